"""The traps of registering ops through LibTorch's stable ABI, each with the test that would have caught it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_ext import _C, _load
from rwkv_ext.testing import make_inputs

ROOT = Path(__file__).parent.parent
KINDS = ("forward", "backward", "step", "summary", "adjoint_summary")
OPS = [f"wkv{version}_{kind}" for version in (5, 6) for kind in KINDS]


def readelf(*options):
    assert shutil.which("readelf"), "readelf comes with the compiler (binutils); install it"
    return subprocess.run(["readelf", "-W", *options, _C.__file__], capture_output=True, text=True, check=True).stdout


def test_stable_abi_scalars_arrive():
    """A flag of the wrong C++ type would arrive as garbage: both values must show in what is saved."""
    for version in ("5", "6"):
        inputs = make_inputs({"5": "5.2", "6": "6.0"}[version], 2, 130, 2, 4)
        op = getattr(torch.ops.rwkv_ext, f"wkv{version}_forward")
        for save, shape in ((True, (2, 2, 2, 4, 4)), (False, (0,)), (True, (2, 2, 2, 4, 4))):
            assert op(*inputs, save)[2].shape == shape


def test_stable_abi_scalar_types_are_the_three_safe_ones():
    """`int` and `float` parameters compile and read garbage; schemas and kernels must use bool, int64_t, double."""
    schemas = {name: getattr(torch.ops.rwkv_ext, name).default._schema for name in [*OPS, "build_info"]}
    kinds = {str(argument.type) for schema in schemas.values() for argument in schema.arguments}
    assert kinds == {"Tensor", "Optional[Tensor]", "bool"}
    for path in [*ROOT.glob("csrc/**/*.cpp")]:
        for parameters in re.findall(r"\(((?:const (?:Tensor|OptionalTensor)&[^()]*))\)\s*\{", path.read_text()):
            kinds = {re.sub(r"\s*\w*$", "", parameter.strip()) for parameter in parameters.split(",")}
            assert not kinds & {"int", "float", "int32_t", "long", "unsigned", "size_t"}, f"{path}: {parameters}"


def test_stable_abi_every_schema_matches_its_kernel():
    """A wrong number of outputs is found at the first call and not before: call every op that is registered."""
    names = torch._C._dispatch_get_all_op_names()
    assert {name.split("::")[1] for name in names if name.startswith("rwkv_ext::wkv")} == set(OPS)
    for version, w_rank in (("5.2", 2), ("6.0", 4)):
        inputs = make_inputs(version, 1, 1, 2, 4)
        assert inputs.w.dim() == w_rank
        name = f"wkv{version[0]}"
        outputs = getattr(torch.ops.rwkv_ext, f"{name}_forward")(*inputs, True)
        gradients = getattr(torch.ops.rwkv_ext, f"{name}_backward")(*outputs[:2], *inputs, *outputs[2:])
        token = [x[:, 0] if x.dim() == 4 else x for x in inputs[:4]]
        y = getattr(torch.ops.rwkv_ext, f"{name}_step")(*token, inputs.u, inputs.state, None)
        assert (len(outputs), len(gradients), y.shape) == (4, 6, (1, 2, 4))
        decay, state = getattr(torch.ops.rwkv_ext, f"{name}_summary")(*inputs[1:4], None)
        dstate = getattr(torch.ops.rwkv_ext, f"{name}_adjoint_summary")(inputs.r, inputs.w, inputs.v, None)
        assert (decay.shape, state.shape, dstate.shape) == ((1, 2, 4), (1, 2, 4, 4), (1, 2, 4, 4))
        for key in ("CPU", "CUDA", "Autograd", "AutocastCPU", "AutocastCUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rwkv_ext::{name}_forward", key), key
        for kind in KINDS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rwkv_ext::{name}_{kind}", "CUDA"), kind
    assert _load.build_info().keys() == {"cpu_instruction_set", "cuda_version", "cuda_archs", "cuda_ops"}


def test_stable_abi_needed_libraries():
    """Without libtorch.so here the weak CUDA stream symbol would stay null on a CUDA build of torch."""
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", readelf("--dynamic")))
    assert "libtorch.so" in needed
    forbidden = ("libtorch_cuda", "libc10_cuda", "libcudart", "libtorch_python", "libpython", "libgomp")
    assert not [name for name in needed if name.startswith(forbidden)], "one binary for every torch, with CUDA or not"
    assert _C.__file__.endswith("_C.abi3.so")


def test_stable_abi_symbols():
    """Only shim functions are asked of torch, CUDA's own as weak ones; cudart's are inside and not handed on."""
    rows = [line.split() for line in readelf("--dyn-syms").splitlines() if re.match(r"\s*\d+:", line)]
    undefined = {row[7].split("@")[0]: row[4] for row in rows if len(row) > 7 and row[6] == "UND"}
    defined = {row[7].split("@")[0] for row in rows if len(row) > 7 and row[6] != "UND"}
    cpp_of_torch = [name for name in undefined if re.match(r"_ZN?K?(2at|3c10|5torch|N2at|N3c10|N5torch)", name)]
    assert not cpp_of_torch, "C++ symbols of torch change between versions"
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert not [name for name in defined | set(undefined) if re.match(r"cuda[A-Z]|cu[A-Z]", name)]
    if _load.build_info()["cuda_version"]:
        assert undefined["aoti_torch_get_current_cuda_stream"] == "WEAK"
    newer = {"torch_stream_native_handle", "torch_library_def_with_tags"}  # not in torch 2.11, the oldest we support
    assert not newer & set(undefined)
    assert "PyInit__C" in defined


LOADING_PROGRAM = """
import resource, sys
import torch
import rwkv_ext
from rwkv_ext import _C, ops, testing

# The same file again, by import, by path and through another spelling of the path.
inputs = testing.make_inputs("6.0", 1, 20, 2, 8)
expected = ops.wkv6(*inputs)[0]
torch.ops.load_library(_C.__file__)
torch.ops.load_library(_C.__file__.replace("rwkv_ext/_C", "rwkv_ext/../rwkv_ext/_C"))
assert torch.equal(ops.wkv6(*inputs)[0], expected)
print("loaded again")

small = inputs.r.clone().requires_grad_()
y = ops.wkv6(*inputs._replace(r=small))[0]
torch.autograd.grad(y, small, torch.ones_like(y))  # torch imports what it needs for this, while there is memory

# Out of memory on the worker threads, inside parallel_for: backward wants at least 5 states of 4 MiB for each head.
big = testing.make_inputs("6.0", 1, 16, 2, 1024)
leaves = [x.requires_grad_() for x in big[:6]]
torch.set_num_threads(2)
y, state = ops.wkv6(*leaves)
dy = torch.ones_like(y)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (24 << 20)  # the gradients fit, the scratch does not
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    torch.autograd.grad(y, leaves, dy)
except Exception as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
torch.autograd.grad(y, leaves, dy)
assert torch.equal(ops.wkv6(*inputs)[0], expected)
print("usable afterwards")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_stable_abi_loading_twice_and_errors_inside_parallel_for():
    """Loading one file twice is harmless; an exception on a worker thread keeps its type and text."""
    result = subprocess.run([sys.executable, "-c", LOADING_PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["loaded again", "MemoryError std::bad_alloc", "usable afterwards"]


def test_stable_abi_errors_have_no_file_names():
    """Our own exceptions: exact text, no build path and no C++ function in front."""
    inputs = make_inputs("6.0", 1, 3, 2, 4)
    with pytest.raises(ValueError) as caught:
        torch.ops.rwkv_ext.wkv6_forward(*inputs._replace(u=inputs.u[0]), False)
    assert str(caught.value) == "wkv6: u must have shape [H, N] = [2, 4], got [4]"
    assert type(caught.value) is ValueError


BUILD_PROGRAM = """
import runpy, sys
import torch.utils.cpp_extension as cpp_extension

def capture(path, **arguments):
    write(path=sys.argv_target, **arguments)
    raise SystemExit(0)

write, sys.argv_target = cpp_extension._write_ninja_file, sys.argv[1]
cpp_extension._write_ninja_file = capture
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def build_rules(tmp_path, cuda):
    """What setup.py tells ninja for rwkv_ext._C, without building."""
    target = tmp_path / "build.ninja"
    environment = {**os.environ, "RWKV_EXT_CUDA": cuda, "TORCH_CUDA_ARCH_LIST": "9.0"}
    result = subprocess.run(
        [sys.executable, "-c", BUILD_PROGRAM, str(target)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and target.exists(), result.stdout + result.stderr
    return target.read_text()


def test_stable_abi_build_tracks_headers(tmp_path):
    """Beside a CPU-only torch the build would drop the headers of .cu files and leave stale objects."""
    with_cuda = shutil.which("nvcc") is not None
    rules = build_rules(tmp_path, "1" if with_cuda else "0")
    compile_rule = re.search(r"rule compile\n(.*?)\n\n", rules, re.S)[1]
    assert "-MMD -MF $out.d" in compile_rule and "depfile = $out.d" in compile_rule
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in rules and "-DPy_LIMITED_API=0x030A0000" in rules
    assert not re.search(r"-march=native|-ffast-math", rules)
    assert re.search(r"^build \S*build/objects/csrc/ops.o: compile", rules, re.M), "a folder that lasts: incremental"
    if with_cuda:
        cuda_rule = re.search(r"rule cuda_compile\n(.*?)\n\n", rules, re.S)[1]
        assert "-MD -MF $out.d" in cuda_rule
        assert "depfile = $out.d" in cuda_rule
        assert "arch=compute_90,code=sm_90" in rules
