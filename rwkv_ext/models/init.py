"""Initial weights, in the two official recipes (BlinkDL/RWKV-LM RWKV-v5; arXiv 2404.05892, appendix I).

"current" is the newest official code (since April 2024; channel-mix exponent since November 2024); "paper" is what the
released models' era used. With a = l / (L - 1), 0 for one layer, b = 1 - l / L, e = i / D, n over A channels:

  mixing   Eagle k e^b, v e^b + 0.3 a, r and g e^(b/2), channel mix e^b; Finch 1 - Eagle's, x and w as k,
           but in the current recipe Finch's channel mix is 1 - e^(b^3)
  decay    -6 + 5 (n / (A - 1))^(0.7 + 1.3 a)          bonus   a (1 - n / (A - 1)) + 0.1 (((n + 1) mod 3) - 1)
  ln_x     ((1 + l) / L)^0.7                           other norms 1 and 0
"""

import math

import torch
from torch import Tensor, nn

from .config import EAGLE, RWKVConfig

RECIPES = ("current", "paper")
_ZERO = ("att.output.weight", "ffn.value.weight", "ffn.receptance.weight")
_GAINS = {"att.receptance.weight": 1.0, "att.value.weight": 1.0, "ffn.key.weight": 1.0}
_GAINS |= {"att.key.weight": 0.1, "att.gate.weight": 0.1}


@torch.no_grad()
def init_weights(
    model: nn.Module,
    config: RWKVConfig,
    recipe: str = "current",
    generator: torch.Generator | None = None,
    lr_init: float | None = None,
) -> None:
    """Fill every parameter of `model` by name; see RWKV.init_weights."""
    if recipe not in RECIPES:
        raise ValueError(f'init_weights: recipe must be "current" or "paper", got {recipe!r}')
    if recipe == "paper" and lr_init is None:
        raise ValueError(
            'init_weights: lr_init must be given with recipe "paper", whose embedding is uniform in +-lr_init, '
            'got None; pass the largest learning rate of the run, or use recipe "current"'
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"init_weights: model must have memory, got {name} on the meta device; "
                "call model.to_empty(device=...) first"
            )
        device = parameter.device if generator is None else generator.device
        fill = _Fill(config, recipe, lr_init, device, generator)
        layer, short = _split(name)
        parameter.copy_(fill.value(short, layer, parameter.shape).view(parameter.shape))


def _split(name: str) -> tuple[int, str]:
    if not name.startswith("blocks."):
        return 0, name
    _, layer, short = name.split(".", 2)
    return int(layer), short


class _Fill:
    """Values of one parameter in fp32 on `device`, before the cast to the parameter's dtype."""

    def __init__(self, config, recipe, lr_init, device, generator):
        self.config, self.device, self.generator = config, device, generator
        self.current = recipe == "current"
        self.embedding_bound = 1e-4 if self.current else lr_init

    def value(self, name: str, layer: int, shape: torch.Size) -> Tensor:
        if name == "emb.weight":
            return self.uniform(shape, self.embedding_bound)
        if name == "head.weight":
            return self.orthogonal(shape, 0.5 * self.tall_gain(shape))
        if name in _ZERO or name == "att.time_state":
            return torch.zeros(shape)
        if name in _GAINS:
            return self.orthogonal(shape, _GAINS[name] if self.current else self.tall_gain(shape))
        if name in ("att.time_maa_w1", "att.time_decay_w1") and self.current:
            return torch.zeros(shape)
        if name.endswith(("_w1", "_w2")):
            return self.uniform(shape, 0.01 if self.current else 1e-4)
        if name == "att.ln_x.weight":
            return torch.full(shape, ((1 + layer) / self.config.n_layer) ** 0.7)
        if name.endswith(".weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        return self.time_vector(name, layer)

    def time_vector(self, name: str, layer: int) -> Tensor:
        layers, width, att = self.config.n_layer, self.config.n_embd, self.config.dim_att
        a = layer / (layers - 1) if layers > 1 else 0.0
        b = 1 - layer / layers
        # fp64, since these are formulas and not random numbers: rounded once, on the way into the parameter.
        n = torch.arange(att, dtype=torch.float64) / max(att - 1, 1)
        if name == "att.time_decay":
            return -6 + 5 * n ** (0.7 + 1.3 * a)
        if name == "att.time_faaaa":
            return a * (1 - n) + 0.1 * ((torch.arange(1, att + 1) % 3) - 1)
        e = torch.arange(width, dtype=torch.float64) / width
        eagle = self.config.version == EAGLE
        part, which = name.split(".")[0], name[-1]
        if part == "ffn":
            value = e ** (b if eagle or not self.current else b**3)
        else:
            value = {"v": e**b + 0.3 * a, "r": e ** (b / 2), "g": e ** (b / 2)}.get(which, e**b)
        return value if eagle else 1 - value

    def uniform(self, shape: torch.Size, bound: float) -> Tensor:
        values = torch.rand(shape, device=self.device, generator=self.generator, dtype=torch.float32)
        return values.mul_(2 * bound).sub_(bound)

    def orthogonal(self, shape: torch.Size, gain: float) -> Tensor:
        tall = torch.randn(max(shape), min(shape), device=self.device, generator=self.generator, dtype=torch.float32)
        q, r = torch.linalg.qr(tall)
        # With R's diagonal made positive, Q is uniform over the orthogonal matrices.
        q.mul_(gain * r.diagonal().sign())
        return q if shape[0] >= shape[1] else q.T

    @staticmethod
    def tall_gain(shape: torch.Size) -> float:
        return math.sqrt(shape[0] / shape[1]) if shape[0] > shape[1] else 1.0
