"""The WKV operators: public functions over torch.ops.rwkv_ext.

Axes: B batch, T time, H heads, N head size. A state is [key, value] in its last two axes. dtypes: r, k, v and y share
one of float32, float64, bfloat16, float16; w and u are each float32 or r's dtype; states are float32 (float64 beside a
float64 r). The arithmetic runs in fp32 (fp64). w is the raw decay parameter omega; the op computes exp(-exp(w)) itself,
exact for every value: 0 where it underflows, exp(w) = inf included. Non-contiguous inputs work; T = 0 and B = 0 are
legal; N is any on the CPU and 32, 64 or 128 on a GPU. On the CPU denormal numbers count as zero. Results are bitwise
equal from run to run and for any number of threads. On a GPU nothing waits for the device, so the ops can be captured
in a CUDA graph; bfloat16 and float16 run on tensor cores, whose products of fp32 numbers keep 11 bits (tf32), and
float32 and float64 in their own arithmetic.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _load, _registration  # the second registers fake, autograd and autocast

_DOCUMENTATION = """
    Args:
        r, k, v: receptance, key, value [B, T, H, N].
        w: raw decay {w_shape}.
        u: bonus for the current token [H, N].
        state: state before the first token [B, H, N(key), N(value)]; None means zeros.
        cu_seqlens: int64 or int32 [sequences + 1] on r's device, for packed rows: B is 1, sequence i is tokens
            cu_seqlens[i] to cu_seqlens[i + 1] - 1, empty ones are allowed, and states are [sequences, H, N, N]. The CPU
            checks its values; CUDA cannot without a synchronisation and clamps them.

    Returns:
        y [B, T, H, N] in r's dtype, and the state after the last token.

    Gradients of r, k, v, w, u and state, from y and from the returned state, in the inputs' dtypes and accumulated in
    fp32 or better. Under autocast r, k, v run in the autocast dtype and w, u, state in fp32. Second derivatives,
    forward-mode derivatives and torch.func transforms raise NotImplementedError.

    Raises:
        ValueError: a shape, dtype, device or cu_seqlens that does not fit; the message names the argument.
        TypeError: an argument is not a tensor.
        RuntimeError: the op library is not built, or not for this device; torch.OutOfMemoryError is one.
"""


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run Finch's recurrence, data-dependent decay (arXiv 2404.05892, section 4.2)."""
    return _forward("wkv6_forward", r, k, v, w, u, state, cu_seqlens)


def wkv5(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run Eagle's recurrence, one decay per channel (arXiv 2404.05892, section 4.1)."""
    return _forward("wkv5_forward", r, k, v, w, u, state, cu_seqlens)


wkv6.__doc__ += "\n" + _DOCUMENTATION.format(w_shape="[B, T, H, N]")
wkv5.__doc__ += "\n" + _DOCUMENTATION.format(w_shape="[H, N]")


def wkv6_step(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, slots: Tensor | None = None
) -> Tensor:
    """Run one token of Finch's recurrence for decoding and update state in place."""
    return _step("wkv6_step", r, k, v, w, u, state, slots)


def wkv5_step(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, slots: Tensor | None = None
) -> Tensor:
    """Run one token of Eagle's recurrence for decoding and update state in place."""
    return _step("wkv5_step", r, k, v, w, u, state, slots)


_STEP_DOCUMENTATION = """
    Args:
        r, k, v: [B, H, N].
        w: raw decay {w_shape}.
        u: [H, N].
        state: [S, H, N, N] contiguous, float32 (float64 beside a float64 r); rows named by slots change in place.
        slots: int64 [B], the row of state that each batch row uses; -1 skips the row (its y is 0). None: S = B in
            order. Repeated slots are an error on the CPU, and so are slots that do not exist; CUDA cannot see the
            first and answers the second with NaN.

    Returns:
        y [B, H, N] in r's dtype. There is no gradient: tensors that require one are refused outside no_grad.
"""
wkv6_step.__doc__ += "\n" + _STEP_DOCUMENTATION.format(w_shape="[B, H, N]")
wkv5_step.__doc__ += "\n" + _STEP_DOCUMENTATION.format(w_shape="[H, N]")


def wkv6_summary(k: Tensor, v: Tensor, w: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Say what Finch's recurrence over these tokens does to any state: decay[..., None] * state_in + state."""
    return _summary("wkv6_summary", k=k, v=v, w=w, cu_seqlens=cu_seqlens)


def wkv5_summary(k: Tensor, v: Tensor, w: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Say what Eagle's recurrence over these tokens does to any state: decay[..., None] * state_in + state."""
    return _summary("wkv5_summary", k=k, v=v, w=w, cu_seqlens=cu_seqlens)


def wkv6_adjoint_summary(r: Tensor, w: Tensor, dy: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Say what Finch's backward over these tokens adds to any gradient of the state.

    dstate_in = decay[..., None] * dstate_out + the result, with the decay of wkv6_summary.
    """
    return _summary("wkv6_adjoint_summary", r=r, w=w, dy=dy, cu_seqlens=cu_seqlens)


def wkv5_adjoint_summary(r: Tensor, w: Tensor, dy: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Say what Eagle's backward over these tokens adds to any gradient of the state, as wkv6_adjoint_summary does."""
    return _summary("wkv5_adjoint_summary", r=r, w=w, dy=dy, cu_seqlens=cu_seqlens)


_SUMMARY_DOCUMENTATION = """
    With it the parts of a sequence, on one device or several, can run at once: each part's state before its first token
    follows from the summaries of the parts before it.

    Args:
        {tensors}: [B, T, H, N]; w, the raw decay, {w_shape}.
        cu_seqlens: as in {op}.

    Returns:
        {returns}, float32 (float64 beside float64 inputs), one per sequence. There is no gradient.
"""
_DECAY_AND_STATE = "decay [B, H, N], the product of exp(-exp(w)), and state [B, H, N(key), N(value)], from zeros"
_DSTATE = "dstate [B, H, N(key), N(value)], the gradient of sum(y * dy) by the state before the first token"
wkv6_summary.__doc__ += "\n" + _SUMMARY_DOCUMENTATION.format(
    tensors="k, v", w_shape="[B, T, H, N]", op="wkv6", returns=_DECAY_AND_STATE
)
wkv5_summary.__doc__ += "\n" + _SUMMARY_DOCUMENTATION.format(
    tensors="k, v", w_shape="[H, N]", op="wkv5", returns=_DECAY_AND_STATE
)
wkv6_adjoint_summary.__doc__ += "\n" + _SUMMARY_DOCUMENTATION.format(
    tensors="r, dy", w_shape="[B, T, H, N]", op="wkv6", returns=_DSTATE
)
wkv5_adjoint_summary.__doc__ += "\n" + _SUMMARY_DOCUMENTATION.format(
    tensors="r, dy", w_shape="[H, N]", op="wkv5", returns=_DSTATE
)


def _forward(name, r, k, v, w, u, state, cu_seqlens):
    _load.require_ops()
    inputs = {"r": r, "k": k, "v": v, "w": w, "u": u, "state": state, "cu_seqlens": cu_seqlens}
    tensors = _tensors_of(name.removesuffix("_forward"), inputs, optional=("state", "cu_seqlens"))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    return _call(name, *inputs.values(), save)[:2]


def _step(name, r, k, v, w, u, state, slots):
    _load.require_ops()
    inputs = {"r": r, "k": k, "v": v, "w": w, "u": u, "state": state, "slots": slots}
    tensors = _tensors_of(name, inputs, optional=("slots",))
    if torch.is_grad_enabled():
        for argument, x in tensors.items():
            if x.requires_grad:
                raise ValueError(
                    f"{name}: {argument} must not require a gradient, because this op has none; call it under "
                    f"torch.no_grad(), or use {name.removesuffix('_step')} to train"
                )
    y = _call(name, *inputs.values())
    # The dispatcher does not count the in-place change; without this autograd would miss a stale saved state.
    torch.autograd.graph.increment_version(state)
    return y


def _summary(name, **inputs):
    _load.require_ops()
    _tensors_of(name, inputs, optional=("cu_seqlens",))
    return _call(name, *inputs.values())


def _call(name, *arguments):
    op = getattr(torch.ops.rwkv_ext, name)
    return op(*arguments) if torch.compiler.is_compiling() else _registration.with_torchs_errors(op, *arguments)


def _tensors_of(name, inputs, optional):
    """Return the tensors among inputs; refuse other types, which C++ cannot see, and transforms (below)."""
    tensors = {argument: x for argument, x in inputs.items() if x is not None or argument not in optional}
    for argument, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(x).__name__}")
    _refuse_transforms(name, tensors.values())
    return tensors


def _refuse_transforms(name, tensors):
    """Forward-mode derivatives would silently come out as zero and torch.func's fail in torch's words: refuse here."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        wrapped = torch._C._functorch
        if any(wrapped.is_batchedtensor(x) for x in tensors):
            raise NotImplementedError(f"{name}: torch.vmap is not implemented; give the op a batch axis B instead")
        if any(wrapped.is_functorch_wrapped_tensor(x) or x.requires_grad for x in tensors):
            raise NotImplementedError(
                f"{name}: torch.func transforms are not implemented; use reverse mode (backward, torch.autograd.grad)"
            )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"{name}: forward-mode derivatives are not implemented; use reverse mode (backward)")
