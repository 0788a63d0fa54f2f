"""What the CUDA half says where it cannot run: reached with CPU tensors through the CUDA dispatch key.

Only beside a CPU build of torch: elsewhere the ops would go on to launch their kernels.
"""

import re
import subprocess
import sys

import pytest
import torch

from rwkv_ext import _load
from rwkv_ext.testing import make_inputs

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(torch.version.cuda is not None, reason="CUDA torch: the kernels would run"),
]
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
VERSIONS = ["5.2", "6.0"]
KINDS = ["forward", "backward", "summary", "adjoint_summary", "step"]
WITH_CUDA = bool(_load.build_info()["cuda_version"])
NO_CUDA = "{op}: {first} is on cpu, but rwkv_ext was built without CUDA; rebuild with RWKV_EXT_CUDA=1 pip install "
NO_STREAM = "{op}: this torch has no CUDA streams; install a CUDA build of torch"


def call(version, kind, *arguments):
    return getattr(torch.ops.rwkv_ext, f"wkv{version[0]}_{kind}").default.redispatch(CUDA, *arguments)


def name_of(version, kind):
    return f"wkv{version[0]}" + ("" if kind == "forward" else f"_{kind}")


def arguments_of(version, kind, size=32, dtype=torch.float32, **changes):
    """Return the op's arguments by name, in order."""
    inputs = make_inputs(version, 2, 3, 2, size, dtype=dtype)
    r, k, v, w, u, state = inputs[:6]
    match kind:
        case "forward":
            given = dict(r=r, k=k, v=v, w=w, u=u, state=state, cu_seqlens=None, save_for_backward=True)
        case "backward":
            y, state_out, *saved = call_cpu(version, "forward", *inputs, True)
            given = dict(dy=y, dstate_out=state_out, r=r, k=k, v=v, w=w, u=u, state=state, cu_seqlens=None)
            given |= dict(zip(("chunk_states", "scores"), saved, strict=True))
        case "summary":
            given = dict(k=k, v=v, w=w, cu_seqlens=None)
        case "adjoint_summary":
            given = dict(r=r, w=w, dy=v, cu_seqlens=None)
        case "step":
            token = [x[:, 0] if x.dim() == 4 else x for x in (r, k, v, w)]
            given = dict(zip("r k v w u state slots".split(), [*token, u, state, None], strict=True))
    return given | changes


def call_cpu(version, kind, *arguments):
    return getattr(torch.ops.rwkv_ext, f"wkv{version[0]}_{kind}")(*arguments)


def refuses(error, text, version, kind, arguments):
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        call(version, kind, *arguments.values())


@pytest.mark.skipif(WITH_CUDA, reason="built with CUDA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_cuda_messages_without_cuda(version, kind):
    first = "k" if kind == "summary" else "r"
    text = NO_CUDA.format(op=name_of(version, kind), first=first)
    refuses(RuntimeError, text, version, kind, arguments_of(version, kind))


@pytest.mark.skipif(not WITH_CUDA, reason="built without CUDA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_cuda_messages_in_order(version, kind):
    """First the checks that the CPU has as well, then the head size, then what torch lacks: a sentence, no crash."""
    op = name_of(version, kind)
    for size in (1, 31, 48, 65, 256):
        text = f"{op}: head size must be 32, 64 or 128 on CUDA, got {size}; run it on the CPU"
        refuses(ValueError, text, version, kind, arguments_of(version, kind, size))
    for size in (32, 64, 128):
        refuses(RuntimeError, NO_STREAM.format(op=op), version, kind, arguments_of(version, kind, size))
    last = "dy" if kind == "adjoint_summary" else "v"
    arguments = arguments_of(version, kind, 48)
    with pytest.raises(ValueError, match=f"^{op}: {last} must have the shape of "):
        call(version, kind, *(arguments | {last: torch.zeros(2, 3)}).values())


@pytest.mark.parametrize("kind", KINDS)
def test_wkv_cuda_messages_other_device(kind):
    """With the first tensor on the CPU and another on a GPU, the other one is what is wrong."""
    arguments = arguments_of("6.0", kind)
    first = "k" if kind == "summary" else "r"
    for name in {"k", "v", "w", "u", "dy"} & arguments.keys() - {first}:
        if WITH_CUDA or name != "dy" or kind != "backward":
            with pytest.raises(ValueError, match=f"{name} must be on {first}'s device cpu, got another device; move"):
                call("6.0", kind, *(arguments | {name: arguments[name].to("meta")}).values())


@pytest.mark.skipif(not WITH_CUDA, reason="built without CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wkv_cuda_messages_step_state(dtype):
    """The kernel reads the state 16 bytes at a time, and it cannot update a copy."""
    arguments = arguments_of("6.0", "step", dtype=dtype)
    state = arguments["state"]
    arguments["state"] = torch.zeros(state.numel() + 1, dtype=dtype)[1:].view(state.shape)
    text = "wkv6_step: state must start at a multiple of 16 bytes on CUDA, got storage offset 1; call .clone() once"
    refuses(ValueError, text, "6.0", "step", arguments)


# Stands in for the CUDA half of torch: then the ops reach the CUDA runtime, which finds no driver.
TORCH_CUDA = """
#include <stdint.h>
int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) { *stream = 0; return 0; }
int aoti_torch_create_device_guard(int32_t device, void** guard) { *guard = 0; return 0; }
int aoti_torch_delete_device_guard(void* guard) { return 0; }
"""
IN_SUBPROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_wkv_cuda_messages import KINDS, arguments_of, call
for kind in KINDS:
    try:
        call("6.0", kind, *arguments_of("6.0", kind).values())
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.skipif(not WITH_CUDA or torch.cuda.is_available(), reason="built without CUDA, or there is a GPU")
def test_wkv_cuda_messages_failing_runtime(tmp_path, request):
    """A failing runtime is named with the op, the shape, the dtype and the device."""
    (tmp_path / "torch_cuda.c").write_text(TORCH_CUDA)
    library = tmp_path / "torch_cuda.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "torch_cuda.c"], check=True)
    result = subprocess.run(
        [sys.executable, "-c", IN_SUBPROCESS, str(request.path.parent)],
        env={"PATH": "/usr/bin:/bin", "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    failures = result.stdout.splitlines()
    assert len(failures) == len(KINDS), result.stderr
    for kind, line in zip(KINDS, failures, strict=True):
        shape = [2, 2, 32] if kind == "step" else [2, 3, 2, 32]
        start = f"{name_of('6.0', kind)}: launch for shape {shape} and dtype float32 on cpu failed: "
        assert line.startswith(start) and "CUDA" in line.removeprefix(start), line
