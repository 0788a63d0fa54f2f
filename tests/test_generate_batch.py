"""Batches: prompts of different lengths, rows that end early, and every row as it would be alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import one_thread, random_model  # noqa: F401
from script_model import VOCAB, ScriptModel, bytewise

from rwkv_ext.generate import generate, generate_batch
from rwkv_ext.generation.prompt_reader import pieces
from rwkv_ext.models import RWKVConfig, RWKVState
from rwkv_ext.tokenizer import WorldTokenizer

TOKENIZER = WorldTokenizer()
PROMPTS = ["def main(", "", "import os\n" * 30, "a"]
CONFIGS = {
    "finch": RWKVConfig(version="6.0", vocab_size=VOCAB, n_layer=2, n_embd=64, head_size=32, mix_rank=8, decay_rank=8),
    "eagle": RWKVConfig(version="5.2", vocab_size=VOCAB, n_layer=2, n_embd=64, head_size=32),
}


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.sampled_from([16, 32, 48]))
def test_pieces_hold_every_token_once_in_order_and_cut_at_multiples_of_16(lengths, size):
    at = [0] * len(lengths)
    for ranges in pieces(lengths, size):
        assert [begin for begin, _ in ranges] == at
        at = [end for _, end in ranges]
        assert all(end % 16 == 0 or end == length for end, length in zip(at, lengths, strict=True))
        assert sum(end - begin for begin, end in ranges) <= size
        open_rows = [end < length for end, length in zip(at, lengths, strict=True)]
        started = [begin < end for begin, end in ranges]
        assert sum(a and b for a, b in zip(open_rows, started, strict=True)) <= 1
    assert at == lengths
    assert len(list(pieces(lengths, size))) <= sum(lengths) // (size - 15) + 1


def test_rows_say_their_scripts_and_leave_the_batch():
    scripts = [bytewise("abcdef"), bytewise("xy"), bytewise("one\n\ntwo"), bytewise("12345678")]
    model = ScriptModel(*scripts, prompt_tokens=(3, 1, 2, 1))
    batch = generate_batch(model, TOKENIZER, ["def main(", "", "a b", "q"], temperature=0, max_tokens=7, stop="\n\n")
    events = list(batch)
    assert [row.text for row in batch.rows] == ["abcdef", "xy", "one", "1234567"]
    assert [row.finish_reason for row in batch.rows] == ["stop_token", "stop_token", "stop", "length"]
    assert [row.prompt_tokens for row in batch.rows] == [3, 1, 2, 1]
    assert events[:8] == [(0, "a"), (1, "x"), (2, "o"), (3, "1"), (0, "b"), (1, "y"), (2, "n"), (3, "2")]
    assert model.sizes == [4, 4, 3, 3, 2, 2]
    assert batch.state.wkv.flatten().tolist() == [3 + 6, 1 + 2, 2 + 5, 1 + 7]
    assert batch.state.att_shift.flatten().tolist() == [0, 1, 2, 3]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param])


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=0),
        dict(top_p=0.9, presence_penalty=0.5, frequency_penalty=0.4, penalty_decay=0.9),
        dict(min_p=0.02, typical_p=0.9, temperature=0.9, temperature_first=True),
    ],
    ids=["plain", "greedy", "penalties", "filters"],
)
def test_every_row_is_what_it_is_alone(model, options):
    """fp32: logits differ by rounding alone (below), and these texts by nothing; stop strings end rows early."""
    options = dict(max_tokens=24, stop=["e", "1"], logprobs=2) | options
    batch = generate_batch(model, TOKENIZER, PROMPTS, seed=7, **options)
    pieces_of = {row: [] for row in range(4)}
    for row, piece in batch:
        pieces_of[row].append(piece)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, TOKENIZER, prompt, seed=7 + row, **options)
        assert list(alone) == pieces_of[row]
        written = batch.rows[row]
        assert (written.tokens, written.text, written.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
        for a, b in zip(written.logprobs, alone.logprobs, strict=True):
            assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=1e-4)
        for x, y in zip(batch.state.select([row]), alone.state, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_logits_differ_from_those_alone_by_rounding(model):
    batch = generate_batch(model, TOKENIZER, PROMPTS, seed=7, max_tokens=9)
    for _ in range(12):
        next(batch)
    for row, prompt in enumerate(PROMPTS):
        tokens = (TOKENIZER.encode(prompt) or [0]) + batch.rows[row].tokens
        with torch.no_grad():
            expected = model(torch.tensor([tokens]))[0][0, -1]
        assert (batch.logits[row] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_seeds_are_one_per_row_or_counted_on(model):
    def texts(seed, prompts=("a", "a", "a")):
        batch = generate_batch(model, TOKENIZER, prompts, seed=seed, max_tokens=12)
        list(batch)
        return [row.text for row in batch.rows], [row.seed for row in batch.rows]

    assert texts(5) == texts([5, 6, 7])
    same, seeds = texts([5, 5, 2**64 - 1])
    assert same[0] == same[1] != same[2] and seeds == [5, 5, 2**64 - 1]
    assert texts(2**64 - 2)[1] == [2**64 - 2, 2**64 - 1, 0] and texts(-1)[1] == [-1, 0, 1]
    new = texts(None)
    assert len(set(new[1])) == 3 and new != texts(None)


def test_state_for_all_rows_or_each(model):
    with torch.no_grad():
        states = [model(torch.tensor([TOKENIZER.encode(text)]))[1] for text in ("def ", "class ")]
    both = RWKVState.cat(states)
    before = both.clone()
    batch = generate_batch(model, TOKENIZER, ["main(", "A:"], state=both, seed=1, max_tokens=9)
    list(batch)
    alone = [generate(model, TOKENIZER, "main(", state=states[0], seed=1, max_tokens=9)]
    alone += [generate(model, TOKENIZER, "A:", state=states[1], seed=2, max_tokens=9)]
    assert [row.text for row in batch.rows] == ["".join(one) for one in alone]
    assert all(torch.equal(a, b) for a, b in zip(both, before, strict=True))
    shared = generate_batch(model, TOKENIZER, ["main(", "x"], state=states[0], seed=1, max_tokens=9)
    list(shared)
    assert shared.rows[0].text == alone[0].text


def test_a_batch_of_one_and_a_batch_of_nothing_to_write(model):
    batch = generate_batch(model, TOKENIZER, ["abc"], seed=3, max_tokens=8)
    assert [piece for _, piece in batch] == list(generate(model, TOKENIZER, "abc", seed=3, max_tokens=8))
    batch = generate_batch(model, TOKENIZER, ["abc", "d"], max_tokens=0)
    assert list(batch) == [] and [row.finish_reason for row in batch.rows] == ["length", "length"]
    with torch.no_grad():
        expected = model(torch.tensor([TOKENIZER.encode("abc")]))[1]
    torch.testing.assert_close(batch.state.wkv[:, :1], expected.wkv, rtol=1e-5, atol=1e-5)


def test_logprobs_are_the_models_own(model):
    generation = generate(
        model, TOKENIZER, "a", 6, seed=1, temperature=2, logprobs=3, ban=range(100), frequency_penalty=1
    )
    list(generation)
    tokens = TOKENIZER.encode("a") + generation.tokens
    with torch.no_grad():
        log_p = model(torch.tensor([tokens]))[0][0, :-1].log_softmax(-1)
    assert [one.token for one in generation.logprobs] == generation.tokens
    for one, row in zip(generation.logprobs, log_p, strict=True):
        assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-4)
        best = row.topk(3)
        assert [token for token, _ in one.alternatives] == best.indices.tolist()
        assert [p for _, p in one.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert generate(model, TOKENIZER, "a").logprobs == []
    only_own = generate(model, TOKENIZER, "a", 2, logprobs=0, stop_tokens=[])
    list(only_own)
    assert [one.alternatives for one in only_own.logprobs] == [(), ()]


def test_bf16_rows_draw_by_themselves():
    """Scripts have equal logits in any batch: then the promise is exact, in every dtype and with every option."""

    class Noise(ScriptModel):
        def row_logits(self, row, position):
            generator = torch.Generator().manual_seed(1000 * row + position)
            return (3 * torch.randn(VOCAB, generator=generator)).bfloat16()

    class NoiseOf(Noise):
        def row_logits(self, row, position):
            return super().row_logits(self.row, position)

    options = dict(max_tokens=10, seed=9, top_p=0.9, typical_p=0.95, frequency_penalty=1.0, penalty_decay=0.5)
    batch = generate_batch(Noise([], [], []), TOKENIZER, ["a", "b", "c"], **options)
    list(batch)
    for row in range(3):
        model = NoiseOf([])
        model.row = row
        alone = generate(model, TOKENIZER, "x", **(options | {"seed": 9 + row}))
        list(alone)
        assert alone.tokens == batch.rows[row].tokens


@pytest.mark.parametrize(
    "prompts, options, error, message",
    [
        ("text", {}, TypeError, "generate_batch: prompts must be several prompts, got one; use generate"),
        ([], {}, ValueError, "generate_batch: prompts must hold at least one prompt, got none"),
        (["a", "b"], {"seed": [1]}, ValueError, "seed must be one number or one per prompt, 2, got 1"),
        (["a", "b"], {"seed": [1, None]}, ValueError, "generate: seed must be a whole number .* got None"),
        (["a", "b"], {"seed": [1, 2.5]}, ValueError, "seed must be a whole number .* got 2.5"),
        (["a", "b"], {"state": 3}, ValueError, "state must be of 1 sequence or 2, got 3"),
        (["a", ""], {"state": 2}, ValueError, "prompt must not be empty when a state is given"),
        (["a", [VOCAB]], {}, ValueError, "prompt must hold token ids from 0 to 65535, got 65536 at index 0"),
        (["a"], {"topp": 0.5}, TypeError, "unexpected keyword argument 'topp'"),
    ],
)
def test_errors_come_before_any_work(prompts, options, error, message):
    if "state" in options:
        options = options | {"state": RWKVState.zeros(CONFIGS["finch"], options["state"])}
    with pytest.raises(error, match=message):
        generate_batch(ScriptModel([]), TOKENIZER, prompts, **options)
