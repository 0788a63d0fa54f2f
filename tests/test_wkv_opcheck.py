"""torch's own checks of a custom op: schema, autograd registration, fake tensors, AOT dispatch; and autocast."""

import pytest
import torch
from wkv_cases import DEVICE, OPS, head_size, make_inputs

from rwkv_ext import ops
from rwkv_ext.testing import outputs_and_gradients

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
STEPS = {"5.2": ops.wkv5_step, "6.0": ops.wkv6_step}


def op(version, kind):
    return getattr(torch.ops.rwkv_ext, f"wkv{version[0]}_{kind}").default


def check(overload, arguments):
    results = torch.library.opcheck(overload, arguments, test_utils=UTILITIES)
    assert set(results) == set(UTILITIES) and set(results.values()) == {"SUCCESS"}


CASES = {
    "plain": dict(batch=2, tokens=133, heads=2, size=4),
    "no-state": dict(batch=1, tokens=17, heads=1, size=4, state=False),
    "packed": dict(heads=2, size=4, lengths=[3, 0, 130]),
    "bf16": dict(batch=2, tokens=5, heads=2, size=4, dtype=torch.bfloat16),
    "transposed": dict(batch=2, tokens=5, heads=3, size=4, layout="transposed"),
}


CHOSEN = [
    ("6.0", "plain"),
    ("6.0", "no-state"),
    ("6.0", "packed"),
    ("6.0", "transposed"),
    ("5.2", "packed"),
    ("5.2", "bf16"),
]


@pytest.mark.parametrize(("version", "case"), CHOSEN)
def test_wkv_opcheck_forward(version, case):
    inputs = make_inputs(version, **CASES[case])
    check(op(version, "forward"), (*inputs, False))
    leaves = [x.requires_grad_() if x is not None else x for x in inputs[:6]]
    check(op(version, "forward"), (*leaves, inputs.cu_seqlens, True))


@pytest.mark.parametrize(
    ("version", "case"), [("6.0", "plain"), ("6.0", "packed"), ("5.2", "no-state"), ("5.2", "bf16")]
)
def test_wkv_opcheck_backward(version, case):
    inputs = make_inputs(version, **CASES[case])
    y, state, *saved = op(version, "forward")(*inputs, True)
    check(op(version, "backward"), (torch.randn_like(y), torch.randn_like(state), *inputs, *saved))
    if case == "plain":
        check(op(version, "backward"), (None, torch.randn_like(state), *inputs, *saved))
        check(op(version, "backward"), (torch.randn_like(y), None, *inputs, *saved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", STEPS)
def test_wkv_opcheck_step(version, dtype):
    inputs = make_inputs(version, 2, 1, 2, 4, dtype=dtype)
    token = [x[:, 0] if x.dim() == 4 else x for x in inputs[:4]]
    check(op(version, "step"), (*token, inputs.u, inputs.state, None))
    check(op(version, "step"), (*token, inputs.u, torch.randn(5, 2, head_size(4), head_size(4)), torch.tensor([3, -1])))


@pytest.mark.parametrize("version", OPS)
def test_wkv_opcheck_fake_equals_real(version):
    """Shapes, dtypes and strides of every output, saved ones and zero sizes included."""
    for options in (
        *CASES.values(),
        dict(batch=0, tokens=3, size=2),
        dict(tokens=0, size=2),
        dict(lengths=[0, 0], size=2),
    ):
        inputs = make_inputs(version, **options)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = [x if x is None else mode.from_tensor(x) for x in inputs]
        for save in (True, False):
            real = op(version, "forward")(*inputs, save)
            with mode:
                guess = op(version, "forward")(*fake, save)
            for a, b in zip(real, guess, strict=True):
                assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
            if save:
                real = op(version, "backward")(real[0], real[1], *inputs, *real[2:])
                with mode:
                    guess = op(version, "backward")(guess[0], guess[1], *fake, *guess[2:])
                for a, b in zip(real, guess, strict=True):
                    assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_wkv_opcheck_meta_tensors():
    """Shapes of a model of any size without its memory."""
    meta = dict(device="meta", dtype=torch.bfloat16)
    r = torch.empty(64, 65536, 64, 64, **meta)
    w, u = torch.empty(64, 65536, 64, 64, device="meta"), torch.empty(64, 64, device="meta")
    y, state = ops.wkv6(r, r, r, w, u)
    assert y.is_meta and y.shape == r.shape and state.shape == (64, 64, 64, 64) and state.dtype == torch.float32


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", OPS)
def test_wkv_autocast(version, autocast_dtype):
    """r, k, v run in the autocast dtype; w, u, state and their gradients stay fp32."""
    inputs = make_inputs(version, 2, 20, 2, 8)
    halves = inputs._replace(**{name: getattr(inputs, name).to(autocast_dtype) for name in "rkv"})

    def under_autocast(*arguments):
        with torch.autocast(DEVICE.type, autocast_dtype):
            return OPS[version](*arguments)

    actual = outputs_and_gradients(under_autocast, inputs)
    expected = outputs_and_gradients(OPS[version], halves)
    for name, x in expected.items():
        assert torch.equal(actual[name].to(x.dtype), x), name
    assert actual["y"].dtype == autocast_dtype and actual["state_out"].dtype == torch.float32
    assert all(actual[name].dtype == torch.float32 for name in ("dr", "dk", "dv", "dw", "du", "dstate"))


@pytest.mark.parametrize("version", OPS)
def test_wkv_autocast_mixed_inputs(version):
    """What a model under autocast hands over: bf16 projections, fp32 or bf16 parameters, a bf16 state."""
    inputs = make_inputs(version, 2, 20, 2, 8, dtype=torch.bfloat16, parameter_dtype=torch.bfloat16)
    inputs = inputs._replace(state=inputs.state.bfloat16(), k=inputs.k.float())
    with pytest.raises(ValueError, match="k must have r's dtype bfloat16, got float32"):
        OPS[version](*inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y, state = OPS[version](*inputs)
    wide = inputs._replace(k=inputs.k.bfloat16(), w=inputs.w.float(), u=inputs.u.float(), state=inputs.state.float())
    expected_y, expected_state = OPS[version](*wide)
    assert torch.equal(y, expected_y) and torch.equal(state, expected_state) and state.dtype == torch.float32


@pytest.mark.parametrize("version", OPS)
def test_wkv_autocast_leaves_fp64_alone(version):
    inputs = make_inputs(version, 1, 9, 2, 4, dtype=torch.float64)
    expected = outputs_and_gradients(OPS[version], inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = outputs_and_gradients(OPS[version], inputs)
    assert all(torch.equal(actual[name], x) and actual[name].dtype == torch.float64 for name, x in expected.items())


@pytest.mark.parametrize("version", STEPS)
def test_wkv_autocast_step(version):
    """The state is updated in place in fp32: never a cast copy of it."""
    inputs = make_inputs(version, 2, 1, 2, 8)
    token = [x[:, 0] if x.dim() == 4 else x for x in inputs[:4]]
    state, expected_state = inputs.state.clone(), inputs.state.clone()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = STEPS[version](*token, inputs.u, state)
    halves = [x.bfloat16() for x in token[:3]]
    assert torch.equal(y, STEPS[version](*halves, token[3], inputs.u, expected_state))
    assert torch.equal(state, expected_state) and not torch.equal(state, inputs.state)
    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(ValueError, match="state must be float32"):
        STEPS[version](*token, inputs.u, state.bfloat16())


def test_wkv_autocast_does_not_cast_integers():
    inputs = make_inputs("6.0", 1, 9, 2, 4)
    text = "r must be float32, .*, got int64"
    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(ValueError, match=text):
        ops.wkv6(*inputs._replace(r=inputs.r.long()))


def test_wkv_autocast_disabled_inside():
    inputs = make_inputs("6.0", 1, 9, 2, 4)
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.autocast(DEVICE.type, enabled=False):
        assert ops.wkv6(*inputs)[0].dtype == torch.float32
