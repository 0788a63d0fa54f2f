"""The CUDA step kernel on a GPU: equal to the CPU's within rounding, in place, slots included."""

import pytest
import torch

import rwkv_ext
from rwkv_ext import _load
from rwkv_ext.testing import assert_close_ratio, make_inputs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not _load.has_cuda_kernels("wkv5_step", "wkv6_step"), reason="built without CUDA"),
]
DEVICE = "cuda"
OPS = {"5.2": rwkv_ext.wkv5_step, "6.0": rwkv_ext.wkv6_step}


def step(version, inputs, device, slots=None):
    """y and the state afterwards, of the one token in inputs, computed on device."""
    inputs = [x if x is None else x.to(device, copy=True) for x in inputs]
    token = [x[:, 0] if x.dim() == 4 else x for x in inputs[:4]]
    y = OPS[version](*token, inputs[4], inputs[5], None if slots is None else torch.tensor(slots, device=device))
    return {"y": y.cpu(), "state": inputs[5].cpu()}


@pytest.mark.parametrize("regime", ["typical", "resets", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("version", OPS)
def test_wkv_cuda_step_equals_the_cpu(version, size, dtype, regime):
    inputs = make_inputs(version, 3, 1, 2, size, dtype=dtype, regime=regime)
    exact = step(version, inputs.double(), "cpu")
    assert_close_ratio(step(version, inputs, DEVICE), exact, step(version, inputs, "cpu"))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_wkv_cuda_step_layouts(layout):
    inputs = make_inputs("6.0", 3, 1, 2, 64, layout=layout)
    inputs = inputs._replace(state=inputs.state.contiguous())
    assert_close_ratio(step("6.0", inputs, DEVICE), step("6.0", inputs.double(), "cpu"), step("6.0", inputs, "cpu"))


@pytest.mark.parametrize("version", OPS)
def test_wkv_cuda_step_slots(version):
    """-1 skips a row; the slots that no row names stay as they were; one that does not exist answers NaN."""
    inputs = make_inputs(version, 4, 1, 2, 64)
    inputs = inputs._replace(state=make_inputs(version, 6, 1, 2, 64, seed=1).state)
    got, expected = (step(version, inputs, device, [5, -1, 0, 3]) for device in (DEVICE, "cpu"))
    assert_close_ratio(got, expected, floor=1e-6)
    assert torch.equal(got["y"][1], torch.zeros(2, 64))
    assert torch.equal(got["state"][[1, 2, 4]], inputs.state[[1, 2, 4]])
    for missing in (-2, 6):
        got = step(version, inputs, DEVICE, [5, missing, 0, 3])
        assert got["y"][1].isnan().all() and got["y"][[0, 2, 3]].isfinite().all()
        assert torch.equal(got["state"], step(version, inputs, DEVICE, [5, -1, 0, 3])["state"])
