"""Inputs cut into pieces: the same shard whatever the pieces and threads, and errors that name the right line."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from rwkv_ext.data import build_task, documents, pieces
from rwkv_ext.data.binidx import BinidxReader, shard_files
from rwkv_ext.data.build import build
from rwkv_ext.data.piece_encoder import PieceEncoder
from rwkv_ext.data.worker_threads import in_order

TEXTS = [f"{number} " + "word " * (number % 7) + "é今\U0001f980\n\\" * (number % 3) for number in range(60)]
LINES = [json.dumps({"text": text}, ensure_ascii=number % 2 == 0) for number, text in enumerate(TEXTS)]
ODD = ['{"text": "a\\ud800b"}', "", " ", "\x0b", '{"text": "x", "n": NaN}', '{"text": ""}']  # json.loads reads them


def files(prefix):
    return tuple(path.read_bytes() for path in shard_files(prefix))


@pytest.fixture
def small_pieces(monkeypatch):
    def use(size):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        monkeypatch.setattr(pieces, "_SEARCHED", 16)
        monkeypatch.setattr(pieces, "_BLOCK_BYTES", 64)
        monkeypatch.setattr(documents, "TABLE_ROWS", max(1, size // 50))

    return use


def sources(folder):
    """Inputs of every kind, with lines that the C++ reader leaves to Python."""
    lines = [*LINES[:20], *ODD, "{" + " " * 900 + '"text": "a line longer than a piece"}', *LINES[20:]]
    (folder / "plain.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    rows = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(rows, folder / "rows.parquet", row_group_size=7)
    names = ["plain.jsonl", "packed.jsonl.gz", "rows.parquet"]
    for number, text in enumerate([*TEXTS[:30], "x" * 2000]):
        names.append(f"{number:02d}.txt")
        (folder / names[-1]).write_bytes(text.encode())
    (folder / "empty.jsonl").touch()
    return [folder / name for name in [*names, "empty.jsonl", "plain.jsonl"]]


def test_any_pieces_and_threads_give_the_same_shard(tmp_path, world, small_pieces):
    inputs = sources(tmp_path)
    build(inputs, tmp_path / "whole", tokenizer=world, invalid_utf8="replace", threads=1, show_progress=False)
    expected = files(tmp_path / "whole")
    reader = BinidxReader(tmp_path / "whole")
    texts = [world.decode(reader.document(i), "strict") for i in range(reader.n_documents)]
    lines = [*TEXTS[:20], "a\ufffdb", "x", "", "a line longer than a piece", *TEXTS[20:]]
    assert texts == [*lines, *lines, *TEXTS, *TEXTS[:30], "x" * 2000, *lines]
    for size in (1, 2, 7, 50, 100, 999, 5000):
        small_pieces(size)
        for threads in (1, 3):
            out = tmp_path / f"{size}-{threads}"
            summary = build(inputs, out, tokenizer=world, invalid_utf8="replace", threads=threads, show_progress=False)
            assert files(out) == expected, (size, threads)
            assert (summary.repaired, summary.documents) == (3, len(texts))


def test_pieces_of_lines_are_the_lines(tmp_path, small_pieces):
    for data in (b"", b"\n", b"a", b"a\n", b"a\nbb\n\n\nccc", b"\n\n" + b"x" * 40 + b"\ny\n", b"x" * 40):
        path = tmp_path / "a.jsonl"
        path.write_bytes(data)
        for size in range(1, 60):
            small_pieces(size)
            [source] = pieces.find_sources([path])
            loaded = [content(piece) for piece in source.pieces("text")]
            assert b"".join(lines for lines, _, _ in loaded) == data
            at = 0
            for lines, offset, end in loaded:
                assert not lines or (offset == at and (not at or data[:at].endswith(b"\n")))
                at += len(lines)
                assert not lines or end == at


def content(piece):
    if isinstance(piece, pieces.Texts):
        return piece.paths, piece.ends
    if isinstance(piece, pieces.Rows):
        return bytes(piece.data), piece.offsets.tolist(), piece.first
    with piece.open() as reader:
        offset = piece.offset + reader.position
        lines = b"".join(iter(reader.next_line, b""))
        return lines, offset, piece.end if isinstance(piece, pieces.Lines) else reader.position


def test_any_piece_can_be_the_first(tmp_path, small_pieces):
    inputs = sources(tmp_path)
    small_pieces(100)
    for source in pieces.find_sources(inputs):
        whole = [content(piece) for piece in source.pieces("text")]
        for first in range(len(whole) + 1):
            assert [content(piece) for piece in source.pieces("text", first)] == whole[first:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bad_line_of_a_late_piece(tmp_path, world, small_pieces, name):
    data = "\n".join([*LINES, "[]", "{", *LINES, ""]).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "first.jsonl").write_text(LINES[0] + "\n")
    at = len("\n".join(LINES).encode()) + 1
    unit = "decompressed byte offset" if name.endswith("gz") else "byte offset"
    message = rf"{name}: line 61, {unit} {at}: line must be a JSON object, got list"
    for size in (10, 300, 10_000):
        small_pieces(size)
        with pytest.raises(ValueError, match=message):
            build([tmp_path / "first.jsonl", tmp_path / name], tmp_path / "out", tokenizer=world, show_progress=False)
        assert {path.name for path in tmp_path.iterdir()} == {"first.jsonl", name}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_byte_order_mark_before_any_line_but_the_first(tmp_path, world, small_pieces, name):
    data = "\n".join([*LINES[:3], "\ufeff" + LINES[3]]).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    at = len("\n".join(LINES[:3]).encode()) + 1
    for size in (1, at, 10_000):  # a line of its own piece, too
        small_pieces(size)
        with pytest.raises(ValueError, match=rf"{name}: line 4, .*byte offset {at}: .*bad JSON \(Unexpected UTF-8 BOM"):
            build([tmp_path / name], tmp_path / "out", tokenizer=world)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_how_far_a_file_was_read(tmp_path, world, small_pieces, name):
    path, data = tmp_path / name, "\n".join([*LINES[:9], *ODD, *LINES[9:]]).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    small_pieces(300)
    [source] = pieces.find_sources([path])
    ends = [PieceEncoder(world).encode(piece).end for piece in source.pieces("text")]
    assert len(ends) > 5 and ends == sorted(ends) and ends[-1] == path.stat().st_size
    assert name.endswith("gz") or all(data[end - 1 : end] == b"\n" for end in ends[:-1])


def test_bad_row_of_a_late_batch(tmp_path, world, small_pieces):
    small_pieces(500)
    pyarrow.parquet.write_table(pyarrow.table({"text": [*TEXTS, None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: row 61: 'text' must be a string, got null; remove such rows"):
        build([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=world)
    buffers = pyarrow.array([*[text.encode() for text in TEXTS], b"a\xff"], pyarrow.binary()).buffers()
    rows = pyarrow.Array.from_buffers(pyarrow.string(), 61, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: row 61, byte 1: text must be UTF-8, got byte 0xff"):
        build([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=world)
    assert build([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=world, invalid_utf8="skip").skipped == 1


def test_file_that_gets_shorter(tmp_path, world, small_pieces):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(LINES))
    small_pieces(100)
    [source] = pieces.find_sources([path])
    loaded = source.pieces("text")
    next(loaded)
    path.write_bytes(path.read_bytes()[:150])
    for _ in range(2):  # one piece is cut off, the next is gone
        with pytest.raises(ValueError, match="a.jsonl: must not change while it is read, got shorter; run it again"):
            PieceEncoder(world).encode(next(loaded))


@pytest.mark.parametrize("change", [lambda path: path.write_text(path.read_text() + " "), lambda path: os.utime(path)])
def test_file_that_changes_after_it_was_read(tmp_path, world, monkeypatch, change):
    path, in_order = tmp_path / "a.jsonl", build_task.in_order
    path.write_text("\n".join(LINES))

    def changing(*arguments):
        yield from in_order(*arguments)
        change(path)

    monkeypatch.setattr(build_task, "in_order", changing)
    with pytest.raises(ValueError, match="a.jsonl: must not change while it is read, got another size or time"):
        build([path], tmp_path / "out", tokenizer=world)
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    build([path], tmp_path / "out", tokenizer=world)


def test_empty_documents_are_dropped_on_request(tmp_path, world):
    lines = [{"text": ""}, {"text": " \n\u3000"}, {"text": "x"}, {"text": "\u200b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"text": " ", "n": NaN}')
    (tmp_path / "b.txt").write_text(" ")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["", "y"]}), tmp_path / "c.parquet")
    summary = build([tmp_path], tmp_path / "out", tokenizer=world, drop_empty=True)
    assert (summary.documents, summary.empty) == (3, 5)
    assert "dropped          5 empty documents" in summary.lines()
    reader = BinidxReader(tmp_path / "out")
    assert [world.decode(reader.document(i)) for i in range(3)] == ["x", "\u200b", "y"]
    with pytest.raises(ValueError, match=r"the 1 input files must hold a document, got none \(1 were empty\)"):
        build([tmp_path / "b.txt"], tmp_path / "none", tokenizer=world, drop_empty=True)


def test_key_must_be_utf_8(tmp_path, world):
    (tmp_path / "a.jsonl").write_text(LINES[0])
    with pytest.raises(ValueError, match=r"text_key must be UTF-8, got 'caf\\udce9'; is the terminal's encoding"):
        build([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=world, text_key="caf\udce9")


def test_threads_must_be_a_number(tmp_path, world):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="threads must be 1 or more, or None for one a core, got 0"):
        build([tmp_path / "a.txt"], tmp_path / "out", tokenizer=world, threads=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_work_comes_in_order_and_so_do_errors(threads):
    def work(item):
        if item == 7:
            raise OSError("seven")
        return -item

    def items(stop):
        yield from ((f"#{i}", i) for i in range(stop))
        raise KeyError("end")

    done = []
    with pytest.raises(KeyError, match="end"):
        done += in_order(work, items(7), threads)
    done = []
    with pytest.raises(OSError, match="seven"):
        for pair in in_order(work, items(8), threads):
            done.append(pair)
    assert done == [(f"#{i}", -i) for i in range(7)]
