"""The source distribution and the wheel made from it: what is in them, and that it works beside nothing but torch."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

from rwkv_ext import _load
from rwkv_ext.version import __version__

ROOT = Path(__file__).parent.parent
NAME = f"rwkv_ext-{__version__}"
PROGRAM = """
import importlib.metadata, subprocess, sys
from pathlib import Path
import torch, rwkv_ext
from rwkv_ext import RWKV, RWKVConfig, WorldTokenizer, _load, generate, reference, testing, wkv6

home = Path(sys.prefix).resolve()
modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "rwkv_ext"]
assert all(home in Path(module.__file__).resolve().parents for module in modules), modules
assert importlib.metadata.version("rwkv_ext") == rwkv_ext.__version__
inputs = testing.make_inputs("6.0", 1, 40, 2, 32)
exact = testing.outputs_and_gradients(reference.wkv6, inputs.double())
testing.assert_close_ratio(testing.outputs_and_gradients(wkv6, inputs), exact, floor=2e-6, inputs=inputs)
model = RWKV(RWKVConfig(version="5.2", n_layer=2, n_embd=64, head_size=32))
tokens = torch.tensor([WorldTokenizer().encode("Today is a beautiful day.")])
assert tokens.tolist() == [[33520, 4600, 332, 59219, 21509, 47]]
loss, state = model(tokens[:, :-1], targets=tokens[:, 1:])
loss.backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
assert "".join(generate(model, WorldTokenizer(), "a", 3, seed=1, stop_tokens=[]))
doctor = subprocess.run([home / "bin" / "rwkv-ext", "doctor"], capture_output=True, text=True)
assert doctor.returncode == 0 and "no problems found" in doctor.stdout, doctor
print(_load.build_info()["cuda_version"] or "no CUDA", "works")
"""


# A C++ compiler that hands out the checkout's own objects where they are newer than every source.
COMPILER = """#!{python}
import os, shutil, sys

arguments, out = sys.argv[1:], ""
if "-c" in arguments:
    out = arguments[arguments.index("-o") + 1]
    made = os.path.join({objects!r}, os.path.relpath(out, {build!r}))
    if os.path.exists(made) and os.path.getmtime(made) > {newest} and os.path.basename(out) not in {differing!r}:
        shutil.copy(made, out)
        open(out + ".d", "w").close()
        sys.exit()
os.execvp({compiler!r}, [{compiler!r}, *arguments])
"""


def run(*command, environment=(), **options):
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own = {"RWKV_EXT_CUDA": "0", "MAX_JOBS": str(os.cpu_count()), "OMP_NUM_THREADS": "1"}
    environment = inherited | own | dict(environment)
    result = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder, cwd=ROOT)
    archive = folder / f"{NAME}.tar.gz"
    assert archive.stat().st_size < 2_000_000
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / NAME


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_sdist_holds_what_a_build_needs_and_nothing_else(sdist):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split("\n") if tracked.returncode == 0 else files(ROOT)
    wanted = {name for name in names if name.split("/")[0] in ("csrc", "rwkv_ext") and (ROOT / name).exists()}
    wanted = {name for name in wanted if name.endswith((".h", ".cpp", ".cu", ".cuh", ".py", ".txt"))}
    assert len(wanted) > 100 and "csrc/torch_api.h" in wanted
    wanted |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "MANIFEST.in"}
    made = {"PKG-INFO", "setup.cfg"}
    got = {name for name in files(sdist) if ".egg-info/" not in name}
    assert got - made == wanted
    assert all((sdist / name).read_bytes() == (ROOT / name).read_bytes() for name in wanted)


def compiler_with_objects(sdist: Path, folder: Path) -> Path:
    """Write COMPILER; only honest where the sources of the sdist are those of the checkout, byte for byte."""
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    assert all((sdist / path.relative_to(ROOT)).read_bytes() == path.read_bytes() for path in sources)
    script = folder / "c++"
    values = dict(
        python=sys.executable,
        objects=str(ROOT / "build" / "objects"),
        build=str(sdist / "build" / "objects"),
        newest=max(path.stat().st_mtime for path in sources),
        # compiled with the versions of CUDA where the checkout has CUDA kernels
        differing=["ops.o"] if _load.error or _load.build_info()["cuda_version"] else [],
        compiler=os.environ.get("CXX", "c++"),
    )
    script.write_text(COMPILER.format(**values))
    script.chmod(0o755)
    return script


@pytest.mark.slow
@pytest.mark.parametrize(
    "reused", [True, pytest.param(False, marks=pytest.mark.kernels)], ids=["objects", "no-objects"]
)
def test_wheel_from_the_sdist_works_in_an_empty_environment(sdist, tmp_path, reused):
    """20 seconds with the objects of a fresh build, CPU only; a minute or two from nothing (make test-kernels)."""
    shutil.rmtree(sdist / "build", ignore_errors=True)
    environment = {"CXX": str(compiler_with_objects(sdist, tmp_path))} if reused else {}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist]
    run(*command, environment=environment)
    (wheel,) = tmp_path.glob("*.whl")
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert wheel.name.startswith(f"{NAME}-{tag}-{tag}-linux_") and wheel.stat().st_size < 5_000_000
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = Parser().parsestr(file.read(f"{NAME}.dist-info/METADATA").decode())
    made = {"rwkv_ext/_C.abi3.so", f"rwkv_ext/_native{sysconfig.get_config_var('EXT_SUFFIX')}"}
    made |= {"rwkv_ext/vocabulary/rwkv_vocab_v20230424.bin"}
    sources = {name for name in files(sdist) if name.startswith("rwkv_ext/")}
    assert {name for name in names if ".dist-info/" not in name} == sources | made
    assert {f"{NAME}.dist-info/licenses/LICENSE", f"{NAME}.dist-info/licenses/NOTICE"} <= names
    needs = {re.split(r"[ ><=;]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needs == {"torch", "numpy", "safetensors", "rich", "matplotlib", "tomli"}

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # torch and the rest come from here; their folder's own .pth files, an editable rwkv_ext among them, are not read.
    Path(site, "torch.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    assert run(python, "-c", PROGRAM, cwd=tmp_path).strip() == "no CUDA works"


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_setup_refuses_other_systems(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    message = f"rwkv_ext needs Linux, got {system}; use WSL 2 on Windows, a Linux container on macOS"
    with pytest.raises(SystemExit, match=f"^{message}$"):
        runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("missing", ["torch", "pybind11", "setuptools"])
def test_setup_names_what_it_lacks(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # import then fails
    message = f"rwkv_ext: no {missing} here; pip install torch ninja pybind11, then install --no-build-isolation"
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(ROOT / "setup.py"))


def test_an_unbuilt_package_says_that_it_needs_linux(monkeypatch):
    assert "needs Linux" not in _load.missing("op library", "reason")
    monkeypatch.setattr(sys, "platform", "darwin")
    text = _load.missing("op library", "reason")
    assert text.endswith("; it needs Linux, got darwin: use WSL 2 on Windows, a Linux container on macOS")
