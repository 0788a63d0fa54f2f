"""GenerateOptions: how text is to be written, checked as a whole before anything is computed."""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from .. import sampling
from .penalties import Penalties

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "temperature_first")


@dataclass
class GenerateOptions:
    """The options of generate(), which defines them, in one form: collections become tuples and a dict.

    Raises ValueError or TypeError that names the option.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Iterable[str] = ()
    stop_tokens: Iterable[int] = (0,)
    min_p: float = 0.0
    typical_p: float = 1.0
    temperature_first: bool = False
    penalty_decay: float = 1.0
    penalty_exempt: str | Iterable[int] = ()
    ban: Iterable[int] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self):
        sampling.check_options(**self.sampling)
        self._check_penalties()
        if not is_integer(self.max_tokens) or self.max_tokens < 0:
            raise ValueError(f"generate: max_tokens must be a whole number >= 0, got {self.max_tokens!r}")
        if self.logprobs is not None and (not is_integer(self.logprobs) or self.logprobs < 0):
            raise ValueError(
                f"generate: logprobs must be None or how many alternatives to tell, >= 0, got {self.logprobs!r}"
            )
        self.stop = _stop_strings(self.stop)
        self.stop_tokens = _token_ids("stop_tokens", self.stop_tokens)
        self.ban = _token_ids("ban", self.ban)
        if self.penalty_exempt != "rwkv":
            if isinstance(self.penalty_exempt, str):
                raise ValueError(f"generate: penalty_exempt must be token ids or 'rwkv', got {self.penalty_exempt!r}")
            self.penalty_exempt = _token_ids("penalty_exempt", self.penalty_exempt)
        self.logit_bias = _biases(self.logit_bias)

    @property
    def sampling(self) -> dict:
        """The arguments of sampling.probabilities()."""
        return {name: getattr(self, name) for name in _SAMPLING}

    def penalties(self, tokenizer) -> Penalties:
        """Return Penalties for texts that begin."""
        exempt = self.penalty_exempt
        return Penalties(self.presence_penalty, self.frequency_penalty, self.penalty_decay, exempt, tokenizer)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError for an id or a count that a model of this vocabulary cannot have; stop tokens may be any."""
        exempt = () if self.penalty_exempt == "rwkv" else self.penalty_exempt
        for name, ids in (("ban", self.ban), ("logit_bias", self.logit_bias), ("penalty_exempt", exempt)):
            for token in ids:
                if token >= vocab_size:
                    raise ValueError(
                        f"generate: {name} must hold token ids from 0 to {vocab_size - 1}, got {token}; "
                        "check the tokenizer against the model's vocabulary"
                    )
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise ValueError(f"generate: logprobs must be at most vocab_size = {vocab_size}, got {self.logprobs}")

    def as_arguments(self) -> dict:
        """Return the arguments that make these options again."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def as_dict(self) -> dict:
        """Return as_arguments() as JSON can hold them (its keys are strings)."""
        return self.as_arguments() | {"logit_bias": list(self.logit_bias.items())}

    @classmethod
    def from_dict(cls, options: dict) -> "GenerateOptions":
        """Return the options of as_dict()."""
        return cls(**(options | {"logit_bias": dict(options["logit_bias"])}))

    def _check_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"generate: {name} must be finite, got {getattr(self, name)}; 0 turns it off")
        if not 0 <= self.penalty_decay <= 1:
            raise ValueError(f"generate: penalty_decay must be from 0 to 1, got {self.penalty_decay}; 1 never forgets")


def _stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stop:
        if not isinstance(text, str):
            raise TypeError(f"generate: stop must be a string or strings, got {text!r}; token ids go to stop_tokens")
        if not text:
            raise ValueError("generate: stop must not hold an empty string, which would end every text; leave it out")
    return stop


def _token_ids(name: str, ids: Iterable[int]) -> tuple[int, ...]:
    ids = tuple(ids)
    for token in ids:
        if not is_integer(token) or token < 0:
            raise ValueError(f"generate: {name} must be token ids >= 0, got {token!r}")
    return tuple(operator.index(token) for token in ids)


def _biases(biases: Mapping[int, float] | None) -> dict[int, float]:
    biases = {} if biases is None else biases
    if not isinstance(biases, Mapping):
        raise TypeError(f"generate: logit_bias must map token ids to numbers, got {type(biases).__name__}")
    for value in biases.values():
        if not value < math.inf:
            raise ValueError(f"generate: logit_bias must be finite, or -inf to ban, got {value}")
    ids = _token_ids("logit_bias", biases)
    return dict(zip(ids, map(float, biases.values()), strict=True))


def is_integer(value) -> bool:
    """Tell whether value is a whole number of any integer type."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
