"""Small runs of every kernel on one set of instances, for builds that are slow to compile: sanitizers and mutants."""

from typing import NamedTuple

import torch
from emulator.build import ROOT
from emulator.mutants import one_instance
from emulator.ops import Emulator

from rwkv_ext.testing import make_inputs

INSTANCES = ROOT / "csrc/cuda/instances"
TOKENS = 140  # more than a saved chunk, not a multiple of 16


class Stage(NamedTuple):
    """The instance that runs. Some barriers exist in some of them alone."""

    version: str = "6.0"
    parameter_dtype: torch.dtype = torch.bfloat16
    size: int = 64

    def __str__(self):
        types = str(self.parameter_dtype).removeprefix("torch.")
        return f"{'eagle' if self.version == '5.2' else 'finch'}-{types}-N{self.size}"

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


def run_chunk(stage, variant, program):
    return forward_and_backward(Emulator(variant, program, kernel="chunk"), inputs_for(stage))


def run_packed(stage, variant, program):
    emulator = Emulator(variant, program, kernel="chunk", segment_tokens=128)
    return forward_and_backward(emulator, inputs_for(stage, lengths=[0, 150, 1, 20, 0, 33]))


def run_summaries(stage, variant, program, kernel="chunk", dtype=torch.bfloat16):
    inputs = inputs_for(stage, dtype, 2 * TOKENS)
    emulator = Emulator(variant, program, kernel=kernel, segment_tokens=128)
    adjoint = emulator.adjoint_summary(inputs.r, inputs.w, inputs.v)
    return [*emulator.summary(inputs.k, inputs.v, inputs.w), adjoint]


def run_recurrent(stage, variant, program):
    emulator = Emulator(variant, program, kernel="recurrent")
    results = [forward_and_backward(emulator, inputs_for(stage, x, 40)) for x in (torch.float32, torch.bfloat16)]
    return [*results[0], *results[1]]


def run_recurrent_summaries(stage, variant, program):
    return run_summaries(stage, variant, program, "recurrent", torch.float32)


def run_step(stage, variant, program):
    inputs = inputs_for(stage, torch.float32, 1)
    w = inputs.w if stage.version == "5.2" else inputs.w[:, 0]
    return Emulator(variant, program).step(*(x[:, 0] for x in inputs[:3]), w, inputs.u, inputs.state)


RUNS = {  # by the instance file whose kernels it runs
    r"wkv_(forward|backward)_": run_chunk,
    r"wkv_segments": run_packed,
    r"wkv_summary_": run_summaries,
    r"wkv_recurrent_(forward|backward)_": run_recurrent,
    r"wkv_recurrent_summary_": run_recurrent_summaries,
    r"wkv_step_": run_step,
}
