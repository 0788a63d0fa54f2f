"""Projection: a bias-free linear layer whose weight is filled by init.py alone, never twice."""

from torch import Tensor, nn

from ..matrix_product import linear


class Projection(nn.Linear):
    """Hold weight [out, in]; construction leaves it uninitialised, because RWKV's own recipe fills it next."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        return linear(x, self.weight)

    def reset_parameters(self) -> None:
        """Do nothing: see RWKV.init_weights."""


class TokenEmbedding(nn.Embedding):
    """Hold weight [V, D], left uninitialised like a Projection's."""

    def reset_parameters(self) -> None:
        """Do nothing: see RWKV.init_weights."""
