"""Check, then time the WKV ops on a GPU, beside whatever else can be imported; write one report with pictures.

    make bench-gpu                                    # or: python benchmarks/bench_gpu.py
    python benchmarks/bench_gpu.py --upstream ~/RWKV-LM --output /tmp/report
    python benchmarks/bench_gpu.py --device cpu --toy --output /tmp/report     # the harness itself, without a GPU

Needs the built package, torch and matplotlib, and neither nvcc nor a build here. No time is printed for a wrong result.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch
from common import ROOT, header, table
from common import device as device_name
from gpu_cases import CASES, DECODE_BATCHES, FIGURE_LENGTHS, LONG, MAIN, decode_case, figure_case
from gpu_check import ALLOWED, Expected, step_errors
from gpu_clock import Clock
from gpu_peers import find_peers, ours
from gpu_report import case_table, decode_table, draw_sweep, error_text, ms, peer_lines, peer_table, percent

from rwkv_ext import _load, ops

OPS = {"5.2": "wkv5", "6.0": "wkv6"}
NOTES = """\
- times: milliseconds, median (best .. worst) of single calls between CUDA events, the L2 cache overwritten before each
- of limit: the time that the least bytes take (inputs read once, outputs written once) by the time measured
- errors: relative rms of one head against fp64
- memory: inputs, the gradient that comes in, output, gradients that go out, and everything in between"""


class Bench:
    def __init__(self, options):
        self.device, self.toy = torch.device(options.device), options.toy
        self.clock = Clock(self.device, budget=0.02 if options.toy else 0.4)
        self.deadline = time.monotonic() + 60 * options.minutes
        self.wrong, self.left_out = [], []
        self.bandwidth = self.clock.copy_bandwidth()
        self.peers, self.missing = find_peers(options.upstream, self.device)
        self.sized = (lambda case: case.toy()) if options.toy else (lambda case: case)

    def late(self, what: str) -> bool:
        if time.monotonic() < self.deadline:
            return False
        self.left_out.append(what)
        return True

    def attempt(self, what: str, function):
        """Return function(), or None with a line in the report where it fails: one peer must not end the run."""
        try:
            return function()
        except Exception as error:  # kernels and peers may fail in any way
            text = str(error).strip().splitlines()
            self.left_out.append(f"{what}: {type(error).__name__}: {text[0] if text else ''}")
            return None
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def judge(self, what: str, errors: dict[str, float], dtype) -> bool:
        """Remember a wrong result of ours; its times are not taken."""
        if all(x <= ALLOWED[dtype] for x in errors.values()):
            return True
        self.wrong.append(f"{what}: " + ", ".join(f"{name} {x:.1e}" for name, x in errors.items()))
        return False

    # ---- our ops, every case ----

    def case(self, case) -> dict:
        case = self.sized(case)
        inputs = case.make(self.device)
        dy = torch.randn_like(inputs.r)
        errors = ours(case, inputs, dy).errors(Expected(case.version, inputs, dy))
        row = {"case": case, "errors": error_text(errors)}
        if not self.judge(f"{case.name}, {case.shape}", errors, case.dtype):
            return row
        return row | self.passes(case, inputs, dy) | {"memory": self.training_memory(case, ours)}

    def passes(self, case, inputs, dy) -> dict:
        """Time the raw ops, without autograd around them."""
        op = OPS[case.version]
        forward, backward = (getattr(torch.ops.rwkv_ext, f"{op}_{kind}") for kind in ("forward", "backward"))
        saved = forward(*inputs, True)[2:]
        return {
            "forward": self.clock.time(lambda: forward(*inputs, False)),
            "saving": self.clock.time(lambda: forward(*inputs, True)),
            "backward": self.clock.time(lambda: backward(dy, None, *inputs, *saved)),
        }

    def training_memory(self, case, prepare) -> int | None:
        """Bytes of inputs, dy, output, gradients and everything in between."""

        def train():
            inputs = case.make(self.device)
            return prepare(case, inputs, torch.randn_like(inputs.r)).train()

        return self.clock.peak_bytes(train)

    # ---- peers ----

    def compare(self, case, peers) -> dict[str, dict]:
        """Time forward, and forward and backward, of ours and of the peers that take the case."""
        case = self.sized(case)
        inputs = case.make(self.device)
        dy = torch.randn_like(inputs.r)
        expected = Expected(case.version, inputs, dy)
        rows = {}
        for name, prepare, refuses in [("rwkv_ext", ours, lambda _: ""), *peers]:
            what = f"{name}, {case.shape}"
            if refuses(case) or self.late(what):
                continue
            run = self.attempt(what, lambda prepare=prepare: prepare(case, inputs, dy))
            errors = run and self.attempt(what, lambda run=run: run.errors(expected))
            if not errors or (name == "rwkv_ext" and not self.judge(what, errors, case.dtype)):
                continue
            row = {"errors": error_text(errors)}
            row["forward"] = self.attempt(what, lambda run=run: self.clock.time(run.forward))
            row["train"] = self.attempt(what, lambda run=run: self.clock.time(run.train))
            del run
            row["memory"] = self.attempt(what, lambda prepare=prepare: self.training_memory(case, prepare))
            row["seconds"] = row["train"] and row["train"].median
            rows[name] = row
        return rows

    def sweep(self) -> dict[str, dict[int, dict]]:
        """The paper's Figures 6 and 7: forward and backward of the attention-like kernel alone."""
        lengths = [16 * 2**i for i in range(3)] if self.toy else FIGURE_LENGTHS
        results: dict[str, dict[int, dict]] = {}
        for tokens in lengths:
            for version in OPS:
                peers = self.peers if version == "6.0" else [p for p in self.peers if "wkv5" in p.name]
                case = figure_case(version, tokens)
                found = self.attempt(case.shape, lambda case=case, peers=peers: self.compare(case, peers))
                for name, row in (found or {}).items():
                    label = f"rwkv_ext {OPS[version]}" if name == "rwkv_ext" else name
                    results.setdefault(label, {})[tokens] = row
        return results

    # ---- decoding ----

    def decode(self, version: str, batch: int) -> list:
        case = decode_case(version, batch)
        case = case.toy() if self.toy else case
        inputs = case.make(self.device)
        state = torch.randn(case.batch, case.heads, case.size, case.size, device=self.device)
        errors = step_errors(version, inputs, state)
        name = f"{OPS[version]}_step"
        row = [name, case.batch]
        if not self.judge(f"{name}, batch {case.batch}", errors, case.dtype):
            return [*row, *[""] * 5, *(f"{x:.1e}" for x in errors.values())]
        token = [x[:, 0].contiguous() if x.dim() == 4 else x for x in inputs[:4]]
        step = getattr(ops, name)
        with torch.no_grad():
            eager = self.clock.time(lambda: step(*token, inputs.u, state))
            graph = self.clock.time(self.clock.replayed(lambda: step(*token, inputs.u, state)))
        moved = 2 * state.nbytes + 2 * case.token_channels * len(token[:4])
        rate = f"{moved / graph.median / 1e9:.0f}"
        tokens = f"{case.batch / graph.median:.0f}"
        limit = percent(moved / self.bandwidth, graph)
        return [*row, ms(graph), limit, rate, ms(eager), tokens, *(f"{x:.1e}" for x in errors.values())]


def targets_table(rows: dict[str, dict], sweep) -> str:
    """The times that the design promises on an H200, beside what was measured."""

    def milliseconds(case, what):
        timing = rows.get(case.name, {}).get(what)
        return timing and 1e3 * timing.median

    def ratio(what):
        long, short = milliseconds(LONG, what), milliseconds(MAIN, what)
        return long and short and long / short

    longest = sweep.get("rwkv_ext wkv6", {}).get(FIGURE_LENGTHS[-1], {}).get("memory")
    lines = [
        (f"forward, ms, {MAIN.shape}", 0.45, 0.45, milliseconds(MAIN, "forward")),
        (f"forward, saving for backward, ms, {MAIN.shape}", 0.60, 0.60, milliseconds(MAIN, "saving")),
        (f"backward, ms, {MAIN.shape}", 0.95, 1.1, milliseconds(MAIN, "backward")),
        (f"forward, {LONG.shape}, times {MAIN.shape}", 1.8, 2.0, ratio("forward")),
        (f"backward, {LONG.shape}, times {MAIN.shape}", 1.8, 2.0, ratio("backward")),
        (f"forward + backward, GB, T{FIGURE_LENGTHS[-1]}", 12.5, 12.5, longest and longest / 1e9),
    ]
    cells = []
    for what, target, accepted, measured in lines:
        if not measured:
            cells.append([what, target, accepted, "", ""])
            continue
        verdict = "met" if measured <= target else "accepted" if measured <= accepted else "missed"
        cells.append([what, target, accepted, f"{measured:.2f}", verdict])
    return table(["what", "target", "accepted", "measured", ""], cells)


def report(bench, rows, compared, decoded, sweep, folder: Path, stem: str) -> str:
    pictures = []
    for field, label, scale in (("seconds", "forward + backward, ms", 1e3), ("memory", "memory, GB", 1e-9)):
        path = folder / f"{stem}_{'time' if field == 'seconds' else field}.png"
        draw_sweep(sweep, field, label, scale, path)
        pictures.append(f"![{label}]({path.name})")
    lengths = sorted({tokens for by_length in sweep.values() for tokens in by_length})
    sweep_rows = [row for tokens in lengths for row in sweep_lines(sweep, tokens)]
    parts = [
        "# WKV on a GPU",
        header(),
        f"- limit: a large copy moves {bench.bandwidth / 1e9:.0f} GB/s, read and written\n" + NOTES,
        *(["Toy sizes on a CPU: this report tests the harness; its times mean nothing."] if bench.toy else []),
        "## Targets (NVIDIA H200)",
        targets_table(*(({}, {}) if bench.toy else (rows, sweep))),
        "## The ops",
        case_table(list(rows.values()), bench.bandwidth),
        "## Beside others",
        "FLA's log w is computed, in fp32, before its times begin. Attention and Mamba compute other functions at the "
        "same model width; Mamba's layer has twice the channels.",
        peer_table(compared),
        "## Decoding: one token for a batch",
        decode_table(decoded),
        "## Time and memory against length (Figures 6 and 7 of arXiv 2404.05892: B 8, D 4096, N 64)",
        peer_table(sweep_rows),
        *pictures,
    ]
    for title, lines in (
        ("Wrong results (no times)", bench.wrong),
        ("Failed or left out", bench.left_out),
        ("Not here", bench.missing),
    ):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def sweep_lines(sweep, tokens: int) -> list[list]:
    found = {name: by_length[tokens] for name, by_length in sweep.items() if tokens in by_length}
    own = found.get("rwkv_ext wkv6", {})
    rows = {name.replace("rwkv_ext wkv6", "rwkv_ext"): row for name, row in found.items()}
    return peer_lines(f"T {tokens}", rows) if own else peer_lines(f"T {tokens}", found)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="small sizes: test the harness, on a CPU too")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the report")
    parser.add_argument("--minutes", type=float, default=7.0, help="start nothing new after this long")
    parser.add_argument("--upstream", type=Path, help="a checkout of RWKV-LM: build and time its CUDA kernels too")
    parser.add_argument("--only", nargs="+", default=["cases", "peers", "decode", "sweep"], help="these parts alone")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    options = parse(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench_gpu: no CUDA device; --device cpu --toy runs the harness itself", file=sys.stderr)
        return 1
    if options.device.startswith("cuda") and not _load.has_cuda_kernels("wkv6_forward", "wkv6_backward"):
        print("bench_gpu: this build of rwkv_ext has no CUDA kernels; RWKV_EXT_CUDA=1 make build", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") + time.strftime("_%Y-%m_wkv")
    torch.manual_seed(0)
    bench = Bench(options)
    rows, compared, decoded, sweep = {}, [], [], {}
    if "cases" in options.only:
        for case in CASES:
            if not bench.late(case.name):
                row = bench.attempt(case.name, lambda case=case: bench.case(case))
                rows |= {case.name: row} if row else {}
    if "peers" in options.only:
        for case in (MAIN, LONG):
            found = bench.attempt(case.name, lambda case=case: bench.compare(case, bench.peers)) or {}
            compared += peer_lines(bench.sized(case).shape, found)
    if "decode" in options.only:
        for version in OPS:
            for batch in DECODE_BATCHES[:2] if options.toy else DECODE_BATCHES:
                if not bench.late(f"decode {batch}"):
                    row = bench.attempt(f"decode {batch}", lambda v=version, b=batch: bench.decode(v, b))
                    decoded += [row] if row else []
    if "sweep" in options.only:
        sweep = bench.sweep()
    text = report(bench, rows, compared, decoded, sweep, options.output, stem)
    (options.output / f"{stem}.md").write_text(text)
    print(text)
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
