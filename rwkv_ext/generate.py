"""generate() and generate_batch(): text that continues a prompt, or several at once."""

import operator
import secrets
from collections.abc import Iterable, Mapping, Sequence

from .generation import BatchGeneration, Continuation, GenerateOptions, Generation
from .generation.continuation import check_seed
from .generation.options import is_integer
from .generation.prompt_reader import PromptReader
from .models import RWKVState


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
    *,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    temperature_first: bool = False,
    penalty_decay: float = 1.0,
    penalty_exempt: str | Iterable[int] = (),
    ban: Iterable[int] = (),
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
) -> Generation:
    """Return an iterator over the text that continues the prompt; see Generation for state, tokens and reason.

    model        an RWKV; the prompt is read by its parallel form, each further token by step()
    tokenizer    a WorldTokenizer
    prompt       text, bytes, or token ids. Empty: the model starts a document, as after token 0
    max_tokens   at most this many tokens are sampled; 0 only reads the prompt, for its state
    temperature, top_p, top_k, min_p, typical_p   sampling.probabilities() defines them; temperature 0 takes the most
                 probable token
    temperature_first   the order of Hugging Face's generate() instead of the `rwkv` package's: see sampling.py
    presence_penalty, frequency_penalty   lower the logits of tokens sampled here before, by a constant and by a
                 multiple of their count; tokens of the prompt do not count
    penalty_decay   counts are multiplied by it with every token, so that frequency_penalty forgets; presence does not
    penalty_exempt   ids that no penalty touches; or "rwkv": as in the `rwkv` package, see Penalties
    ban          ids that are never sampled, stop tokens among them if they are listed
    logit_bias   what to add to the logits of some ids; -inf bans
    logprobs     None, or n: keep the log-probability of every sampled token and of the n most probable ones
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
    options = GenerateOptions(
        max_tokens, temperature, top_p, top_k, presence_penalty, frequency_penalty, stop, stop_tokens, min_p, typical_p,
        temperature_first, penalty_decay, penalty_exempt, ban, logit_bias, logprobs,
    )  # fmt: skip
    return Generation(_begin(model, tokenizer, [prompt], options, seed, state))


def generate_batch(
    model,
    tokenizer,
    prompts: Sequence[str | bytes | Iterable[int]],
    *,
    seed: int | Sequence[int] | None = None,
    state: RWKVState | None = None,
    **options,
) -> BatchGeneration:
    """Continue several prompts at once; return an iterator over (row, piece of text).

    prompts   as generate() takes one, of any lengths: they are read packed, without padding
    seed      row i draws with seed + i; or one seed per row; None draws new ones
    state     to start from: of 1 sequence for all rows, or of one sequence per row; it is not changed
    options   those of generate(), the same for all rows

    A row draws with its own seed and is judged by its own logits alone, bit for bit as by itself (on a CPU), and leaves
    the batch when it ends. So it has the text that generate() writes with its prompt and seed, as long as the logits
    are equal. Matrix products of other sizes may round them differently, and two texts part where a draw is a tie
    within that rounding: hardly ever, but not never. docs/generation.md has numbers.

    Raises as generate() does; TypeError for an unknown option.

    Example:
        batch = rwkv_ext.generate_batch(model, WorldTokenizer(), ["def main(", "import "], seed=1, max_tokens=20)
        for row, piece in batch:
            ...
        texts = [row.text for row in batch.rows]
    """
    if isinstance(prompts, (str, bytes)):
        raise TypeError("generate_batch: prompts must be several prompts, got one; use generate(), or [prompt]")
    return _begin(model, tokenizer, list(prompts), GenerateOptions(**options), seed, state)


def check_state(state: RWKVState | None, prompts: Sequence) -> None:
    """Raise ValueError where these prompts cannot go on from the state."""
    if state is None:
        return
    if not all(map(len, prompts)):
        raise ValueError(
            "generate: prompt must not be empty when a state is given, which does not hold the next logits; "
            "start with the text that follows"
        )
    if state.batch not in (1, len(prompts)):
        needed = "of 1 sequence" if len(prompts) == 1 else f"of 1 sequence or {len(prompts)}"
        raise ValueError(f"generate: state must be {needed}, got {state.batch}")


def _begin(model, tokenizer, prompts, options, seed, state) -> BatchGeneration:
    vocab_size = model.head.weight.shape[0]
    options.check_vocabulary(vocab_size)
    if not prompts:
        raise ValueError("generate_batch: prompts must hold at least one prompt, got none")
    seeds = _seeds(seed, len(prompts))
    prompts = [_token_ids(prompt, tokenizer, vocab_size) for prompt in prompts]
    check_state(state, prompts)
    prompts = [prompt or [0] for prompt in prompts]
    if state is not None and state.batch != len(prompts):
        state = state.fork(len(prompts))
    rows = [Continuation(tokenizer, options, *each) for each in zip(seeds, map(len, prompts), strict=True)]
    return BatchGeneration(model, tokenizer, options, rows, PromptReader(model, prompts, state))


def _seeds(seed, n: int) -> list[int]:
    if seed is None:
        return [secrets.randbits(63) for _ in range(n)]
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != n:
            raise ValueError(f"generate_batch: seed must be one number or one per prompt, {n}, got {len(seed)}")
        seeds = list(seed)
    else:
        check_seed("generate", seed)
        seeds = [(operator.index(seed) + i) % 2**64 if seed >= 0 else seed + i for i in range(n)]
    for one in seeds:
        check_seed("generate", one)
    return [operator.index(one) for one in seeds]


def _token_ids(prompt, tokenizer, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt)
    elif isinstance(prompt, bytes):
        prompt = tokenizer.encode_bytes(prompt)
    ids = list(prompt)
    for i, token in enumerate(ids):
        if not is_integer(token) or not 0 <= token < vocab_size:
            raise ValueError(
                f"generate: prompt must hold token ids from 0 to {vocab_size - 1}, got {token!r} at index {i}; "
                "check the tokenizer against the model's vocabulary"
            )
    return [operator.index(token) for token in ids]
