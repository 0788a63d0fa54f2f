"""What the dispatcher must know about the ops beside their kernels: fake (shapes), autograd, autocast, vmap.

The schemas are in csrc/ops.cpp, the public functions in ops.py.
"""

from functools import partial

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard

from . import _load

CHUNK_TOKENS = 128  # tokens between two states saved for backward: kChunkTokens of csrc/wkv_params.h
SCORES_PER_TOKEN = 16  # likewise, by the CUDA kernels for 16-bit activations: kScoresPerToken
AUTOCAST_KEYS = {"cpu": DispatchKey.AutocastCPU, "cuda": DispatchKey.AutocastCUDA}


def with_torchs_errors(op, *arguments):
    """Call op; torch.OutOfMemoryError keeps its type, which the stable ABI takes away."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        text = str(error)
        if type(error) is not RuntimeError:
            raise
        if "CUDA out of memory" in text:
            raise torch.OutOfMemoryError(text) from None
        # Torch before 2.13 names a line of its header and no reason; on a GPU there is one reason for this call.
        on_gpu = any(getattr(x, "is_cuda", False) for x in arguments)
        if on_gpu and "new_empty" in text and "API call failed" in text:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory in {op}; torch {torch.__version__} does not say how much was asked for"
            ) from error
        raise


def _state_dtype(r):
    return torch.float64 if r.dtype == torch.float64 else torch.float32


def _check(op, axes, **tensors):
    """Check what the fakes below rely on, in the words of the kernels, which never see tensors without data."""
    (first, like), *others = tensors.items()
    dims = axes.count(",") + 1
    if like.dim() != dims:
        raise ValueError(f"{op}: {first} must have {dims} dimensions {axes}, got {list(like.shape)}")
    for name, x in others:
        if x is not None and x.device != like.device:
            raise ValueError(
                f"{op}: {name} must be on {first}'s device {like.device}, got {x.device}; "
                f"move it with .to({first}.device)"
            )


def has_scores(r):
    """Tell whether a forward that saves for backward saves scores, as has_scores of csrc/wkv_prepare.h does."""
    return r.is_cuda and r.dtype in (torch.bfloat16, torch.float16)


def _forward_fake(op, r, k, v, w, u, state, cu_seqlens, save_for_backward):
    _check(op, "[B, T, H, N]", r=r, k=k, v=v, w=w, u=u, state=state, cu_seqlens=cu_seqlens)
    batch, tokens, heads, size = r.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = (tokens + CHUNK_TOKENS - 1) // CHUNK_TOKENS

    def new(*shape):
        return r.new_empty(shape, dtype=_state_dtype(r))

    if not save_for_backward:
        chunk_states = new(0)
    elif cu_seqlens is None:
        chunk_states = new(batch, chunks, heads, size, size)
    else:
        chunk_states = new(chunks + sequences - 1, heads, size, size)
    if save_for_backward and has_scores(r):
        scores = r.new_empty(batch, heads, tokens, SCORES_PER_TOKEN, dtype=torch.float32)
    else:
        scores = new(0)
    y = r.new_empty(batch, tokens, heads, size)
    return y, new(sequences, heads, size, size), chunk_states, scores


def _backward_fake(op, dy, dstate_out, r, k, v, w, u, state, cu_seqlens, chunk_states, scores):
    _check(op, "[B, T, H, N]", r=r, dy=dy, k=k, v=v, w=w, u=u, state=state, chunk_states=chunk_states)
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (0,) if state is None else (sequences, r.shape[2], r.shape[3], r.shape[3])
    return *(x.new_empty(x.shape) for x in (r, k, v, w, u)), r.new_empty(shape, dtype=_state_dtype(r))


def _summary_fake(op, k, v, w, cu_seqlens):
    _check(op, "[B, T, H, N]", k=k, v=v, w=w, cu_seqlens=cu_seqlens)
    state = _state_like(k, cu_seqlens)
    return state.new_empty(state.shape[:3]), state


def _adjoint_summary_fake(op, r, w, dy, cu_seqlens):
    _check(op, "[B, T, H, N]", r=r, w=w, dy=dy, cu_seqlens=cu_seqlens)
    return _state_like(r, cu_seqlens)


def _state_like(r, cu_seqlens):
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return r.new_empty(sequences, r.shape[2], r.shape[3], r.shape[3], dtype=_state_dtype(r))


def _step_fake(op, r, k, v, w, u, state, slots):
    _check(op, "[B, H, N]", r=r, k=k, v=v, w=w, u=u, state=state, slots=slots)
    return r.new_empty(r.shape)


def _save(ctx, inputs, output):
    r, k, v, w, u, state, cu_seqlens, _ = inputs
    _, _, chunk_states, scores = output
    ctx.save_for_backward(r, k, v, w, u, state, cu_seqlens, chunk_states, scores)
    ctx.mark_non_differentiable(chunk_states, scores)
    ctx.set_materialize_grads(False)


def _backward_formula(name):
    def backward(ctx, dy, dstate_out, _chunk_states, _scores):
        if dy is None and dstate_out is None:
            return (None,) * 8
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them on that one read
        op = getattr(torch.ops.rwkv_ext, name + "_backward")
        *gradients, dstate = with_torchs_errors(op, dy, dstate_out, *saved)
        return (*gradients, None if saved[5] is None else dstate, None, None)

    return backward


def refuse(name, what, instead):
    def refuse(*_args, **_kwargs):
        raise NotImplementedError(f"{name}: {what} not implemented; {instead}")

    return refuse


def _cast(x, dtype):
    """As torch's own autocast: fp64 and integers stay, and the kernel says what does not fit."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _autocast(op, device):
    keys = DispatchKeySet(AUTOCAST_KEYS[device])

    names = [argument.name for argument in op._schema.arguments]

    def cast_and_call(*given):
        if given[0].is_floating_point() and given[0].dtype != torch.float64:
            dtypes = dict.fromkeys(("r", "k", "v", "dy"), torch.get_autocast_dtype(device))
            dtypes |= dict.fromkeys(("w", "u"), torch.float32)
            if not op._schema.is_mutable:  # the state of a step is updated in place and so never cast
                dtypes["state"] = torch.float32
            named = zip(names, given, strict=True)
            given = [_cast(x, dtypes[name]) if name in dtypes and x is not None else x for name, x in named]
        with _ExcludeDispatchKeyGuard(keys):
            return op(*given)

    return cast_and_call


def _register(library):
    for name in ("wkv5", "wkv6"):
        forward, backward, step = (f"rwkv_ext::{name}_{kind}" for kind in ("forward", "backward", "step"))
        summaries = [f"rwkv_ext::{name}_{kind}" for kind in ("summary", "adjoint_summary")]
        torch.library.register_fake(forward, partial(_forward_fake, name))
        torch.library.register_fake(backward, partial(_backward_fake, f"{name}_backward"))
        torch.library.register_fake(step, partial(_step_fake, f"{name}_step"))
        for summary, fake in zip(summaries, (_summary_fake, _adjoint_summary_fake), strict=True):
            op = summary.removeprefix("rwkv_ext::")
            torch.library.register_fake(summary, partial(fake, op))
            torch.library.register_autograd(summary, refuse(op, "gradients are", f"differentiate {name} instead"))
        torch.library.register_autograd(forward, _backward_formula(name), setup_context=_save)
        torch.library.register_autograd(
            backward, refuse(name, "second derivatives are", "differentiate once, or use rwkv_ext.reference")
        )
        for op in (forward, backward, step, *summaries):
            torch.library.register_vmap(op, refuse(name, "torch.vmap is", "give the op a batch axis B instead"))
        for kind in ("forward", "step", "summary", "adjoint_summary"):
            overload = getattr(torch.ops.rwkv_ext, f"{name}_{kind}").default
            for device, key in AUTOCAST_KEYS.items():
                library.impl(f"{name}_{kind}", _autocast(overload, device), key.name)


if _load.error is None:
    _library = torch.library.Library("rwkv_ext", "IMPL")  # its registrations live as long as it does
    _register(_library)
