"""The shapes that the fakes promise for CUDA tensors, which torch can imagine without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_ext import _load

pytestmark = pytest.mark.skipif(_load.error is not None, reason="the op library is not built")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("version", ["wkv5", "wkv6"])
def test_wkv_cuda_fake_saves_scores_for_16_bit_activations(version, dtype):
    batch, tokens, heads, size = 2, 130, 3, 32
    wide = torch.promote_types(dtype, torch.float32)
    forward = getattr(torch.ops.rwkv_ext, f"{version}_forward")
    with FakeTensorMode():
        r = torch.empty(batch, tokens, heads, size, device="cuda", dtype=dtype)
        u = torch.empty(heads, size, device="cuda", dtype=dtype)
        w = u if version == "wkv5" else r
        y, state_out, chunk_states, scores = forward(r, r, r, w, u, None, None, True)
        assert (y.shape, y.dtype) == (r.shape, dtype)
        assert (state_out.shape, state_out.dtype) == ((batch, heads, size, size), wide)
        assert (chunk_states.shape, chunk_states.dtype) == ((batch, 2, heads, size, size), wide)
        if dtype.itemsize == 2:
            assert (scores.shape, scores.dtype) == ((batch, heads, tokens, 16), torch.float32)
        else:
            assert scores.numel() == 0
        assert {x.device.type for x in (y, state_out, chunk_states, scores)} == {"cuda"}
        assert all(x.numel() == 0 for x in forward(r, r, r, w, u, None, None, False)[2:])
