"""Builds rwkv_ext._C (the ops, LibTorch stable ABI, abi3) and rwkv_ext._native (tokenizer and shards, pybind11).

RWKV_EXT_CUDA=auto|0|1   auto: CUDA code when nvcc and a CUDA build of torch are here; 1: also beside a CPU-only torch
TORCH_CUDA_ARCH_LIST     architectures of the CUDA code, as torch reads it (default 8.0;9.0;10.0+PTX)
RWKV_EXT_DEBUG=1         -O0 -g
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if sys.platform != "linux":
    sys.exit(f"rwkv_ext needs Linux, got {sys.platform}; use WSL 2 on Windows, a Linux container on macOS")
try:
    import pybind11
    import torch
    from setuptools import Extension, setup
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(f"rwkv_ext: no {error.name} here; pip install torch ninja pybind11, then install --no-build-isolation")

os.chdir(ROOT := Path(__file__).parent.resolve())
OPTIMISE = ["-O0", "-g"] if os.environ.get("RWKV_EXT_DEBUG") == "1" else ["-O3"]
CXX = ["-g0", "-Wall", "-fvisibility=hidden", *OPTIMISE]  # -g0: Python's own flags have -g, most of a build's bytes
ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX"


def sources(*patterns):
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(f"csrc/{pattern}"))


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not (nvcc := shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")):
        return None
    # nvcc on PATH may be a wrapper script, so nvcc itself says where its toolkit lies.
    log = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if not ((top := re.search(r"TOP=(\S+)", log)) and (release := re.search(r"release (\d+\.\d+)", version))):
        sys.exit(f"rwkv_ext: {nvcc} does not answer like nvcc; set CUDA_HOME to a CUDA toolkit or RWKV_EXT_CUDA=0")
    home = Path(top[1]).resolve()
    folders = [*re.findall(r'"-L([^"]+)"', log), str(home / "lib64"), str(home / "lib")]
    library = next((folder for folder in folders if Path(folder, "libcudart_static.a").exists()), None)
    if not library:
        sys.exit(f"rwkv_ext: no libcudart_static.a beside {nvcc}; install the CUDA runtime's development files")
    return str(home), library, release[1]


def choose_cuda():
    """Returns find_nvcc()'s answer or None, and prints what was chosen and why."""
    if (wish := os.environ.get("RWKV_EXT_CUDA", "auto")) not in ("auto", "0", "1"):
        sys.exit(f"rwkv_ext: RWKV_EXT_CUDA must be auto, 0 or 1, got {wish!r}")
    toolkit = None if wish == "0" else find_nvcc()
    if wish == "1" and not toolkit:
        sys.exit("rwkv_ext: RWKV_EXT_CUDA=1 but there is no nvcc; install the CUDA toolkit or set CUDA_HOME")
    if wish == "auto" and toolkit and not torch.version.cuda:
        print("rwkv_ext: CPU only: this torch has no CUDA (RWKV_EXT_CUDA=1 builds the CUDA code all the same)")
        return None
    print(f"rwkv_ext: CUDA {toolkit[2]} for {ARCHS}" if toolkit else "rwkv_ext: CPU only")
    return toolkit


def gencode():
    flags = []
    for arch in ARCHS.replace(";", " ").split():
        if not (match := re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", arch)) or int(match[1]) < 8:
            sys.exit(f"rwkv_ext: TORCH_CUDA_ARCH_LIST: {arch!r} must look like 9.0 or 9.0+PTX and be 8.0 or newer")
        number = match[1] + match[2] + match[3]
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if match[4] else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def ops_extension():
    files = [file for file in sources("*.cpp", "cpu/*.cpp") if not file.startswith("csrc/native")]
    folders, libraries = [], []
    defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11: one binary for every later one
    nvcc = ["-std=c++20", "-lineinfo", "-Xfatbin=-compress-all", *OPTIMISE]
    if toolkit := choose_cuda():
        cpp_extension.CUDA_HOME, folder, version = toolkit
        # This process only: lets BuildExtension track the headers of .cu files beside a CPU-only torch.
        torch.version.cuda = version
        files += sources("cuda/*.cpp", "cuda/*.cu", "cuda/instances/*.cu")
        files.remove("csrc/wkv_cuda_absent.cpp")
        folders, libraries = [folder], ["-l:libcudart_static.a", "-lrt", "-ldl", "-lpthread"]
        defines += [f'-DRWKV_CUDA_VERSION="{version}"', f'-DRWKV_CUDA_ARCHS="{ARCHS}"']
        nvcc += gencode()
    return cpp_extension.CppExtension(
        "rwkv_ext._C",
        files,
        py_limited_api=True,
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=folders,
        extra_compile_args={"cxx": [*CXX, "-std=c++20", "-Wno-psabi", *defines], "nvcc": nvcc},
        # Without libtorch.so among the needed libraries the weak CUDA stream symbol would stay null.
        extra_link_args=[*libraries, "-Wl,--exclude-libs,ALL,--no-as-needed,-ltorch"],
    )


def native_extension():
    return Extension(
        "rwkv_ext._native",
        sources("native*.cpp", "tokenizer/*.cpp", "data/*.cpp"),
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        extra_compile_args=[*CXX, "-std=c++17", "-pthread"],
    )


class BuildExtension(cpp_extension.BuildExtension):
    def run(self):
        self.build_temp = "build/objects"  # pip's own would be thrown away; this one makes every build incremental
        super().run()
        library = self.get_ext_fullpath("rwkv_ext._native")
        subprocess.run([sys.executable, "rwkv_ext/vocabulary/compiler.py", library], check=True)


setup(ext_modules=[ops_extension(), native_extension()], cmdclass={"build_ext": BuildExtension})
