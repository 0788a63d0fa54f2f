"""The fuzz targets (tests/fuzz) over their kept inputs, under AddressSanitizer and UBSan; make fuzz finds others."""

import re
import shutil
import subprocess
import sys

import pytest
from emulator.build import ROOT, compile_object, compiler
from fuzz import programs
from fuzz import run as campaign

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def commands():
    return programs.build() | {target: programs.python_command(target) for target in programs.PYTHON_TARGETS}


@pytest.mark.parametrize("target", [*programs.TARGETS, *programs.PYTHON_TARGETS])
def test_kept_inputs(commands, target, tmp_path):
    folder = programs.FOLDER / "corpus" / target
    arguments = ["-runs=0", f"-artifact_prefix={tmp_path}/", str(folder)]
    done = subprocess.run(
        [*commands[target], *arguments], capture_output=True, text=True, errors="replace", timeout=120
    )
    assert done.returncode == 0, done.stderr[-6000:]
    runs = re.search(r"Done (\d+) runs in", done.stdout + done.stderr)
    assert int(runs[1]) >= len(list(folder.iterdir())) >= 5


LIBRARY = [*ROOT.glob("csrc/tokenizer/*.cpp"), *ROOT.glob("csrc/data/*.cpp")]


@pytest.mark.skipif(not shutil.which("clang++"), reason="there is no clang++")
@pytest.mark.parametrize("source", [x for x in LIBRARY if "target(" in x.read_text()], ids=lambda path: path.stem)
def test_vector_code_is_for_clang_too(source, tmp_path):
    # make fuzz builds with it where it has libFuzzer; it knows no `#pragma GCC target`
    command = ["clang++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-c", source, "-o", tmp_path / "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NEEDLE = """
#include <cstddef>
#include <cstdint>
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 2 && data[0] == 'k')
    if (data[1] == 'e')
      if (data[2] == 'y') return *(data + size);  // one byte behind the end
  return 0;
}
"""


@pytest.fixture(scope="module")
def needle(tmp_path_factory):
    """A target that reads behind inputs of one beginning, which edges alone lead to."""
    folder = tmp_path_factory.mktemp("needle")
    (folder / "needle.cpp").write_text(NEEDLE)
    edges = ["-std=c++17", "-O0", "-g1", *programs.SANITIZERS, "-fsanitize-coverage=trace-pc"]
    objects = [
        compile_object(folder / "needle.cpp", edges, folder),
        compile_object(programs.FOLDER / "driver.cpp", ["-std=c++17", "-Wall", "-Wextra", "-O2"], programs.OUT),
    ]
    program = folder / "needle"
    subprocess.run([compiler(), *programs.SANITIZERS, *map(str, objects), "-o", str(program)], check=True)
    return program


def run(program, *arguments):
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, errors="replace", timeout=120
    )


@pytest.mark.skipif(programs.has_libfuzzer(), reason="the compiler has libFuzzer")
def test_driver_finds_a_fault_and_keeps_its_input(needle, tmp_path):
    found, kept = tmp_path / "found", tmp_path / "kept"
    found.mkdir(), kept.mkdir()
    done = run(needle, "-runs=1000000", "-seed=1", f"-artifact_prefix={kept}/crash-", found)
    assert done.returncode == 1
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    (path,) = kept.iterdir()
    assert path.name.startswith("crash-") and path.read_bytes()[:3] == b"key" and str(path) in done.stderr
    assert {file.read_bytes()[:2] for file in found.iterdir()} >= {b"ke"}  # the steps on the way
    again = run(needle, "-runs=0", f"-artifact_prefix={kept}/again-", kept)
    assert again.returncode == 1 and len(list(kept.iterdir())) == 2


@pytest.mark.skipif(programs.has_libfuzzer(), reason="the compiler has libFuzzer")
def test_driver_stops_in_time_and_refuses_other_options(needle, tmp_path):
    (tmp_path / "input").write_bytes(b"ke")
    assert re.search(r"Done 1 runs in \d+ second.s., 1 inputs, 0 of them new", run(needle, "-runs=0", tmp_path).stdout)
    done = run(needle, "-max_total_time=1", "-max_len=2", tmp_path)
    assert done.returncode == 0 and re.search(r"Done \d{4,} runs in \d second", done.stdout)
    assert run(needle, "-jobs=2").returncode == 2


def test_index_target_finds_a_wrong_read(tmp_path):
    """With a reader that takes any offset, the target fails and keeps the input."""
    program = "import index_file as t; t.BinidxReader._check_offsets = lambda *a: 0; t.sys.exit(t.main(t.sys.argv[1:]))"
    arguments = ["-runs=20000", f"-artifact_prefix={tmp_path}/kept-", str(programs.FOLDER / "corpus" / "index_file")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=programs.FOLDER, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    (path,) = tmp_path.iterdir()
    assert str(path) in done.stderr


def test_campaign_counts_its_inputs():
    command = [sys.executable, str(programs.FOLDER / "run.py"), "--minutes", "0.02", "--jobs", "1"]
    done = subprocess.run([*command, "index_file"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"index_file +[\d,]{2,} inputs in \d+ s\n[\d,]{2,} inputs, none failed\n", done.stdout)
    done = subprocess.run([*command, "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and re.search("TARGET must be one of .*decoder .*index_file, got nothing", done.stderr)


def test_campaign_shows_the_last_words_of_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "OUT", tmp_path)
    monkeypatch.setattr(campaign, "FAILURES", tmp_path / "failures")
    commands = {
        "crash": [sys.executable, "-c", "import sys; print('the fault'); sys.exit(1)"],
        "silent": [sys.executable, "-c", "pass"],
    }
    for target, words in (("crash", "crash failed:\nthe fault"), ("silent", "silent failed:")):
        with pytest.raises(RuntimeError, match=words):
            campaign.Campaign(commands, seconds=1, seed=1).run(target)
