"""Checks of the whole-model step in this process's instruction set; run as a program with ATEN_CPU_CAPABILITY set."""

from unittest.mock import patch

import torch
from model_cases import CASES, SMALL, random_model, random_tokens

from rwkv_ext import RWKV, RWKVConfig, RWKVState, _layer_registration, _load

EVERY_TAIL = {  # ranks, heads and a vocabulary out of step with every vector width, in three dtypes
    "eagle": RWKVConfig(version="5.2", vocab_size=41, n_layer=2, n_embd=96, head_size=12, dim_ffn=160),
    "finch": RWKVConfig(
        version="6.0", vocab_size=41, n_layer=2, n_embd=96, head_size=24, dim_ffn=352, mix_rank=5, decay_rank=13
    ),
}
CONFIGS = {**CASES, **{f"small-{k}": v for k, v in SMALL.items()}, **{f"tails-{k}": v for k, v in EVERY_TAIL.items()}}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def plain_step(model: RWKV, tokens: torch.Tensor, state: RWKVState) -> torch.Tensor:
    """Take the step as it is specified, one torch operator at a time."""
    with patch.object(_layer_registration, "_built", False):
        return model._plain_step(model.emb(tokens), state)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def check_against_fp64(config: RWKVConfig, dtype: torch.dtype, batch: int) -> None:
    """Not further from the fp64 model than the plain step in the same dtype is, token after token."""
    model, exact_model = random_model(config, dtype=dtype), random_model(config, dtype=dtype).double()
    state, plain_state, exact_state = (m.initial_state(batch) for m in (model, model, exact_model))
    # fp32: both sum in fp32 in their own order. 16 bits: the plain step rounds after every operator.
    factor = 4.0 if dtype == torch.float32 else 1.0
    for tokens in random_tokens(config, 5, batch):
        logits = model.step(tokens, state)
        assert logits.dtype == dtype
        plain, exact = plain_step(model, tokens, plain_state), plain_step(exact_model, tokens, exact_state)
        rows = zip((logits, *state), (plain, *plain_state), (exact, *exact_state), strict=True)
        for name, (actual, other, wanted) in zip(("logits", *RWKVState._fields), rows, strict=True):
            error, bound = relative_error(actual, wanted), factor * relative_error(other, wanted) + 1e-7
            assert error <= bound, f"{name}: {error:.2e}, plain {bound:.2e}"


def check_denormal_halves() -> None:
    """float16 weights below 6e-5, its denormal numbers, count, though denormal fp32 numbers are flushed."""
    config = EVERY_TAIL["finch"]
    model, exact = random_model(config, dtype=torch.float16), random_model(config, dtype=torch.float16).double()
    small = (model.head.weight.detach() / model.head.weight.abs().max() * 3e-5).half()
    assert (small != 0).any()
    with torch.no_grad():
        model.head.weight.copy_(small)
        exact.head.weight.copy_(small)
    tokens = next(iter(random_tokens(config, 1, 2)))
    wanted = plain_step(exact, tokens, exact.initial_state(2))
    error = (model.step(tokens, model.initial_state(2)).double() - wanted).abs().max()
    assert error <= 0.02 * wanted.abs().max() + 6e-8, f"{error:.1e} of {wanted.abs().max():.1e}"


def check_all() -> None:
    check_denormal_halves()
    for name, config in CONFIGS.items():
        for dtype in DTYPES if name.startswith("tails") else (torch.float32,):
            check_against_fp64(config, dtype, 3)


if __name__ == "__main__":
    check_all()
    print(_load.build_info()["cpu_instruction_set"])
