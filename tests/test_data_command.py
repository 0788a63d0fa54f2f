"""rwkv-ext data build, info and check as typed: what they print, their status, what they refuse."""

import json
import resource
import struct

import numpy as np
import pytest

from rwkv_ext import cli
from rwkv_ext.data.binidx import BinidxReader, BinidxWriter, shard_files
from rwkv_ext.tokenizer import WorldTokenizer


@pytest.fixture(scope="module")
def world():
    return WorldTokenizer()


def run(*arguments):
    return cli.main(["data", *map(str, arguments)])


def test_build_command_and_its_summary(tmp_path, capsys):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n" * 4000)
    (folder / "b.jsonl").write_text(json.dumps({"body": "Today is"}))
    out = tmp_path / "new" / "corpus"
    assert run("build", folder, out, "--include", "*.py", "--text-key", "body") == 0
    printed = capsys.readouterr().out
    n = BinidxReader(out).n_tokens
    assert f"documents        2\ntokens           {n:,} (2 of them end a document)\n" in printed
    assert f"text             24,008 bytes, {24008 / (n - 2):.3f} bytes a token\n" in printed
    assert f"wrote            {out}.bin ({2 * n:,} bytes) and corpus.idx" in printed
    assert "magic_prime      29 for ctx_len 512\n" in printed  # 16,005 tokens: 31 slots, and 30 is the limit
    assert "magic_prime      2 for ctx_len 4096" in printed
    assert run("build", folder, out) == 2
    assert "corpus.bin: already exists; choose another name" in capsys.readouterr().err
    (folder / "b.jsonl").write_text(json.dumps({"text": "Today is"}))
    assert run("build", "--no-eod", "--overwrite", folder, out) == 0
    assert BinidxReader(out).tokens.tolist() == [33520, 4600]
    assert "magic_prime      none for ctx_len 512: that takes 1,536 tokens" in capsys.readouterr().out


def test_build_command_takes_another_vocabulary(tmp_path):
    vocabulary = tmp_path / "bytes.vocabulary"
    vocabulary.write_text("".join(f"{byte + 1} b'\\x{byte:02x}' 1\n" for byte in range(256)))
    (tmp_path / "a.txt").write_text("ab")
    assert run("build", tmp_path / "a.txt", tmp_path / "out", "--vocabulary", vocabulary) == 0
    assert BinidxReader(tmp_path / "out").tokens.tolist() == [98, 99, 0]
    assert run("check", tmp_path / "out", "--vocabulary", vocabulary) == 0


def test_build_command_protects_an_input_named_last(tmp_path, capsys):
    for name in ("a.txt", "b.txt", "c"):
        (tmp_path / name).write_text("keep me")
    for out in ("b.txt", "new.jsonl", "c", "."):
        assert run("build", tmp_path / "a.txt", tmp_path / out) == 2
        assert "OUT must be the name of a shard, got " in capsys.readouterr().err
    assert (tmp_path / "b.txt").read_text() == (tmp_path / "c").read_text() == "keep me"


def test_build_command_on_a_full_disk(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("word " * 100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert run("build", tmp_path / "a.txt", tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (
        "cannot write after 1 documents and 100002 tokens: File too large; nothing was kept" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def shards(tmp_path, world):
    rng = np.random.default_rng(1)
    for name in ("one", "two"):
        with BinidxWriter(tmp_path / name) as writer:
            for _ in range(10):
                writer.add_document([*rng.integers(1, 65530, 300), 0])
            writer.add_document(world.encode("The last document."))
    return tmp_path / "one", tmp_path / "two"


def test_info_command(shards, capsys):
    assert run("info", *shards) == 0
    printed = capsys.readouterr().out
    for prefix in shards:
        assert f"{prefix}\ndocuments        11\ntokens           3,014 (uint16, 6,028 bytes)\n" in printed
        assert f"fingerprint      {BinidxReader(prefix).fingerprint()[:16]}" in printed
    assert "document length  4 to 301 tokens, mean 274.0" in printed
    assert "magic_prime      2 for ctx_len 512" in printed


def test_folders_and_lists_are_one_stream(shards, tmp_path, capsys):
    assert run("merge", tmp_path, tmp_path / "whole" / "shard") == 0
    merged = capsys.readouterr().out
    of_tokens = merged.splitlines()[-1].split()[-4]
    for name, sources in (("info", [tmp_path]), ("check", shards), ("info", [shards[0], tmp_path / "two.idx"])):
        assert run(name, *sources) == 0
        last = capsys.readouterr().out.split("all 2 shards as one stream, in this order\n")[1]
        assert last.startswith("documents        22\ntokens           6,028\nmagic_prime      5 for ctx_len 512\n")
        assert last.endswith(f"\nfingerprint      {of_tokens} of the tokens\n")
    assert run("info", tmp_path / "whole") == 0
    assert capsys.readouterr().out == merged  # of one shard there is nothing to add up
    assert run("sample", tmp_path, "--documents", 1, "--tokens", 1) == 0
    assert capsys.readouterr().out.count("--- ") == 2
    (tmp_path / "none").mkdir()
    (tmp_path / "list.txt").touch()
    assert run("info", tmp_path / "none", tmp_path / "list.txt", shards[0]) == 1
    printed = capsys.readouterr()
    assert "none: the folder must hold *.idx and *.bin files, got none" in printed.err
    assert "list.txt: must be a shard's name or a folder" in printed.err
    assert f"{shards[0]}\n" in printed.out and "as one stream" not in printed.out


def test_check_command_on_a_good_shard(shards, capsys):
    assert run("check", shards[0]) == 0
    printed = capsys.readouterr().out
    assert "end in token 0   90.9% of the documents; RWKV's models expect it after each" in printed
    assert "document 10      'The last document.'" in printed
    assert printed.endswith("no fault found\n")


def test_check_command_names_the_damage_and_looks_at_the_other_shards(shards, capsys):
    bin_path = shard_files(shards[0])[0]
    good = bin_path.read_bytes()
    bin_path.write_bytes(good[:999])
    assert run("check", *shards) == 1
    printed = capsys.readouterr()
    assert "one.bin: must have 6028 bytes" in printed.err and "cut off at byte 999, in document 1 of 11" in printed.err
    assert "copy both files again, or rebuild them with `rwkv-ext data build`" in printed.err
    assert f"{shards[1]}\n" in printed.out
    assert run("info", shards[0], shards[0].with_name("none")) == 1
    printed = capsys.readouterr()
    assert "cut off at byte 999" in printed.err and "none.bin: no such file" in printed.err
    bin_path.write_bytes(good[:2000] + struct.pack("<H", 65533) + good[2002:])
    assert run("check", shards[0]) == 1
    assert "one.bin: the token at byte 2000 must be an id of the vocabulary, got 65533" in capsys.readouterr().err


def test_empty_shard_is_described(tmp_path, capsys):
    BinidxWriter(tmp_path / "empty").close()
    assert run("check", tmp_path / "empty") == 0
    assert "documents        0\ntokens           0 (uint16, 0 bytes)" in capsys.readouterr().out
