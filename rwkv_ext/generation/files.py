"""Generations in files: the state, the tokens so far and the options, all that the rest of the text depends on."""

from os import PathLike

import torch

from ..checkpoint import tagged_file
from ..models import RWKVState
from .batch import BatchGeneration
from .continuation import Continuation, TokenLogprob
from .options import GenerateOptions
from .prompt_reader import PromptReader

_FORMAT = "rwkv_ext.Generation.1"


def save(path: str | PathLike, batch: BatchGeneration) -> None:
    """Write a batch; see Generation.save."""
    logits = batch.logits  # reads the prompts, and takes the last tokens
    rows = [
        {
            "seed": row.seed,
            "prompt_tokens": row.prompt_tokens,
            "tokens": row.tokens,
            "logprobs": row.logprobs,
            "finish_reason": row.finish_reason,
        }
        for row in batch.rows
    ]
    values = {"options": batch.options.as_dict(), "rows": rows, "waiting": batch.waiting}
    tensors = batch.state._asdict() | {"logits": logits}
    tagged_file.write(path, _FORMAT, tensors, values, "Generation.save")


def load(path: str | PathLike, model, tokenizer) -> BatchGeneration:
    """Read a batch; see Generation.load."""
    weight = model.head.weight
    tensors, values = tagged_file.read(path, _FORMAT, "Generation.save", "Generation.load", weight.device)
    logits = tensors.pop("logits")
    state = RWKVState(**tensors)
    _check_sizes(path, state, logits, model)
    options = GenerateOptions.from_dict(values["options"])
    rows = []
    for saved in values["rows"]:
        row = Continuation(tokenizer, options, saved["seed"], saved["prompt_tokens"])
        logprobs = [TokenLogprob(token, p, tuple(map(tuple, best))) for token, p, best in saved["logprobs"]]
        row.restore(saved["tokens"], logprobs, saved["finish_reason"])
        rows.append(row)
    batch = BatchGeneration(model, tokenizer, options, rows, PromptReader(model, [], None))
    batch.resume(logits, state, [tuple(item) for item in values["waiting"]])
    return batch


def _check_sizes(path, state: RWKVState, logits: torch.Tensor, model) -> None:
    needed = RWKVState.zeros(model.config, state.batch, "meta", model.head.weight.dtype)
    found = {name: x for name, x in state._asdict().items()} | {"logits": logits}
    expected = needed._asdict() | {"logits": torch.empty(len(logits), model.config.vocab_size, device="meta")}
    for name, x in found.items():
        if x.shape != expected[name].shape:
            raise ValueError(
                f"Generation.load: {path} must be of the model it is loaded with, whose {name} has shape "
                f"{list(expected[name].shape)}, got {list(x.shape)}; load the model that wrote it"
            )
