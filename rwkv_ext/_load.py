"""Loads the two compiled libraries, rwkv_ext._C (the ops) and rwkv_ext._native (the tokenizer), or keeps the sentence
that says how to build what is missing: the rest of the package works without."""

import importlib
import re
import sys
from pathlib import Path

import torch


class MissingLibraryError(RuntimeError):
    """A compiled library is missing; the message says how to build it."""


def missing(library: str, reason: object) -> str:
    """Return what to say of a library that is not there."""
    text = (
        f"rwkv_ext: the {library} is not built or does not load ({reason}); build it with `make build` in a "
        "checkout or `pip install --no-build-isolation -e .`, and see `rwkv-ext doctor`"
    )
    if sys.platform == "linux":
        return text
    return f"{text}; it needs Linux, got {sys.platform}: use WSL 2 on Windows, a Linux container on macOS"


def _import(name: str, library: str) -> str | None:
    try:
        importlib.import_module(f"rwkv_ext.{name}")  # importing _C registers the ops
    except ImportError as reason:
        return missing(library, reason)
    return None


def _outdated(table: Path) -> str | None:
    """Return what to say of an op library that lacks ops of csrc/ops.cpp, as after an update of a checkout."""
    ops = re.findall(r'm\.def\("(\w+)\(', table.read_text()) if table.is_file() else []
    lacking = [op for op in ops if not hasattr(torch.ops.rwkv_ext, op)]
    return missing("op library rwkv_ext._C", f"it is older than csrc/ops.cpp: no {lacking[0]}") if lacking else None


error = _import("_C", "op library rwkv_ext._C") or _outdated(Path(__file__).parent.parent / "csrc" / "ops.cpp")
native_error = _import("_native", "tokenizer library rwkv_ext._native")


def require_ops() -> None:
    """Raise MissingLibraryError with what to do when the op library is missing."""
    if error:
        raise MissingLibraryError(error)


def native():
    """Return the module rwkv_ext._native, or raise MissingLibraryError with what to do."""
    if native_error:
        raise MissingLibraryError(native_error)
    return importlib.import_module("rwkv_ext._native")


def build_info() -> dict[str, str]:
    """Return what the op library was built with: cpu_instruction_set, cuda_version, cuda_archs, cuda_ops."""
    require_ops()
    lines = torch.ops.rwkv_ext.build_info().splitlines()
    return dict(line.split("=", 1) for line in lines)


def has_cuda_kernels(*ops: str) -> bool:
    """Tell whether this build has CUDA kernels for every named op, such as "wkv6_forward"."""
    return error is None and set(ops) <= set(build_info()["cuda_ops"].split())
