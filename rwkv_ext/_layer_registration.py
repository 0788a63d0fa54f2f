"""What the dispatcher must know about a layer's CPU ops beside their kernels: fake (shapes), autograd, autocast, vmap.

The schemas are in csrc/ops.cpp. These ops are private: losses.py and models/ call them on CPU tensors, where the plain
PyTorch form of the same function, which other devices run, is what they are tested against. All compute in fp32 (fp64
for fp64) and round once; their results do not depend on the number of threads.

cross_entropy_rows  loss [rows] of logits [rows, V], which become their gradient; see losses.py
shift_mix           a list of C tensors [B, T, D]: base + (other - base) (weights[c] + low[c]), where base is h
                    [B, T, D] and other the token before (last [B or sequences, D], zeros if None, before the first), or
                    the reverse if weighs_current; weights [C, D] fp32 or h's dtype; low C tensors [B, T, D], or none
head_norm_gate      [M, H * N]: each head of y [M, H, N] normalised, times weight, plus bias, times silu(gate)
add_layer_norm      (x + delta in x's dtype, its layer norm in `dtype`), both of x's shape [..., D]; delta, in `dtype`,
                    may be None, and the sum is then empty; dtype is x's own or, beside an fp32 x, a 16-bit one
squared_relu        relu(x) ** 2
sigmoid_gate        sigmoid(gate) * x
accumulate          total, fp32 (fp64), becomes part, or total + part unless first; part of any dtype
"""

import torch
from torch._C import DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.autograd import forward_ad

from . import _load
from ._registration import AUTOCAST_KEYS, _cast, refuse

_built = _load.error is None


def has_layer_ops(x: torch.Tensor) -> bool:
    """Tell whether the ops of this file can take x: a CPU tensor, the op library is built, and no transform is at work.

    They have no forward-mode derivatives and no batching rules: functorch's transforms get plain PyTorch.
    """
    return x.is_cpu and _built and (torch.compiler.is_compiling() or not _transforms())


def _transforms() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _cross_entropy_rows_fake(logits, targets, l2wrap, overwrite):
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


def _shift_mix_fake(h, last, weights, low, cu_seqlens, weighs_current):
    return [h.new_empty(h.shape) for _ in range(weights.shape[0])]


def _shift_mix_backward_fake(dmixed, h, last, weights, low, cu_seqlens, weighs_current):
    dlast = h.new_empty(0 if last is None else last.shape)
    return h.new_empty(h.shape), dlast, weights.new_empty(weights.shape), [h.new_empty(h.shape) for _ in low]


def _shift_mix_save(ctx, inputs, output):
    h, last, weights, low, cu_seqlens, ctx.weighs_current = inputs
    ctx.save_for_backward(h, last, weights, cu_seqlens, *low)


def _shift_mix_gradient(ctx, dmixed):
    h, last, weights, cu_seqlens, *low = ctx.saved_tensors
    dmixed = [h.new_zeros(h.shape) if x is None else x for x in dmixed]
    dh, dlast, dweights, dlow = torch.ops.rwkv_ext.shift_mix_backward(
        dmixed, h, last, weights, low, cu_seqlens, ctx.weighs_current
    )
    return dh, None if last is None else dlast, dweights, dlow, None, None


def _head_norm_gate_fake(y, weight, bias, gate, eps):
    return y.new_empty(y.shape[0], y.shape[1] * y.shape[2])


def _head_norm_gate_backward_fake(dout, y, weight, bias, gate, eps):
    return tuple(x.new_empty(x.shape) for x in (y, weight, bias, gate))


def _head_norm_gate_save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _head_norm_gate_gradient(ctx, dout):
    return *torch.ops.rwkv_ext.head_norm_gate_backward(dout, *ctx.saved_tensors, ctx.eps), None


def _add_layer_norm_fake(x, delta, weight, bias, eps, dtype):
    return x.new_empty(0 if delta is None else x.shape), x.new_empty(x.shape, dtype=dtype)


def _add_layer_norm_backward_fake(dnormal, dsum, stream, weight, eps, needs_ddelta):
    ddelta = dnormal.new_empty(stream.shape if needs_ddelta else 0)
    return stream.new_empty(stream.shape), ddelta, *(weight.new_empty(weight.shape) for _ in range(2))


def _add_layer_norm_save(ctx, inputs, output):
    x, delta, weight, _, ctx.eps, ctx.dtype = inputs
    ctx.has_delta = delta is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0] if ctx.has_delta else x, weight)


def _add_layer_norm_gradient(ctx, dsum, dnormal):
    stream, weight = ctx.saved_tensors
    if dnormal is None:
        dnormal = stream.new_zeros(stream.shape, dtype=ctx.dtype)
    own_dtype = ctx.dtype == stream.dtype  # delta's gradient is then x's
    dx, ddelta, dweight, dbias = torch.ops.rwkv_ext.add_layer_norm_backward(
        dnormal, dsum if ctx.has_delta else None, stream, weight, ctx.eps, ctx.has_delta and not own_dtype
    )
    return dx, (dx if own_dtype else ddelta) if ctx.has_delta else None, dweight, dbias, None, None


def _save_all(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _squared_relu_gradient(ctx, dout):
    return torch.ops.rwkv_ext.squared_relu_backward(dout, *ctx.saved_tensors)


def _sigmoid_gate_gradient(ctx, dout):
    return torch.ops.rwkv_ext.sigmoid_gate_backward(dout, *ctx.saved_tensors)


def _contiguous_like(x):
    return x.new_empty(x.shape)


# name: (fake of the forward, fake of the backward, setup_context, backward formula, arguments that autocast casts)
_DIFFERENTIABLE = {
    "shift_mix": (
        _shift_mix_fake,
        _shift_mix_backward_fake,
        _shift_mix_save,
        _shift_mix_gradient,
        ("h", "last", "low"),
    ),
    "head_norm_gate": (
        _head_norm_gate_fake,
        _head_norm_gate_backward_fake,
        _head_norm_gate_save,
        _head_norm_gate_gradient,
        ("y", "gate"),
    ),
    "add_layer_norm": (
        _add_layer_norm_fake,
        _add_layer_norm_backward_fake,
        _add_layer_norm_save,
        _add_layer_norm_gradient,
        (),  # dtype says it
    ),
    "squared_relu": (
        _contiguous_like,
        lambda dout, x: x.new_empty(x.shape),
        _save_all,
        _squared_relu_gradient,
        ("x",),
    ),
    "sigmoid_gate": (
        lambda gate, x: gate.new_empty(gate.shape),
        lambda dout, gate, x: (gate.new_empty(gate.shape), x.new_empty(x.shape)),
        _save_all,
        _sigmoid_gate_gradient,
        ("gate", "x"),
    ),
}


# These ops are private, so what fails is a model or its loss.
_INSTEAD_OF_VMAP = "give the model a batch axis B instead, or the loss all tokens at once"


def _autocast(op, cast):
    keys = DispatchKeySet(AUTOCAST_KEYS["cpu"])
    names = [argument.name for argument in op._schema.arguments]

    def cast_and_call(*given):
        dtype = torch.get_autocast_dtype("cpu")

        def to_dtype(x):
            return [_cast(part, dtype) for part in x] if isinstance(x, (list, tuple)) else _cast(x, dtype)

        if given[0].dtype != torch.float64:
            named = zip(names, given, strict=True)
            given = [to_dtype(x) if name in cast and x is not None else x for name, x in named]
        with _ExcludeDispatchKeyGuard(keys):
            return op(*given)

    return cast_and_call


def _refuse_vmap(name):
    torch.library.register_vmap(f"rwkv_ext::{name}", refuse(name, "torch.vmap is", _INSTEAD_OF_VMAP))


def _register(library):
    torch.library.register_fake("rwkv_ext::cross_entropy_rows", _cross_entropy_rows_fake)
    torch.library.register_fake("rwkv_ext::accumulate", lambda total, part, first: None)
    for name in ("cross_entropy_rows", "accumulate"):
        _refuse_vmap(name)
    for name, (fake, backward_fake, save, gradient, cast) in _DIFFERENTIABLE.items():
        forward, backward = f"rwkv_ext::{name}", f"rwkv_ext::{name}_backward"
        torch.library.register_fake(forward, fake)
        torch.library.register_fake(backward, backward_fake)
        torch.library.register_autograd(forward, gradient, setup_context=save)
        torch.library.register_autograd(backward, refuse(name, "second derivatives are", "differentiate once"))
        _refuse_vmap(name)
        _refuse_vmap(f"{name}_backward")
        overload = getattr(torch.ops.rwkv_ext, name).default
        library.impl(name, _autocast(overload, cast), AUTOCAST_KEYS["cpu"].name)


if _built:
    _library = torch.library.Library("rwkv_ext", "IMPL")  # its registrations live as long as it does
    _register(_library)
