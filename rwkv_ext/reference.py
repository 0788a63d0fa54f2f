"""The WKV recurrence in plain PyTorch, one token at a time: the specification every kernel is tested against.

Shapes: r, k, v [B, T, H, N]; w [B, T, H, N] (Finch) or [H, N] (Eagle); u [H, N]; state [B, H, N(key), N(value)].
w is the raw decay parameter omega: a token decays the state by exp(-exp(w)), which is 0 for exp(w) = inf.
"""

from itertools import pairwise

import torch
from torch import Tensor


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the Finch recurrence (arXiv 2404.05892, section 4.2).

    y_t = r_t (S + u k_t v_t), then S <- exp(-exp(w_t)) S + k_t v_t.

    Returns (y [B, T, H, N] in r's dtype, state_out [B, H, N, N]). With cu_seqlens [nseq + 1], B must be 1 and
    sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1 with its own state [nseq, H, N, N].
    The arithmetic runs in fp64 for fp64 inputs, else in fp32. Every input has a gradient through autograd.
    """
    if cu_seqlens is not None:
        return _packed(wkv6, r, k, v, w, u, state, cu_seqlens)
    compute = torch.promote_types(r.dtype, torch.float32)
    batch, tokens, heads, size = r.shape
    if state is None:
        state = r.new_zeros(batch, heads, size, size, dtype=compute)
    dtype, (r, k, v, w, u) = r.dtype, (x.to(compute) for x in (r, k, v, w, u))
    decay = decay_of(w)
    y = []
    for t in range(tokens):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        y.append((r[:, t, :, :, None] * (state + u[:, :, None] * kv)).sum(-2))
        state = decay[:, t, :, :, None] * state + kv
    return (torch.stack(y, 1) if y else r).to(dtype), state


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the Eagle recurrence (arXiv 2404.05892, section 4.1): wkv6 with one decay w [H, N] for every token."""
    return wkv6(r, k, v, w.expand(r.shape), u, state, cu_seqlens)


def wkv6_summary(k: Tensor, v: Tensor, w: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Say what a sequence does to the state: it leaves decay[..., None] * state_in + state (any r and u).

    Returns (decay [B, H, N], the product of exp(-exp(w)) over the tokens; state [B, H, N, N], from zeros), one per
    sequence with cu_seqlens, in fp64 for fp64 inputs, else in fp32.
    """
    if cu_seqlens is not None:
        parts = [wkv6_summary(k[:, a:b], v[:, a:b], w[:, a:b]) for a, b in pairwise(cu_seqlens.tolist())]
        return torch.cat([decay for decay, _ in parts]), torch.cat([state for _, state in parts])
    k, v, w = (x.to(torch.promote_types(k.dtype, torch.float32)) for x in (k, v, w))
    batch, tokens, heads, size = k.shape
    decay, state = k.new_ones(batch, heads, size), k.new_zeros(batch, heads, size, size)
    for t in range(tokens):
        decay = decay * decay_of(w[:, t])
        state = decay_of(w[:, t])[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
    return decay, state


def wkv6_adjoint_summary(r: Tensor, w: Tensor, dy: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the gradient of sum(y * dy) by the state before the sequence [B, H, N, N]: wkv6_summary against time."""
    if cu_seqlens is not None:
        parts = [wkv6_adjoint_summary(r[:, a:b], w[:, a:b], dy[:, a:b]) for a, b in pairwise(cu_seqlens.tolist())]
        return torch.cat(parts)
    return wkv6_summary(r.flip(1), dy.flip(1), w.flip(1))[1]


def wkv5_summary(k: Tensor, v: Tensor, w: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As wkv6_summary, with one decay w [H, N] for every token."""
    return wkv6_summary(k, v, w.expand(k.shape), cu_seqlens)


def wkv5_adjoint_summary(r: Tensor, w: Tensor, dy: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """As wkv6_adjoint_summary, with one decay w [H, N] for every token."""
    return wkv6_adjoint_summary(r, w.expand(r.shape), dy, cu_seqlens)


def decay_of(w: Tensor) -> Tensor:
    """Return exp(-exp(w)); its gradient is 0 where it underflows to 0 (autograd alone would give inf * 0 = nan)."""
    return torch.exp(-torch.exp(w.masked_fill(torch.exp(-torch.exp(w)) == 0, 8.0)))  # exp(-exp(8)) is 0 as well


def _packed(step, r, k, v, w, u, state, cu_seqlens):
    bounds = cu_seqlens.tolist()
    compute = torch.promote_types(r.dtype, torch.float32)
    if state is None:
        state = r.new_zeros(len(bounds) - 1, *r.shape[2:], r.shape[3], dtype=compute)
    parts = [
        step(r[:, a:b], k[:, a:b], v[:, a:b], w[:, a:b], u, state[i : i + 1])
        for i, (a, b) in enumerate(pairwise(bounds))
    ]
    return torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts])
