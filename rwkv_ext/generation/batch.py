"""BatchGeneration: several texts from a model at once, piece by piece as they are decided.

Ctrl-C, in the iterator or outside of it, leaves it as it was between two tokens: go on iterating, or take the texts,
the state, a copy.
"""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import sampling
from ..models import RWKVState
from .continuation import Continuation, TokenLogprob, check_seed
from .interruption import uninterrupted
from .options import GenerateOptions
from .penalties import fixed_bias
from .prompt_reader import PromptReader


class BatchGeneration(Iterator[tuple[int, str]]):
    """Iterate over (row, piece of text), rows taking turns; rows that end leave the batch, and steps get cheaper.

    rows     a Continuation for every prompt, in order: tokens, text, logprobs, finish_reason
    options  as given, the same for all rows
    """

    def __init__(self, model, tokenizer, options: GenerateOptions, rows: list[Continuation], reader: PromptReader):
        self.rows = rows
        self._model, self._tokenizer, self.options, self._reader = model, tokenizer, options, reader
        self._penalties = options.penalties(tokenizer)
        self._bias: Tensor | None = None  # [V]
        self._live: list[int] | None = None  # rows still running, None before the prompts are read
        self._state: RWKVState | None = None  # of the live rows, as are the next two
        self._logits: Tensor | None = None  # [live, V], what follows the tokens in the state
        self._pending: list[int] | None = None  # sampled, but not in the state yet
        self._left: dict[int, tuple[RWKVState, int | None]] = {}  # of rows that ended: state, token not in it yet
        self._ready: deque[tuple[int, str]] = deque()  # decided, but not handed out yet
        self._is_broken = False

    def __next__(self) -> tuple[int, str]:
        self.read_prompts()
        while not self._ready:
            if not self._live:
                raise StopIteration
            with uninterrupted():
                self._next_tokens()
        return self._ready.popleft()

    @property
    def prefill_seconds(self) -> float:
        """The time it took to read the prompts."""
        return self._reader.seconds

    @property
    def state(self) -> RWKVState | None:
        """A copy of the state, row by row, after the prompts and all tokens; before the first piece, the given one.

        The last tokens are put in on demand, which is one step of the model.
        """
        if self._live is None:
            return None if self._reader.given is None else self._reader.given.clone()
        with uninterrupted():
            self._take_pending()
            for row in self._left:
                self._take_left(row)
        parts = {row: state for row, (state, _) in self._left.items()}
        parts |= {row: self._state.select([slot]) for slot, row in enumerate(self._live)}
        return RWKVState.cat([parts[row] for row in range(len(self.rows))])

    @property
    def logits(self) -> Tensor:
        """The logits [live rows, V] after all tokens, before any option has changed them."""
        self.read_prompts()
        with uninterrupted():
            self._take_pending()
        return self._logits

    @property
    def waiting(self) -> list[tuple[int, str]]:
        """The pieces that are decided but were not handed out yet: an interruption came between."""
        return list(self._ready)

    def fork(self, seeds: list[int] | None = None) -> "BatchGeneration":
        """Return a copy that goes on by itself from here, with the same draws, or those of other seeds, one per row."""
        self.read_prompts()
        seeds = [row.seed for row in self.rows] if seeds is None else list(seeds)
        if len(seeds) != len(self.rows):
            raise ValueError(f"fork: seeds must be one per row, {len(self.rows)}, got {len(seeds)}")
        for seed in seeds:
            check_seed("fork", seed)
        rows = [row.copy(seed) for row, seed in zip(self.rows, seeds, strict=True)]
        other = BatchGeneration(self._model, self._tokenizer, self.options, rows, self._reader)
        other.resume(self.logits, self.state, self.waiting)
        return other

    def resume(self, logits: Tensor, state: RWKVState, waiting: list[tuple[int, str]]) -> None:
        """Begin where another batch was: with its logits, state and waiting pieces, and copies of its rows."""
        self._begin(logits, state)
        self._ready.extend(waiting)

    def read_prompts(self) -> None:
        """Read the prompts if that has not been done; an exception on the way loses only the piece it fell into."""
        if self._live is None:
            logits, state = self._reader.read()
            with uninterrupted():
                self._begin(logits if self.options.max_tokens else logits[:0], state)

    def _begin(self, logits: Tensor, state: RWKVState) -> None:
        """Take the logits of the rows that run, and the state of all."""
        options, numbered = self.options, list(enumerate(self.rows))
        live = [row for row, text in numbered if text.finish_reason is None]
        self._left = {row: (state.select([row]), None) for row, _ in numbered if row not in live}
        self._state = state.select(live) if self._left else state
        self._logits = logits
        self._bias = fixed_bias(logits, self._tokenizer, options.logit_bias, options.ban, options.stop_tokens)
        self._penalties.start(logits)
        for slot, row in enumerate(live):
            self._penalties.replay(slot, self.rows[row].tokens)
        self._live = live

    @torch.no_grad()
    def _next_tokens(self) -> None:
        """Sample a token for every live row."""
        self._take_pending()
        logits = self._logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chances = sampling.probabilities(self._penalties.apply(wide + self._bias), **self.options.sampling)
        sampled = sampling.pick(chances, [self.rows[row].next_key() for row in self._live])
        tokens = sampled.tolist()
        logprobs = self._judge(wide, sampled)
        self._penalties.count(sampled)
        for row, token, logprob in zip(self._live, tokens, logprobs, strict=True):
            piece = self.rows[row].accept(token, logprob)
            if piece:
                self._ready.append((row, piece))
        self._pending = tokens
        self._drop_ended(tokens)

    def _judge(self, logits: Tensor, sampled: Tensor) -> list[TokenLogprob | None]:
        if self.options.logprobs is None:
            return [None] * len(sampled)
        log_p = logits.log_softmax(-1)
        own = log_p.gather(-1, sampled[:, None])[:, 0].tolist()
        best = log_p.topk(self.options.logprobs)
        alternatives = [tuple(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist())]
        return [TokenLogprob(*row) for row in zip(sampled.tolist(), own, alternatives, strict=True)]

    def _drop_ended(self, tokens: list[int]) -> None:
        """Take the rows that these tokens have ended out of the batch, with the token that their state lacks."""
        slots = [slot for slot, row in enumerate(self._live) if self.rows[row].finish_reason is None]
        if len(slots) == len(self._live):
            return
        for slot, (row, token) in enumerate(zip(self._live, tokens, strict=True)):
            if slot not in slots:
                is_kept = self.rows[row].tokens[-1:] == [token]  # a stop token is not
                self._left[row] = (self._state.select([slot]), token if is_kept else None)
        self._live = [self._live[slot] for slot in slots]
        self._state = self._state.select(slots)
        self._logits = self._logits[slots]
        self._pending = [tokens[slot] for slot in slots]
        self._penalties.select(slots)

    def _take_pending(self) -> None:
        self._check_whole()
        if self._pending is not None and self._live:
            self._logits = self._step(self._pending, self._state)
        self._pending = None

    def _take_left(self, row: int) -> None:
        state, token = self._left[row]
        if token is not None:
            self._step([token], state)
            self._left[row] = (state, None)

    def _step(self, tokens: list[int], state: RWKVState) -> Tensor:
        self._is_broken = True  # unless it returns: the state changes in place
        logits = self._model.step(torch.tensor(tokens, device=self._logits.device), state)
        self._is_broken = False
        return logits

    def _check_whole(self) -> None:
        if self._is_broken:
            raise RuntimeError(
                "generate: the model's step failed on the way, so the state is lost; the text so far is in `text`, "
                "start again from it or from a saved state"
            )
