"""What bench_gpu times: shapes, their inputs, and the bytes that each must move through memory at least."""

from dataclasses import dataclass, replace

import torch

from rwkv_ext.testing import WkvInputs

# B 8, D 4096, N 64: the settings of Figures 6 and 7 of arXiv 2404.05892.
FIGURE_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def uneven(tokens: int, sequences: int) -> tuple[int, ...]:
    """Return lengths that sum up to tokens, from short to ten times the average, as documents are."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.empty(sequences, dtype=torch.float64).exponential_(generator=generator)
    lengths = (shares / shares.sum() * tokens).floor().long().tolist()
    lengths[0] += tokens - sum(lengths)
    return tuple(lengths)


@dataclass(frozen=True)
class Case:
    name: str
    version: str = "6.0"
    batch: int = 8
    tokens: int = 4096
    heads: int = 64
    size: int = 64
    dtype: torch.dtype = torch.bfloat16
    w_dtype: torch.dtype | None = None  # of w; None: dtype. u is always fp32, or fp64 beside fp64
    lengths: tuple[int, ...] | None = None

    def toy(self) -> "Case":
        """Return the same case small enough for a CPU."""
        lengths = self.lengths and tuple(min(n, 40) for n in self.lengths[:5])
        tokens = sum(lengths) if lengths else min(self.tokens, 160)
        return replace(self, batch=min(self.batch, 2), tokens=tokens, heads=2, lengths=lengths)

    @property
    def shape(self) -> str:
        rows = f"B{self.batch} T{self.tokens} H{self.heads} N{self.size}"
        if not self.lengths:
            return rows
        return f"{rows}, {len(self.lengths)} sequences of {min(self.lengths)} to {max(self.lengths)}"

    @property
    def token_channels(self) -> int:
        return self.batch * self.tokens * self.heads * self.size

    def bytes(self, what: str) -> float:
        """Bytes of "forward", "saving" (forward that keeps what a backward needs) or "backward".

        Each input read once, each output written once. A backward also reads what was saved, which a kernel could
        do without by computing it again, so the limit does not count it.
        """
        each = self.dtype.itemsize
        w = (self.w_dtype or self.dtype).itemsize if self.version == "6.0" else 0
        scores = 4 * 16 / self.size if each == 2 else 0
        states = 4 * self.size / 128
        per = {"forward": 4 * each + w, "saving": 4 * each + w + scores + states, "backward": 7 * each + 2 * w}
        return per[what] * self.token_channels

    def make(self, device: torch.device, seed: int = 0) -> WkvInputs:
        """Draw inputs on the device: normal r, k, v; decays as a trained model has them; no initial state."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

        shape = (self.batch, self.tokens, self.heads, self.size)
        r, k, v = (normal(*shape).to(self.dtype) for _ in range(3))
        wide = torch.promote_types(self.dtype, torch.float32)
        w = normal(*(shape if self.version == "6.0" else shape[2:])).mul_(0.5)
        w = w.add_(torch.linspace(-6, 1, self.size, device=device)).to(self.w_dtype or self.dtype)
        cu_seqlens = None
        if self.lengths:
            cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(device)
        return WkvInputs(r, k, v, w, normal(self.heads, self.size).to(wide), None, cu_seqlens)


MAIN = Case("main")
LONG = Case("one long sequence", batch=1, tokens=65536, heads=32)
CASES = [
    MAIN,
    LONG,
    Case("packed", batch=1, tokens=32768, lengths=uneven(32768, 24)),
    Case("Eagle", version="5.2"),
    Case("Eagle, one long sequence", version="5.2", batch=1, tokens=65536, heads=32),
    Case("N 32", heads=128, size=32),
    Case("N 128", heads=32, size=128),
    Case("fp16", dtype=torch.float16),
    Case("w in fp32", w_dtype=torch.float32),
    Case("fp32", batch=2, dtype=torch.float32),
]


def figure_case(version: str, tokens: int) -> Case:
    return Case(f"wkv{version[0]}", version=version, tokens=tokens)


def decode_case(version: str, batch: int) -> Case:
    return Case(f"wkv{version[0]}_step", version=version, batch=batch, tokens=1)
