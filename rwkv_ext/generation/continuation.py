"""Continuation: one text as it is written after its prompt, from tokens to characters; knows nothing of models."""

from typing import NamedTuple

from ..sampling import draw_key
from .options import GenerateOptions, is_integer
from .stop_strings import StopStrings


def check_seed(where: str, seed) -> None:
    """Raise ValueError for what is no seed."""
    if not (is_integer(seed) and -(2**63) <= seed < 2**64):
        raise ValueError(f"{where}: seed must be a whole number from -2**63 to 2**64 - 1, got {seed!r}")


class TokenLogprob(NamedTuple):
    """A sampled token as the model judged it: natural logarithms of the softmax of its own logits.

    Neither temperature nor bans, biases and penalties count. alternatives are the most probable tokens with theirs,
    best first, as many as were asked for.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class Continuation:
    """The tokens sampled after one prompt, and the text that they settle.

    tokens         ids sampled so far; a stop token is not among them, the tokens of a stop string are
    logprobs       a TokenLogprob for each of them, where they were asked for
    finish_reason  None while running, then "length" (max_tokens), "stop" (a stop string) or "stop_token"
    prompt_tokens  number of tokens of the prompt
    seed           with the number of tokens, all that the next draw depends on beside the logits
    """

    def __init__(self, tokenizer, options: GenerateOptions, seed: int, prompt_tokens: int):
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.prompt_tokens = prompt_tokens
        self.seed = seed
        self._tokenizer, self._options = tokenizer, options
        self._decoder, self._stop = tokenizer.stream(), StopStrings(options.stop)
        self._pieces: list[str] = []
        if options.max_tokens == 0:
            self.finish_reason = "length"

    @property
    def text(self) -> str:
        """The text so far; what may still turn out to be a stop string or half a character is not in it."""
        return "".join(self._pieces)

    def next_key(self) -> int:
        """Return the key that draws the next token."""
        return draw_key(self.seed, len(self.tokens))

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> str:
        """Add the sampled token and return the text that it settles, perhaps none; may set finish_reason."""
        if token in self._options.stop_tokens:
            return self._settle("stop_token", "")
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        piece = self._stop.push(self._decoder.push(token))
        if len(self.tokens) == self._options.max_tokens or self._stop.found is not None:
            return self._settle("length", piece)
        return self._keep(piece)

    def copy(self, seed: int | None = None) -> "Continuation":
        """Return a text that goes on from here by itself, with the same draws or those of another seed."""
        other = Continuation(self._tokenizer, self._options, self.seed if seed is None else seed, self.prompt_tokens)
        other.restore(self.tokens, self.logprobs, self.finish_reason)
        return other

    def restore(self, tokens: list[int], logprobs: list[TokenLogprob], finish_reason: str | None) -> None:
        """Bring a new continuation to where another one was: the text follows from the tokens."""
        for token in tokens:
            self.accept(token)
        self.logprobs = list(logprobs)
        if finish_reason is not None and self.finish_reason is None:  # a stop token came, which is not kept
            self._settle(finish_reason, "")

    def _settle(self, reason: str, piece: str) -> str:
        """End the text: nothing is held back any longer, and that may hold a stop string."""
        if self._stop.found is None:
            piece += self._stop.push(self._decoder.flush())
            piece += self._stop.flush()
        self.finish_reason = reason if self._stop.found is None else "stop"
        return self._keep(piece)

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
