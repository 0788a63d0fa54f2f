"""Generations in files: the state, the tokens so far and the options, all that the rest of the text depends on."""

from os import PathLike

from ..checkpoint import tagged_file
from ..models import RWKVConfig, RWKVState
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
    check_state_sizes("Generation.load", path, state, model.config)
    if logits.shape[-1] != model.config.vocab_size:
        raise ValueError(
            f"Generation.load: {path} must be of the model it is loaded with, whose vocabulary has "
            f"{model.config.vocab_size} ids, got {logits.shape[-1]}; load the model that wrote it"
        )
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


def check_state_sizes(where: str, path: str | PathLike, state: RWKVState, config: RWKVConfig) -> None:
    """Raise ValueError if the state that was read from path is not of a model of this config."""
    for name, x, needed in zip(RWKVState._fields, state, RWKVState.zeros(config, state.batch, "meta"), strict=True):
        if x.shape != needed.shape:
            raise ValueError(
                f"{where}: {path} must be of the model it is loaded with, whose {name} has shape "
                f"{list(needed.shape)}, got {list(x.shape)}; load the model that wrote it"
            )
