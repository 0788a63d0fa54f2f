"""ScriptModel: a stand-in for RWKV whose every row says what its script says, so that texts can be told beforehand."""

from types import SimpleNamespace

import torch

from rwkv_ext.models import RWKVState

VOCAB = 65536
END = 0


def bytewise(text: str) -> list[int]:
    """One token per byte: ids 1 to 256 are the bytes."""
    return [1 + byte for byte in text.encode()]


class ScriptModel:
    """Row b says scripts[b][i] after the i-th token that follows its prompt, whatever the tokens are; then END.

    The position and the row's script are kept in the state (wkv, att_shift), and `seen` lists the tokens in the order
    they went in. `halfway` is called in the middle of every piece of prompt and every step.
    """

    def __init__(self, *scripts: list[int], prompt_tokens: int | tuple = 1, others: tuple[int, ...] = ()):
        self.scripts, self.others = scripts, others
        self.starts = prompt_tokens if isinstance(prompt_tokens, tuple) else (prompt_tokens,) * len(scripts)
        self.seen: list[int] = []
        self.sizes: list[int] = []  # of the batches that were stepped
        self.config = SimpleNamespace(vocab_size=VOCAB, n_layer=1, n_embd=1, n_head=1, head_size=1)
        self.halfway = lambda: None
        self.head = torch.nn.Linear(2, VOCAB, bias=False)
        self.head.forward = self.logits

    def logits(self, hidden):
        return torch.stack([self.row_logits(int(row), int(count) - self.starts[int(row)]) for count, row in hidden])

    def row_logits(self, row: int, position: int) -> torch.Tensor:
        script = self.scripts[row]
        logits = torch.zeros(VOCAB)
        logits[list(self.others)] = 60.0
        logits[script[position] if position < len(script) else END] = 50.0
        return logits

    def hidden(self, tokens, state, cu_seqlens=None):
        ends = [0, tokens.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        if state is None:
            rows = torch.arange(len(ends) - 1, dtype=torch.float32)[None, :, None]
            state = RWKVState(rows, torch.zeros(1, len(ends) - 1, 1, 1, 1), rows * 0)
        self.halfway()
        state, hidden = state.clone(), []
        for row, (begin, end) in enumerate(zip(ends[:-1], ends[1:])):
            for _ in range(begin, end):
                state.wkv[:, row] += 1
                hidden.append(self._hidden(state)[row])
        self.seen += tokens[0].tolist()
        return torch.stack(hidden)[None], state

    def step(self, tokens, state):
        state.wkv.add_(0.5)
        self.halfway()
        state.wkv.add_(0.5)
        self.seen += tokens.tolist()
        self.sizes.append(len(tokens))
        return self.logits(self._hidden(state))

    @staticmethod
    def _hidden(state):
        return torch.stack([state.wkv.flatten(), state.att_shift.flatten()], -1)
