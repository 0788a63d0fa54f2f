"""Generation: one text from a model, piece by piece as it is decided."""

from collections.abc import Iterator
from os import PathLike

from ..models import RWKVState
from . import files
from .batch import BatchGeneration
from .options import GenerateOptions

_OF_THE_ROW = ("tokens", "logprobs", "text", "finish_reason", "prompt_tokens", "seed")


class Generation(Iterator[str]):
    """Iterate over the pieces of text; what else is known is in the attributes.

    tokens, logprobs, text, finish_reason, prompt_tokens, seed   see Continuation
    prefill_seconds   time it took to read the prompt; 0 before the first piece is asked for
    state             see the property
    """

    def __init__(self, batch: BatchGeneration):
        self._batch = batch

    def __next__(self) -> str:
        return next(self._batch)[1]

    def __getattr__(self, name: str):
        if name in _OF_THE_ROW:
            return getattr(self._batch.rows[0], name)
        raise AttributeError(f"Generation has no attribute {name!r}")

    @property
    def options(self) -> GenerateOptions:
        """The options as given."""
        return self._batch.options

    @property
    def prefill_seconds(self) -> float:
        """The time it took to read the prompt."""
        return self._batch.prefill_seconds

    @property
    def state(self) -> RWKVState | None:
        """A copy of the state (B = 1) after the prompt and all of `tokens`; before the first piece, the given one.

        To go on: generate(model, tokenizer, more_text, state=generation.state). The last token is put in on demand,
        which is one step of the model.
        """
        return self._batch.state

    def fork(self, seed: int | None = None) -> "Generation":
        """Return a copy that goes on by itself from here, with the same draws, or those of another seed.

        Reads the prompt first if that has not been done. Both write what one undisturbed generation would.
        """
        return Generation(self._batch.fork(None if seed is None else [seed]))

    def save(self, path: str | PathLike) -> None:
        """Write a file from which load() goes on: the text of both is what one undisturbed generation would write.

        Reads the prompt first if that has not been done. The file appears whole or not at all (OSError).
        """
        files.save(path, self._batch)

    @classmethod
    def load(cls, path: str | PathLike, model, tokenizer) -> "Generation":
        """Go on from a file of save(), with the model and tokenizer that it was made with.

        FileNotFoundError, or ValueError where the file is something else, damaged, or of a model of other sizes.
        """
        return cls(files.load(path, model, tokenizer))
