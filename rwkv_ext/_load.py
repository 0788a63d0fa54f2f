"""Loads the op library rwkv_ext._C, or keeps the sentence that says how to build it."""

import torch

_MISSING = (
    "rwkv_ext: the op library rwkv_ext._C is not built or does not load ({reason}); build it with `make build` in a "
    "checkout or `pip install --no-build-isolation -e .`, and see `rwkv-ext doctor`"
)

try:
    from . import _C  # noqa: F401  (importing it registers the ops)

    error = None
except ImportError as reason:
    error = _MISSING.format(reason=reason)


def require_ops() -> None:
    """Raise RuntimeError with what to do when the op library is missing."""
    if error:
        raise RuntimeError(error)


def build_info() -> dict[str, str]:
    """Return what the op library was built with: cpu_instruction_set, cuda_version, cuda_archs, cuda_ops."""
    require_ops()
    lines = torch.ops.rwkv_ext.build_info().splitlines()
    return dict(line.split("=", 1) for line in lines)


def has_cuda_kernels(*ops: str) -> bool:
    """Tell whether this build has CUDA kernels for every named op, such as "wkv6_forward"."""
    return error is None and set(ops) <= set(build_info()["cuda_ops"].split())
