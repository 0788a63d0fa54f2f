"""Builds and calls the CUDA kernels of a checkout of RWKV-LM, for comparison; nothing of them is kept here.

The sources are RWKV-v5/cuda/wkv6_{op.cpp,cuda.cu} and wkv5_*. Head size and, for wkv6, the longest sequence are
compile-time constants there; both take bf16 tensors [B, T, H N] and have no states.
"""

from pathlib import Path

import torch

SIZE = 64


def build(checkout: Path, tokens: int):
    """Return (version, prepare) for each kernel; prepare(inputs, dy) gives the functions forward and backward."""
    from torch.utils.cpp_extension import load

    folder = next((x for x in (checkout / "RWKV-v5/cuda", checkout / "cuda", checkout) if x.is_dir()), checkout)
    kernels = []
    for version, prepare in (("6.0", _finch), ("5.2", _eagle)):
        name = f"wkv{version[0]}"
        sources = [folder / f"{name}_op.cpp", folder / f"{name}_cuda.cu"]
        if not all(source.exists() for source in sources):
            raise FileNotFoundError(f"{sources[0]} or {sources[1].name} is missing; give a checkout of RWKV-LM")
        flags = ["--use_fast_math", "-O3", "--extra-device-vectorization", f"-D_N_={SIZE}", f"-D_T_={tokens}"]
        module = load(name=f"bench_{name}", sources=[str(x) for x in sources], extra_cuda_cflags=flags)
        kernels.append((version, lambda inputs, dy, module=module, prepare=prepare: prepare(module, inputs, dy)))
    return kernels


def _shapes(inputs):
    batch, tokens, heads, size = inputs.r.shape
    if size != SIZE or inputs.r.dtype != torch.bfloat16:
        raise ValueError(f"its kernels take bf16 and N = {SIZE}")
    return batch, tokens, heads * size, heads


def _flat(*tensors):
    return [x.flatten(-2) for x in tensors]


def _finch(module, inputs, dy):
    batch, tokens, width, heads = sizes = _shapes(inputs)
    r, k, v, w, dy_flat = _flat(*(x.bfloat16().contiguous() for x in (*inputs[:4], dy)))
    u = inputs.u.bfloat16()

    def forward():
        y = torch.empty_like(r)
        module.forward(*sizes, r, k, v, w, u, y)
        return y.view(inputs.r.shape)

    def backward():
        grads = [torch.empty_like(r) for _ in range(4)]
        du = torch.empty(batch, width, device=r.device, dtype=torch.bfloat16)
        module.backward(*sizes, r, k, v, w, u, dy_flat, *grads, du)
        return *(x.view(inputs.r.shape) for x in grads), du.sum(0).view(heads, -1)

    return forward, backward


def _eagle(module, inputs, dy):
    batch, tokens, width, heads = sizes = _shapes(inputs)
    r, k, v, dy_flat = _flat(*(x.contiguous() for x in (*inputs[:3], dy)))
    u = inputs.u.bfloat16()
    log_w = -torch.exp(inputs.w.float()).contiguous()
    decay = torch.exp(log_w)

    def forward():
        y = torch.empty_like(r)
        module.forward(*sizes, r, k, v, decay, u, y)
        return y.view(inputs.r.shape)

    def backward():
        grads = [torch.empty_like(r) for _ in range(3)]
        dw, du = (torch.empty(batch, width, device=r.device, dtype=torch.bfloat16) for _ in range(2))
        module.backward(*sizes, r, k, v, decay, log_w, u, dy_flat, *grads, dw, du)
        return *(x.view(inputs.r.shape) for x in grads), dw.sum(0).view(heads, -1), du.sum(0).view(heads, -1)

    return forward, backward
