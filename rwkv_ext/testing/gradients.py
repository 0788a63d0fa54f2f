"""Running a WKV op forward and backward, and checking its gradients by finite differences."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .inputs import WkvInputs, normal

GRADIENTS = ("dr", "dk", "dv", "dw", "du", "dstate")


def outputs_and_gradients(
    op: Callable,
    inputs: WkvInputs,
    *,
    gradients: Sequence[str] = GRADIENTS,
    cotangents: Sequence[str] = ("y", "state_out"),
    seed: int = 1,
) -> dict[str, Tensor]:
    """Run op forward and backward and return y, state_out and the wanted gradients by name.

    Args:
        gradients: which inputs require one: any of dr, dk, dv, dw, du, dstate (dstate only where there is a state).
        cotangents: which outputs the loss uses. Their gradients are reproducible and about normal, with so few digits
            that every dtype holds them exactly: a run in fp64 judges the same problem. A gradient that autograd does
            not reach from there is zeros.
    """
    wanted = [f"d{name}" in gradients and x is not None for name, x in zip(inputs._fields, inputs, strict=True)]
    leaves = WkvInputs(*(x.detach().requires_grad_() if need else x for x, need in zip(inputs, wanted, strict=True)))
    results = dict(zip(("y", "state_out"), op(*leaves), strict=True))
    generator = torch.Generator("cpu").manual_seed(seed)
    used = []
    for name, x in results.items():
        cotangent = (normal(x.shape, generator) * 32).round().clamp(-127, 127).div(32).to(x)
        if name in cotangents and x.requires_grad:
            used.append((x, cotangent))
    sources = {f"d{name}": x for name, x in leaves._asdict().items() if x is not None and x.requires_grad}
    results |= {name: torch.zeros_like(x) for name, x in sources.items()}
    if used:
        roots, seeds = zip(*used, strict=True)
        grads = torch.autograd.grad(roots, list(sources.values()), seeds, materialize_grads=True)
        results |= zip(sources, grads, strict=True)
    return {name: x.detach() for name, x in results.items()}


def gradcheck_wkv(op: Callable, inputs: WkvInputs, *, fast_mode: bool = False) -> None:
    """Compare op's gradients of every input, from y and state_out, with finite differences in fp64.

    Takes T N calls of op for every input; use fast_mode (random projections) for more than a few hundred elements.

    Raises:
        ValueError: inputs are not fp64.
        torch.autograd.gradcheck.GradcheckError: the gradients differ.
    """
    if inputs.r.dtype != torch.float64:
        raise ValueError(f"gradcheck_wkv: inputs must be float64, got {inputs.r.dtype}; use inputs.double()")
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:6] if x is not None]

    def run(*tensors):
        state = tensors[5] if inputs.state is not None else None
        y, state_out = op(*tensors[:5], state, inputs.cu_seqlens)
        return y, state_out

    torch.autograd.gradcheck(run, leaves, fast_mode=fast_mode)
