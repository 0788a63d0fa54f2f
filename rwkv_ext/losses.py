"""Linear layer, cross-entropy and L2Wrap in one function that never holds the logits of all tokens.

With V = 65536 the logits are the largest tensor of a language model by far. Here they exist for one chunk of
tokens at a time: z = hidden weight^T, then z is overwritten by the gradient of the loss, then both gradients are
accumulated. All three matrix products are done in the forward pass; the backward pass only scales the results.

Shapes: hidden [..., D], weight [V, D], targets [...]; inside, the leading axes are flattened to n tokens.
"""

import torch
from torch import Tensor

from ._layer_registration import has_layer_ops
from .matrix_product import add_transposed_product, is_for_onednn, multiply_into

_CHUNK_BYTES = 64 << 20  # of fp32 logits on the CPU, 256 tokens; bench_loss.py compares sizes
_CHUNK_BYTES_16_BIT = 128 << 20  # 1024 tokens: each chunk's part of weight's gradient is added to an fp32 sum
_CHUNK_BYTES_GPU = 512 << 20
_SOFTMAX_ROWS = 32  # of 16-bit logits, made fp32: 8 MB at V = 65536 stay in the cache
_ADD_ROWS = 4096


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    l2wrap: float = 1e-4,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the cross-entropy of softmax(hidden weight^T) against targets: a scalar in fp32, fp64 for fp64.

    hidden [..., D] in fp64, fp32, bf16 or fp16; weight [V, D] in hidden's dtype, or fp32 with a 16-bit hidden
    (cast once per call); targets [...] integers in [0, V), or ignore_index where a position shall contribute
    nothing to loss and gradients. The products run in hidden's dtype; under autocast, hidden is first cast to the
    autocast dtype. Softmax, loss and the sum of weight's gradient over chunks are in fp32 or better.

    reduction "mean" divides the sum over tokens by the number of tokens that are not ignored, or by normalizer
    where given (under gradient accumulation or data parallelism: the token count of the whole batch). "sum" does
    not divide. With no token left the loss is 0 and so are the gradients, unlike torch's nan: one masked-out
    micro-batch must not poison an accumulated gradient.

    L2Wrap (RWKV-LM, src/model.py) keeps the logits from drifting: it leaves the value of the loss alone and adds
    l2wrap / count * max_logit to the gradient of each position's largest logit (the first, where several are
    equal), count being the divisor above. That is the gradient of 0.5 * l2wrap / count * sum(max_logit ** 2). It
    is scaled by the incoming gradient like the rest. l2wrap = 0 turns it off.

    Gradients exist for hidden and weight, in their dtypes, and are computed in the forward pass: each only where
    grad mode is on and the tensor requires it, so validation costs one product. They cannot be differentiated
    again. chunk is the number of tokens whose logits exist at a time; None chooses it from V and the dtype.

    Raises TypeError and ValueError for dtypes, shapes, devices and options that do not fit, and ValueError for a
    target out of range on the CPU. Other devices would have to synchronise for that: there the gather asserts, as
    in torch's own cross_entropy.

    Example: loss = linear_cross_entropy(x, model.head.weight, tokens[:, 1:]); loss.backward()
    """
    _check(hidden, weight, targets, l2wrap, reduction, normalizer, chunk)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if weight.dtype != hidden.dtype and (weight.dtype != torch.float32 or hidden.dtype == torch.float64):
        raise TypeError(
            f"linear_cross_entropy: weight must be {hidden.dtype} as hidden is, or float32 with a 16-bit hidden, got "
            f"{weight.dtype}; cast one of them, or use autocast"
        )
    if chunk is None:
        on_cpu = _CHUNK_BYTES_16_BIT if hidden.element_size() == 2 else _CHUNK_BYTES
        budget = on_cpu if device == "cpu" else _CHUNK_BYTES_GPU
        chunk = max(1, budget // (max(1, weight.shape[0]) * hidden.element_size()))
    training = torch.is_grad_enabled()
    total, _, _ = _linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        ignore_index,
        l2wrap,
        chunk,
        training and hidden.requires_grad,
        training and weight.requires_grad,
    )
    if reduction == "sum":
        return total
    if normalizer is None:
        normalizer = (targets != ignore_index).sum().clamp(min=1)
    elif isinstance(normalizer, Tensor):
        normalizer = normalizer.to(total.dtype)  # an fp64 one would make the loss fp64
    return total / normalizer


def _check(hidden, weight, targets, l2wrap, reduction, normalizer, chunk):
    where = "linear_cross_entropy:"
    if hidden.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{where} hidden must be float64, float32, bfloat16 or float16, got {hidden.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where} targets must be int64 or int32 token ids, got {targets.dtype}; use .long()")
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[0] < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{where} weight must be [V, D] with V >= 1 and the D of hidden [..., D], got weight {list(weight.shape)} "
            f"and hidden {list(hidden.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{where} targets must have hidden's leading axes {list(hidden.shape[:-1])}, got {list(targets.shape)}"
        )
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"{where} hidden, weight and targets must be on one device, got {hidden.device}, {weight.device} and "
            f"{targets.device}"
        )
    if not l2wrap >= 0:
        raise ValueError(f"{where} l2wrap must be >= 0, got {l2wrap}; 0 turns it off")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'{where} reduction must be "mean" or "sum", got {reduction!r}')
    if normalizer is not None and reduction == "sum":
        raise ValueError(f'{where} normalizer must be None with reduction="sum", got {normalizer}; use "mean"')
    if isinstance(normalizer, Tensor):
        if normalizer.dim():
            raise ValueError(f"{where} normalizer must be a number or scalar tensor, got {list(normalizer.shape)}")
    elif normalizer is not None and not normalizer > 0:
        raise ValueError(f"{where} normalizer must be > 0, got {normalizer}; it is the token count to divide by")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{where} chunk must be at least 1 token, got {chunk}; leave it out to have it chosen")


@torch.library.custom_op("rwkv_ext::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    l2wrap: float,
    chunk: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss summed over tokens and its gradients for hidden and weight, empty where not needed."""
    with torch.autocast(hidden.device.type, enabled=False):
        targets, keep = targets.long(), targets != ignore_index
        options = (l2wrap, chunk, need_hidden, need_weight)
        if hidden.device.type != "cpu":  # selecting rows would synchronise
            return _sum_and_gradients(hidden, weight, targets.where(keep, 0), keep, *options)
        rows = keep.nonzero().squeeze(1)
        _check_targets(targets, rows, weight.shape[0])
        if len(rows) == len(targets):
            return _sum_and_gradients(hidden, weight, targets, None, *options)
        total, grad, grad_weight = _sum_and_gradients(hidden[rows], weight, targets[rows], None, *options)
        if need_hidden:
            grad = torch.zeros_like(hidden).index_copy_(0, rows, grad)
        return total, grad, grad_weight


def _check_targets(targets: Tensor, rows: Tensor, vocab: int):
    wrong = ((targets[rows] < 0) | (targets[rows] >= vocab)).nonzero()
    if len(wrong):
        index = rows[wrong[0, 0]].item()
        raise ValueError(
            f"linear_cross_entropy: targets must be in [0, {vocab}) or ignore_index, got {targets[index].item()} "
            f"at position {index} (axes flattened); check the tokenizer against the model's vocabulary"
        )


def _sum_and_gradients(hidden, weight, targets, keep, l2wrap, chunk, need_hidden, need_weight):
    """Do the work of the op for targets in [0, V); keep is False where a token shall not count, None keeps all."""
    n, vocab = hidden.shape[0], weight.shape[0]
    compute = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(hidden.dtype)
    total = hidden.new_zeros((), dtype=compute)
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    # oneDNN's fp32 products come out the right way round for a transposed sum.
    transposed = need_weight and is_for_onednn(hidden, weight)
    shape = (vocab, hidden.shape[1])[:: -1 if transposed else 1]
    grad_weight = hidden.new_empty(shape if need_weight else 0, dtype=compute)
    logits = hidden.new_empty(min(chunk, n), vocab)
    # A part of grad_weight in hidden's dtype, to be added to the fp32 sum.
    part = torch.empty_like(weight) if need_weight and compute != hidden.dtype else None
    fused = keep is None and has_layer_ops(hidden)
    tile = chunk if fused or compute == hidden.dtype else _SOFTMAX_ROWS
    for start in range(0, n, chunk):
        end = min(start + chunk, n)
        x, z = hidden[start:end], logits[: end - start]
        multiply_into(z, x, weight)
        for i in range(start, end, tile):
            j = min(i + tile, end)
            rows, overwrite = z[i - start : j - start], need_hidden or need_weight
            if fused:
                total += torch.ops.rwkv_ext.cross_entropy_rows(rows, targets[i:j], l2wrap, overwrite).sum()
            else:
                kept = None if keep is None else keep[i:j, None]
                total += _softmax_gradient(rows, targets[i:j, None], kept, l2wrap, overwrite)
        if need_hidden:
            _multiply_back(grad_hidden[start:end], z, weight)
        if transposed:
            add_transposed_product(grad_weight, z, x, first=start == 0)
        elif need_weight:
            _add_product(grad_weight, z, x, part, first=start == 0)
    if need_weight and n == 0:
        grad_weight.zero_()
    return total, grad_hidden, grad_weight.t().contiguous() if transposed else grad_weight


def _softmax_gradient(z, targets, keep, l2wrap, overwrite):
    """Return the summed loss of logits z [rows, V]; if overwrite, z becomes its gradient (L2Wrap included).

    targets [rows, 1]; keep [rows, 1] or None.
    """
    p = z.to(torch.promote_types(z.dtype, torch.float32))  # z itself for fp32 and fp64
    largest, at = _first_max(p)
    picked = p.gather(1, targets)
    torch.softmax(p, 1, out=p)
    # The softmax of the largest logit is 1 / sum(exp(z - max)): the logarithm of the sum needs no pass of its own.
    loss = largest - picked - p.gather(1, at).log_()
    if overwrite:
        p.scatter_add_(1, targets, torch.full_like(picked, -1))
        if l2wrap:
            p.scatter_add_(1, at, l2wrap * largest)
        if keep is not None:
            torch.mul(p, keep.to(p.dtype), out=z)
        elif p is not z:
            z.copy_(p)
    return loss.sum() if keep is None else loss.where(keep, 0).sum()


def _first_max(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest value and where it first occurs, both [rows, 1].

    torch.max with an index takes five times as long as amax on the CPU: the index is looked for in one block only.
    """
    rows, vocab = z.shape
    block = 256
    if vocab % block:
        return z.max(1, keepdim=True)
    blocks = z.view(rows, vocab // block, block)
    largest, b = blocks.amax(2).max(1, keepdim=True)
    inside = blocks.gather(1, b[:, :, None].expand(rows, 1, block)).argmax(2)
    return largest, b * block + inside


def _multiply_back(out: Tensor, z: Tensor, weight: Tensor):
    """Write z weight to out [rows, D]."""
    if z.is_cpu and z.element_size() == 2:  # oneDNN is a tenth faster the other way round, all on its side
        out.copy_(torch.mm(weight.t(), z.t()).t())
    else:
        multiply_into(out, z, weight.t())


def _add_product(total: Tensor, z: Tensor, x: Tensor, part: Tensor | None, first: bool):
    """Add z^T x to total [V, D], or store it there if first; part is room for the product in x's dtype."""
    if part is None:
        torch.addmm(total, z.t(), x, beta=0 if first else 1, out=total)
        return
    torch.mm(z.t(), x, out=part)
    if has_layer_ops(total):
        torch.ops.rwkv_ext.accumulate(total, part, first)
        return
    if first:
        total.copy_(part)
        return
    for i in range(0, total.shape[0], _ADD_ROWS):  # in two steps and in the cache: the mixed add_ is 10 times slower
        total[i : i + _ADD_ROWS] += part[i : i + _ADD_ROWS].to(total.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, ignore_index, l2wrap, chunk, need_hidden, need_weight):
    compute = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=compute),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        hidden.new_empty(weight.shape if need_weight else 0, dtype=compute),
    )


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.options, ctx.weight_dtype = inputs[3:], inputs[1].dtype
    # While torch traces, tensors are of its own kinds, and what a graph computes is for the compiler to reuse.
    ctx.traced = type(output[1]) is not Tensor
    if ctx.traced:
        ctx.save_for_backward(*output[1:])
        return
    ctx.save_for_backward(*inputs[:3])
    # Kept by hand because the first backward pass scales them in place: a copy of [V, D] costs as much as AdamW does.
    ctx.gradients = [gradient.detach() for gradient in output[1:]]


def _backward(ctx, grad, _grad_hidden, _grad_weight):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy: second derivatives do not exist; where create_graph=True is needed, use "
            "F.cross_entropy(F.linear(hidden, weight), targets)"
        )
    need_hidden, need_weight = ctx.options[-2:]
    if grad is None:
        return (None,) * 8
    if ctx.traced:
        scaled = [gradient * grad for gradient in ctx.saved_tensors]
    else:
        inputs = ctx.saved_tensors
        if ctx.gradients is None:  # a second pass with retain_graph=True
            ctx.gradients = torch.ops.rwkv_ext.linear_cross_entropy(*inputs, *ctx.options)[1:]
        scaled, ctx.gradients = [gradient.mul_(grad) for gradient in ctx.gradients], None
    return (
        scaled[0] if need_hidden else None,
        scaled[1].to(ctx.weight_dtype) if need_weight else None,
        *[None] * 6,
    )


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
