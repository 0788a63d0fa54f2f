"""WKV-6 in PyTorch operators alone, as people write it: what the CPU kernels are compared with. Autograd's gradients.

Each takes r, k, v, w [B, T, H, N] and u [H, N] in fp32, starts from an empty state and returns y [B, T, H, N].
"""

import torch

CHUNK = 16
SMALLEST_DECAY = 0.005  # its 16th power is the smallest product that fp32 can divide by


def chunked(r, k, v, w, u):
    """Chunks of 16 tokens as matrix products with quotients of decays; decays are clamped, or fp32 would overflow.

    So it is not exact for strong decays. T must be a multiple of 16. The way of RWKV-infctx-trainer.
    """
    batch, tokens, heads, size = r.shape
    r, k, v, w = (x.transpose(1, 2).reshape(batch, heads, -1, CHUNK, size) for x in (r, k, v, w))
    decay = torch.exp(-torch.exp(w)).clamp(min=SMALLEST_DECAY)
    until = decay.cumprod(3)
    before = until / decay
    received, kept = r * before, k / until
    scores = (received @ kept.mT).tril(-1) + torch.diag_embed((r * u[:, None, None] * k).sum(-1))
    whole = until[:, :, :, -1:]
    added = (kept * whole).mT @ v
    state, states = torch.zeros(batch, heads, size, size), []
    for decayed, new in zip(whole.unbind(2), added.unbind(2), strict=True):  # indexing's gradient is as large as all
        states.append(state)
        state = decayed.mT * state + new
    y = scores @ v + received @ torch.stack(states, 2)
    return y.reshape(batch, heads, tokens, size).transpose(1, 2)


def token_by_token(r, k, v, w, u):
    """The recurrence, one token after the other; unbind() hands the tokens out without an indexing operator each."""
    decay = torch.exp(-torch.exp(w)).unsqueeze(-1)
    state = torch.zeros(r.shape[0], *r.shape[2:], r.shape[3])
    y = []
    for rt, kt, vt, et in zip(*(x.unbind(1) for x in (r, k, v, decay)), strict=True):
        kv = kt.unsqueeze(-1) * vt.unsqueeze(-2)
        y.append((rt.unsqueeze(-2) @ (state + u.unsqueeze(-1) * kv)).squeeze(-2))
        state = et * state + kv
    return torch.stack(y, 1)
