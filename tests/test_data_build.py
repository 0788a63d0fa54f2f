"""Text to shards: bytes against an independent writer, a message for every bad input, nothing half-written."""

import json
import re
import signal
import struct

import pytest

from rwkv_ext.data import progress
from rwkv_ext.data.binidx import BinidxReader, shard_files
from rwkv_ext.data.build import build
from rwkv_ext.data.documents import find_files, read_documents
from rwkv_ext.tokenizer import WorldTokenizer

TEXTS = [
    "Today is a beautiful day.\n",
    "",
    "\u4eca\u5929\u662f\u7f8e\u597d",
    "a\0b\r\n",
    "\ufeffBOM <|endoftext|> \U0001f980" * 99,
]


def expected_files(texts, upstream):
    """What make_data.py writes for these documents, from the format's description and the PyPI tokenizer."""
    documents = [upstream.encode(text) + [0] for text in texts]
    sizes = [len(document) for document in documents]
    tokens = sum(documents, [])
    pointers = [2 * sum(sizes[:i]) for i in range(len(sizes))]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(sizes) + 1)
    index = struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    starts = struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    return struct.pack(f"<{len(tokens)}H", *tokens), header + index + starts


def files(prefix):
    return tuple(path.read_bytes() for path in shard_files(prefix))


def write_lines(path, *records, end="\n"):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def test_jsonl_is_make_data_byte_for_byte(tmp_path, world, upstream):
    records = [{"text": text, "meta": {"n": n}} for n, text in enumerate(TEXTS)]
    path = write_lines(tmp_path / "corpus.jsonl", *records[:2], "", "  \t", *records[2:])
    summary = build([path], tmp_path / "out", tokenizer=world)
    assert files(tmp_path / "out") == expected_files(TEXTS, upstream)
    reader = BinidxReader(tmp_path / "out")
    assert [world.decode(reader.document(i), "strict") for i in range(len(TEXTS))] == TEXTS
    assert (summary.documents, summary.end_of_documents, summary.tokens) == (5, 5, reader.n_tokens)
    assert summary.text_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("end", ["\r\n", ""], ids=["CRLF", "no line end at the end"])
def test_jsonl_line_ends_and_byte_order_mark(tmp_path, world, upstream, end):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + (end or "\n").join(json.dumps({"text": text}) for text in TEXTS).encode()
        + end.encode()
    )
    build([path], tmp_path / "out", tokenizer=world)
    assert files(tmp_path / "out") == expected_files(TEXTS, upstream)


def test_text_files_are_one_document_each(tmp_path, world, upstream):
    paths = []
    for number, text in enumerate(TEXTS):
        paths.append(tmp_path / f"{9 - number}.txt")
        paths[-1].write_bytes(text.encode())
    build(paths, tmp_path / "out", tokenizer=world)
    assert files(tmp_path / "out") == expected_files(TEXTS, upstream)
    build([tmp_path], tmp_path / "sorted", tokenizer=world)
    assert files(tmp_path / "sorted") == expected_files(TEXTS[::-1], upstream)


def test_without_end_of_document(tmp_path, world):
    path = write_lines(tmp_path / "corpus.jsonl", {"text": "Today"}, {"text": ""}, {"text": " is"})
    summary = build([path], tmp_path / "out", tokenizer=world, eod=False)
    reader = BinidxReader(tmp_path / "out")
    assert reader.tokens.tolist() == world.encode("Today") + world.encode(" is") and reader.n_documents == 3
    assert summary.end_of_documents == 0 and reader.eod_share() == 0


def test_folders_are_walked_in_sorted_order(tmp_path):
    names = [
        "b/2.txt",
        "b/10.txt",
        "a.jsonl",
        "c.py",
        "b.txt",
        "b/deep/x.py",
        "b/.git/hidden.txt",
        ".hidden.txt",
        "d.md",
        "B.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "z.txt").symlink_to(tmp_path / "d.md")

    def found(*include, inputs=(tmp_path,)):
        return [path.relative_to(tmp_path).as_posix() for path in find_files(inputs, include)]

    plain = ["B.txt", "a.jsonl", "b/10.txt", "b/2.txt", "b.txt", "z.txt"]
    assert found() == plain
    assert found("*.py") == [
        "B.txt",
        "a.jsonl",
        "b/10.txt",
        "b/2.txt",
        "b/deep/x.py",
        "b.txt",
        "c.py",
        "z.txt",
    ]
    assert found("b/*.py", "*.md") == [*plain[:4], "b/deep/x.py", "b.txt", "d.md", "z.txt"]
    assert found(inputs=(tmp_path / "d.md", tmp_path / "b")) == ["d.md", "b/10.txt", "b/2.txt"]
    (tmp_path / "lost.md").symlink_to(tmp_path / "nothing")  # matters where it would be read
    assert found() == plain
    with pytest.raises(FileNotFoundError, match="lost.md: a link to a file that is not there; mend or remove it"):
        found("*.md")
    (tmp_path / "lost.md").unlink()
    with pytest.raises(
        FileNotFoundError, match="nothing: no such file or folder; name .jsonl or text files, or folders"
    ):
        found(inputs=(tmp_path / "nothing",))
    with pytest.raises(
        ValueError, match=r"deep: the folder must hold \*.txt, \*.jsonl .*, \*.parquet, got no such file; .* --include"
    ):
        found(inputs=(tmp_path / "b" / "deep",))


GOOD = '{"text": "fine"}'  # 17 bytes with its line end


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "cut', r"line must be a JSON object, got bad JSON \(Unterminated .* at column 10\); mend"),
        ("text", r"line must be a JSON object, got bad JSON \(Expecting value at column 1\)"),
        ('{"text": ' + "9" * 5000 + "}", ".* must be a (JSON object, got bad JSON .Exceeds|string, got int)"),
        ("[" * 200_000, "line must be a JSON object, got bad JSON"),
        ('["text"]', "line must be a JSON object, got list; mend or remove the line"),
        ('{"body": "x", "id": 3}', "object must have the key 'text', got 'body', 'id'; name the right .* --text-key"),
        ("{}", "object must have the key 'text', got no key at all"),
        ('{"text": 3}', "'text' must be a string, got int; mend or remove the line"),
        ('{"text": null}', "'text' must be a string, got NoneType"),
        ('{"text": "a\\ud800b"}', r"text must be Unicode, got the lone surrogate U\+D800 at character 1; mend"),
    ],
)  # fmt: skip
def test_bad_line_is_named_and_nothing_is_written(tmp_path, world, line, message):
    path = write_lines(tmp_path / "corpus.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=rf"corpus.jsonl: line 3, byte offset 18: {message}"):
        build([path], tmp_path / "out", tokenizer=world)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_invalid_utf8_is_named_by_its_byte(tmp_path, world):
    text = tmp_path / "latin1.txt"
    text.write_bytes(b"caf\xe9 au lait")
    advice = "convert the file, or choose --invalid-utf8=replace or --invalid-utf8=skip"
    with pytest.raises(
        ValueError, match=rf"latin1.txt: byte offset 3: text must be UTF-8, got byte 0xe9 .*; {advice}"
    ):
        build([text], tmp_path / "out", tokenizer=world)
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(GOOD.encode() + b'\n{"text": "caf\xe9"}\n')
    with pytest.raises(
        ValueError, match="lines.jsonl: line 2, byte offset 30: text must be UTF-8, got byte 0xe9"
    ):
        build([lines], tmp_path / "out", tokenizer=world)
    lines.write_bytes(b'\xef\xbb\xbf{"text": "caf\xe9"}\n')
    with pytest.raises(
        ValueError, match="lines.jsonl: line 1, byte offset 16: text must be UTF-8, got byte 0xe9"
    ):
        build([lines], tmp_path / "out", tokenizer=world)
    lines.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\n[]\n")
    with pytest.raises(ValueError, match="lines.jsonl: line 2, byte offset 20: line must be a JSON object"):
        build([lines], tmp_path / "out", tokenizer=world)
    with pytest.raises(ValueError, match="invalid_utf8 must be one of error, replace, skip, got 'ignore'"):
        build([lines], tmp_path / "out", tokenizer=world, invalid_utf8="ignore")
    assert {path.name for path in tmp_path.iterdir()} == {"latin1.txt", "lines.jsonl"}


def test_invalid_utf8_may_be_replaced_or_skipped_and_is_counted(tmp_path, world):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_bytes(b"caf\xe9 \xf0\x9f!")
    lines.write_bytes(
        b'{"text": "\xff"}\n{"text": "x\\udc00\\ud83e\\udd80\\ud800"}\n{"text": "good"}\n\xfe\n'
    )

    def read(path, policy):
        try:
            documents = list(read_documents(path, invalid_utf8=policy))
            return [document.data and document.data.decode() for document in documents]
        except ValueError as error:
            return str(error)

    assert read(text, "replace") == ["caf\ufffd \ufffd!"] and read(text, "skip") == [None]
    assert read(lines, "skip") == [None, None, "good", None]
    assert "line 4, byte offset 69: line must be a JSON object" in read(lines, "replace")
    lines.write_bytes(lines.read_bytes()[:-2])
    assert read(lines, "replace") == ["\ufffd", "x\ufffd\U0001f980\ufffd", "good"]

    repaired = build([text, lines], tmp_path / "repaired", tokenizer=world, invalid_utf8="replace")
    assert (repaired.documents, repaired.repaired, repaired.skipped) == (4, 3, 0)
    assert "not UTF-8        3 documents, repaired with U+FFFD" in repaired.lines()
    skipped = build([text, lines], tmp_path / "skipped", tokenizer=world, invalid_utf8="skip")
    assert (skipped.documents, skipped.repaired, skipped.skipped) == (1, 0, 3)
    assert "not UTF-8        3 documents, left out" in skipped.lines()
    assert BinidxReader(tmp_path / "skipped").tokens.tolist() == [*world.encode("good"), 0]
    with pytest.raises(
        ValueError, match=r"the 1 input files must hold a document, got none \(1 were not UTF-8\)"
    ):
        build([text], tmp_path / "none", tokenizer=world, invalid_utf8="skip")


def test_inputs_without_a_document(tmp_path, world):
    path = write_lines(tmp_path / "empty.jsonl", "", "")
    with pytest.raises(ValueError, match="the 1 input files must hold a document, got none"):
        build([path], tmp_path / "out", tokenizer=world)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


class Tampering(WorldTokenizer):
    """Stands for what goes wrong in the middle of the second document."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def encode_array(self, data):
        if b"second" in data:
            self.fault()
        return super().encode_array(data)

    def decode_bytes(self, ids):
        data = super().decode_bytes(ids)
        return data.replace(b"third", b"THIRD")


def test_interrupt_leaves_nothing_behind(tmp_path):
    path = write_lines(tmp_path / "corpus.jsonl", *({"text": text} for text in ("first", "second", "fine")))
    with pytest.raises(KeyboardInterrupt):
        build([path], tmp_path / "out", tokenizer=Tampering(lambda: signal.raise_signal(signal.SIGINT)))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_document_that_does_not_decode_to_itself(tmp_path):
    path = write_lines(tmp_path / "corpus.jsonl", {"text": "first"}, {"text": "third"})
    message = (
        "corpus.jsonl: the document that ends at byte 36 must decode to itself, but it does not; report this"
    )
    with pytest.raises(ValueError, match=message):
        build([path], tmp_path / "out", tokenizer=Tampering(lambda: None))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_progress_is_lines_without_a_terminal_and_a_bar_with_one(tmp_path, world, capsys, monkeypatch):
    path = write_lines(tmp_path / "corpus.jsonl", *[{"text": "word " * 10_000}] * 4)
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0)
    build([path, path], tmp_path / "out", tokenizer=world)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"encoding: 0\.2 of 0\.4 MB, [\d,]+ MB/s, 4 documents, 40,008 tokens, 0 s left", lines[0])
    assert re.fullmatch(r"encoding: 0\.4 of 0\.4 MB, [\d,]+ MB/s, 8 documents, 80,016 tokens, 0 s left", lines[1])
    build([path], tmp_path / "quiet", tokenizer=world, show_progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    build([path], tmp_path / "bar", tokenizer=world)
    shown = capsys.readouterr().err
    assert "encoding" in shown and "4 documents, 40,008 tokens" in shown
