"""The summary ops: a sequence seen from outside, forward (decay, state) and adjoint (dstate)."""

import re

import pytest
import torch
from wkv_cases import DEVICE, DTYPES, ON_CUDA, OPS, SHAPES, assert_accurate, make_inputs, name

from rwkv_ext import ops, reference
from rwkv_ext.testing import assert_close_ratio, layouts

VERSIONS = ["5.2", "6.0"]
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LENGTHS = [37, 0, 1, 128, 0, 200, 16]


def summaries(module, version, inputs, dy):
    """Both ops' results by name; module is ops or reference."""
    r, k, v, w = inputs[:4]
    decay, state = getattr(module, f"wkv{version[0]}_summary")(k, v, w, inputs.cu_seqlens)
    dstate = getattr(module, f"wkv{version[0]}_adjoint_summary")(r, w, dy, inputs.cu_seqlens)
    return {"decay": decay, "state": state, "dstate": dstate}


def cotangent(inputs):
    generator = torch.Generator("cpu").manual_seed(7)
    return torch.randn(inputs.r.shape, dtype=torch.float64, generator=generator, device="cpu").to(inputs.r)


@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_wkv_summary_fp64(case):
    version, *shape, regime = case
    inputs = make_inputs(version, *shape, regime=regime, dtype=torch.float64, state=False)
    actual, expected = (summaries(module, version, inputs, cotangent(inputs)) for module in (ops, reference))
    assert_close_ratio(actual, expected, floor=1e-13)
    assert all(x.dtype == torch.float64 for x in actual.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_wkv_summary_other_dtypes(case, dtype):
    version, *shape, regime = case
    for parameter_dtype in {torch.float32, dtype}:
        inputs = make_inputs(version, *shape, regime=regime, dtype=dtype, parameter_dtype=parameter_dtype, state=False)
        dy = cotangent(inputs)
        actual, plain = (summaries(module, version, inputs, dy) for module in (ops, reference))
        exact = summaries(reference, version, inputs.double(), dy.double())
        assert_accurate(actual, exact, plain, dtype, floor=1e-6)
        assert all(x.dtype == torch.float32 for x in actual.values())


@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_summary_packed(version, int_dtype):
    inputs = make_inputs(version, heads=3, size=24, lengths=LENGTHS, regime="mixed", dtype=torch.float64)
    inputs = inputs._replace(cu_seqlens=inputs.cu_seqlens.to(int_dtype))
    actual, expected = (summaries(module, version, inputs, cotangent(inputs)) for module in (ops, reference))
    assert_close_ratio(actual, expected, floor=1e-13)
    for i, length in enumerate(LENGTHS):
        if length == 0:
            assert (actual["decay"][i] == 1).all() and not actual["state"][i].any() and not actual["dstate"][i].any()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["rows", "packed"])
@pytest.mark.parametrize("regime", ["typical", "near_one", "resets", "huge"])
@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_summary_predicts_the_op(version, regime, lengths):
    """The op's final state, and its initial state's gradient, from the summaries alone: for any state and gradient."""
    shape = dict(lengths=lengths) if lengths else dict(batch=2, tokens=150)
    inputs = make_inputs(version, heads=2, size=20, regime=regime, dtype=torch.float64, **shape)
    leaf = inputs.state.clone().requires_grad_()
    y, state_out = OPS[version](*inputs._replace(state=leaf))
    dy, dstate_out = cotangent(inputs), torch.randn_like(state_out)
    (dstate,) = torch.autograd.grad((y, state_out), leaf, (dy, dstate_out))
    summary = summaries(ops, version, inputs, dy)
    predicted = {
        "state_out": summary["decay"][..., None] * inputs.state + summary["state"],
        "dstate": summary["decay"][..., None] * dstate_out + summary["dstate"],
    }
    assert_close_ratio(predicted, {"state_out": state_out.detach(), "dstate": dstate}, floor=1e-13)


@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_summary_of_parts(version):
    """Summaries compose: the parts of a sequence, cut anywhere, give the whole."""
    inputs = make_inputs(version, 2, 100, 2, 16, dtype=torch.float64)
    dy = cotangent(inputs)
    whole = summaries(ops, version, inputs, dy)
    parts = []
    for tokens in (slice(0, 33), slice(33, 34), slice(34, 100)):
        w = inputs.w if version == "5.2" else inputs.w[:, tokens]
        part = inputs._replace(r=inputs.r[:, tokens], k=inputs.k[:, tokens], v=inputs.v[:, tokens], w=w)
        parts.append(summaries(ops, version, part, dy[:, tokens]))
    decay, state, dstate = torch.ones_like(whole["decay"]), torch.zeros_like(inputs.state), None
    for part in parts:
        decay, state = decay * part["decay"], part["decay"][..., None] * state + part["state"]
    for part in reversed(parts):
        dstate = part["dstate"] if dstate is None else part["decay"][..., None] * dstate + part["dstate"]
    assert_close_ratio({"decay": decay, "state": state, "dstate": dstate}, whole, floor=1e-13)


@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_summary_state_is_the_final_state_in_bits(version):
    """From zeros the op and its summary do the same additions, on the CPU in the same order."""
    for size in (5, 32, 64):
        inputs = make_inputs(version, 2, 70, 2, size, state=False)
        state, expected = summaries(ops, version, inputs, inputs.r)["state"], OPS[version](*inputs)[1]
        assert torch.equal(state, expected) or ON_CUDA
        assert_close_ratio({"state": state}, {"state": expected}, floor=2e-6)


@pytest.mark.parametrize("layout", layouts)
@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_summary_layouts(version, layout):
    inputs = make_inputs(version, 2, 20, 3, 8, layout=layout)
    dy = layouts[layout](cotangent(inputs))
    actual = summaries(ops, version, inputs, dy)
    contiguous = inputs._replace(**{x: getattr(inputs, x).contiguous() for x in "rkvw"})
    expected = summaries(ops, version, contiguous, dy.contiguous())
    assert all(torch.equal(actual[x], expected[x]) for x in expected)


def test_wkv_summary_threads():
    for lengths in (None, LENGTHS):
        inputs = make_inputs("6.0", 1, 200, 5, 32, lengths=lengths, dtype=torch.bfloat16)
        runs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(summaries(ops, "6.0", inputs, inputs.v))
        assert all(torch.equal(run[x], runs[0][x]) for run in runs for x in run)


def overload(version, kind):
    return getattr(torch.ops.rwkv_ext, f"wkv{version[0]}_{kind}").default


@pytest.mark.parametrize("lengths", [None, [3, 0, 17]], ids=["rows", "packed"])
@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_summary_opcheck(version, lengths):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        r, k, v, w, _, _, cu_seqlens = make_inputs(version, 1, 20, 2, 4, dtype=dtype, lengths=lengths)
        for kind, given in (("summary", (k, v, w, cu_seqlens)), ("adjoint_summary", (r, w, v, cu_seqlens))):
            results = torch.library.opcheck(overload(version, kind), given, test_utils=UTILITIES)
            assert set(results) == set(UTILITIES) and set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_summary_meta_tensors(version):
    meta = dict(device="meta", dtype=torch.bfloat16)
    k, w = torch.empty(8, 4096, 64, 64, **meta), torch.empty(8, 4096, 64, 64, **meta)
    inputs = make_inputs(version)._replace(r=k, k=k, v=k, w=w[0, 0] if version == "5.2" else w)
    found = summaries(ops, version, inputs, k)
    assert found["decay"].shape == (8, 64, 64) and found["state"].shape == found["dstate"].shape == (8, 64, 64, 64)
    assert all(x.is_meta and x.dtype == torch.float32 for x in found.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_summary_autocast(version):
    inputs = make_inputs(version, 2, 20, 2, 8)
    halves = inputs._replace(**{x: getattr(inputs, x).bfloat16() for x in "rkv"})
    expected = summaries(ops, version, halves, inputs.v.bfloat16())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = summaries(ops, version, inputs, inputs.v)
    assert all(torch.equal(actual[x], expected[x]) for x in expected)


def refuses(error, text, op, *given):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        op(*given)


@pytest.mark.parametrize("version", VERSIONS)
def test_wkv_summary_has_no_gradient(version):
    r, k, v, w = (x.requires_grad_() for x in make_inputs(version, 1, 5, 2, 4)[:4])
    name = f"wkv{version[0]}"
    decay, state = getattr(ops, f"{name}_summary")(k, v, w)
    text = f"{name}_summary: gradients are not implemented; differentiate {name} instead"
    refuses(NotImplementedError, text, (decay.sum() + state.sum()).backward)
    dstate = getattr(ops, f"{name}_adjoint_summary")(r, w, v)
    text = f"{name}_adjoint_summary: gradients are not implemented; differentiate {name} instead"
    refuses(NotImplementedError, text, dstate.sum().backward)


def test_wkv_summary_refuses_transforms():
    _, k, v, w = make_inputs("6.0", 2, 3, 2, 4)[:4]
    text = "wkv6_summary: torch.vmap is not implemented; give the op a batch axis B instead"
    refuses(NotImplementedError, text, torch.vmap(lambda *x: ops.wkv6_summary(*(y[None] for y in x))), k, v, w)


zeros = torch.zeros


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(k=zeros(2, 3, 8)), "k must have 4 dimensions [B, T, H, N], got [2, 3, 8]"),
        (dict(k=zeros(2, 3, 2, 0)), "k must have a head size N of at least 1, got [2, 3, 2, 0]"),
        (dict(k=zeros(2, 3, 2, 4).int()), "k must be float32, float64, bfloat16 or float16, got int32"),
        (dict(v=zeros(2, 3, 2, 5)), "v must have the shape of k [2, 3, 2, 4], got [2, 3, 2, 5]"),
        (dict(v=zeros(2, 3, 2, 4).half()), "v must have k's dtype float32, got float16; convert it with .to(k.dtype)"),
        (dict(w=zeros(2, 4)), "w must have the shape of k [2, 3, 2, 4], got [2, 4]"),
        (dict(w=zeros(2, 3, 2, 4).half()), "w must be float32, got float16; convert it with .to()"),
        (
            dict(cu_seqlens=torch.tensor([0, 3])),
            "k must have B = 1 with cu_seqlens, got [2, 3, 2, 4]; concatenate the sequences along T",
        ),
        (dict(cu_seqlens=torch.tensor([0.0, 3.0])), "cu_seqlens must be int64 or int32, got float32"),
    ],
)
def test_wkv_summary_errors(changes, text):
    given = dict(k=zeros(2, 3, 2, 4), v=zeros(2, 3, 2, 4), w=zeros(2, 3, 2, 4), cu_seqlens=None) | changes
    refuses(ValueError, f"wkv6_summary: {text}", ops.wkv6_summary, *given.values())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(r=zeros(3, 2, 4)), "r must have 4 dimensions [B, T, H, N], got [3, 2, 4]"),
        (dict(dy=zeros(1, 3, 2, 5)), "dy must have the shape of r [1, 3, 2, 4], got [1, 3, 2, 5]"),
        (
            dict(dy=zeros(1, 3, 2, 4).double()),
            "dy must have r's dtype float32, got float64; convert it with .to(r.dtype)",
        ),
        (dict(w=zeros(4)), "w must have shape [H, N] = [2, 4], got [4]"),
        pytest.param(
            dict(cu_seqlens=torch.tensor([0, 4, 3])),
            "cu_seqlens must not exceed T = 3, got 4 at index 1",
            marks=pytest.mark.cpu,  # a GPU cannot see values without waiting
        ),
    ],
)
def test_wkv_adjoint_summary_errors(changes, text):
    given = dict(r=zeros(1, 3, 2, 4), w=zeros(2, 4), dy=zeros(1, 3, 2, 4), cu_seqlens=None) | changes
    refuses(ValueError, f"wkv5_adjoint_summary: {text}", ops.wkv5_adjoint_summary, *given.values())


def test_wkv_summary_errors_without_data():
    """Fake tensors get the words of the kernels."""
    meta = zeros(2, 3, 2, 4, device="meta")
    text = "wkv6_summary: k must have 4 dimensions [B, T, H, N], got [3, 2, 4]"
    refuses(ValueError, text, ops.wkv6_summary, meta[0], meta, meta)
    text = f"wkv6_adjoint_summary: w must be on r's device meta, got {zeros(0).device}; move it with .to(r.device)"
    refuses(ValueError, text, ops.wkv6_adjoint_summary, meta, zeros(2, 3, 2, 4), meta)


def test_wkv_summary_errors_not_a_tensor():
    k = zeros(1, 3, 2, 4)
    refuses(TypeError, "wkv6_summary: v must be a torch.Tensor, got int", ops.wkv6_summary, k, 3, k)
    refuses(
        TypeError, "wkv5_adjoint_summary: dy must be a torch.Tensor, got NoneType", ops.wkv5_adjoint_summary, k, k, None
    )
    refuses(TypeError, "wkv6_summary: cu_seqlens must be a torch.Tensor, got list", ops.wkv6_summary, k, k, k, [0, 3])
