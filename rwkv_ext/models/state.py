"""RWKVState: everything a model remembers between calls, one fixed-size record per sequence."""

from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint import tagged_file
from .config import RWKVConfig

_FORMAT = "rwkv_ext.RWKVState.1"


class RWKVState(NamedTuple):
    """Hold the state of B sequences (B is nseq for packed input); a tuple of tensors, so pytrees see through it.

    att_shift  [L, B, D]           newest layer-normed input of each time mix, activation dtype
    wkv        [L, B, H, N, N]     the recurrence's matrix, axes [key, value], fp32 (fp64 in fp64 models)
    ffn_shift  [L, B, D]           newest layer-normed input of each channel mix, activation dtype
    Gradients flow through all three.
    """

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor

    @classmethod
    def zeros(
        cls,
        config: RWKVConfig,
        batch: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "RWKVState":
        """Return the state before the first token of `batch` sequences; dtype is that of the activations."""
        shift = (config.n_layer, batch, config.n_embd)
        wkv = (config.n_layer, batch, config.n_head, config.head_size, config.head_size)
        return cls(
            torch.zeros(shift, device=device, dtype=dtype),
            torch.zeros(wkv, device=device, dtype=torch.promote_types(dtype, torch.float32)),
            torch.zeros(shift, device=device, dtype=dtype),
        )

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.wkv.shape[1]

    def detach(self) -> "RWKVState":
        """Cut the graph (truncated backpropagation); memory is shared, as with Tensor.detach."""
        return RWKVState(*(x.detach() for x in self))

    def clone(self) -> "RWKVState":
        """Copy the memory, so that RWKV.step on the copy leaves this state as it is; gradients flow through."""
        return RWKVState(*(x.clone() for x in self))

    def fork(self, n: int) -> "RWKVState":
        """Return a state of B * n sequences: n independent copies of every sequence, the copies side by side."""
        if n < 1:
            raise ValueError(f"RWKVState.fork: n must be at least 1, got {n}")
        return RWKVState(*(x.repeat_interleave(n, dim=1) for x in self))

    def select(self, sequences: Sequence[int]) -> "RWKVState":
        """Return a copy of some of the sequences, in the order given."""
        return RWKVState(*(x[:, list(sequences)] for x in self))

    @classmethod
    def cat(cls, states: Sequence["RWKVState"]) -> "RWKVState":
        """Return the sequences of several states, of one model, side by side."""
        return cls(*(torch.cat(parts, dim=1) for parts in zip(*states, strict=True)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "RWKVState":
        """Move to a device; dtype is that of the shifts, and wkv stays fp32 (fp64 where dtype is fp64)."""
        wkv_dtype = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return RWKVState(
            self.att_shift.to(device=device, dtype=dtype),
            self.wkv.to(device=device, dtype=wkv_dtype),
            self.ffn_shift.to(device=device, dtype=dtype),
        )

    def save(self, path: str | PathLike) -> None:
        """Write a safetensors file; a failure (OSError, naming the file) leaves what was there before untouched."""
        tagged_file.write(path, _FORMAT, self._asdict(), None, "RWKVState.save")

    @classmethod
    def load(cls, path: str | PathLike, device: torch.device | str | None = None) -> "RWKVState":
        """Read a file of save(); FileNotFoundError, or ValueError where the file is something else or damaged."""
        return cls(**tagged_file.read(path, _FORMAT, "RWKVState.save", "RWKVState.load", device)[0])
