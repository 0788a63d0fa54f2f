"""Products x weight^T, in fp32 on AVX-512 processors by oneDNN instead of torch's BLAS.

Torch multiplies fp32 matrices by MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, which torch holds
as well and uses for bf16, has AVX-512 code for all of them: 2.2 times as fast on an EPYC of family 26.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

_WORTH_A_CALL = 1 << 20  # multiply-adds; below, what a call of oneDNN costs (about 10 us) is more than it saves
_TILE = 4096
_FEWEST_ROWS = 4  # fewer are bound by reading the weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T as F.linear does: x [..., in], weight [out, in] with any strides; result [..., out].

    All that F.linear has holds here: dtypes, devices, autocast, derivatives of any order and kind, compilation; only
    the rounding of fp32 products differs. torch.backends.mkldnn.flags(enabled=False) gives torch's own.
    """
    if not is_for_onednn(x, weight):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight)
    return _by_onednn(x, weight)


def multiply_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Write x weight^T into out [n, V], which exists already; x [n, D], weight [V, D]; no gradients."""
    if not is_for_onednn(x, weight):
        torch.mm(x, weight.t(), out=out)
        return
    for tile in _tiles(out.shape[1]):
        out[:, tile] = _by_onednn(x, weight[tile])


def add_transposed_product(total: Tensor, z: Tensor, x: Tensor, first: bool) -> None:
    """Add x^T z to total [D, V], or store it there if first; z [n, V], x [n, D]; no gradients."""
    rows = x.t().contiguous()
    if not is_for_onednn(rows, z.t()):
        torch.addmm(total, rows, z, beta=0 if first else 1, out=total)
        return
    for tile in _tiles(total.shape[1]):
        part = _by_onednn(rows, z[:, tile].t())
        if first:
            total[:, tile] = part
        else:
            total[:, tile] += part


def _tiles(n: int) -> list[slice]:
    """Cut n columns into tiles: oneDNN returns new memory, which is free for results of a few MB that come and go."""
    return [slice(i, i + _TILE) for i in range(0, n, _TILE)]


def is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Tell whether x weight^T is a product that oneDNN takes over."""
    return (
        not torch.compiler.is_compiling()  # inductor chooses its own kernels
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.shape[-1] == weight.shape[1]
        and x.numel() >= _FEWEST_ROWS * x.shape[-1]
        and x.numel() * weight.shape[0] >= _WORTH_A_CALL
        and _HAS_AVX512
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


_PLAIN = (Tensor, torch.nn.Parameter)  # not a fake or distributed tensor, which has its own rules
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        # Other strides send oneDNN to its reference code, a hundred times slower.
        weight = weight.t().contiguous().t() if weight.stride(0) == 1 else weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both are products again, through linear(): they have derivatives of their own."""
        x, weight = ctx.saved_tensors
        dx = linear(dy, weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        rows_dy, rows_x = dy.flatten(0, -2), x.flatten(0, -2)
        return dx, linear(rows_dy.t(), rows_x.t())
