"""Text from a model, piece by piece as it is decided."""

import operator
import time
from collections.abc import Iterable, Iterator

import torch

from . import sampling
from .models import RWKVState

_PREFILL_CHUNK = 1024  # tokens of the prompt at a time: bounds memory, long enough for full speed


class Generation(Iterator[str]):
    """Iterate over the pieces of text; what else is known is in the attributes.

    tokens          ids sampled so far; a stop token is not among them, the tokens of a stop string are
    finish_reason   None while running, then "length" (max_tokens), "stop" (a stop string) or "stop_token"
    prompt_tokens   number of tokens of the prompt
    prefill_seconds time it took to read the prompt; 0 before the first piece is asked for
    state           see the property
    """

    def __init__(self, model, tokenizer, prompt, max_tokens, options, penalties, generator, stop, stop_tokens, state):
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.prompt_tokens = len(prompt)
        self.prefill_seconds = 0.0
        self._model = model
        self._state = state
        self._logits: torch.Tensor | None = None  # [V], what follows the tokens in the state
        self._pending: int | None = None  # sampled, but not in the state yet
        self._pieces = self._run(tokenizer, prompt, max_tokens, options, penalties, generator, stop, stop_tokens)

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def state(self) -> RWKVState | None:
        """A copy of the state (B = 1) after the prompt and all of `tokens`; before the first piece, the given one.

        To go on: generate(model, tokenizer, more_text, state=generation.state). The last token is put in on demand,
        which is one step of the model.
        """
        self._take_pending()
        return self._state.clone() if self._state is not None else None

    def _take_pending(self) -> None:
        if self._pending is not None:
            token = torch.tensor([self._pending], device=self._logits.device)
            self._logits = self._model.step(token, self._state)[0]
            self._pending = None

    def _run(self, tokenizer, prompt, max_tokens, options, penalties, generator, stop, stop_tokens):
        start = time.perf_counter()
        self._prefill(prompt)
        banned = _undecodable(tokenizer, self._logits, stop_tokens)
        counts = torch.zeros(self._logits.shape, device=self._logits.device)
        self.prefill_seconds = time.perf_counter() - start
        decoder, text = tokenizer.stream(), StopStrings(stop)
        reason = "length"
        for _ in range(max_tokens):
            self._take_pending()
            logits = self._logits.masked_fill(banned, float("-inf"))
            if any(penalties):
                logits = sampling.penalize(logits, counts, *penalties)
            token = sampling.sample(logits, *options, generator=generator).item()
            if token in stop_tokens:
                reason = "stop_token"
                break
            self._pending = token
            self.tokens.append(token)
            counts[token] += 1
            piece = text.push(decoder.push(token))
            if piece:
                yield piece
            if text.found:
                break
        piece = "" if text.found else text.push(decoder.flush()) + text.flush()
        self.finish_reason = "stop" if text.found else reason
        if piece:
            yield piece

    @torch.no_grad()
    def _prefill(self, prompt: list[int]) -> None:
        """Read the prompt into a new state; the caller's is left as it is."""
        device = self._model.head.weight.device
        for i in range(0, len(prompt), _PREFILL_CHUNK):
            tokens = torch.tensor([prompt[i : i + _PREFILL_CHUNK]], device=device)
            hidden, self._state = self._model.hidden(tokens, self._state)
        self._logits = self._model.head(hidden[0, -1])  # [V]: after the last token alone


class StopStrings:
    """Pass text on, in pieces, up to the first stop string, which may be spread over pieces.

    The stop string that is complete first ends the text (of several complete at once, the longest), so the result does
    not depend on where pieces begin and end. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, stop: tuple[str, ...]):
        self.found: str | None = None
        self._stop = sorted(stop, key=len, reverse=True)
        self._held = ""

    def push(self, piece: str) -> str:
        """Return the text that is now known to belong to the output."""
        text = self._held + piece
        ends = [(at + len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            end, self.found = min(ends, key=lambda item: item[0])
            self._held = ""
            return text[: end - len(self.found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back: no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of text that begins stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def generate(
    model,
    tokenizer,
    prompt: str | bytes | Iterable[int] = "",
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    stop: str | Iterable[str] = (),
    stop_tokens: Iterable[int] = (0,),
    state: RWKVState | None = None,
) -> Generation:
    """Return an iterator over the text that continues the prompt; see Generation for state, tokens and reason.

    model        an RWKV; the prompt is read by its parallel form, each further token by step()
    tokenizer    a WorldTokenizer
    prompt       text, bytes, or token ids. Empty: the model starts a document, as after token 0
    max_tokens   at most this many tokens are sampled; 0 only reads the prompt, for its state
    temperature, top_p, top_k   sampling.probabilities() defines them; temperature 0 takes the most probable token
    presence_penalty, frequency_penalty   lower the logits of tokens sampled here before, by a constant and by a
                 multiple of their count; tokens of the prompt do not count
    seed         an integer makes the text repeatable; None draws a new one
    stop         strings that end the text and are not part of it, wherever tokens begin and end
    stop_tokens  ids that end the text; 0 is the end of a document
    state        a state for B = 1 to start from instead of an empty one; it is not changed

    Ids that are no text (65530 to 65535 in the World vocabulary) are never sampled. Pieces are never cut inside a
    character. Raises ValueError or TypeError at once, before anything is computed; a state of another model is
    refused with the first piece.

    Example:
        for piece in rwkv_ext.generate(model, WorldTokenizer(), "def main(", seed=1, stop="\\n\\n"):
            print(piece, end="", flush=True)
    """
    options = (temperature, top_p, top_k)
    penalties = (presence_penalty, frequency_penalty)
    sampling.check_options(*options, *penalties)
    stop, stop_tokens = check_limits(max_tokens, seed, stop, stop_tokens)
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt)
    elif isinstance(prompt, bytes):
        prompt = tokenizer.encode_bytes(prompt)
    prompt = _token_ids(prompt, model.head.weight.shape[0])
    if not prompt:
        if state is not None:
            raise ValueError(
                "generate: prompt must not be empty when a state is given, which does not hold the next logits; "
                "start with the text that follows"
            )
        prompt = [0]
    if state is not None and state.wkv.shape[1] != 1:
        raise ValueError(f"generate: state must be of 1 sequence, got {state.wkv.shape[1]}")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return Generation(model, tokenizer, prompt, max_tokens, options, penalties, generator, stop, stop_tokens, state)


def check_limits(max_tokens, seed, stop, stop_tokens) -> tuple[tuple[str, ...], frozenset[int]]:
    """Return stop and stop_tokens in one form, or raise for what generate() could not obey."""
    if not _is_integer(max_tokens) or max_tokens < 0:
        raise ValueError(f"generate: max_tokens must be a whole number >= 0, got {max_tokens!r}")
    if seed is not None and not (_is_integer(seed) and -(2**63) <= seed < 2**64):
        raise ValueError(f"generate: seed must be a whole number from -2**63 to 2**64 - 1, got {seed!r}")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stop:
        if not isinstance(text, str):
            raise TypeError(f"generate: stop must be a string or strings, got {text!r}; token ids go to stop_tokens")
        if not text:
            raise ValueError("generate: stop must not hold an empty string, which would end every text; leave it out")
    stop_tokens = frozenset(stop_tokens)
    for token in stop_tokens:
        if not _is_integer(token) or token < 0:
            raise ValueError(f"generate: stop_tokens must be token ids >= 0, got {token!r}")
    return stop, stop_tokens


def _token_ids(prompt: Iterable[int], vocab_size: int) -> list[int]:
    ids = list(prompt)
    for i, token in enumerate(ids):
        if not _is_integer(token) or not 0 <= token < vocab_size:
            raise ValueError(
                f"generate: prompt must hold token ids from 0 to {vocab_size - 1}, got {token!r} at index {i}; "
                "check the tokenizer against the model's vocabulary"
            )
    return [operator.index(token) for token in ids]


def _is_integer(value) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _undecodable(tokenizer, logits, stop_tokens) -> torch.Tensor:
    """Return a mask [V] of the ids that stand for no bytes and stop nothing; id 0, the end of a document, is none."""
    lengths = torch.zeros(logits.shape, dtype=torch.uint8)
    known = torch.from_numpy(tokenizer.byte_lengths.copy())[: len(lengths)]
    lengths[: len(known)] = known
    mask = lengths == 0
    mask[[0, *(token for token in stop_tokens if token < len(mask))]] = False
    return mask.to(logits.device)
