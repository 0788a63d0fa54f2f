"""What the dispatcher must know about the ops beside their kernels: fake (shapes), autograd, autocast, vmap.

The schemas are in csrc/ops.cpp, the public functions in ops.py.
"""

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard

from . import _load

CHUNK_TOKENS = 128  # tokens between two states saved for backward: kChunkTokens of csrc/wkv_params.h
AUTOCAST_KEYS = {"cpu": DispatchKey.AutocastCPU, "cuda": DispatchKey.AutocastCUDA}


def _state_dtype(r):
    return torch.float64 if r.dtype == torch.float64 else torch.float32


def _forward_fake(r, k, v, w, u, state, cu_seqlens, save_for_backward):
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
    y = r.new_empty(batch, tokens, heads, size)
    return y, new(sequences, heads, size, size), chunk_states, new(0)


def _backward_fake(dy, dstate_out, r, k, v, w, u, state, cu_seqlens, chunk_states, scores):
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (0,) if state is None else (sequences, r.shape[2], r.shape[3], r.shape[3])
    return *(x.new_empty(x.shape) for x in (r, k, v, w, u)), r.new_empty(shape, dtype=_state_dtype(r))


def _step_fake(r, k, v, w, u, state, slots):
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
        *gradients, dstate = op(dy, dstate_out, *saved)
        return (*gradients, None if saved[5] is None else dstate, None, None)

    return backward


def _refuse(name, what, instead):
    def refuse(*_args, **_kwargs):
        raise NotImplementedError(f"{name}: {what} not implemented; {instead}")

    return refuse


def _autocast(op, device):
    keys = DispatchKeySet(AUTOCAST_KEYS[device])

    def cast_and_call(r, k, v, w, u, *rest):
        # rest begins with the state; that of a step is updated in place and so never cast.
        if r.is_floating_point() and r.dtype != torch.float64:
            r, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (r, k, v))
            w, u = w.float(), u.float()
            if rest[0] is not None and not op._schema.is_mutable:
                rest = (rest[0].float(), *rest[1:])
        with _ExcludeDispatchKeyGuard(keys):
            return op(r, k, v, w, u, *rest)

    return cast_and_call


def _register(library):
    for name in ("wkv5", "wkv6"):
        forward, backward, step = (f"rwkv_ext::{name}_{kind}" for kind in ("forward", "backward", "step"))
        torch.library.register_fake(forward, _forward_fake)
        torch.library.register_fake(backward, _backward_fake)
        torch.library.register_fake(step, _step_fake)
        torch.library.register_autograd(forward, _backward_formula(name), setup_context=_save)
        torch.library.register_autograd(
            backward, _refuse(name, "second derivatives are", "differentiate once, or use rwkv_ext.reference")
        )
        for op in (forward, backward, step):
            torch.library.register_vmap(op, _refuse(name, "torch.vmap is", "give the op a batch axis B instead"))
        for kind in ("forward", "step"):
            overload = getattr(torch.ops.rwkv_ext, f"{name}_{kind}").default
            for device, key in AUTOCAST_KEYS.items():
                library.impl(f"{name}_{kind}", _autocast(overload, device), key.name)


if _load.error is None:
    _library = torch.library.Library("rwkv_ext", "IMPL")  # its registrations live as long as it does
    _register(_library)
