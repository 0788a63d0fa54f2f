"""What the CUDA half says where it cannot run: reached with CPU tensors through the CUDA dispatch key.

Only beside a CPU build of torch: elsewhere the step op would go on to launch its kernel.
"""

import re

import pytest
import torch

from rwkv_ext import _load
from rwkv_ext.testing import make_inputs

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="CUDA torch: see test_wkv_cuda_step.py")
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
VERSIONS = ["5.2", "6.0"]


def call(version, kind, *arguments):
    return getattr(torch.ops.rwkv_ext, f"wkv{version[0]}_{kind}").default.redispatch(CUDA, *arguments)


def step_arguments(version, size, **changes):
    inputs = make_inputs(version, 2, 1, 2, size)
    token = [x[:, 0] if x.dim() == 4 else x for x in inputs[:4]]
    arguments = dict(zip("r k v w u state slots".split(), [*token, inputs.u, inputs.state, None], strict=True))
    return list((arguments | changes).values())


def missing_kernel(op, first="r"):
    if _load.build_info()["cuda_version"]:
        reason = "rwkv_ext has no CUDA kernel for this op yet (wkv5_step and wkv6_step have one)"
        remedy = "move the tensors to the CPU, or use rwkv_ext.reference"
    else:
        reason = "rwkv_ext was built without CUDA"
        remedy = "rebuild with RWKV_EXT_CUDA=1 pip install --no-build-isolation -e ."
    return f"^{re.escape(f'{op}: {first} is on cpu, but {reason}; {remedy}')}$"


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_cuda_messages_missing_kernels(version, kind):
    inputs = make_inputs(version, 1, 3, 2, 32)
    arguments = (*inputs, True)
    op = f"wkv{version[0]}"
    if kind == "backward":
        y, state, *saved = getattr(torch.ops.rwkv_ext, f"{op}_forward")(*arguments)
        arguments, op = (y, state, *inputs, *saved), f"{op}_backward"
    with pytest.raises(RuntimeError, match=missing_kernel(op)):
        call(version, kind, *arguments)


@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_cuda_messages_missing_summaries(version):
    r, k, v, w = make_inputs(version, 1, 3, 2, 32)[:4]
    with pytest.raises(RuntimeError, match=missing_kernel(f"wkv{version[0]}_summary", first="k")):
        call(version, "summary", k, v, w, None)
    with pytest.raises(RuntimeError, match=missing_kernel(f"wkv{version[0]}_adjoint_summary")):
        call(version, "adjoint_summary", r, w, v, None)
    with pytest.raises(ValueError, match="dy must be on r's device cpu, got another device; move it with"):
        call(version, "adjoint_summary", r, w, v.to("meta"), None)


@pytest.mark.parametrize("kind", ["forward", "step"])
def test_wkv_cuda_messages_other_device(kind):
    """With r on the CPU and another tensor on a GPU, the other tensor is what is wrong."""
    given = step_arguments("6.0", 32) if kind == "step" else [*make_inputs("6.0", 1, 3, 2, 32), True]
    for i, name in enumerate("kvwu", start=1):
        arguments = [x.to("meta") if i == j else x for j, x in enumerate(given)]
        with pytest.raises(ValueError, match=f"{name} must be on r's device cpu, got another device; move it with"):
            call("6.0", kind, *arguments)


@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_cuda_messages_step(version):
    op = f"wkv{version[0]}_step"
    if not _load.has_cuda_kernels(op):
        with pytest.raises(RuntimeError, match=missing_kernel(op)):
            call(version, "step", *step_arguments(version, 32))
        return
    for size in (1, 31, 48, 65, 256):
        text = f"{op}: head size must be 32, 64 or 128 on CUDA, got {size}; run it on the CPU"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            call(version, "step", *step_arguments(version, size))
    # the same checks as on the CPU: they are the same code
    for changes, text in (
        (dict(k=torch.zeros(2, 2, 33)), "k must have the shape of r [2, 2, 32], got [2, 2, 33]"),
        (dict(slots=torch.zeros(2).int()), "slots must be int64, got int32"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{op}: {text}')}$"):
            call(version, "step", *step_arguments(version, 32, **changes))
    # the kernel reads four columns at a time
    for dtype, alignment in ((torch.float32, 16), (torch.float64, 32)):
        arguments = [x if x is None else x.to(dtype) for x in step_arguments(version, 32)]
        arguments[5] = torch.zeros(arguments[5].numel() + 1, dtype=dtype)[1:].view(arguments[5].shape)
        text = f"{op}: state must start at a multiple of {alignment} bytes on CUDA, got storage offset 1; call .clone()"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
            call(version, "step", *arguments)
    # past every check, this torch has no stream to launch on: a null weak symbol is a sentence and no crash
    text = f"{op}: this torch has no CUDA streams; install a CUDA build of torch"
    for size in (32, 64, 128):
        with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
            call(version, "step", *step_arguments(version, size))
