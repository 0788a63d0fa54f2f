"""PromptReader: prompts of different lengths go through the model in packed pieces of bounded size."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..models import RWKVState

PIECE = 1024  # tokens at a time: bounds memory, long enough for full speed
_BLOCK = 16  # cut at multiples of it, a recurrence has the bits of the whole


def pieces(lengths: list[int], size: int = PIECE) -> Iterator[list[tuple[int, int]]]:
    """Cut prompts laid end to end into pieces of at most `size` tokens; yield every prompt's (begin, end) in each."""
    at, row = [0] * len(lengths), 0
    while row < len(lengths):
        begins, room = list(at), size
        while row < len(lengths) and room:
            left = lengths[row] - at[row]
            taken = left if left <= room else room - room % _BLOCK
            at[row] += taken
            room -= taken
            if taken < left:
                break
            row += 1
        yield list(zip(begins, at, strict=True))


class PromptReader:
    """Reads prompts into a new state; an exception between or inside pieces, Ctrl-C among them, loses nothing.

    seconds  the time it took so far
    given    the state the prompts start from, or None
    """

    def __init__(self, model, prompts: list[list[int]], state: RWKVState | None):
        self.seconds = 0.0
        self.given = state
        self._model, self._prompts = model, prompts
        self._pieces = list(pieces([len(prompt) for prompt in prompts]))
        # What has been read, as one value that is replaced whole: pieces, the state after them, the hidden vector
        # after the last token of every prompt that has ended.
        self._done: tuple[int, RWKVState | None, dict[int, Tensor]] = (0, state, {})

    @torch.no_grad()
    def read(self) -> tuple[Tensor, RWKVState]:
        """Read what is left to read; return the logits [B, V] that follow the prompts, and the state after them."""
        start = time.perf_counter()
        try:
            while self._done[0] < len(self._pieces):
                self._done = self._read_piece(*self._done)
            _, state, last = self._done
            return self._model.head(torch.stack([last[row] for row in range(len(self._prompts))])), state
        finally:
            self.seconds += time.perf_counter() - start

    def _read_piece(self, number: int, state: RWKVState | None, last: dict[int, Tensor]):
        ranges = self._pieces[number]
        tokens = [token for prompt, (i, j) in zip(self._prompts, ranges, strict=True) for token in prompt[i:j]]
        ends = torch.tensor([j - i for i, j in ranges]).cumsum(0).tolist()
        device = self._model.head.weight.device
        packing = None if len(ranges) == 1 else torch.tensor([0, *ends], device=device)
        hidden, state = self._model.hidden(torch.tensor([tokens], device=device), state, packing)
        ended = {
            row: hidden[0, end - 1].clone()  # a view would keep the whole piece
            for row, ((i, j), end) in enumerate(zip(ranges, ends, strict=True))
            if i < j == len(self._prompts[row])
        }
        return number + 1, state, last | ended
