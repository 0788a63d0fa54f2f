"""Every barrier and every wait of the kernels is needed, and the tests would notice if one were missing.

Each is left out, one at a time, and small cases run under ThreadSanitizer. Noticed is: a race, a broken rule of the
emulator (deadlock, copies that nobody waits for), or results with other bits (poison that was read is NaN).
"""

import re
from typing import NamedTuple

import pytest
import torch
from emulator.build import ROOT, TSAN, build, depends_on
from emulator.mutants import find_sites, one_instance, unparsed_calls, without
from emulator.ops import Emulator, EmulatorError

from rwkv_ext.testing import make_inputs

pytestmark = pytest.mark.cpu
INSTANCES = ROOT / "csrc/cuda/instances"
SITES = find_sites()
TOKENS = 140  # more than a saved chunk, not a multiple of 16


class Stage(NamedTuple):
    """The instance that runs. Some barriers exist in some of them alone."""

    version: str = "6.0"
    parameter_dtype: torch.dtype = torch.bfloat16
    size: int = 64

    def sources(self):
        kind = "float" if self.parameter_dtype == torch.float32 else "BFloat16"
        chunk = f"BFloat16, {kind}, {self.size}, {'true' if self.version == '5.2' else 'false'}"
        recurrent = f"float, {self.size}"
        names = {f"wkv_{x}_bf16_{self.size}": chunk for x in ("forward", "backward", "summary")}
        names |= {f"wkv_recurrent_{x}_fp32": recurrent for x in ("forward", "backward", "summary")}
        names |= {"wkv_step_fp32": recurrent}
        instances = [one_instance(INSTANCES / f"{name}.cu", arguments) for name, arguments in names.items()]
        return [ROOT / "csrc/cuda/wkv_dispatch.cu", INSTANCES / "wkv_segments.cu", *instances]


STAGES = [Stage(), Stage("5.2", torch.float32), Stage(size=128), Stage(size=32), Stage(parameter_dtype=torch.float32)]


def inputs_for(stage, dtype=torch.bfloat16, tokens=TOKENS, lengths=None):
    parameter_dtype = stage.parameter_dtype if dtype == torch.bfloat16 else dtype
    options = dict(regime="mixed", dtype=dtype, parameter_dtype=parameter_dtype, lengths=lengths)
    return make_inputs(stage.version, 1, tokens, 1, stage.size, **options)


def forward_and_backward(emulator, inputs):
    y, state_out, saved = emulator.forward(*inputs)
    dstate_out = torch.ones_like(state_out)
    return [y, state_out, *emulator.backward(y, dstate_out, *inputs[:5], saved, inputs.cu_seqlens)]


def run_chunk(stage, program):
    return forward_and_backward(Emulator(TSAN, program, kernel="chunk"), inputs_for(stage))


def run_packed(stage, program):
    emulator = Emulator(TSAN, program, kernel="chunk", segment_tokens=128)
    return forward_and_backward(emulator, inputs_for(stage, lengths=[0, 150, 1, 20, 0, 33]))


def run_summaries(stage, program, kernel="chunk", dtype=torch.bfloat16):
    inputs = inputs_for(stage, dtype, 2 * TOKENS)
    emulator = Emulator(TSAN, program, kernel=kernel, segment_tokens=128)
    adjoint = emulator.adjoint_summary(inputs.r, inputs.w, inputs.v)
    return [*emulator.summary(inputs.k, inputs.v, inputs.w), adjoint]


def run_recurrent(stage, program):
    emulator = Emulator(TSAN, program, kernel="recurrent")
    results = [forward_and_backward(emulator, inputs_for(stage, x, 40)) for x in (torch.float32, torch.bfloat16)]
    return [*results[0], *results[1]]


def run_recurrent_summaries(stage, program):
    return run_summaries(stage, program, "recurrent", torch.float32)


def run_step(stage, program):
    inputs = inputs_for(stage, torch.float32, 1)
    w = inputs.w if stage.version == "5.2" else inputs.w[:, 0]
    return Emulator(TSAN, program).step(*(x[:, 0] for x in inputs[:3]), w, inputs.u, inputs.state)


RUNS = {  # by the instance file whose kernels it runs
    r"wkv_(forward|backward)_": run_chunk,
    r"wkv_segments": run_packed,
    r"wkv_summary_": run_summaries,
    r"wkv_recurrent_(forward|backward)_": run_recurrent,
    r"wkv_recurrent_summary_": run_recurrent_summaries,
    r"wkv_step_": run_step,
}


@pytest.fixture(scope="module")
def baseline():
    """Return f(stage, run): the results of the kernels as they are, which nothing may complain about."""
    known = {}

    def results(stage, run):
        if (stage, run) not in known:
            known[stage, run] = run(stage, build(TSAN, sources=stage.sources()))
        return known[stage, run]

    return results


def complaint(stage, site, baseline):
    """Return what a run says about the kernels without the call at the site, or None."""
    sources = stage.sources()
    build(TSAN, sources=sources)
    changed = [x.stem for x in sources if depends_on(TSAN, x, site.header)]
    runs = [run for pattern, run in RUNS.items() if any(re.match(pattern, x) for x in changed)]
    assert runs, f"no run covers {site.header}"
    program = build(TSAN, sources=sources, instead=without(site))
    for run in runs:
        expected = baseline(stage, run)
        try:
            actual = run(stage, program)
        except EmulatorError as error:
            return str(error)
        for x, y in zip(actual, expected):
            if not torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)):
                return "other bits"
    return None


def test_no_call_escapes_the_parser():
    assert len(SITES) > 20
    assert not (lines := unparsed_calls()), "write one call and its semicolon to a line:\n" + "\n".join(lines)


@pytest.mark.kernels
@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("run", RUNS.values(), ids=lambda run: run.__name__)
def test_the_kernels_as_they_are_have_no_race(stage, run, baseline):
    baseline(stage, run)


@pytest.mark.kernels
@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_missing_barrier_or_wait_is_noticed(site, baseline):
    assert any(complaint(stage, site, baseline) for stage in STAGES), (
        f"csrc/{site.header}:{site.line}: nothing notices when {site.call}() is missing: "
        "is it needed? If so, add a case that shows it."
    )
