"""CPU tensors take the place of CUDA tensors: the ops on CUDA, host code and kernels, run under the emulator.

    pytest --device emulated tests/test_wkv_state.py tests/test_gpu_wkv.py

loads the library of emulator/torch_ops.cpp over the CUDA half of rwkv_ext._C and sends the ops from the CPU's place in
torch's dispatcher there. What a test of the ops says on a GPU it says here, far more slowly and without a GPU.
"""

import dataclasses
import os
import sysconfig
import threading

import torch
from emulator.build import PLAIN, build
from torch.utils import cpp_extension

from rwkv_ext import _registration

KINDS = ("forward", "backward", "summary", "adjoint_summary", "step")
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def built() -> str:
    """Build the library, from the objects of the emulator's programs and one that includes torch; return its path."""
    folders = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join(folders)  # no flag: flags are part of an object's name
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    return str(build(dataclasses.replace(PLAIN, link_flags=("-shared", *libraries)), "torch_ops"))


def use() -> None:
    """Load the library and route the ops to it, one call at a time: the emulator has one device."""
    torch.ops.load_library(built())
    one_at_a_time = threading.Lock()

    def routed(op):
        def call(*arguments):
            with one_at_a_time:
                return op.redispatch(CUDA, *arguments)

        return call

    library = torch.library.Library("rwkv_ext", "IMPL")
    for name in ("wkv5", "wkv6"):
        for kind in KINDS:
            op = getattr(torch.ops.rwkv_ext, f"{name}_{kind}").default
            library.impl(f"{name}_{kind}", routed(op), "CPU", allow_override=True)
    use.library = library  # its registrations live as long as it does
    _registration.has_scores = lambda r: r.dtype in (torch.bfloat16, torch.float16)
