"""RWKV: the Eagle and Finch language models (arXiv 2404.05892) as one nn.Module with the .pth files' parameter names.

Shapes: tokens [B, T] int64; hidden [B, T, D]; logits [B, T, V]; the state's are in state.py.
"""

from os import PathLike

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import _load
from ..checkpoint import files as checkpoint_files
from ..checkpoint.tensors import copied, widest_dtype
from ..losses import linear_cross_entropy
from . import init, quantized
from .block import Block
from .config import RWKVConfig
from .fused_step import FusedStep
from .projection import Projection, TokenEmbedding
from .residual_norm import ResidualNorm
from .state import RWKVState
from .token_shift import Packing


class RWKV(nn.Module):
    """An Eagle or Finch model. Construction fills the weights by the "current" recipe (except on the meta device).

    activation_checkpointing  True: the backward pass recomputes every block instead of keeping its activations

    Example:
        model = RWKV(RWKVConfig(version="6.0", n_layer=6, n_embd=192))
        logits, state = model(tokens)               # [B, T] -> [B, T, V]
        logits, state = model(more_tokens, state)   # goes on where the state ended
    """

    def __init__(self, config: RWKVConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self._fused: FusedStep | None = None
        self.emb = TokenEmbedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = ResidualNorm(config.n_embd)
        self.head = Projection(config.n_embd, config.vocab_size)
        if not self.emb.weight.is_meta:
            self.init_weights()

    def forward(
        self,
        tokens: Tensor,
        state: RWKVState | None = None,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, RWKVState]:
        """Return (logits [B, T, V], state), or with targets [B, T] (loss, state).

        The logits have the activations' dtype. The loss is the mean cross-entropy in fp32 plus L2Wrap, computed in
        chunks that never hold [B * T, V]; targets of -100 do not count. state is where to go on from (None: the
        start of a text); the returned one is new memory and carries gradients to every input, the given state
        included. cu_seqlens [nseq + 1] (int32 or int64, on the tokens' device, B = 1) marks packed sequences: nothing
        crosses a boundary, and both states hold nseq sequences; empty sequences pass theirs through.
        Raises TypeError or ValueError naming the argument; on a GPU token ids are not checked.
        """
        hidden, state = self.hidden(tokens, state, cu_seqlens)
        if targets is None:
            return self.head(hidden), state
        weight = self.head.weight
        if quantized.is_quantized(self):
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "RWKV: a model with int8 weights cannot be trained, got targets with gradients enabled; load it "
                    "without quantize to train it, or take its loss under torch.no_grad()"
                )
            weight = self.head.dequantized(hidden.dtype)
        return linear_cross_entropy(hidden, weight, targets), state

    def hidden(
        self, tokens: Tensor, state: RWKVState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RWKVState]:
        """Return (what forward multiplies with head.weight [B, T, D], state); for those who need few of the logits."""
        self._check_tokens(tokens, dims=2)
        batch, packing = tokens.shape[0], None
        if cu_seqlens is not None:
            batch = self._check_cu_seqlens(cu_seqlens, tokens)
            packing = Packing.of(cu_seqlens, tokens.shape[1])
        att_shift, wkv, ffn_shift = self._layer_states(state, batch)
        x, delta = self.emb(tokens), None
        ends = []
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            inputs = (x, delta, att_shift[layer], wkv[layer], ffn_shift[layer], packing)
            x, delta, *end = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            ends.append(end)
        return self.ln_out(x, delta)[1], RWKVState(*(torch.stack(parts) for parts in zip(*ends, strict=True)))

    @torch.no_grad()
    def step(self, tokens: Tensor, state: RWKVState) -> Tensor:
        """Take one token of every sequence, tokens [B]; return its logits [B, V] and update `state` IN PLACE.

        No gradients. Clone the state first to keep it. Equal to forward on [B, 1] up to rounding.
        """
        self._check_tokens(tokens, dims=1)
        self._check_state(state, tokens.shape[0])
        if any(part.requires_grad for part in state):
            raise ValueError(
                "RWKV.step: state must not require a gradient, got one with a graph that an update in place would "
                "falsify; pass state.detach().clone(), or run forward under torch.no_grad()"
            )
        x = self.emb(tokens)
        fused = self._fused_step()
        return fused(x, state) if fused and fused.fits(x, state) else self._plain_step(x, state)

    def _plain_step(self, x: Tensor, state: RWKVState) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block.step(x, state.att_shift[layer], state.wkv[layer], state.ffn_shift[layer])
        return self.head(self.ln_out(x)[1])

    def _fused_step(self) -> FusedStep | None:
        """Return how to take a step in one op, made anew where modules have been replaced; None: not from here."""
        if _load.error or torch.compiler.is_compiling():
            return None
        if self._fused is None or not self._fused.knows_the_modules():
            self._fused = FusedStep(self)
        return self._fused

    def initial_state(self, batch: int = 1) -> RWKVState:
        """Return the state at the start of `batch` texts: zeros, or the tuned time_state a checkpoint brought along.

        New memory on the model's device, so step() may change it; gradients flow to time_state.
        """
        weight = self.emb.weight
        state = RWKVState.zeros(self.config, batch, weight.device, weight.dtype)
        if self.blocks[0].att.time_state is None:
            return state
        tuned = torch.stack([block.att.time_state.to(state.wkv.dtype) for block in self.blocks])
        wkv = tuned.transpose(-1, -2).unsqueeze(1).repeat(1, batch, 1, 1, 1)
        return state._replace(wkv=wkv)

    def enable_time_state(self) -> None:
        """Give every block an att.time_state parameter [H, N(value), N(key)] of zeros, as state tuning trains."""
        size = self.config.head_size
        for block in self.blocks:
            if block.att.time_state is None:
                like = self.emb.weight
                zeros = torch.zeros(self.config.n_head, size, size, device=like.device, dtype=like.dtype)
                block.att.time_state = nn.Parameter(zeros)

    def init_weights(
        self, recipe: str = "current", generator: torch.Generator | None = None, lr_init: float | None = None
    ) -> None:
        """Fill all parameters by an official recipe, "current" or "paper" (which needs lr_init); see init.py.

        generator decides the random numbers and where they are drawn; None takes torch's default on the parameter's
        device. Values are computed in fp32 or better and cast to each parameter's dtype.
        """
        if quantized.is_quantized(self):
            raise ValueError("init_weights: the weights must be floating point, got int8; make a new model instead")
        init.init_weights(self, self.config, recipe, generator, lr_init)

    def quantize_(self, kind: str = "int8") -> "RWKV":
        """Turn every matrix of the model, but not the embedding, to int8 rows with a scale, in place; see quantized.py.

        A quarter of fp32's memory and time per token of step() on a CPU, half of bf16's; docs/decoding.md has the
        error. For inference: no gradients, and the model cannot be saved or quantised again. Returns the model.
        Raises ValueError for another kind, weights that are quantised already, not finite, or without memory (meta).
        """
        quantized.check_kind(kind)
        if quantized.is_quantized(self):
            raise ValueError("quantize: the model must have floating-point weights, got int8 ones already")
        if self.emb.weight.is_meta:
            raise ValueError("quantize: the model must have memory, got one on the meta device; load it first")
        quantized.quantize_projections(self)
        return self

    def parameter_count(self) -> int:
        """Return the number of parameters, embedding and head included."""
        return sum(x.numel() for _, x in self._numbers())

    def _numbers(self) -> list[tuple[str, Tensor]]:
        """Return all parameters, and what stands for them in a quantised model."""
        integers = [(name, x) for name, x in self.named_buffers() if name.endswith(".weight")]
        return [*self.named_parameters(), *integers]

    def flops_per_token(self) -> int:
        """Return the operations (a multiply-add is 2) of training on one token: forward, and twice that backward.

        Counted: every matrix product but the embedding's look-up, and 5 N per channel for the recurrence.
        """
        # All matrices are used once per token, [out, in] weights and low-rank factors alike.
        products = sum(
            x.numel()
            for name, x in self._numbers()
            if name.endswith((".weight", "_w1", "_w2")) and x.dim() > 1 and name != "emb.weight"
        )
        recurrence = 5 * self.config.dim_att * self.config.head_size * self.config.n_layer
        return 3 * (2 * products + recurrence)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        time_state: str | PathLike | None = None,
        quantize: str | None = None,
    ) -> "RWKV":
        """Load an Eagle or Finch checkpoint; version, sizes and ranks come from the tensors' shapes.

        path is a .pth or .safetensors file, or a folder with Hugging Face's or flash-linear-attention's layout; see
        docs/checkpoints.md. dtype None keeps the file's (the widest, where it mixes several). att.time_state tensors,
        if any, become the state every text starts from; time_state is the path of a file of those alone, see
        load_time_state. quantize "int8" does as quantize_(), to each matrix as it is read. Files are mapped and copied
        tensor by tensor, so memory holds the model once. Nothing in a file is executed.
        Raises FileNotFoundError, or ValueError that says what the file is, or names every wrong tensor or setting.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"from_pretrained: dtype must be a floating-point dtype, got {dtype}; use torch.bfloat16")
        if quantize is not None:
            quantized.check_kind(quantize)
        config, tensors, *_ = checkpoint_files.read(path)
        with torch.device("meta"):
            model = cls(config)
            if any(name.endswith("att.time_state") for name in tensors):
                model.enable_time_state()
        dtype = dtype or widest_dtype(tensors)
        if quantize is None:
            model.load_state_dict(copied(tensors, dtype, device or "cpu"), assign=True)
        else:
            quantized.load_quantized(model, tensors, dtype, device or "cpu")
        if time_state is not None:
            model.load_time_state(time_state)
        return model

    def save_pretrained(
        self,
        path: str | PathLike,
        dtype: torch.dtype | None = None,
        format: str | None = None,
        shard_bytes: int = checkpoint_files.SHARD_BYTES,
    ) -> None:
        """Write the model; dtype None means bfloat16, as in the released files.

        path says the form: a .pth file that the official tools load, a .safetensors file of the same names, or else a
        folder with Hugging Face's names and config.json, in shards of at most shard_bytes. format "fla" makes that a
        folder for flash-linear-attention (Finch alone); "pth", "safetensors", "hf" are for paths that do not say.
        What is there appears whole or not at all: OSError (a full disk, no permission) leaves an earlier one as it was.
        """
        if quantized.is_quantized(self):
            raise ValueError(
                f"save_pretrained: {path} must hold floating-point weights, got int8 ones, which no such file can; "
                "keep the file that the model came from and quantise when loading it"
            )
        checkpoint_files.write(path, self.config, self.state_dict(), dtype or torch.bfloat16, format, shard_bytes)

    def load_time_state(self, path: str | PathLike) -> None:
        """Take the tuned initial states of a file that holds blocks.N.att.time_state alone, as state tuning saves them.

        They lie there as [H, N(value), N(key)], the transpose of RWKVState.wkv, and become parameters in the model's
        dtype. Raises FileNotFoundError, or ValueError where the file holds anything else or suits another size.
        """
        tensors = checkpoint_files.read_time_state(path, self.config)
        weight = self.emb.weight
        loaded = copied(tensors, weight.dtype, weight.device)
        self.enable_time_state()
        self.load_state_dict(loaded, strict=False, assign=True)

    def save_time_state(self, path: str | PathLike, dtype: torch.dtype | None = None) -> None:
        """Write the tuned initial states alone, as .pth or .safetensors; see load_time_state and save_pretrained."""
        states = {name: x for name, x in self.state_dict().items() if name.endswith("att.time_state")}
        if not states:
            raise ValueError("save_time_state: the model must have a time_state, has none; see enable_time_state()")
        checkpoint_files.write_time_state(path, states, dtype or torch.bfloat16)

    def _layer_states(self, state, batch):
        if state is None and self.blocks[0].att.time_state is None:
            nothing = [None] * self.config.n_layer
            return nothing, nothing, nothing
        if state is None:
            state = self.initial_state(batch)
        self._check_state(state, batch)
        # unbind, not indexing: its backward is one stack, where each index would fill a whole state with zeros.
        return tuple(x.unbind(0) for x in state)

    def _check_tokens(self, tokens: Tensor, dims: int) -> None:
        shape = "[B, T]" if dims == 2 else "[B]"
        if not isinstance(tokens, Tensor):
            raise TypeError(f"RWKV: tokens must be a tensor {shape}, got {type(tokens).__name__}; use torch.tensor()")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"RWKV: tokens must be int64 or int32, got {tokens.dtype}; convert with tokens.long()")
        if tokens.dim() != dims:
            raise ValueError(f"RWKV: tokens must have shape {shape}, got {list(tokens.shape)}")
        device = self.emb.weight.device
        if tokens.device != device:
            raise ValueError(
                f"RWKV: tokens must be on the model's device {device}, got {tokens.device}; "
                f"move them with .to({str(device)!r})"
            )
        # Reading values stops a graph capture and waits for a GPU, where torch asserts by itself.
        if tokens.is_cpu and tokens.numel() and not torch.compiler.is_compiling():
            low, high = (int(x) for x in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"RWKV: tokens must be from 0 to vocab_size - 1 = {self.config.vocab_size - 1}, "
                    f"got {low if low < 0 else high}; check the tokenizer"
                )

    @staticmethod
    def _check_cu_seqlens(cu_seqlens: Tensor, tokens: Tensor) -> int:
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"RWKV: cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}; use torch.tensor()")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(f"RWKV: cu_seqlens must have shape [nseq + 1], got {list(cu_seqlens.shape)}")
        if cu_seqlens.device != tokens.device:
            raise ValueError(
                f"RWKV: cu_seqlens must be on the tokens' device {tokens.device}, got {cu_seqlens.device}; "
                "move it with .to(tokens.device)"
            )
        if tokens.shape[0] != 1:
            raise ValueError(
                f"RWKV: tokens must have B = 1 with cu_seqlens, got {list(tokens.shape)}; "
                "join the sequences into one row"
            )
        return cu_seqlens.numel() - 1

    def _check_state(self, state: RWKVState, batch: int) -> None:
        if not isinstance(state, RWKVState):
            raise TypeError(f"RWKV: state must be an RWKVState, got {type(state).__name__}")
        c = self.config
        shift = (c.n_layer, batch, c.n_embd)
        shapes = (shift, (c.n_layer, batch, c.n_head, c.head_size, c.head_size), shift)
        for name, x, shape in zip(RWKVState._fields, state, shapes, strict=True):
            if x.shape != shape:
                raise ValueError(
                    f"RWKV: state.{name} must have shape {list(shape)}, got {list(x.shape)}; "
                    f"use model.initial_state({batch}), or RWKVState.fork for more sequences"
                )
            if x.device != self.emb.weight.device:
                raise ValueError(
                    f"RWKV: state.{name} must be on the model's device {self.emb.weight.device}, got {x.device}; "
                    "move the state with state.to(device)"
                )
