"""rwkv-ext doctor and the rwkv-ext command: the report, the sentences that say what to do, exit codes."""

import subprocess
import sys

import pytest
import torch

from rwkv_ext import RWKV, RWKVConfig, _load, cli, doctor


def test_doctor_reports_what_is_built(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    info = _load.build_info()
    assert f"running with {info['cpu_instruction_set']} instructions" in printed
    assert f"torch {torch.__version__}" in printed
    assert "rwkv_ext._native: built" in printed
    assert (info["cuda_ops"] or "CUDA kernels: none built") in printed


WITHOUT_LIBRARIES = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in sys.argv[1].split():
            raise ImportError("hidden by the test")

sys.meta_path.insert(0, Hide())
from rwkv_ext import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def without(libraries, *arguments):
    command = [sys.executable, "-c", WITHOUT_LIBRARIES, libraries, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_doctor_says_how_to_build_missing_libraries():
    result = without("rwkv_ext._C rwkv_ext._native", "doctor")
    assert (result.returncode, result.stderr) == (1, "")
    for library in ("op library rwkv_ext._C", "tokenizer library rwkv_ext._native"):
        assert (
            f"problem: rwkv_ext: the {library} is not built or does not load (hidden by the test); build it with "
            "`make build` in a checkout or `pip install"
        ) in result.stdout


def test_commands_say_how_to_build_a_missing_library(monkeypatch, capsys, tmp_path):
    path = tmp_path / "model.pth"
    RWKV(RWKVConfig(vocab_size=64, n_layer=1, n_embd=32, head_size=16)).save_pretrained(path)
    for error in ("native_error", "error"):
        monkeypatch.setattr(_load, error, "the library is not built; build it")
        assert cli.main(["generate", str(path)]) == 2
        assert capsys.readouterr().err == "rwkv-ext generate: the library is not built; build it\n"
        monkeypatch.undo()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: "H200")


@pytest.mark.parametrize(
    ("version", "archs", "problem"),
    [
        ("", "", "a GPU is here but no CUDA code was built; install the CUDA toolkit"),
        ("13.0", "8.0;10.0", "cuda:0 is sm_90, which 8.0;10.0 does not cover; rebuild with TORCH_CUDA_ARCH_LIST=9.0"),
        ("13.0", "8.0 9.0", None),
    ],
)
def test_doctor_compares_the_build_with_the_gpu(monkeypatch, hopper, version, archs, problem):
    info = {"cpu_instruction_set": "avx2", "cuda_version": version, "cuda_archs": archs, "cuda_ops": "wkv6_step"}
    monkeypatch.setattr(_load, "build_info", lambda: info)
    lines, problems = doctor.report()
    assert "H200 (sm_90)" in "\n".join(lines)
    assert [problem in p for p in problems] == ([] if problem is None else [True])
    assert (doctor.gpu_problem() is None) if problem is None else (problem in doctor.gpu_problem())
    assert doctor.gpu_problem(1) == "there is no cuda:1 (1 found)"


def test_gpu_problem_says_what_is_missing_first(monkeypatch, hopper):
    monkeypatch.setattr(_load, "error", "the library is not built; build it")
    assert doctor.gpu_problem() == "the library is not built; build it"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.gpu_problem() == "torch sees no GPU"


def test_doctor_knows_no_kernels_below_sm_80(monkeypatch, hopper):
    info = {"cpu_instruction_set": "avx2", "cuda_version": "13.0", "cuda_archs": "8.0", "cuda_ops": "wkv6_step"}
    monkeypatch.setattr(_load, "build_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: (7, 5))
    text = "cuda:0 is sm_75, and the CUDA kernels need sm_80 or newer; use another GPU, or the CPU"
    assert doctor.report()[1] == [text] and doctor.gpu_problem() == text


@pytest.mark.parametrize(
    ("archs", "device", "runs"),
    [
        ("8.0", (8, 9), True),  # binary code runs on later minor versions of its major one
        ("8.9", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("10.0+PTX", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),  # architecture-specific code runs nowhere else
        ("8.0 9.0 10.0+PTX", (12, 0), True),
    ],
)
def test_covers(archs, device, runs):
    assert doctor.covers(archs.split(), *device) is runs


def test_has_cuda_kernels_names_every_op(monkeypatch):
    monkeypatch.setattr(_load, "build_info", lambda: {"cuda_ops": "wkv5_step wkv6_step"})
    assert _load.has_cuda_kernels("wkv5_step", "wkv6_step")
    assert not _load.has_cuda_kernels("wkv6_step", "wkv6_forward")


def test_a_users_mistake_is_one_sentence_and_exit_status_2(monkeypatch, capsys):
    def fail(args):
        raise ValueError("data: it must be so, got thus; do this")

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "rwkv-ext doctor: data: it must be so, got thus; do this\n"


def test_ctrl_c_is_one_sentence_and_exit_status_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "rwkv-ext doctor: interrupted; nothing was left half-written\n"


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doktor"])
    assert stop.value.code == 2
    assert "doctor" in capsys.readouterr().err
