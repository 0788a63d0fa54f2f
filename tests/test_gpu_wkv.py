"""The tensor-core kernels on a GPU: errors of at most twice what is unavoidable, per output (kernel_cases.py).

fp32 and fp64 run other kernels; the tests of the ops cover those (pytest --device cuda tests/test_wkv_*.py).
"""

import pytest
import torch
from gpu_tools import DEVICE, check, exact, make_inputs, needs_kernels, run, same_bits
from kernel_cases import floor_of
from wkv_cases import OPS, assert_rounded

from rwkv_ext import ops
from rwkv_ext.testing import (
    GRADIENTS,
    assert_close_ratio,
    decay_bins,
    decay_regimes,
    error_ratio,
    layouts,
    outputs_and_gradients,
)

pytestmark = [*needs_kernels, pytest.mark.emulated]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
VERSIONS = pytest.mark.parametrize("version", OPS)
LENGTHS = (0, 1, 15, 16, 17, 31, 32, 33, 64, 65, 128, 129, 200, 300)  # around blocks of 16 and chunks of 128
PACKED = [[0, 5, 0, 0, 170], [1, 128, 0, 129], [260, 1, 0], [16, 127, 3, 0, 1, 33], [0], [0, 0], [700, 0, 20, 1500, 3]]
SUMS = {"5.2": ("du", "dw"), "6.0": ("du",)}  # over tokens and sequences


@HALVES
@pytest.mark.parametrize("size", [32, 64, 128])
@VERSIONS
def test_gpu_wkv_lengths(version, size, dtype):
    for tokens in LENGTHS:
        regime = list(decay_regimes)[tokens % 6]
        check(version, make_inputs(version, 2, tokens, 3, size, dtype=dtype, regime=regime, state=tokens % 2 == 0))


@HALVES
@pytest.mark.parametrize("regime", decay_regimes)
@VERSIONS
def test_gpu_wkv_regimes(version, regime, dtype):
    check(version, make_inputs(version, 1, 300, 4, dtype=dtype, regime=regime))


@HALVES
def test_gpu_wkv_dw_by_decay(dtype):
    """dw keeps its digits in every bin of decays: a ratio over all of w is blind to the small ones."""
    inputs = make_inputs("6.0", 2, 512, 4, dtype=dtype, regime="mixed")
    actual, expected = run("6.0", inputs)["dw"], exact("6.0", inputs)["dw"]
    for _, here in list(decay_bins(inputs.w))[:5]:
        assert here.sum() > 1000 and error_ratio(actual[here], expected[here]) < 2 * floor_of("dw", actual.dtype)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@VERSIONS
def test_gpu_wkv_parameter_dtypes(version, parameter_dtype):
    """w and u each in fp32 or in bf16, also mixed; every gradient in its own input's dtype."""
    inputs = make_inputs(version, 2, 100, 2, parameter_dtype=parameter_dtype)
    for mixed in (inputs, inputs._replace(u=inputs.u.float()), inputs._replace(w=inputs.w.float())):
        actual = check(version, mixed)
        assert actual["dw"].dtype == mixed.w.dtype and actual["du"].dtype == mixed.u.dtype


@pytest.mark.parametrize("cotangents", [("y",), ("state_out",)], ids=["y-alone", "state_out-alone"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no-state"])
@VERSIONS
def test_gpu_wkv_one_output(version, state, cotangents):
    for tokens in (40, 300):
        check(version, make_inputs(version, 2, tokens, 2, regime="mixed", state=state), cotangents=cotangents)


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@VERSIONS
def test_gpu_wkv_packed(version, lengths):
    for state, index_dtype in ((True, torch.int64), (False, torch.int32)):
        inputs = make_inputs(version, heads=2, lengths=lengths, regime="resets", state=state)
        check(version, inputs._replace(cu_seqlens=inputs.cu_seqlens.to(index_dtype)))


@pytest.mark.parametrize("lengths", [[40, 33, 128, 0, 200], [129, 0, 65]], ids=str)
def test_gpu_wkv_packed_equals_separate(lengths):
    """Bitwise, but for the sums: a sequence's bits do not depend on its neighbours."""
    inputs = make_inputs("6.0", heads=2, lengths=lengths, regime="mixed")
    packed, first = run("6.0", inputs), 0
    for i, length in enumerate(lengths):
        here = slice(first, first + length)
        alone = inputs._replace(**{name: getattr(inputs, name)[:, here] for name in "rkvw"}, cu_seqlens=None)
        y, state = ops.wkv6(*alone._replace(state=inputs.state[i : i + 1]))
        assert torch.equal(y, packed["y"][:, here]) and torch.equal(state[0], packed["state_out"][i])
        first += length


def test_gpu_wkv_packed_does_not_leak():
    """NaN and a huge state in one sequence leave its neighbours bitwise alone, forward and backward."""
    clean = make_inputs("6.0", heads=2, lengths=[70, 60, 65])
    dirty = type(clean)(*(None if x is None else x.clone() for x in clean))
    for x in (dirty.r, dirty.k, dirty.v, dirty.w):
        x[:, 70:130] = float("nan")
    dirty.state[1] = 1e30
    a, b = (run("6.0", x) for x in (clean, dirty))
    for name in ("y", "dr", "dk", "dv", "dw"):
        assert torch.equal(a[name][:, :70], b[name][:, :70]) and torch.equal(a[name][:, 130:], b[name][:, 130:]), name
        assert b[name][:, 70:130].isnan().any()
    for name in ("state_out", "dstate"):
        assert torch.equal(a[name][::2], b[name][::2]), name


@pytest.mark.parametrize("tokens", [1024, 1500, 2133])
@VERSIONS
def test_gpu_wkv_segments(version, tokens):
    """So few heads that the sequence is cut into segments, which run at the same time."""
    for regime in ("typical", "near_one"):
        check(version, make_inputs(version, 1, tokens, 2, regime=regime))


def test_gpu_wkv_segments_in_fp32():
    for version in OPS:
        inputs = make_inputs(version, 1, 2100, 1, 32, dtype=torch.float32)
        assert_close_ratio(run(version, inputs), exact(version, inputs), floor=5e-6)


@pytest.mark.parametrize("layout", [name for name in layouts if name != "contiguous"])
@VERSIONS
def test_gpu_wkv_layouts(version, layout):
    """Any layout gives the bits of the contiguous one: transposed, misaligned, strided, expanded."""
    inputs = make_inputs(version, 2, 130, 4, layout=layout)
    dense = type(inputs)(*(x if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs))
    assert same_bits(run(version, inputs), run(version, dense))


def test_gpu_wkv_slices_of_a_fused_projection():
    size = 64
    fused = torch.randn(2, 150, 3, 4 * size, device=DEVICE, dtype=torch.bfloat16)
    u, state = torch.randn(3, size, device=DEVICE), torch.randn(2, 3, size, size, device=DEVICE).mT
    for strided in (fused.split(size, -1), [fused[..., i * 8 + 1 : i * 8 + 1 + size] for i in range(4)]):
        dense = [x.contiguous() for x in strided]
        for a, b in zip(ops.wkv6(*strided, u, state), ops.wkv6(*dense, u, state.contiguous()), strict=True):
            assert torch.equal(a, b)


def test_gpu_wkv_cotangent_layouts():
    inputs = make_inputs("6.0", 2, 140, 2)
    leaves = [x.requires_grad_() for x in inputs[:6]]
    y, state = ops.wkv6(*leaves)
    for dy, ds in (
        (torch.tensor(2.0, device=DEVICE).to(y.dtype).expand_as(y), torch.tensor(3.0, device=DEVICE).expand_as(state)),
        (torch.randn(140, 2, 2, 64, device=DEVICE).to(y.dtype).transpose(0, 1), torch.randn_like(state).mT),
        (torch.randn(2, 140, 2, 128, device=DEVICE).to(y.dtype)[..., 1::2], torch.randn_like(state)),
    ):
        odd, dense = (
            torch.autograd.grad((y, state), leaves, pair, retain_graph=True)
            for pair in ((dy, ds), (dy.contiguous(), ds.contiguous()))
        )
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(odd, dense, strict=True))


@pytest.mark.parametrize("cut", [32, 48, 128, 160, 256])
@VERSIONS
def test_gpu_wkv_carried_over_a_cut(version, cut):
    """Bitwise: forward at multiples of 16, backward at multiples of 128, but for the sums over tokens."""
    inputs = make_inputs(version, 2, 300, 2, regime="mixed")

    def in_two_parts(r, k, v, w, u, state, _):
        y = []
        for part in (slice(0, cut), slice(cut, None)):
            own_w = w if version == "5.2" else w[:, part]
            out, state = OPS[version](*(x[:, part] for x in (r, k, v)), own_w, u, state)
            y.append(out)
        return torch.cat(y, 1), state

    whole, parts = run(version, inputs), outputs_and_gradients(in_two_parts, inputs)
    different = [name for name in {"y", "state_out", *GRADIENTS} if not torch.equal(whole[name], parts[name])]
    assert set(different) <= (set(SUMS[version]) if cut % 128 == 0 else {*GRADIENTS})
    assert_rounded({x: parts[x] for x in different}, {x: whole[x] for x in different})


@VERSIONS
def test_gpu_wkv_determinism(version):
    for shape in (dict(batch=3, tokens=200, heads=5), dict(tokens=3000), dict(heads=2, lengths=[500, 0, 1300, 20])):
        inputs = make_inputs(version, **shape)
        first = run(version, inputs)
        assert all(same_bits(first, run(version, inputs)) for _ in range(4))


def test_gpu_wkv_batch_and_head_position():
    """A row's results do not depend on its neighbours or its place in the batch."""
    inputs = make_inputs("6.0", 3, 170, 3)
    y, state = ops.wkv6(*inputs)
    for row, head in ((2, 0), (1, 2)):
        alone = [x[row : row + 1, :, head : head + 1] for x in inputs[:4]]
        y_alone, state_alone = ops.wkv6(*alone, inputs.u[head : head + 1], inputs.state[row : row + 1, head : head + 1])
        assert torch.equal(y_alone[0, :, 0], y[row, :, head]) and torch.equal(state_alone[0, 0], state[row, head])


@HALVES
def test_gpu_wkv_short_and_long_kernels_agree(dtype):
    """Tokens below the threshold run token by token: the same function, within rounding."""
    inputs = make_inputs("6.0", 2, 96, 2, dtype=dtype)

    def in_short_parts(r, k, v, w, u, state, _):
        y = []
        for first in range(0, 96, 16):
            part, state = ops.wkv6(*(x[:, first : first + 16] for x in (r, k, v, w)), u, state)
            y.append(part)
        return torch.cat(y, 1), state

    assert_rounded(outputs_and_gradients(in_short_parts, inputs), exact("6.0", inputs))


def test_gpu_wkv_more_elements_than_32_bits_count():
    """2.1e9 elements a tensor: the last row and head equal the same numbers alone."""
    needed = 48 << 30
    if DEVICE.type != "cuda" or torch.cuda.mem_get_info()[0] < needed:
        pytest.skip("needs 48 GB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    batch, tokens, heads = 4, 8192 + 17, 1024
    r = torch.randn(batch, tokens, heads, 64, device=DEVICE, dtype=torch.bfloat16)
    k, v = r.flip(0), r.roll(1, 1)
    u = torch.randn(heads, 64, device=DEVICE)
    with torch.no_grad():
        y, state = ops.wkv6(r, k, v, r, u)
        alone = [x[-1:, :, -1:].contiguous() for x in (r, k, v, r)]
        y_alone, state_alone = ops.wkv6(*alone, u[-1:])
    assert y.numel() > 2**31
    actual = {"y": y[-1:, :, -1:], "state": state[-1:, -1:]}
    assert_rounded(actual, {"y": y_alone.double(), "state": state_alone.double()})
