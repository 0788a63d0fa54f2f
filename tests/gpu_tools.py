"""Programs for the GPU that tests run: built by `make gpu-programs`, here or on another machine."""

from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent.parent / "build" / "gpu"


def device_program(name: str) -> Path:
    """Return the program's path, or fail with what builds it."""
    if not (path := PROGRAMS / name).exists():
        pytest.fail(f"{path} is missing: `make gpu-programs` builds it (nvcc needed, a GPU is not)")
    return path
