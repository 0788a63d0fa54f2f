"""How fast the CPU's WKV kernels are, against the processor's limits and against PyTorch.

First every way is checked, then one report: percent of the multiply-add peak that the run itself probes, counting 3 N
multiply-adds per token and channel forward, 2 N for recomputing states and 8 N for the reverse pass (the naive
recurrence's; the kernels need fewer); ratios to PyTorch; threads; bf16; one-token steps against memory bandwidth; the
AVX2 kernels against AVX2's own peak. --output writes it with its picture: results/<device>_<yyyy-mm>_wkv.md and .png.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cpu_limits
import torch
import wkv_peers
from common import header, measure, table

from rwkv_ext import _load, ops, reference
from rwkv_ext.testing import assert_close_ratio, make_inputs, outputs_and_gradients

SHAPES = {"in L3": (1, 1024, 8), "memory": (4, 1024, 8), "memory, long": (1, 8192, 4)}  # B, T, H
COUNTS = {"forward": 3, "forward, saving": 3, "backward": 10, "forward + backward": 13}
TARGETS = {"in L3": {"forward": 80, "forward + backward": 50}, "memory": {"forward": 58, "forward + backward": 42}}
LENGTHS = (64, 256, 1024, 4096, 16384)
# Fresh pages for every result cost more than some of the kernels; this way all contestants keep theirs.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 40)}


def inputs_of(batch, tokens, heads, size=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    r, k, v, dy = (torch.randn(batch, tokens, heads, size, generator=generator).to(dtype) for _ in range(4))
    w = (2 * torch.randn(batch, tokens, heads, size, generator=generator) - 2.5).to(dtype)
    return (r, k, v, w, torch.randn(heads, size, generator=generator)), dy


def calls_of(shape, size=64, dtype=torch.float32, version="6"):
    """Return the op's parts as functions without arguments."""
    inputs, dy = inputs_of(*shape, size, dtype)
    if version == "5":
        inputs = (*inputs[:3], inputs[3][0, 0].float(), inputs[4])
    forward, backward = (getattr(torch.ops.rwkv_ext, f"wkv{version}_{part}") for part in ("forward", "backward"))
    saved = forward(*inputs, None, None, True)[2:]
    return {
        "forward": lambda: forward(*inputs, None, None, False),
        "forward, saving": lambda: forward(*inputs, None, None, True),
        "backward": lambda: backward(dy, None, *inputs, None, None, *saved),
    }


def best_times(calls, repeats):
    times = {name: timing.best for name, timing in measure(calls, repeats, warm=True).items()}
    if "backward" in times:
        times["forward + backward"] = times["forward, saving"] + times["backward"]
    return times


def elements(shape, size=64):
    return shape[0] * shape[1] * shape[2] * size


def percent(shape, name, seconds, peak, size=64):
    return 100 * elements(shape, size) * COUNTS[name] * size / seconds / peak


def check():
    """Every way against the fp64 loop, before any is timed."""
    for version, op, plain_op in (("6.0", ops.wkv6, reference.wkv6), ("5.2", ops.wkv5, reference.wkv5)):
        for size, dtype in ((64, torch.float32), (64, torch.bfloat16), (32, torch.float32), (128, torch.float32)):
            given = make_inputs(version, 2, 160, 3, size, regime="typical", state=False, dtype=dtype)
            exact = outputs_and_gradients(plain_op, given.double())
            plain = outputs_and_gradients(plain_op, given)
            assert_close_ratio(outputs_and_gradients(op, given), exact, plain)
    inputs = make_inputs("6.0", 2, 160, 3, 64, regime="typical", state=False)
    truth = reference.wkv6(*inputs.double())[0]
    for peer in (wkv_peers.chunked, wkv_peers.token_by_token):
        error = (peer(*inputs[:5]).double() - truth).norm() / truth.norm()
        assert error < 1e-2, f"{peer.__name__}: {error:.1e}"
    r, k, v, w, u, state, _ = make_inputs("6.0", 5, 1, 3, 64)
    y, expected = reference.wkv6(*(x.double() for x in (r, k, v, w, u, state)))
    out = ops.wkv6_step(*(x[:, 0] for x in (r, k, v, w)), u, state)
    assert_close_ratio({"y": out, "state": state}, {"y": y[:, 0], "state": expected}, floor=1e-6)


def own_peak():
    """Multiply-adds per second of one thread now: a shared machine's clock is not the same for long."""
    return cpu_limits.probe(_load.build_info()["cpu_instruction_set"], seconds=0.3, mebibytes=1).multiply_adds


def kernels_table(repeats):
    rows = []
    for place, shape in SHAPES.items():
        peak = own_peak()
        times = best_times(calls_of(shape), repeats)
        peak = max(peak, own_peak())
        targets = TARGETS.get(place, TARGETS["memory"])
        for name, seconds in times.items():
            share = percent(shape, name, seconds, peak)
            target = f"{targets[name]}" if name in targets else ""
            rows.append([f"B{shape[0]} T{shape[1]} H{shape[2]}, {place}", name, f"{1e3 * seconds:.2f}",
                         f"{elements(shape) / seconds / 1e6:.0f}", f"{share:.0f}", target])  # fmt: skip
    return table(["shape, N = 64, fp32", "part", "ms", "Mtc/s", "% of peak", "target"], rows)


def peers_table(repeats):
    """Seconds of PyTorch's forms over ours, in turns."""
    rows = []
    for place, shape in list(SHAPES.items())[:2]:
        inputs, dy = inputs_of(*shape)
        leaves = [x.clone().requires_grad_() for x in inputs]

        def run(way, leaves=leaves, dy=dy):
            torch.autograd.grad(way(*leaves), leaves, dy)

        ways = {
            "rwkv_ext": lambda *x: ops.wkv6(*x)[0],
            "chunks of 16, clamped (PyTorch)": wkv_peers.chunked,
            "token by token (PyTorch)": wkv_peers.token_by_token,
        }
        calls = {name: lambda way=way, inputs=inputs: way(*inputs) for name, way in ways.items()}
        forward = best_times(calls, max(2, repeats // 4))
        both = best_times({name: lambda way=way: run(way) for name, way in ways.items()}, max(2, repeats // 8))
        for name in ways:
            rows.append([f"B{shape[0]} T{shape[1]} H{shape[2]}, {place}", name, f"{1e3 * forward[name]:.1f}",
                         f"{forward[name] / forward['rwkv_ext']:.1f}", f"{1e3 * both[name]:.1f}",
                         f"{both[name] / both['rwkv_ext']:.1f}"])  # fmt: skip
    return table(["shape", "way", "forward ms", "times ours", "forward + backward ms", "times ours"], rows)


def variants_table(repeats):
    rows = []
    for place, shape in SHAPES.items():
        calls = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            calls |= {f"{name} {part}": call for part, call in calls_of(shape, dtype=dtype).items()}
        calls |= {f"Eagle {part}": call for part, call in calls_of(shape, version="5").items()}
        times = {name: timing.best for name, timing in measure(calls, repeats, warm=True).items()}
        for kind in ("bf16", "Eagle"):
            ratios = [times[f"fp32 {part}"] / times[f"{kind} {part}"] for part in ("forward", "backward")]
            rows.append([f"B{shape[0]} T{shape[1]} H{shape[2]}, {place}", kind, *(f"{x:.2f}" for x in ratios)])
    for size in (32, 128):
        shape = (1, 1024, 8)
        times = best_times(calls_of(shape, size), repeats)
        peak = own_peak()
        shares = (f"{percent(shape, part, times[part], peak, size):.0f} %" for part in ("forward", "backward"))
        rows.append([f"B1 T1024 H8, N = {size}, fp32", "% of peak", *shares])
    return table(["shape", "speed of Finch in fp32 = 1", "forward", "backward"], rows)


def threads_table(repeats):
    rows = []
    for shape in (*SHAPES.values(), (1, 4096, 1)):
        calls, times = calls_of(shape), {}
        for _ in range(3):  # in turns
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for name, seconds in best_times(calls, max(2, repeats // 3)).items():
                    times[name, threads] = min(seconds, times.get((name, threads), seconds))
        torch.set_num_threads(1)
        speedups = (f"{times[name, 1] / times[name, 2]:.2f}" for name in COUNTS)
        rows.append([f"B{shape[0]} T{shape[1]} H{shape[2]}", *speedups])
    return table(["shape", *(f"{name}, 2 threads" for name in COUNTS)], rows)


def step_table(limits, repeats):
    rows = []
    for batch, heads in ((64, 32), (256, 32)):
        (r, k, v, w, u), _ = inputs_of(batch, 1, heads)
        state = torch.zeros(batch, heads, 64, 64)
        step = lambda: ops.wkv6_step(*(x[:, 0] for x in (r, k, v, w)), u, state)  # noqa: B023, E731
        for threads, limit in limits.items():
            torch.set_num_threads(threads)
            seconds = best_times({"step": step}, repeats)["step"]
            moved = 2 * state.numel() * 4 / seconds
            share = f"{100 * moved / limit.update_bytes:.0f}"
            rows.append([f"B{batch} H{heads}", threads, f"{1e6 * seconds / batch:.1f}", f"{moved / 1e9:.1f}", share])
    torch.set_num_threads(1)
    return table(["step, N = 64, fp32", "threads", "us per sequence", "GB/s of states", "% of updating memory"], rows)


def other_instruction_set(name, repeats):
    """The kernels of a narrower instruction set in a process of their own."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": name}
    command = [sys.executable, __file__, "--only-shares", "--repeats", str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def shares(repeats):
    peak = own_peak()
    return {
        f"B{shape[0]} T{shape[1]} H{shape[2]}, {place}": {
            name: percent(shape, name, seconds, peak) for name, seconds in best_times(calls_of(shape), repeats).items()
        }
        for place, shape in SHAPES.items()
    }


def draw(path, repeats):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {}
    for tokens in LENGTHS:
        shape = (1, tokens, 8)
        inputs, dy = inputs_of(*shape)
        leaves = [x.clone().requires_grad_() for x in inputs]
        ways = {"rwkv_ext": lambda *x: ops.wkv6(*x)[0], "PyTorch, chunks of 16": wkv_peers.chunked}
        calls = {}
        for name, way in ways.items():
            calls[f"{name}: forward"] = lambda way=way, inputs=inputs: way(*inputs)
            calls[f"{name}: forward + backward"] = lambda way=way, leaves=leaves, dy=dy: torch.autograd.grad(
                way(*leaves), leaves, dy
            )
        for name, seconds in best_times(calls, max(2, repeats // 3)).items():
            lines.setdefault(name, []).append(elements(shape) / seconds / 1e6)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, speeds in lines.items():
        dashed = "--" if "backward" in name else "-"
        axes.plot(LENGTHS, speeds, dashed, marker="o", color="C0" if "rwkv" in name else "C1", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="million token-channels per second")
    axes.set_title("WKV-6 on one thread, B 1, H 8, N 64, fp32")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main():
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path, help="folder for the report, such as benchmarks/results")
    parser.add_argument("--only-shares", action="store_true", help="percentages of the peak as JSON, nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only_shares:
        print(json.dumps(shares(options.repeats)))
        return
    check()
    limits = {threads: cpu_limits.probe(_load.build_info()["cpu_instruction_set"], threads) for threads in (1, 2)}
    peak = limits[1].multiply_adds
    lines = [
        "# WKV-6 on the CPU",
        "",
        header(),
        f"- kernels: {_load.build_info()['cpu_instruction_set']}; malloc keeps freed memory ({', '.join(KEEP_MEMORY)})",
        f"- peak of one thread: {peak / 1e9:.0f} billion fp32 multiply-adds per second; memory updated in place: "
        + ", ".join(f"{limit.update_bytes / 1e9:.1f} GB/s ({n} threads)" for n, limit in limits.items()),
        "- best of the repeats, each after an untimed call; tc: one token and channel. Every way was checked against "
        "the fp64 loop first.",
    ]
    for title, text in (
        ("One thread against the peak", kernels_table(options.repeats)),
        ("Against PyTorch, one thread, fp32", peers_table(options.repeats)),
        ("Other dtypes and shapes, one thread", variants_table(options.repeats)),
        ("Two threads against one", threads_table(options.repeats)),
        ("One-token steps", step_table(limits, options.repeats)),
    ):
        lines += ["", f"## {title}", "", text]
    if _load.build_info()["cpu_instruction_set"] == "avx512":
        found = other_instruction_set("avx2", options.repeats)
        rows = [[shape, *(f"{share[name]:.0f}" for name in COUNTS)] for shape, share in found.items()]
        lines += ["", "## AVX2 kernels, % of AVX2's own peak", "", table(["shape", *COUNTS], rows)]
    if options.output:
        stem = options.output / f"{device_slug()}_{time.strftime('%Y-%m')}_wkv"
        draw(stem.with_suffix(".png"), options.repeats)
        lines += ["", f"![speed against length]({stem.name}.png)"]
        stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def device_slug():
    """The first words of the processor's name, as the other reports' file names have them."""
    from common import device

    return "-".join(device().split("(")[0].lower().split()[:2]) or "cpu"


if __name__ == "__main__":
    main()
