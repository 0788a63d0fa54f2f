"""Every message of the ops: which argument, what it got, what it needs, what to do."""

import re

import pytest
import torch
from wkv_cases import DEVICE, head_size

import rwkv_ext
from rwkv_ext import ops
from rwkv_ext.testing import make_inputs

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def arguments(version="6.0", **changes):
    """wkv arguments by name: B 2, T 3, H 2, N 4."""
    inputs = make_inputs(version, 2, 3, 2, 4, dtype=changes.pop("dtype", torch.float32))
    return {**inputs._asdict(), **changes}


def step_arguments(version="6.0", **changes):
    inputs = make_inputs(version, 2, 1, 2, 4)
    token = {name: x[:, 0] if x.dim() == 4 else x for name, x in zip("rkvw", inputs, strict=False)}
    return {**token, "u": inputs.u, "state": inputs.state, "slots": None, **changes}


def packed(cu_seqlens, **changes):
    inputs = make_inputs("6.0", 1, 6, 2, 4, state=False)
    return {**inputs._asdict(), "cu_seqlens": torch.as_tensor(cu_seqlens), **changes}


def refuses(error, text, op, given):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        op(**given)


zeros = torch.zeros


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(r=zeros(2, 3, 8)), "r must have 4 dimensions [B, T, H, N], got [2, 3, 8]"),
        (dict(r=zeros(())), "r must have 4 dimensions [B, T, H, N], got []"),
        (dict(r=zeros(2, 3, 2, 0)), "r must have a head size N of at least 1, got [2, 3, 2, 0]"),
        (dict(r=zeros(2, 3, 2, 4).int()), "r must be float32, float64, bfloat16 or float16, got int32"),
        (dict(r=zeros(2, 3, 2, 4).short()), "r must be float32, float64, bfloat16 or float16, got int16"),
        (dict(r=zeros(2, 3, 2, 4).byte()), "r must be float32, float64, bfloat16 or float16, got uint8"),
        (dict(r=zeros(2, 3, 2, 4).char()), "r must be float32, float64, bfloat16 or float16, got int8"),
        (dict(r=zeros(2, 3, 2, 4).bool()), "r must be float32, float64, bfloat16 or float16, got bool"),
        (dict(r=zeros(2, 3, 2, 4).cfloat()), "r must be float32, float64, bfloat16 or float16, got complex64"),
        (dict(r=zeros(2, 3, 2, 4).cdouble()), "r must be float32, float64, bfloat16 or float16, got complex128"),
        (
            dict(r=zeros(2, 3, 2, 4).to(torch.float8_e5m2)),
            "r must be float32, float64, bfloat16 or float16, got another dtype",
        ),
        (dict(k=zeros(2, 3, 2, 5)), "k must have the shape of r [2, 3, 2, 4], got [2, 3, 2, 5]"),
        (dict(k=zeros(1, 3, 2, 4)), "k must have the shape of r [2, 3, 2, 4], got [1, 3, 2, 4]"),
        (dict(v=zeros(3, 2, 4)), "v must have the shape of r [2, 3, 2, 4], got [3, 2, 4]"),
        (dict(k=zeros(2, 3, 2, 4).half()), "k must have r's dtype float32, got float16; convert it with .to(r.dtype)"),
        (dict(v=zeros(2, 3, 2, 4).long()), "v must have r's dtype float32, got int64; convert it with .to(r.dtype)"),
        (dict(w=zeros(2, 3, 2, 5)), "w must have the shape of r [2, 3, 2, 4], got [2, 3, 2, 5]"),
        (dict(w=zeros(2, 4)), "w must have the shape of r [2, 3, 2, 4], got [2, 4]"),
        (dict(w=zeros(2, 3, 2, 4).double()), "w must be float32, got float64; convert it with .to()"),
        (dict(w=zeros(2, 3, 2, 4).half()), "w must be float32, got float16; convert it with .to()"),
        (dict(u=zeros(8)), "u must have shape [H, N] = [2, 4], got [8]"),
        (dict(u=zeros(4, 2)), "u must have shape [H, N] = [2, 4], got [4, 2]"),
        (dict(u=zeros(2, 4).bfloat16()), "u must be float32, got bfloat16; convert it with .to()"),
        (dict(state=zeros(1, 2, 4, 4)), "state must have shape [B, H, N, N] = [2, 2, 4, 4], got [1, 2, 4, 4]"),
        (dict(state=zeros(2, 2, 4)), "state must have shape [B, H, N, N] = [2, 2, 4, 4], got [2, 2, 4]"),
        (
            dict(state=zeros(2, 2, 4, 4).double()),
            "state must be float32 beside a float32 r, got float64; convert it with .to()",
        ),
    ],
)
def test_wkv_errors_shapes_and_dtypes(changes, text):
    refuses(ValueError, f"wkv6: {text}", ops.wkv6, arguments(**changes))


def test_wkv_errors_name_the_op():
    for op, name, version in ((ops.wkv5, "wkv5", "5.2"), (ops.wkv6, "wkv6", "6.0")):
        refuses(ValueError, f"{name}: u must have shape [H, N] = [2, 4], got [3]", op, arguments(version, u=zeros(3)))
    refuses(ValueError, "wkv5: w must have shape [H, N] = [2, 4], got [2, 3, 2, 4]", ops.wkv5, arguments("6.0"))
    refuses(ValueError, "wkv5_step: w must have shape [H, N] = [2, 4], got [2, 2, 4]", ops.wkv5_step, step_arguments())


def test_wkv_errors_dtypes_beside_other_r():
    bf16 = arguments(dtype=torch.bfloat16)
    text = "w must be float32 or bfloat16, got float16; convert it with .to()"
    refuses(ValueError, f"wkv6: {text}", ops.wkv6, bf16 | {"w": bf16["w"].half()})
    text = "u must be float32 or bfloat16, got float64; convert it with .to()"
    refuses(ValueError, f"wkv6: {text}", ops.wkv6, bf16 | {"u": bf16["u"].double()})
    text = "state must be float32 beside a bfloat16 r, got bfloat16; convert it with .to()"
    refuses(ValueError, f"wkv6: {text}", ops.wkv6, bf16 | {"state": bf16["state"].bfloat16()})
    fp64 = arguments(dtype=torch.float64)
    text = "w must be float64, got float32; convert it with .to()"
    refuses(ValueError, f"wkv6: {text}", ops.wkv6, fp64 | {"w": fp64["w"].float()})
    text = "state must be float64 beside a float64 r, got float32; convert it with .to()"
    refuses(ValueError, f"wkv6: {text}", ops.wkv6, fp64 | {"state": fp64["state"].float()})


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (packed([1, 6]), "cu_seqlens must start with 0, got 1"),
        (packed([0, 5]), "cu_seqlens must end with T = 6, got 5"),
        (packed([0, 7]), "cu_seqlens must end with T = 6, got 7"),
        (packed([0, 4, 2, 6]), "cu_seqlens must not decrease, got 4 before 2 at index 2"),
        (packed([0, -1, 6]), "cu_seqlens must not decrease, got 0 before -1 at index 1"),
        (packed([0, 9, 6]), "cu_seqlens must not exceed T = 6, got 9 at index 1"),
        (packed(torch.tensor([0, 9, 6], dtype=torch.int32)), "cu_seqlens must not exceed T = 6, got 9 at index 1"),
        (packed([0, 2**62, 6]), f"cu_seqlens must not exceed T = 6, got {2**62} at index 1"),
    ],
)
def test_wkv_errors_cu_seqlens_values(given, text):
    """A GPU cannot see them without waiting: it clamps."""
    refuses(ValueError, f"wkv6: {text}", ops.wkv6, given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (packed([0.0, 6.0]), "cu_seqlens must be int64 or int32, got float32"),
        (packed([0]), "cu_seqlens must have shape [sequences + 1] with at least one sequence, got [1]"),
        (packed([[0, 6]]), "cu_seqlens must have shape [sequences + 1] with at least one sequence, got [1, 2]"),
        (
            arguments(cu_seqlens=torch.tensor([0, 3])),
            "r must have B = 1 with cu_seqlens, got [2, 3, 2, 4]; concatenate the sequences along T",
        ),
        (
            packed([0, 2, 6], state=zeros(1, 2, 4, 4)),
            "state must have shape [sequences, H, N, N] = [2, 2, 4, 4], got [1, 2, 4, 4]",
        ),
    ],
)
def test_wkv_errors_cu_seqlens(given, text):
    refuses(ValueError, f"wkv6: {text}", ops.wkv6, given)


@pytest.mark.parametrize(
    ("error", "changes", "text"),
    [
        (ValueError, dict(r=zeros(2, 1, 2, 4)), "r must have 3 dimensions [B, H, N], got [2, 1, 2, 4]"),
        (
            ValueError,
            dict(state=zeros(3, 2, 4, 4)),
            "state must have shape [B, H, N, N] = [2, 2, 4, 4], got [3, 2, 4, 4]",
        ),
        (
            ValueError,
            dict(state=zeros(2, 2, 4, 4).half()),
            "state must be float32 beside a float32 r, got float16; convert it with .to()",
        ),
        (
            ValueError,
            dict(state=zeros(2, 2, 4, 4).mT),
            "state must be contiguous, because it is updated in place, got strides [32, 16, 1, 4]; "
            "call .contiguous() once and keep the result",
        ),
        (
            ValueError,
            dict(state=zeros(1, 2, 4, 4).expand(2, 2, 4, 4)),
            "state must be contiguous, because it is updated in place, got strides [0, 16, 4, 1]; "
            "call .contiguous() once and keep the result",
        ),
        (ValueError, dict(slots=torch.tensor([0])), "slots must have shape [B] = [2], got [1]"),
        (ValueError, dict(slots=torch.tensor([0, 1]).int()), "slots must be int64, got int32"),
        (
            ValueError,
            dict(slots=torch.tensor([0, 1]), state=zeros(5, 4, 4)),
            "state must have shape [slots, H, N, N] = [5, 2, 4, 4], got [5, 4, 4]",
        ),
        (
            ValueError,
            dict(slots=torch.tensor([0, 1]), state=zeros(())),
            "state must have shape [slots, H, N, N] = [2, 2, 4, 4], got []",
        ),
    ],
)
def test_wkv_errors_step(error, changes, text):
    refuses(error, f"wkv6_step: {text}", ops.wkv6_step, step_arguments(**changes))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("error", "slots", "text"),
    [
        (ValueError, [1, 1], "slots must not repeat, got 1 again at index 1"),
        (IndexError, [0, 2], "slots must be -1 (skip the row) or 0 to 1, got 2 at index 1"),
        (IndexError, [-2, 0], "slots must be -1 (skip the row) or 0 to 1, got -2 at index 0"),
    ],
)
def test_wkv_errors_step_slots(error, slots, text):
    refuses(error, f"wkv6_step: {text}", ops.wkv6_step, step_arguments(slots=torch.tensor(slots)))


@pytest.mark.parametrize("wrong", [None, 3, [1.0], "r"], ids=str)
@pytest.mark.parametrize("name", "r k v w u".split())
def test_wkv_errors_not_a_tensor(name, wrong):
    text = f"{name} must be a torch.Tensor, got {type(wrong).__name__}"
    refuses(TypeError, f"wkv6: {text}", ops.wkv6, arguments(**{name: wrong}))
    refuses(TypeError, f"wkv6_step: {text}", ops.wkv6_step, step_arguments(**{name: wrong}))


def test_wkv_errors_optional_arguments_not_tensors():
    refuses(
        TypeError,
        "wkv6: cu_seqlens must be a torch.Tensor, got list",
        ops.wkv6,
        packed([0, 6]) | {"cu_seqlens": [0, 6]},
    )
    refuses(TypeError, "wkv6: state must be a torch.Tensor, got int", ops.wkv6, arguments(state=0))
    refuses(
        TypeError, "wkv6_step: state must be a torch.Tensor, got NoneType", ops.wkv6_step, step_arguments(state=None)
    )
    refuses(TypeError, "wkv6_step: slots must be a torch.Tensor, got list", ops.wkv6_step, step_arguments(slots=[0, 1]))


def test_wkv_errors_backward():
    """The backward op by itself: cotangents and saved tensors that do not fit."""
    size = head_size(4)
    inputs = make_inputs("6.0", 2, 3, 2, size)
    forward, backward = torch.ops.rwkv_ext.wkv6_forward, torch.ops.rwkv_ext.wkv6_backward
    y, state, *saved = forward(*inputs, True)
    for dy, ds, text in (
        (y[:1], None, f"dy must have the shape of r [2, 3, 2, {size}], got [1, 3, 2, {size}]"),
        (y.half(), None, "dy must have r's dtype float32, got float16; convert it with .to(r.dtype)"),
        (
            y,
            state[:1],
            f"dstate_out must have shape [B, H, N, N] = [2, 2, {size}, {size}], got [1, 2, {size}, {size}]",
        ),
        (y, state.double(), "dstate_out must be float32 beside a float32 r, got float64; convert it with .to()"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape('wkv6_backward: ' + text)}$"):
            backward(dy, ds, *inputs, *saved)
    text = "chunk_states must be float32 beside a float32 r, got float64; convert it with .to()"
    with pytest.raises(ValueError, match=f"^{re.escape('wkv6_backward: ' + text)}$"):
        backward(y, None, *inputs, saved[0].double(), saved[1])


@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_wkv_errors_backward_on_unsaved_tensors(version):
    """The raw op with save_for_backward = False, then backward()."""
    size = head_size(4)
    inputs = [x if x is None else x.requires_grad_() for x in make_inputs(version, 2, 130, 2, size)[:6]]
    op = f"wkv{version[0]}"
    y = getattr(torch.ops.rwkv_ext, f"{op}_forward")(*inputs, None, False)[0]
    text = (
        f"{op}_backward: chunk_states must hold 4 states of [H, N, N] = [2, {size}, {size}], got shape [0]; "
        "run the forward op with save_for_backward = true"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        y.sum().backward()


@pytest.mark.cpu
def test_wkv_errors_other_device():
    """Reached through the CPU kernel with tensors of the meta device, the only other one that is everywhere."""
    forward, step = (getattr(torch.ops.rwkv_ext, f"wkv6_{kind}").default for kind in ("forward", "step"))
    for name in ("k", "v", "w", "u", "state", "cu_seqlens"):
        given = packed([0, 6], state=zeros(1, 2, 4, 4))
        given[name] = given[name].to("meta")
        text = f"wkv6: {name} must be on r's device cpu, got another device; move it with .to(r.device)"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            forward.redispatch(CPU, *given.values(), False)
    given = step_arguments(slots=torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="^wkv6_step: slots must be on r's device cpu, got another device"):
        step.redispatch(CPU, *given.values())


def test_wkv_errors_second_derivatives():
    for version, op in (("5.2", ops.wkv5), ("6.0", ops.wkv6)):
        inputs = [x.requires_grad_() for x in make_inputs(version, 1, 5, 1, head_size(4))[:6]]
        (gradient,) = torch.autograd.grad(op(*inputs)[0].square().sum(), inputs[0], create_graph=True)
        text = f"wkv{version[0]}: second derivatives are not implemented; differentiate once, or use rwkv_ext.reference"
        with pytest.raises(NotImplementedError, match=f"^{re.escape(text)}$"):
            gradient.sum().backward()


FORWARD_MODE = "forward-mode derivatives are not implemented; use reverse mode (backward)"
TRANSFORMS = "torch.func transforms are not implemented; use reverse mode (backward, torch.autograd.grad)"
VMAP = "torch.vmap is not implemented; give the op a batch axis B instead"


def beside_a_leaf(f, x):
    """Differentiate by something else while x, a model's parameter for instance, requires a gradient as well."""
    return torch.func.grad(lambda scale: (scale * f(x)).sum())(torch.ones(()))


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (lambda f, x: torch.func.grad(lambda r: f(r).sum())(x), TRANSFORMS),
        (lambda f, x: torch.func.vjp(f, x), TRANSFORMS),
        (lambda f, x: torch.func.jacrev(f)(x), TRANSFORMS),
        (lambda f, x: torch.func.hessian(f)(x), TRANSFORMS),
        (lambda f, x: torch.func.jvp(f, (x,), (x,)), TRANSFORMS),
        (lambda f, x: torch.func.jacfwd(f)(x), None),
        (lambda f, x: torch.vmap(f)(x[None]), VMAP),
        (lambda f, x: torch.vmap(torch.func.grad(lambda r: f(r).sum()))(x[None]), None),
        (lambda f, x: beside_a_leaf(f, x.clone().requires_grad_()), TRANSFORMS),
    ],
    ids="grad vjp jacrev hessian jvp jacfwd vmap vmap-of-grad grad-beside-a-leaf".split(),
)
@pytest.mark.parametrize("name", ["wkv5", "wkv6", "wkv6_step"])
def test_wkv_errors_transforms(name, transform, text):
    given = step_arguments() if name == "wkv6_step" else arguments({"wkv5": "5.2", "wkv6": "6.0"}[name])
    op = getattr(ops, name)
    r, *rest = given.values()

    def f(x):
        y = op(x, *rest)
        return y if isinstance(y, torch.Tensor) else y[0]

    expected = f"^{name}: " + (re.escape(text) if text else "torch.* (is|are) not implemented; ")
    with pytest.raises(NotImplementedError, match=expected):
        transform(f, r)


def test_wkv_errors_forward_mode():
    given = make_inputs("6.0", 2, 3, 2, head_size(4))._asdict()
    with torch.autograd.forward_ad.dual_level():
        for name in "r k v w u state".split():
            dual = torch.autograd.forward_ad.make_dual(given[name], torch.ones_like(given[name]))
            refuses(NotImplementedError, f"wkv6: {FORWARD_MODE}", ops.wkv6, given | {name: dual})
        ops.wkv6(**given)  # a level without tangents is no reason to refuse
        token = step_arguments()
        token["r"] = torch.autograd.forward_ad.make_dual(token["r"], torch.ones_like(token["r"]))
        refuses(NotImplementedError, f"wkv6_step: {FORWARD_MODE}", ops.wkv6_step, token)


@pytest.mark.parametrize("kind", ["forward", "step"])
def test_wkv_errors_vmap_of_the_raw_op(kind):
    given = list((arguments() if kind == "forward" else step_arguments()).values())
    given += [False] if kind == "forward" else []
    op = getattr(torch.ops.rwkv_ext, f"wkv6_{kind}")
    with pytest.raises(NotImplementedError, match=f"^wkv6: {re.escape(VMAP)}$"):
        torch.vmap(lambda r: op(r, *given[1:]))(given[0][None])


def test_wkv_errors_transforms_elsewhere_are_no_reason_to_refuse():
    """A constant inside torch.func.grad, and functional_call, which is no transform."""
    given = make_inputs("6.0", 2, 3, 2, head_size(4))._asdict()
    y = ops.wkv6(**given)[0].sum()
    assert torch.func.grad(lambda s: s * ops.wkv6(**given)[0].sum())(torch.ones(())) == y


def test_wkv_errors_leave_the_op_usable():
    """After a refusal the next call is right."""
    given = make_inputs("6.0", 2, 3, 2, head_size(4))._asdict()
    expected = ops.wkv6(**given)[0]
    with pytest.raises(ValueError):
        ops.wkv6(**arguments(u=zeros(3)))
    assert torch.equal(ops.wkv6(**given)[0], expected) and rwkv_ext.wkv6 is ops.wkv6


@pytest.mark.parametrize("kind", ["forward", "step"])
def test_tensors_without_data_get_the_same_sentences(kind):
    shape = (1, 4, 2, 8) if kind == "forward" else (1, 2, 8)
    x, u = torch.empty(shape, device="meta"), torch.empty(2, 8, device="meta")
    state = torch.empty(1, 2, 8, 8, device="meta")
    last = (None, False) if kind == "forward" else (None,)
    op, name = getattr(torch.ops.rwkv_ext, f"wkv6_{kind}"), "wkv6" if kind == "forward" else "wkv6_step"
    with pytest.raises(ValueError, match=rf"^{name}: r must have {len(shape)} dimensions \[B, .*\], got \[2, 8\]$"):
        op(u, x, x, x, u, state, *last)
    with pytest.raises(ValueError, match=rf"^{name}: k must be on r's device meta, got {DEVICE.type}"):
        op(x, torch.zeros(shape), x, x, u, state, *last)


def test_autocast_leaves_fp64_to_the_checks():
    x, u = torch.zeros(1, 4, 2, 8), torch.zeros(2, 8)
    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(ValueError, match="k must have r's dtype bfloat16"):
        ops.wkv6(x, x.double(), x, x, u)
