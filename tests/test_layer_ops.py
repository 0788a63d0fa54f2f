"""The CPU ops of a layer against plain PyTorch in fp64: values, gradients, every dtype, packing, strides, messages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_ext import _layer_registration, _load
from rwkv_ext.models.token_shift import Packing, TokenShift, shift_tokens

pytestmark = pytest.mark.skipif(_load.error is not None, reason="the op library is not built")
ops = torch.ops.rwkv_ext
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative RMS error of a result that is computed in fp32 (fp64) and rounded once.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
CUTS = {"batch": None, "packed": [0, 3, 3, 67, 130], "one": [0, 130], "empty ends": [0, 0, 130, 130]}


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def plain_mix(h, last, weights, low, cu_seqlens, weighs_current):
    packing = None if cu_seqlens is None else Packing.of(cu_seqlens, h.shape[1])
    previous = shift_tokens(h, last, packing)[0]
    base, other = (previous, h) if weighs_current else (h, previous)
    return [base + (other - base) * (w + (low[c] if low else 0)) for c, w in enumerate(weights)]


def plain_head_norm_gate(y, weight, bias, gate, eps):
    return (F.layer_norm(y, y.shape[-1:], eps=eps).flatten(1) * weight + bias) * F.silu(gate)


def plain_add_layer_norm(x, delta, weight, bias, eps, dtype):
    total = x if delta is None else x + delta
    return x.flatten()[:0] if delta is None else total, F.layer_norm(total, x.shape[-1:], weight, bias, eps)


PLAIN = {
    "shift_mix": plain_mix,
    "head_norm_gate": plain_head_norm_gate,
    "add_layer_norm": plain_add_layer_norm,
    "squared_relu": lambda x: torch.relu(x).square(),
    "sigmoid_gate": lambda gate, x: torch.sigmoid(gate) * x,
}


def mix_inputs(
    dtype=torch.float64,
    cuts=None,
    tokens=65,
    width=37,
    low=True,
    last=True,
    weighs_current=False,
    wide_weights=False,
):
    batch, tokens = (2, tokens) if cuts is None else (1, cuts[-1])
    sequences = batch if cuts is None else len(cuts) - 1
    weights = randn(3, width, seed=2, dtype=torch.float32 if wide_weights else dtype)
    return [
        randn(batch, tokens, width, dtype=dtype),
        randn(sequences, width, seed=1, dtype=dtype) if last else None,
        weights,
        [randn(batch, tokens, width, seed=3 + c, dtype=dtype) for c in range(3)] if low else [],
        None if cuts is None else torch.tensor(cuts),
        weighs_current,
    ]


def head_norm_inputs(dtype=torch.float64, rows=70, heads=2, size=19, wide_weights=False):
    real = torch.float32 if wide_weights else dtype
    width = heads * size
    y, gate = 3 * randn(rows, heads, size, dtype=dtype), 2 * randn(rows, width, seed=1, dtype=dtype)
    return [y, randn(width, seed=2, dtype=real), randn(width, seed=3, dtype=real), gate, 64e-5]


def layer_norm_inputs(dtype=torch.float64, delta=True, shape=(2, 35, 37), wide_weights=False):
    weight, bias = (randn(shape[-1], seed=seed, dtype=torch.float32 if wide_weights else dtype) for seed in (2, 3))
    # Whole quarters: their sum is exact in every dtype.
    x, added = ((4 * randn(*shape, seed=seed)).round().div(4).to(dtype) for seed in (0, 1))
    return [x, added if delta else None, weight, bias, 1e-5, dtype]


def pointwise_inputs(dtype=torch.float64, arguments=2):
    return [2 * randn(13, 1301, seed=seed, dtype=dtype) for seed in range(arguments)]


CASES = {
    **{f"mix-{name}": ("shift_mix", dict(cuts=cuts)) for name, cuts in CUTS.items()},
    "mix-start": ("shift_mix", dict(last=False)),
    "mix-packed-start": ("shift_mix", dict(last=False, cuts=CUTS["packed"], weighs_current=True)),
    "mix-static": ("shift_mix", dict(low=False, width=64)),
    "mix-current": ("shift_mix", dict(low=False, weighs_current=True)),
    "mix-wide-weights": ("shift_mix", dict(wide_weights=True)),
    "norm": ("head_norm_gate", {}),
    "norm-whole-lanes": ("head_norm_gate", dict(size=64)),
    "norm-one": ("head_norm_gate", dict(size=1, heads=3)),
    "norm-wide-weights": ("head_norm_gate", dict(wide_weights=True)),
    "add": ("add_layer_norm", {}),
    "add-whole-lanes": ("add_layer_norm", dict(shape=(70, 128))),
    "add-nothing": ("add_layer_norm", dict(delta=False)),
    "add-wide-weights": ("add_layer_norm", dict(wide_weights=True)),
    "relu": ("squared_relu", dict(arguments=1)),
    "gate": ("sigmoid_gate", {}),
}
MAKERS = {"shift_mix": mix_inputs, "head_norm_gate": head_norm_inputs, "add_layer_norm": layer_norm_inputs}


def make(case, dtype):
    name, options = CASES[case]
    return name, MAKERS.get(name, pointwise_inputs)(dtype, **options)


def flat(values):
    tensors = []
    for x in values:
        tensors += flat(x) if isinstance(x, (list, tuple)) else [x] if isinstance(x, Tensor) else []
    return tensors


def mapped(values, change):
    return [
        [change(x) for x in v] if isinstance(v, list) else change(v) if isinstance(v, Tensor) else v for v in values
    ]


def outputs_and_gradients(function, inputs, dtype):
    """Outputs, then the gradient of every floating-point input, from cotangents rounded to dtype."""
    leaves = mapped(inputs, lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)
    outputs = flat([function(*leaves)])
    wanted = [x for x in flat(leaves) if x.requires_grad]
    cotangents = [randn(*x.shape, seed=20 + i).to(dtype).to(x.dtype) for i, x in enumerate(outputs)]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, wanted, cotangents))


def assert_close(actual, expected, bound):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm()
    assert error <= bound * expected.norm() + 1e-300, f"relative RMS error {error / expected.norm():.1e} > {bound:.0e}"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype):
    name, inputs = make(case, dtype)
    if dtype == torch.float64 and CASES[case][1].get("wide_weights"):
        pytest.skip("fp64 activations have fp64 parameters")
    actual = outputs_and_gradients(getattr(ops, name), inputs, dtype)
    exact = mapped(inputs, lambda x: x.double() if x.is_floating_point() else x)
    expected = outputs_and_gradients(PLAIN[name], exact, dtype)
    leaves = [x for x in flat(inputs) if x.is_floating_point()]
    sources = [inputs[0]] * (len(actual) - len(leaves)) + leaves
    assert [x.dtype for x in actual] == [x.dtype for x in sources]
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, BOUNDS[dtype])


SMALL = {
    "packed": ("shift_mix", mix_inputs(cuts=[0, 2, 2, 5], width=3)),
    "current": ("shift_mix", mix_inputs(tokens=4, width=3, low=False, weighs_current=True)),
    "norm": ("head_norm_gate", head_norm_inputs(rows=3, heads=2, size=5)),
    "add": ("add_layer_norm", layer_norm_inputs(shape=(3, 5))),
    "add-nothing": ("add_layer_norm", layer_norm_inputs(shape=(3, 5), delta=False)),
    "relu": ("squared_relu", [randn(2, 5)]),
    "gate": ("sigmoid_gate", [randn(2, 5), randn(2, 5, seed=1)]),
}


@pytest.mark.parametrize("case", SMALL)
def test_gradcheck(case):
    name, inputs = SMALL[case]
    leaves = [x.clone().requires_grad_() for x in flat(inputs) if x.is_floating_point()]

    def of(*tensors):
        rest = iter(tensors)
        return tuple(flat([getattr(ops, name)(*mapped(inputs, lambda x: next(rest) if x.is_floating_point() else x))]))

    assert torch.autograd.gradcheck(of, leaves)


@pytest.mark.parametrize("case", ["mix-batch", "mix-packed", "norm", "add", "relu", "gate"])
def test_any_strides(case):
    name, inputs = make(case, torch.float32)

    def spread(x):
        wide = x.new_full([2 * n for n in x.shape], float("nan")) if x.is_floating_point() else x
        view = wide[tuple(slice(None, None, 2) for _ in x.shape)] if x.is_floating_point() else x
        return view.copy_(x) if x.is_floating_point() else x

    dense, strided = (
        outputs_and_gradients(getattr(ops, name), given, torch.float32) for given in (inputs, mapped(inputs, spread))
    )
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))


@pytest.mark.parametrize("case", ["mix-batch", "mix-packed", "norm", "add", "relu", "gate"])
def test_same_bits_for_any_number_of_threads(case):
    name, inputs = make(case, torch.bfloat16)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(outputs_and_gradients(getattr(ops, name), inputs, torch.bfloat16))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 1, 4), (2, 3, 0)], ids=str)
def test_empty_and_short_input(shape):
    h = randn(*shape).requires_grad_()
    last, weights = (randn(n, shape[2], seed=1).requires_grad_() for n in (shape[0], 2))
    actual = ops.shift_mix(h, last, weights, [], None, False)
    expected = plain_mix(h, last, weights, [], None, False)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(sum(x.sum() for x in r), (h, last, weights)) for r in (actual, expected)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)
    norm = head_norm_inputs(rows=0)
    assert ops.head_norm_gate(*norm).shape == (0, 38)
    assert ops.squared_relu(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("case", ["mix-batch", "mix-packed", "mix-static", "norm", "add-nothing", "relu", "gate"])
def test_opcheck(case):
    name, inputs = make(case, torch.float32)
    inputs = mapped(inputs, lambda x: x.requires_grad_() if x.is_floating_point() else x)
    torch.library.opcheck(getattr(ops, name).default, tuple(inputs))


def test_second_derivatives_are_refused():
    x = randn(4).requires_grad_()
    (first,) = torch.autograd.grad(ops.squared_relu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="squared_relu: second derivatives are not implemented"):
        first.sum().backward()


@pytest.mark.parametrize("case", ["mix-batch", "norm", "relu", "gate"])
def test_autocast(case):
    name, inputs = make(case, torch.float32)
    cast = ("h", "last", "low", "y", "gate", "x")
    names = [argument.name for argument in getattr(ops, name).default._schema.arguments]
    halves = [mapped([x], Tensor.bfloat16)[0] if n in cast else x for n, x in zip(names, inputs, strict=True)]
    expected = flat([getattr(ops, name)(*halves)])
    with torch.autocast("cpu", torch.bfloat16):
        actual = flat([getattr(ops, name)(*inputs)])
        double = flat([getattr(ops, name)(*mapped(inputs, Tensor.double))])
    assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in zip(actual, expected, strict=True))
    assert all(x.dtype == torch.float64 for x in double)


VMAPPED = {
    "cross_entropy_rows": lambda x: ops.cross_entropy_rows(x, torch.zeros(3, dtype=torch.int64), 0.0, False),
    "accumulate": lambda x: ops.accumulate(x, x, False),
    "shift_mix": lambda x: ops.shift_mix(x[None], None, x, [], None, False),
    "shift_mix_backward": lambda x: ops.shift_mix_backward([x[None]] * 3, x[None], None, x, [], None, False),
    "head_norm_gate": lambda x: ops.head_norm_gate(x[None], x.flatten(), x.flatten(), x.flatten()[None], 0.0),
    "head_norm_gate_backward": lambda x: ops.head_norm_gate_backward(
        x.flatten()[None], x[None], x.flatten(), x.flatten(), x.flatten()[None], 0.0
    ),
    "add_layer_norm": lambda x: ops.add_layer_norm(x, None, x[0], x[0], 0.0, x.dtype),
    "add_layer_norm_backward": lambda x: ops.add_layer_norm_backward(x, None, x, x[0], 0.0, False),
    "squared_relu": lambda x: ops.squared_relu(x),
    "squared_relu_backward": lambda x: ops.squared_relu_backward(x, x),
    "sigmoid_gate": lambda x: ops.sigmoid_gate(x, x),
    "sigmoid_gate_backward": lambda x: ops.sigmoid_gate_backward(x, x, x),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_is_refused(name):
    VMAPPED[name](randn(3, 4))  # a right call but for the batch
    with pytest.raises(NotImplementedError, match=f"^{name}: torch.vmap is not implemented; give the model a batch"):
        torch.vmap(VMAPPED[name])(randn(2, 3, 4))


def test_nan_stays_in_its_row():
    x = randn(6, 2, 19, dtype=torch.float32)
    inputs = head_norm_inputs(torch.float32, rows=6)
    inputs[0] = x
    clean = ops.head_norm_gate(*inputs)
    x[2, 1, 3] = float("nan")
    dirty = ops.head_norm_gate(*inputs)
    assert dirty[2, 19:].isnan().all() and torch.equal(dirty[2, :19], clean[2, :19])
    assert torch.equal(dirty[3:], clean[3:])
    assert ops.squared_relu(torch.tensor([float("nan"), float("-inf"), 2.0])).isnan().tolist() == [True, False, False]
    assert ops.sigmoid_gate(torch.tensor([-1e4, 1e4]), torch.ones(2)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("cuts", [[0, 5, 3, 130], [1, 130], [0, 131], [0, 129]], ids=str)
def test_wrong_cu_seqlens(cuts):
    inputs = mix_inputs(cuts=[0, 1, 130] if len(cuts) == 4 else [0, 130], last=False)
    inputs[4] = torch.tensor(cuts)
    with pytest.raises(ValueError, match="shift_mix: cu_seqlens must (not decrease|start with 0|end with T = 130),"):
        ops.shift_mix(*inputs)


H, W = torch.zeros(2, 3, 4), torch.zeros(5, 4)
Y, A, FP32 = torch.zeros(3, 2, 4), torch.zeros(8), torch.float32
MESSAGES = {
    "integers": ("shift_mix", (H.long(), None, W, [], None, False), "h must be float32, .*, got int64"),
    "rank": ("shift_mix", (H[0], None, W, [], None, False), r"h must have 3 dimensions \[B, T, D\], got \[3, 4\]"),
    "weights": ("shift_mix", (H, None, W[0], [], None, False), r"weights must have 2 dimensions \[C, D\], got \[4\]"),
    "width": ("shift_mix", (H, None, W[:, :3], [], None, False), r"weights must have shape \[C, D\] = \[5, 4\]"),
    "weights dtype": ("shift_mix", (H, None, W.double(), [], None, False), "weights must be float32, got float64"),
    "last": ("shift_mix", (H, H[:, 0, :3], W, [], None, False), r"last must have shape \[B, D\] = \[2, 4\]"),
    "last dtype": ("shift_mix", (H, H[:, 0].half(), W, [], None, False), "last must have h's dtype float32"),
    "packed batch": ("shift_mix", (H, None, W, [], torch.tensor([0, 3]), False), "h must have B = 1 with cu_seqlens"),
    "low count": ("shift_mix", (H, None, W, [H], None, False), "low must hold C = 5 tensors or none, got 1"),
    "low": ("shift_mix", (H, None, W[:1], [H[:1]], None, False), "low must have the shape of h"),
    "y": ("head_norm_gate", (Y[0], A, A, H, 0.0), r"y must have 3 dimensions \[M, H, N\], got \[2, 4\]"),
    "weight": ("head_norm_gate", (Y, A[1:], A, Y, 0.0), r"weight must have shape \[H \* N\] = \[8\], got \[7\]"),
    "bias": ("head_norm_gate", (Y, A, A.half(), Y, 0.0), "bias must be float32, got float16"),
    "gate": ("head_norm_gate", (Y, A, A, Y, 0.0), r"gate must have shape \[M, H \* N\] = \[3, 8\], got \[3, 2, 4\]"),
    "gate dtype": ("head_norm_gate", (Y, A, A, Y.flatten(1).half(), 0.0), "gate must have y's dtype float32"),
    "norm's width": (
        "add_layer_norm",
        (Y[..., :0], None, A, A, 0.0, FP32),
        r"x must .* D of at least 1",
    ),
    "norm's weight": ("add_layer_norm", (Y, None, A, A, 0.0, FP32), r"weight must have shape \[D\] = \[4\], got \[8\]"),
    "norm's bias": ("add_layer_norm", (Y, None, A[:4], A, 0.0, FP32), r"bias must have shape \[D\] = \[4\], got \[8\]"),
    "norm's dtype": (
        "add_layer_norm",
        (Y, None, A[:4], A[:4], 0.0, torch.float64),
        "dtype must be float32, bfloat16 or float16 beside a float32 x, got float64",
    ),
    "delta": ("add_layer_norm", (Y, H, A[:4], A[:4], 0.0, FP32), "delta must have the shape of x"),
    "delta dtype": (
        "add_layer_norm",
        (Y, Y, A[:4], A[:4], 0.0, torch.bfloat16),
        "delta must have the result's dtype bfloat16, got float32",
    ),
    "x": ("sigmoid_gate", (Y, H), r"x must have the shape of gate \[3, 2, 4\], got \[2, 3, 4\]"),
    "x dtype": ("squared_relu", (A.long(),), "x must be float32, .*, got int64"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    name, arguments, text = MESSAGES[case]
    with pytest.raises(ValueError, match=f"{name}: {text}"):
        getattr(ops, name)(*arguments)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("carried", [True, False], ids=["carried", "start"])
def test_token_shift_is_the_same_without_the_ops(cuts, carried, monkeypatch):
    h, last, weights, _, cu_seqlens, _ = mix_inputs(cuts=cuts, last=carried)
    packing = None if cuts is None else Packing.of(cu_seqlens, h.shape[1])
    low, up = randn(*h.shape[:2], 3, 4, seed=8), randn(3, 4, h.shape[2], seed=9)

    def run(weighs_current):
        shift = TokenShift(h, last, packing)
        factors = (None, None) if weighs_current else (low, up)
        return [*shift.mix(weights, *factors, weighs_current), shift.newest()]

    for weighs_current in (False, True):
        monkeypatch.setattr(_layer_registration, "_built", True)
        fused = run(weighs_current)
        monkeypatch.setattr(_layer_registration, "_built", False)
        for a, b in zip(fused, run(weighs_current), strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(fused[-1], shift_tokens(h, last, packing)[1])


@pytest.mark.parametrize("instruction_set", ["default", "avx2"])
def test_other_instruction_sets(instruction_set):
    """The values and gradients again, in a process that is kept to fewer instructions."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "values or gradcheck", __file__]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instruction_set, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent, timeout=300
    )
    assert result.returncode == 0, result.stdout[-2000:]
