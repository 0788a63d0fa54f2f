"""rwkv-ext doctor: what was built, for which processors and GPUs, and what to do if something is missing."""

import platform
import shutil
import sys

import torch

from . import _load
from .version import __version__

REBUILD = "pip install --no-build-isolation -e ."


def add_arguments(parser) -> None:
    """The command has no arguments."""


def run(args) -> int:
    """Print the report; 0 when the op library and the tokenizer library load, else 1."""
    lines, problems = report()
    print("\n".join(lines))
    print("\n".join(f"problem: {problem}" for problem in problems) or "no problems found")
    return 1 if _load.error or _load.native_error else 0


def report() -> tuple[list[str], list[str]]:
    """Return the lines of the report and the sentences that say what is missing and what to do."""
    lines = [
        f"rwkv_ext {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, CUDA of this torch: {torch.version.cuda or 'none'}, {_devices()}",
        f"nvcc: {shutil.which('nvcc') or 'not found'}, compiler: {shutil.which('g++') or 'not found'}",
        f"tokenizer library rwkv_ext._native: {'not built' if _load.native_error else 'built'}",
    ]
    problems = [error for error in (_load.native_error, _load.error) if error]
    if _load.error:
        return lines, problems
    info = _load.build_info()
    lines.append(f"op library rwkv_ext._C: CPU kernels, running with {info['cpu_instruction_set']} instructions")
    if info["cuda_version"]:
        lines.append(
            f"CUDA kernels: built with CUDA {info['cuda_version']} for {info['cuda_archs']}: {info['cuda_ops']}"
        )
    else:
        lines.append("CUDA kernels: none built")
    return lines, problems + _cuda_problems(info)


def _devices() -> str:
    if not torch.cuda.is_available():
        return "no GPU visible to torch"
    return ", ".join(
        f"cuda:{i} {torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    )


def _cuda_problems(info) -> list[str]:
    if not torch.cuda.is_available():
        return []
    if not info["cuda_version"]:
        remedy = f"install the CUDA toolkit (nvcc), then RWKV_EXT_CUDA=1 {REBUILD}"
        return [f"a GPU is here but no CUDA code was built; {remedy}"]
    return [problem for i in range(torch.cuda.device_count()) if (problem := _uncovered(info, i))]


def _uncovered(info, index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if covers(info["cuda_archs"].replace(";", " ").split(), major, minor):
        return None
    name = f"cuda:{index} is sm_{major}{minor}"
    if major < 8:
        return f"{name}, and the CUDA kernels need sm_80 or newer; use another GPU, or the CPU"
    return (
        f"{name}, which {info['cuda_archs']} does not cover; rebuild with "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor} RWKV_EXT_CUDA=1 {REBUILD}"
    )


def gpu_problem(index: int = 0) -> str | None:
    """Return why the ops do not run on cuda:index, or None."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if index >= torch.cuda.device_count():
        return f"there is no cuda:{index} ({torch.cuda.device_count()} found)"
    if _load.error:
        return _load.error
    info = _load.build_info()
    return _uncovered(info, index) if info["cuda_version"] else _cuda_problems(info)[0]


def covers(archs: list[str], major: int, minor: int) -> bool:
    """Tell whether code for archs such as ["8.0", "10.0+PTX"] runs on a device of compute capability major.minor.

    Binary code runs on its own major version from its minor version on, PTX on every later device; code for an
    architecture such as 9.0a runs on that one alone.
    """
    for arch in archs:
        number = arch.removesuffix("+PTX")
        built = tuple(map(int, number.rstrip("a").split(".")))
        if number.endswith("a"):
            runs = built == (major, minor)
        else:
            runs = built <= (major, minor) and (built[0] == major or arch.endswith("+PTX"))
        if runs:
            return True
    return False


if __name__ == "__main__":
    sys.exit(run(None))
