"""RWKVConfig: the sizes of an Eagle or Finch model, validated once, with the formulas of the released models."""

from dataclasses import dataclass

EAGLE = "5.2"
FINCH = "6.0"


@dataclass(frozen=True, kw_only=True)
class RWKVConfig:
    """Describe an Eagle ("5.2") or Finch ("6.0") model; sizes left None take the released models' value.

    vocab_size  V, rows of emb.weight and head.weight (65536 for every World model)
    n_layer     L, blocks
    n_embd      D, width of the residual stream; a multiple of 32
    head_size   N, channels per head (64 in every released model)
    dim_att     A = heads * N, width of r, k, v, g; default D
    dim_ffn     F, width of the channel mix; default 32 * floor(3.5 * D / 32)
    mix_rank    R, Finch only: rank of the data-dependent token shift; default 32, 64 where D = 4096
    decay_rank  Finch only: rank of the data-dependent decay; default 64, 128 where D = 4096
    Raises TypeError or ValueError naming the field.
    """

    version: str = FINCH
    vocab_size: int = 65536
    n_layer: int
    n_embd: int
    head_size: int = 64
    dim_att: int | None = None
    dim_ffn: int | None = None
    mix_rank: int | None = None
    decay_rank: int | None = None

    def __post_init__(self) -> None:
        if self.version not in (EAGLE, FINCH):
            raise ValueError(
                f'RWKVConfig: version must be "{EAGLE}" (Eagle) or "{FINCH}" (Finch), got {self.version!r}; '
                "other RWKV versions are not supported"
            )
        if self.version == EAGLE:
            for name in ("mix_rank", "decay_rank"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"RWKVConfig: {name} must be None for Eagle, got {getattr(self, name)!r}; "
                        f'only Finch (version "{FINCH}") has low-rank factors'
                    )
        self._require_positive("vocab_size", "n_layer", "n_embd", "head_size")
        large = self.n_embd == 4096
        defaults = {"dim_att": self.n_embd, "dim_ffn": 32 * int(3.5 * self.n_embd / 32)}
        if self.version == FINCH:
            defaults |= {"mix_rank": 64 if large else 32, "decay_rank": 128 if large else 64}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._require_positive(*defaults)
        for name in ("n_embd", "dim_att", "dim_ffn"):
            if getattr(self, name) % 32:
                raise ValueError(f"RWKVConfig: {name} must be a multiple of 32, got {getattr(self, name)}")
        if self.dim_att % self.head_size:
            raise ValueError(
                f"RWKVConfig: dim_att must be a multiple of head_size, got {self.dim_att} and {self.head_size}; "
                "change n_embd (dim_att's default), dim_att or head_size"
            )

    @property
    def n_head(self) -> int:
        """H, the number of heads."""
        return self.dim_att // self.head_size

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"RWKVConfig: {name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"RWKVConfig: {name} must be at least 1, got {value}")
