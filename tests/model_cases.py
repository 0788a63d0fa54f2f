"""Small models with every tensor away from zero, and one thread to run them, shared by the model tests."""

import pytest
import torch

from rwkv_ext.models import RWKV, RWKVConfig

SIZES = dict(vocab_size=97, n_layer=3, n_embd=128)
CASES = {
    "eagle": RWKVConfig(version="5.2", **SIZES),
    "finch-32-64": RWKVConfig(version="6.0", **SIZES),
    "finch-64-128": RWKVConfig(version="6.0", mix_rank=64, decay_rank=128, **SIZES),
}
SMALL = {
    "eagle": RWKVConfig(version="5.2", vocab_size=41, n_layer=2, n_embd=64, head_size=16),
    "finch": RWKVConfig(version="6.0", vocab_size=41, n_layer=2, n_embd=64, head_size=16, mix_rank=8, decay_rank=16),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small take twice the time on two threads, and more where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(config: RWKVConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> RWKV:
    """Build a model whose activations, decays (0.05 to 0.998) and low-rank factors are all of realistic size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    with torch.device("meta"):
        model = RWKV(config)
    model = model.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            short = name.split(".")[-1]
            if name == "emb.weight":
                value = normal(p.shape, 0.5)
            elif short.startswith(("time_mix", "time_maa")) and p.dim() == 3 and p.shape[0] == 1:
                value = torch.rand(p.shape, generator=generator, dtype=torch.float64)
            elif short == "time_decay":
                value = torch.rand(p.shape, generator=generator, dtype=torch.float64) * 7 - 6
            elif short == "time_faaaa":
                value = normal(p.shape, 0.5)
            elif short in ("time_maa_w2", "time_decay_w2"):
                value = normal(p.shape, 0.5 * p.shape[-2] ** -0.5)
            elif short.endswith("_w1"):
                value = normal(p.shape, p.shape[0] ** -0.5)
            elif p.dim() == 2:
                value = normal(p.shape, p.shape[1] ** -0.5)
            else:
                value = normal(p.shape, 0.2) + (1 if short == "weight" else 0)
            p.copy_(value)
    return model


def random_tokens(config: RWKVConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
