"""The tables of a run's TOML file as dataclasses: defaults, meaning and limits of every key, in one place.

train/config_file.py reads and writes the files. Every mistake ends in a ValueError that names the key, what it got and
what to do. A field without a default must be in the file.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rwkv_ext.data.weighted_sampler import samples_per_period

DATA_MODES = ("stream", "packed")


def _require(ok: bool, key: str, must: str, got: Any, hint: str = "") -> None:
    if not ok:
        raise ValueError(f"{key} must {must}, got {got!r}" + (f"; {hint}" if hint else ""))


@dataclass(frozen=True)
class ModelTable:
    """[model]: the network. Sizes left out follow rwkv_ext.RWKVConfig."""

    n_layer: int
    """Number of blocks."""
    n_embd: int
    """Width D of the residual stream."""
    version: Literal["6.0", "5.2"] = "6.0"
    """"6.0" is Finch (data-dependent decay), "5.2" is Eagle."""
    vocab_size: int = 65536
    """Rows of the embedding and of the head; every token id must be below it."""
    head_size: int = 64
    """Width N of one head."""
    dim_att: int | None = None
    """Width of time mixing; n_embd when left out."""
    dim_ffn: int | None = None
    """Width of channel mixing; 3.5 n_embd rounded down to a multiple of 32 when left out."""
    mix_rank: int | None = None
    """Rank of Finch's token-shift LoRA; 32, or 64 at n_embd 4096, when left out."""
    decay_rank: int | None = None
    """Rank of Finch's decay LoRA; 64, or 128 at n_embd 4096, when left out."""
    init: Literal["current", "paper"] = "current"
    """Initial weights: "current" is the newest official recipe, "paper" the one of arXiv 2404.05892, appendix I."""

    def __post_init__(self) -> None:
        for key in ("n_layer", "n_embd", "vocab_size", "head_size"):
            _require(getattr(self, key) >= 1, f"model.{key}", "be at least 1", getattr(self, key))

    def sizes(self) -> dict[str, Any]:
        """Return the keyword arguments of rwkv_ext.RWKVConfig."""
        return {key: value for key, value in asdict(self).items() if key != "init" and value is not None}


@dataclass(frozen=True)
class DataTable:
    """[data]: token shards (PREFIX.bin and PREFIX.idx, made by `rwkv-ext data build`) and how windows are cut."""

    train: list[str]
    """Shard prefixes, or folders of shards, to learn from. Relative to the working directory."""
    ctx_len: int
    """Tokens per window T; the state starts at zero in every window."""
    weights: list[float] = field(default_factory=list)
    """How often each entry of train gives a sample, relative to the others; empty: all of them are one stream."""
    mode: Literal["stream", "packed"] = "stream"
    """"stream": the state runs through document ends (token 0), as in the World models; "packed": it is reset there."""
    validation: list[str] = field(default_factory=list)
    """Shard prefixes, or folders, never trained on; empty means no validation loss."""
    validation_windows: int = 64
    """Windows measured in each validation, evenly spaced over the tokens; 0 means all of them."""
    prime: int | None = None
    """The order's prime (p % 3 == 2); the largest that fits the shards when left out. Not with weights."""
    prefetch: int = 4
    """Optimizer steps whose windows a thread reads ahead of the loop."""
    vocabulary: Literal["world", "none"] = "world"
    """"world" counts bytes of World tokens for bits per byte; "none" for other tokens (no bits per byte)."""

    def __post_init__(self) -> None:
        _require(len(self.train) > 0, "data.train", "name at least one shard prefix", self.train)
        _require(all((*self.train, *self.validation)), "data.train and data.validation", "hold no empty name", "")
        _require(self.ctx_len >= 1, "data.ctx_len", "be at least 1", self.ctx_len)
        _require(self.prefetch >= 1, "data.prefetch", "be at least 1", self.prefetch)
        if self.weights:
            entries = f"be empty or have a number for each of the {len(self.train)} entries of data.train"
            _require(len(self.weights) == len(self.train), "data.weights", entries, self.weights)
            _require(self.prime is None, "data.prime", "be left out with data.weights", self.prime,
                     "each source has a prime of its own")
            try:
                samples_per_period(self.weights)
            except ValueError as error:
                raise ValueError(f"data.{error}") from None
        _require(self.validation_windows >= 0, "data.validation_windows", "be 0 or more", self.validation_windows)


@dataclass(frozen=True)
class TrainTable:
    """[train]: batch, length and numerics of the run."""

    global_batch: int
    """Windows per optimizer step over all ranks: the learning rate belongs to this number."""
    micro_batch: int
    """Windows per rank in one forward pass; accumulation is global_batch / (micro_batch x ranks)."""
    tokens: int = 0
    """Length of the run, rounded up to whole steps. With minutes it is an upper limit, and 0 means none."""
    minutes: float = 0.0
    """When above 0: choose the length from the first steps' speed so that the run ends within this time."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """"bf16": autocast over fp32 master weights. "auto": bf16 where a short matrix product is faster in it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": a GPU when there is one and the operators are built for it, else the CPU."""
    threads: int = 0
    """CPU threads per rank; 0 divides the cores by the ranks on this machine."""
    sharding: Literal["replicate", "fsdp"] = "replicate"
    """"replicate": every rank holds the model, one gradient reduction per step. "fsdp": FSDP2, one unit per block."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""
    seed: int = 0
    """Seed of the initial weights. The order of the data does not depend on it."""

    def __post_init__(self) -> None:
        for key in ("global_batch", "micro_batch"):
            _require(getattr(self, key) >= 1, f"train.{key}", "be at least 1", getattr(self, key))
        for key in ("tokens", "minutes", "threads"):
            _require(getattr(self, key) >= 0, f"train.{key}", "be 0 or more", getattr(self, key))
        _require(self.threads <= 4096, "train.threads", "be at most 4096", self.threads)
        _require(0 <= self.seed < 2**63, "train.seed", "lie between 0 and 2**63 - 1", self.seed)
        _require(self.tokens > 0 or self.minutes > 0, "train.tokens", "be above 0", self.tokens,
                 "or set train.minutes to choose the length by time")

    def accumulation(self, ranks: int) -> int:
        """Return the forward passes per rank and optimizer step; ValueError with the nearest legal values otherwise."""
        unit = self.micro_batch * ranks
        if self.global_batch % unit == 0:
            return self.global_batch // unit
        below = self.global_batch // unit * unit
        legal = ", ".join(str(value) for value in (below, below + unit) if value)
        hint = f"nearest legal values of train.global_batch: {legal}"
        if self.global_batch % ranks == 0:
            per_rank = self.global_batch // ranks
            sizes = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
            sizes = sorted(sorted(sizes, key=lambda size: abs(size - self.micro_batch))[:3])
            hint += "; or train.micro_batch: " + ", ".join(map(str, sizes))
        raise ValueError(
            f"train.global_batch must be a multiple of micro_batch x ranks = {self.micro_batch} x {ranks} = {unit}, "
            f"got {self.global_batch}; {hint}"
        )


@dataclass(frozen=True)
class OptimTable:
    """[optim]: AdamW and the learning-rate curve."""

    lr: float
    """Highest learning rate; time_decay gets twice as much."""
    lr_final: float
    """Learning rate at the last token of the cosine."""
    warmup_steps: int = 10
    """Steps over which the rate rises to lr; they are counted over the whole run, not from a resume."""
    warmup_floor: float = 0.01
    """The factor at step 0; the released models used 0.2."""
    weight_decay: float = 0.001
    """Decoupled decay of the matrices (embedding, projections, head) and of nothing else."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.99
    """Decay of AdamW's second moment; 0.95 helps against spikes."""
    eps: float = 1e-18
    """AdamW's epsilon; the released models used 1e-8."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off (the norm is still measured)."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", "be above 0", self.lr)
        _require(0 <= self.lr_final <= self.lr, "optim.lr_final", "lie between 0 and optim.lr", self.lr_final)
        _require(0 <= self.warmup_floor <= 1, "optim.warmup_floor", "lie between 0 and 1", self.warmup_floor)
        for key in ("beta1", "beta2"):
            _require(0 <= getattr(self, key) < 1, f"optim.{key}", "be at least 0 and below 1", getattr(self, key))
        for key in ("warmup_steps", "weight_decay", "eps", "grad_clip"):
            _require(getattr(self, key) >= 0, f"optim.{key}", "be 0 or more", getattr(self, key))


@dataclass(frozen=True)
class CheckpointTable:
    """[checkpoint]: the folder of the run and what is kept in it."""

    folder: str
    """Everything the run writes is here: step_N/, log.jsonl, loss.png, final.pth, tensorboard/."""
    every: int = 1000
    """Steps between two checkpoints; 0 saves only at the end and when interrupted."""
    keep: int = 2
    """Newest checkpoints that stay on disk."""
    resume: bool = True
    """Go on from the newest complete checkpoint of the folder; false refuses a folder that has one."""
    export_dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of final.pth; the released models are bf16."""

    def __post_init__(self) -> None:
        _require(bool(self.folder), "checkpoint.folder", "be a path", self.folder)
        _require(self.every >= 0, "checkpoint.every", "be 0 or more", self.every)
        _require(self.keep >= 1, "checkpoint.keep", "be at least 1", self.keep)


@dataclass(frozen=True)
class LogTable:
    """[log]: what is measured and drawn."""

    every: int = 10
    """Steps between two printed lines when the output is not a terminal (log.jsonl holds every step)."""
    validate_every: int = 500
    """Steps between two validations; 0 validates only before the first and after the last step."""
    tensorboard: bool = True
    """Write TensorBoard events too, if the package is installed."""
    picture: bool = True
    """Draw loss.png after each validation."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Named horizontal lines for loss.png, in nats per token."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "log.every", "be at least 1", self.every)
        _require(self.validate_every >= 0, "log.validate_every", "be 0 or more", self.validate_every)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelTable
    data: DataTable
    train: TrainTable
    optim: OptimTable
    checkpoint: CheckpointTable
    log: LogTable

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.train.global_batch * self.data.ctx_len

    def whole_steps(self, tokens: int) -> int:
        """Return tokens rounded up to whole optimizer steps."""
        return -(-tokens // self.step_tokens) * self.step_tokens
