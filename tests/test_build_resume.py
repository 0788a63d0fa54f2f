"""A build that is killed anywhere leaves nothing or everything, and the same call completes it, byte for byte."""

import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
from crash import Step, run_until_killed
from file_limits import largest_file

from rwkv_ext.data import build_folder, build_task, document_store, duplicates, pieces, shuffle
from rwkv_ext.data.binidx import shard_files
from rwkv_ext.data.build import build

TEXTS = [f"{number} " + "word é今\n" * (number % 9) for number in range(16)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few lines, and a record of the journal for each."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 400)
    monkeypatch.setattr(build_task, "SECONDS_PER_RECORD", 0)
    monkeypatch.setattr(build_task, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(shuffle, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 500)
    monkeypatch.setattr(duplicates, "DIGESTS_AT_ONCE", 7)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # takes long, and a kill loses nothing that was written


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(LINES)
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    for number in range(5):
        (tmp_path / "in" / f"c{number}.txt").write_text(f"{number}" * 150)
    return [tmp_path / "in"]


def content(folder):
    """Return {name: bytes} of all below, hidden folders included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MODES = {
    "plain": {},
    "shards": {"shard_tokens": 150},
    "shuffled": {"shuffle": True, "epochs": 2, "shard_tokens": 300},
    "unique": {"drop_duplicates": True, "drop_empty": True},
    "all": {"shuffle": True, "drop_duplicates": True},
}


def run(inputs, folder, world, **options):
    folder.mkdir(exist_ok=True)
    return build(inputs, folder / "out", tokenizer=world, show_progress=False, **options)


def kill_at_steps(inputs, folder, world, options, first=1, stride=1):
    """Kill a build before each change of a file, or every stride-th, and complete it; return how many times."""
    whole = run(inputs, folder / "whole", world, **options)
    expected = content(folder / "whole")

    def interrupted(fatal):
        step = Step(fatal)
        for owner, name in (
            *((os, name) for name in ("fsync", "replace", "unlink", "rmdir")),
            (document_store.DocumentStore, "_write"),
            (shuffle.Buckets, "deal"),
            (build_folder.BuildFolder, "write"),
        ):
            step.before(owner, name)
        run(inputs, folder / f"killed-{fatal}", world, **options)

    fatal, own = first, {"seconds": 0, "shards": []}
    while not run_until_killed(interrupted, fatal):
        killed = folder / f"killed-{fatal}"
        left = {name: data for name, data in content(killed).items() if not name.startswith(".")}
        assert all(expected[name] == data for name, data in left.items()), fatal
        assert {name[:-4] for name in left if name.endswith(".idx")} <= {name[:-4] for name in left if "bin" in name}
        try:
            again = run(inputs, killed, world, **options)
            assert {**vars(again), **own} == {**vars(whole), **own}, fatal
        except FileExistsError:  # it was killed when nothing was left but to remove the journal
            assert left == expected
        assert content(killed) == expected, fatal
        fatal += stride
    return fatal


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_many_steps(tmp_path, world, small, inputs, mode):
    assert kill_at_steps(inputs, tmp_path, world, {**MODES[mode], "threads": 1}, first=3, stride=11) > 40


def test_killed_with_pieces_in_flight(tmp_path, world, small, inputs):
    assert kill_at_steps(inputs, tmp_path, world, {"threads": 3}, stride=13) > 40


@pytest.mark.chaos
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_step(tmp_path, world, small, inputs, mode):
    assert kill_at_steps(inputs, tmp_path, world, {**MODES[mode], "threads": 1}) > 40


def test_killed_twice_and_more(tmp_path, world, small, inputs):
    run(inputs, tmp_path / "whole", world)
    runs = 0

    def interrupted():
        Step(4).before(document_store.DocumentStore, "_write")
        run(inputs, tmp_path / "killed", world, threads=1)

    while not run_until_killed(interrupted):
        runs += 1
    assert runs > 2 and content(tmp_path / "killed") == content(tmp_path / "whole")


def kill(inputs, folder, world):
    def interrupted():
        Step(9).before(document_store.DocumentStore, "_write")
        run(inputs, folder, world, threads=1)

    assert not run_until_killed(interrupted)
    assert (folder / ".out.building" / "journal").exists()


def test_other_inputs_or_options_begin_anew(tmp_path, world, small, inputs, capsys):
    kill(inputs, tmp_path / "killed", world)
    out = tmp_path / "killed" / "out"
    build(inputs, out, tokenizer=world, eod=False)
    assert "held an unfinished build of other inputs or options; beginning anew" in capsys.readouterr().err
    build(inputs, tmp_path / "expected", tokenizer=world, eod=False, show_progress=False)
    assert out.with_suffix(".bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()

    kill(inputs, tmp_path / "again", world)
    (tmp_path / "again" / ".out.building" / "folder").mkdir()  # whoever made it
    (tmp_path / "in" / "a.jsonl").write_text(LINES * 2)
    out = tmp_path / "again" / "out"
    build(inputs, out, tokenizer=world)
    assert "beginning anew" in capsys.readouterr().err
    build(inputs, tmp_path / "longer", tokenizer=world, show_progress=False)
    assert out.with_suffix(".bin").read_bytes() == (tmp_path / "longer.bin").read_bytes()


def test_another_standard_input_is_another_build(tmp_path, world, small, monkeypatch):
    def read(text, out):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps({"text": text}).encode())))
        build(["-"], out, tokenizer=world, shuffle=True, show_progress=False)

    def killed():
        Step(1).before(build_task.BuildTask, "_arrange")
        read("first", tmp_path / "out")

    assert not run_until_killed(killed)
    read("second", tmp_path / "out")
    read("second", tmp_path / "whole")
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_names_are_given_from_another_working_folder(tmp_path, world, small, inputs, monkeypatch):
    options = {"tokenizer": world, "shard_tokens": 300, "overwrite": True, "show_progress": False}
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    build(inputs, "below/out", **{**options, "shard_tokens": 150})

    def killed():
        Step(1).before(build_task.BuildTask, "_publish")
        build(inputs, "below/out", **options)

    assert not run_until_killed(killed)
    monkeypatch.chdir(tmp_path / "below")
    summary = build(inputs, "out", **options)
    assert content(tmp_path / "below").keys() == {file.name for shard in summary.shards for file in shard_files(shard)}
    shards = build(inputs, "whole", **options).shards
    for name, other in zip(summary.shards, shards, strict=True):
        assert [file.read_bytes() for file in shard_files(name)] == [file.read_bytes() for file in shard_files(other)]


def test_link_to_nothing_in_the_place_of_the_folder(tmp_path, world, inputs):
    (tmp_path / ".out.building").symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match="cannot create the shard"):
        build(inputs, tmp_path / "out", tokenizer=world)


def test_what_is_gone_on_with_is_said(tmp_path, world, small, inputs, capsys):
    kill(inputs, tmp_path / "killed", world)
    build(inputs, tmp_path / "killed" / "out", tokenizer=world)
    assert "going on after " in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["torn record", "no header", "not JSON", "empty"])
def test_damaged_journal(tmp_path, world, small, inputs, damage):
    run(inputs, tmp_path / "whole", world)
    kill(inputs, tmp_path / "killed", world)
    journal = tmp_path / "killed" / ".out.building" / "journal"
    data = journal.read_bytes()
    damaged = {"torn record": data[:-5], "no header": data[20:], "not JSON": b"\0" * 99 + b"\n", "empty": b""}[damage]
    journal.write_bytes(damaged)
    run(inputs, tmp_path / "killed", world)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_data_shorter_than_the_journal_says(tmp_path, world, small, inputs):
    kill(inputs, tmp_path / "killed", world)
    path = tmp_path / "killed" / ".out.building" / "shard-00000.bin"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(
        ValueError, match="shard-00000.bin: must have .* bytes or more, has fewer: it is damaged; run it again"
    ):
        run(inputs, tmp_path / "killed", world)
    run(inputs, tmp_path / "killed", world)


def test_interrupted_and_full_disk_keep_what_is_finished(tmp_path, world, small, inputs):
    run(inputs, tmp_path / "whole", world)
    folder = tmp_path / "full"
    message = "cannot write after .* documents and .* tokens: File too large; what is finished was kept: make room on"
    with largest_file(1000), pytest.raises(OSError, match=message):
        run(inputs, folder, world)
    assert [path.name for path in folder.iterdir()] == [".out.building"]
    run(inputs, folder, world)
    assert content(folder) == content(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_finished(tmp_path, world, small, inputs, monkeypatch):
    run(inputs, tmp_path / "whole", world)
    write, left = document_store.DocumentStore._write, list(range(9))

    def interrupted(*arguments):
        if not left:
            signal.raise_signal(signal.SIGINT)
        left.pop()
        write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(document_store.DocumentStore, "_write", interrupted)
        run(inputs, tmp_path / "stopped", world)
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [".out.building"]
    run(inputs, tmp_path / "stopped", world)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_broken_input_leaves_nothing(tmp_path, world, small, inputs):
    with (tmp_path / "in" / "a.jsonl").open("a") as file:
        file.write("[]\n")
    with pytest.raises(ValueError, match="a.jsonl: line 17, byte offset"):
        run(inputs, tmp_path / "broken", world)
    assert not content(tmp_path / "broken") and not list((tmp_path / "broken").iterdir())


def test_two_builders_at_once(tmp_path, world, inputs):
    with build_folder.BuildFolder(tmp_path / "out", "another"):
        with pytest.raises(ValueError, match="out.bin: another process is building this shard; wait for it or choose"):
            build(inputs, tmp_path / "out", tokenizer=world)
    build(inputs, tmp_path / "out", tokenizer=world)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.bin", "out.idx"}


def test_many_builders_at_once(tmp_path, world, small, inputs):
    run(inputs, tmp_path / "whole", world)
    processes = [
        multiprocessing.get_context("fork").Process(target=compete, args=(inputs, tmp_path / "shared", world))
        for _ in range(6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert content(tmp_path / "shared") == content(tmp_path / "whole")


def compete(inputs, folder, world):
    for _ in range(10):
        try:
            run(inputs, folder, world, overwrite=True)
        except ValueError as error:
            assert "another process is building" in str(error)


@pytest.mark.chaos
def test_killed_at_fifty_random_moments(tmp_path, world, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(build_task, "SECONDS_PER_RECORD", 0.02)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    (tmp_path / "a.jsonl").write_text(LINES * 2000)
    inputs = [tmp_path / "a.jsonl"]
    for mode, options in MODES.items():
        began = time.monotonic()
        run(inputs, tmp_path / f"whole-{mode}", world, **options)
        seconds = time.monotonic() - began
        expected, kills, folder = content(tmp_path / f"whole-{mode}"), 0, tmp_path / f"killed-{mode}"
        while kills < 50 // len(MODES):
            child = multiprocessing.get_context("fork").Process(
                target=run, args=(inputs, folder, world), kwargs=options
            )
            child.start()
            child.join(random.uniform(0, seconds))
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                kills += 1
            left = {name: data for name, data in content(folder).items() if not name.startswith(".")}
            assert all(expected[name] == data for name, data in left.items())
            if left == expected:
                shutil.rmtree(folder)
            else:  # so that what was killed goes on, and no other failure passes for a kill
                assert child.exitcode == -signal.SIGKILL
