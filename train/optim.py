"""AdamW with RWKV's parameter groups: which tensors decay, and which learn at twice the rate."""

import torch
from torch import nn

from train.config import OptimTable

# First match wins: (group, learning-rate factor, decays, test on the name and the rank without axes of size one).
RULES = (
    ("lora", 1.0, False, lambda name, rank: "_w1" in name or "_w2" in name),
    ("state", 1.0, True, lambda name, rank: "time_sta" in name),
    ("mix", 1.0, False, lambda name, rank: "time_mix" in name or "time_maa" in name),
    ("decay", 2.0, False, lambda name, rank: "time_decay" in name),
    ("bonus", 1.0, False, lambda name, rank: "time_faaaa" in name),
    ("matrix", 1.0, True, lambda name, rank: rank >= 2 and ".weight" in name),
    ("norm", 1.0, False, lambda name, rank: True),
)


def group_of(name: str, shape: torch.Size) -> str:
    """Return the group of a parameter by its .pth name and shape."""
    rank = sum(size > 1 for size in shape)
    return next(group for group, _, _, matches in RULES if matches(name, rank))


def make_optimizer(model: nn.Module, table: OptimTable) -> torch.optim.AdamW:
    """Build fused AdamW over fp32 master weights, one parameter group per rule that has members.

    Each group carries `name` and `lr_scale`; set_learning_rate multiplies by the latter.
    """
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault(group_of(name, parameter.shape), []).append(parameter)
    groups = [
        {
            "name": group,
            "params": members[group],
            "lr_scale": scale,
            "weight_decay": table.weight_decay if decays else 0.0,
        }
        for group, scale, decays, _ in RULES
        if group in members
    ]
    return torch.optim.AdamW(groups, lr=table.lr, betas=(table.beta1, table.beta2), eps=table.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """Return the norm of all gradients together, over all ranks where they are sharded."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clipped_step(optimizer: torch.optim.AdamW, norm: float, limit: float) -> None:
    """Take a step on gradients shortened from norm, which is finite, to limit where it is longer; limit 0 is none.

    On a CPU the fused step divides them as it reads them: a pass of its own over all gradients takes a quarter of the
    step's time. Like gradient scaling for fp16, this needs an optimizer made with fused=True.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not limit or norm <= limit:
        optimizer.step()
    elif all(p.is_cpu and not hasattr(p, "full_tensor") for p in parameters):
        optimizer.grad_scale = torch.tensor(norm / limit)
        try:
            optimizer.step()
        finally:
            optimizer.grad_scale = None
    else:
        nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm, device=parameters[0].device))
        optimizer.step()


def materialise_state(optimizer: torch.optim.AdamW) -> None:
    """Create the moments that AdamW would create in its first step, so that a checkpoint can be loaded into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
