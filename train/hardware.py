"""What the machine can do: device, cores, matrix-product speed, number format, peak for the MFU, memory estimate."""

import os
import time

import torch

from rwkv_ext.doctor import gpu_problem
from rwkv_ext.models import RWKVConfig

# Dense bf16 peak in TFLOP/s by a part of the device's name, from the vendors' data sheets; the first match counts.
GPU_PEAKS = (
    ("B200", 2250.0), ("B100", 1750.0), ("GH200", 989.0), ("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0),
    ("H800", 989.0), ("H20", 148.0), ("A100", 312.0), ("A800", 312.0), ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0),
    ("A40", 150.0), ("A10", 125.0), ("RTX 6000 Ada", 364.0), ("RTX A6000", 155.0), ("5090", 209.0), ("4090", 165.0),
    ("4080", 97.0), ("3090", 71.0), ("3080", 59.0),
)  # fmt: skip


def cores() -> int:
    """Return the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Return the device of this rank; "auto" takes a GPU only if the WKV operators run on it.

    ValueError if "cuda" is wanted and there is no GPU or no kernel for it.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    problem = cuda_problem(local_rank)
    if problem is None:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if wanted == "cuda":
        raise ValueError(f'train.device must be "cpu" or "auto" here, got "cuda": {problem}')
    return torch.device("cpu")


def cuda_problem(local_rank: int) -> str | None:
    """Return why training cannot run on GPU local_rank, or None."""
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        return f"rank {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} found)"
    return gpu_problem(local_rank)


def gemm_flops(dtype: torch.dtype, device: torch.device, tokens: int, width: int, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of [tokens, width] x [width, 4 width] with the threads that are set: the best short run."""
    # Large enough to be at the limit of the machine, and short.
    tokens, width = min(max(256, tokens), 2048), min(max(256, width), 2048)
    a = torch.ones(tokens, width, dtype=dtype, device=device)
    b = torch.ones(width, 4 * width, dtype=dtype, device=device)
    work, times, end = 2.0 * a.shape[0] * b.numel(), [], time.perf_counter() + seconds
    (a @ b).sum().item()
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        (a @ b)[-1, -1].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return work / min(times)


def choose_dtype(wanted: str, device: torch.device, tokens: int, width: int) -> str:
    """Return "bf16" or "fp32"; "auto" measures a matrix product of the model's size in both."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16"
    fp32, bf16 = (gemm_flops(dtype, device, tokens, width) for dtype in (torch.float32, torch.bfloat16))
    return "bf16" if bf16 > 1.2 * fp32 else "fp32"  # autocast's casts cost a little


def peak_flops(device: torch.device, dtype: str, tokens: int, width: int) -> tuple[float, str]:
    """Return (FLOP/s of one rank, where the number comes from): the denominator of the MFU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, tera in GPU_PEAKS:
            if part in name:
                return tera * 1e12, f"{tera:.0f} TFLOP/s, {name} in bf16"
    flops = gemm_flops(torch.bfloat16 if dtype == "bf16" else torch.float32, device, tokens, width)
    return flops, f"{flops / 1e12:.3g} TFLOP/s, measured with a {dtype} matrix product"


def memory_estimate(
    config: RWKVConfig, parameters: int, micro_tokens: int, dtype: str, checkpointing: bool, shards: int = 1
) -> dict[str, int]:
    """Estimate one rank's bytes: weights, gradients and AdamW's moments (16 per parameter), and activations.

    Activations are what autograd keeps for each token, counted with saved-tensor hooks: per block 26 (Eagle) or 36
    (Finch) numbers of the residual width, five of the channel mix's and the fp32 WKV states (one per 128 tokens); a
    block that recomputes keeps its input alone: the fp32 residual stream and what the last block adds to it.
    """
    size = 2 if dtype == "bf16" else 4
    widths = 26 if config.version == "5.2" else 36
    block = (widths * config.n_embd + 5 * config.dim_ffn) * size + config.dim_att * config.head_size * 4 // 128
    kept = config.n_layer * config.n_embd * (4 + size) + block if checkpointing else config.n_layer * block
    return {
        "weights, gradients, moments": 16 * parameters // shards,
        "activations": micro_tokens * (kept + 4 * config.n_embd * size),
    }
