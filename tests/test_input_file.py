"""Compressed files, tables and standard input: the same documents as from plain text, and no silent loss."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from rwkv_ext import cli
from rwkv_ext.data.binidx import shard_files
from rwkv_ext.data.build import build
from rwkv_ext.data.documents import find_files, read_documents

TEXTS = ["Today is a beautiful day.\n", "", "\u4eca\u5929", "a\0b\r\n", "long " * 9999]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
COMPRESS = {".gz": lambda data: gzip.compress(data, mtime=0), ".zst": zstandard.ZstdCompressor().compress}


def zstandard_stream(data):
    """A frame that does not say how long its content is, as command lines and pipes write them."""
    writer = zstandard.ZstdCompressor().compressobj()
    return writer.compress(data) + writer.flush()


def texts_of(path, **options):
    return [document.data.decode() for document in read_documents(path, **options)]


def files(prefix):
    return tuple(path.read_bytes() for path in shard_files(prefix))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_lines_are_the_lines(tmp_path, world, suffix):
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES))
    documents = list(read_documents(path))
    assert [document.data.decode() for document in documents] == TEXTS
    ends = [document.end for document in documents]
    assert ends == sorted(ends) and ends[-1] == path.stat().st_size
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    build([tmp_path / "plain.jsonl"], tmp_path / "plain", tokenizer=world)
    build([path], tmp_path / "out", tokenizer=world)
    assert files(tmp_path / "out") == files(tmp_path / "plain")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_parts_one_after_the_other(tmp_path, suffix):
    path = tmp_path / f"corpus.jsonl{suffix.upper()}"
    path.write_bytes(b"".join(COMPRESS[suffix](LINES[i : i + 1000]) for i in range(0, len(LINES), 1000)))
    assert texts_of(path) == TEXTS


def test_frame_of_unknown_length(tmp_path):
    path = tmp_path / "corpus.jsonl.zst"
    path.write_bytes(zstandard_stream(LINES))
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_one_document(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one\ntwo\n"))
    assert texts_of(path) == ["one\ntwo\n"]
    path.write_bytes(COMPRESS[suffix](b"one\xff"))
    with pytest.raises(ValueError, match="decompressed byte offset 3: text must be UTF-8, got byte 0xff"):
        texts_of(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_compressed_file(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    content = b"A text of some length. " * 4
    checksummed = zstandard.ZstdCompressor(write_checksum=True).compress(content)  # as command lines write it
    data = checksummed if suffix == ".zst" else COMPRESS[suffix](content)
    for length in range(1, len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"a.txt{suffix}: must be a whole {suffix} file, got .*; copy it again"):
            texts_of(path)
    silent = 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            assert texts_of(path) == [content.decode()]
            silent += 1
        except ValueError:
            pass
    assert silent <= 8  # bytes of the header that mean nothing for the content


def table(path, rows, kind=None, **options):
    rows = pyarrow.array(rows, kind) if isinstance(rows, list) else rows
    columns = {"n": list(range(len(rows))), "text": rows}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()], ids=str)
def test_table_rows_are_documents(tmp_path, kind):
    path = table(tmp_path / "a.parquet", TEXTS * 900, kind, row_group_size=1000)
    documents = list(read_documents(path))
    assert [document.data.decode() for document in documents] == TEXTS * 900
    ends = [document.end for document in documents]
    assert ends == sorted(ends) and ends[-1] == path.stat().st_size


def test_bad_tables(tmp_path):
    good = table(tmp_path / "good.parquet", ["a", "b"])
    with pytest.raises(ValueError, match="table must have the column 'body', got 'n', 'text'; .* with --text-key"):
        texts_of(good, text_key="body")
    with pytest.raises(ValueError, match="column 'n' must hold strings, got int64; name another with --text-key"):
        texts_of(good, text_key="n")
    with pytest.raises(ValueError, match="null.parquet: row 2: 'text' must be a string, got null"):
        texts_of(table(tmp_path / "null.parquet", ["a", None], pyarrow.string()))
    cut = tmp_path / "cut.parquet"
    for length in (0, 3, 100, good.stat().st_size - 1):
        cut.write_bytes(good.read_bytes()[:length])
        with pytest.raises(ValueError, match="cut.parquet: must be a whole .parquet file, got an error"):
            texts_of(cut)
    with pytest.raises(FileNotFoundError):
        texts_of(tmp_path / "nothing.parquet")


def test_tables_with_other_strings(tmp_path):
    path = table(tmp_path / "dictionary.parquet", pyarrow.array(["a", "b", "a"]).dictionary_encode())
    assert texts_of(path) == ["a", "b", "a"]
    # Writers do not always check what they call strings.
    buffers = pyarrow.array([b"ok", b"a\xff"], pyarrow.binary()).buffers()
    path = table(tmp_path / "bytes.parquet", pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers))
    with pytest.raises(ValueError, match="bytes.parquet: row 2, byte 1: text must be UTF-8, got byte 0xff"):
        texts_of(path)
    assert texts_of(path, invalid_utf8="replace") == ["ok", "a\ufffd"]
    assert [document.data for document in read_documents(path, invalid_utf8="skip")] == [b"ok", None]


def test_gzip_padded_with_zeros(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(COMPRESS[".gz"](LINES) + bytes(200_000))
    assert texts_of(path) == TEXTS


def test_gzip_after_zeros(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(bytes(4) + COMPRESS[".gz"](LINES))
    with pytest.raises(ValueError, match="must be a whole .gz file"):
        texts_of(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_empty_compressed_file(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.touch()
    with pytest.raises(ValueError, match=f"must be a whole {suffix} file, got a file that is cut off near byte 0"):
        texts_of(path)


def test_inputs_that_are_no_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="/dev/null: an input must be a file or a folder, got neither; give - for"):
        find_files(["/dev/null"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="-: standard input must be open, but this process was started without"):
        build(["-"], tmp_path / "out")


def test_folders_give_compressed_files_and_tables(tmp_path):
    names = ["a.jsonl.gz", "b.txt.zst", "c.parquet", "d.csv.gz"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in find_files([tmp_path])] == names[:3]


def test_standard_input(tmp_path, world):
    command = [sys.executable, "-m", "rwkv_ext.cli", "data", "build", "-", str(tmp_path / "out")]
    done = subprocess.run(command, input=LINES, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    build([tmp_path / "plain.jsonl"], tmp_path / "plain", tokenizer=world)
    assert files(tmp_path / "out") == files(tmp_path / "plain")


def test_missing_package(tmp_path, monkeypatch, capsys):
    for package, name in (("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        (tmp_path / name).touch()
        assert cli.main(["data", "build", str(tmp_path / name), str(tmp_path / "out")]) == 2
        expected = f"{name}: reading it takes the package {package}, which is not installed; pip install {package}"
        assert expected in capsys.readouterr().err
