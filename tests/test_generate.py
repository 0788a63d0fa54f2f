"""Generation: exact stop strings and streaming with a model that follows a script, state and seeds with a real one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import random_model
from script_model import VOCAB, ScriptModel, bytewise

from rwkv_ext.generate import generate
from rwkv_ext.generation.stop_strings import StopStrings
from rwkv_ext.models import RWKVConfig, RWKVState
from rwkv_ext.tokenizer import WorldTokenizer

TOKENIZER = WorldTokenizer()
CONFIG = RWKVConfig(version="6.0", vocab_size=VOCAB, n_layer=2, n_embd=32, head_size=16, mix_rank=8, decay_rank=8)


def run(script, **options):
    generation = generate(ScriptModel(script), TOKENIZER, temperature=0, **options)
    pieces = list(generation)
    return pieces, generation


def test_script_is_written_and_token_zero_ends_it():
    script = TOKENIZER.encode("def main():\n    return 1\n")
    pieces, generation = run(script)
    assert pieces == [TOKENIZER.decode([token]) for token in script]
    assert generation.tokens == script
    assert generation.finish_reason == "stop_token" and generation.prompt_tokens == 1


@pytest.mark.parametrize("count, text", [(0, ""), (1, "a"), (3, "abc")])
def test_max_tokens(count, text):
    pieces, generation = run(bytewise("abcdef"), max_tokens=count)
    assert "".join(pieces) == text and generation.finish_reason == "length"


def test_there_is_no_finish_reason_before_the_end():
    generation = generate(ScriptModel(bytewise("ab")), TOKENIZER, temperature=0)
    assert generation.finish_reason is None
    assert next(generation) == "a" and generation.finish_reason is None
    assert list(generation) == ["b"] and generation.finish_reason == "stop_token"


def test_other_stop_tokens_end_the_text_and_zero_then_does_not():
    script = [*bytewise("ab"), 0, *bytewise("c"), 300, *bytewise("d")]
    pieces, generation = run(script, stop_tokens=[300])
    assert "".join(pieces) == "abc" and generation.finish_reason == "stop_token"
    assert generation.tokens == script[:4]


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one\n\ntwo", "\n\n", "one"),
        ("one\ntwo", "\n\n", "one\ntwo"),
        ("User: hi", ("User:", "Bot:"), ""),
        ("aab", "ab", "a"),
        ("ababac", "abac", "ab"),
        ("xabcx", ("abcd", "b"), "xa"),
        ("xabc", ("bc", "abc"), "x"),
        ("caf\u00e9 \U0001f600!", "\U0001f600", "caf\u00e9 "),
        ("ab", ("abc",), "ab"),
        ("", "x", ""),
    ],
)
def test_stop_strings_across_tokens(text, stop, expected):
    found = expected != text
    for script in (bytewise(text), TOKENIZER.encode(text)):
        pieces, generation = run(script, stop=stop)
        assert "".join(pieces) == expected
        assert "" not in pieces
        assert generation.finish_reason == ("stop" if found else "stop_token")


def test_only_what_may_begin_a_stop_string_is_held_back():
    pieces, _ = run(bytewise("ab\nc\n\nd"), stop="\n\n")
    assert pieces == ["a", "b", "\nc"]


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_stop_strings_do_not_depend_on_where_pieces_begin(text, stops, sizes):
    # The definition: read character by character, end as soon as the text ends with a stop string, the longest of them.
    expected, found = text, None
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            found = max(hits, key=len)
            expected = text[: end - len(found)]
            break
    strings, got, rest = StopStrings(tuple(stops)), "", text
    for size in sizes:
        if strings.found is None and rest:
            got += strings.push(rest[:size])
            rest = rest[size:]
    assert (got + strings.flush(), strings.found) == (expected, found)


def test_characters_are_never_cut():
    text = "\u00e9\U0001f600\u4e2d x"
    pieces, _ = run(bytewise(text))
    assert pieces == list(text)


def test_incomplete_character_at_the_end_becomes_one_replacement_character():
    pieces, _ = run(bytewise("a\U0001f600")[:-1])
    assert "".join(pieces) == "a\ufffd"
    pieces, _ = run([*bytewise("a"), 1 + 0xE4, *bytewise("b")], stop="b")
    assert "".join(pieces) == "a\ufffd"


def test_a_stop_string_in_the_last_flushed_text_counts():
    pieces, generation = run([*bytewise("a"), 1 + 0xE4], stop="\ufffd")
    assert "".join(pieces) == "a" and generation.finish_reason == "stop"


def test_ids_without_text_are_never_sampled():
    model = ScriptModel(bytewise("ab"), others=(65530, 65535))
    assert "".join(generate(model, TOKENIZER, temperature=0)) == "ab"
    model = ScriptModel(bytewise("ab"), others=(65535,))
    generation = generate(model, TOKENIZER, temperature=0, stop_tokens=[65535])
    assert list(generation) == [] and generation.finish_reason == "stop_token"


def test_prompt_is_read_in_chunks_and_sampled_tokens_follow_once():
    prompt = [7] * 2500
    model = ScriptModel(bytewise("abc"), prompt_tokens=2500)
    generation = generate(model, TOKENIZER, prompt, temperature=0, max_tokens=3)
    assert "".join(generation) == "abc" and generation.prompt_tokens == 2500
    assert model.seen == prompt + bytewise("ab")
    assert generation.state.wkv.item() == 2503
    assert generation.state.wkv.item() == 2503  # the last token goes in once
    assert model.seen == prompt + bytewise("abc")


def test_reading_the_state_on_the_way_changes_nothing():
    model = ScriptModel(bytewise("abc"))
    generation = generate(model, TOKENIZER, temperature=0)
    text, states = "", []
    for piece in generation:
        text += piece
        states.append(generation.state)
    assert text == "abc" and [state.wkv.item() for state in states] == [2, 3, 4]  # copies: they stay what they were
    assert model.seen == [0, *bytewise("abc")]


def test_nothing_is_computed_before_the_first_piece_is_asked_for():
    model = ScriptModel(bytewise("abc"))
    generation = generate(model, TOKENIZER, "x")
    assert model.seen == [] and generation.state is None and generation.finish_reason is None


@pytest.fixture(autouse=True)
def one_thread(torch_settings):
    torch.set_num_threads(1)  # the steps are too small to share; conftest.py restores the number


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def text_of(model, prompt="def main(", **options):
    return "".join(generate(model, TOKENIZER, prompt, max_tokens=20, **options))


def test_seed_repeats_the_text(model):
    assert text_of(model, seed=5) == text_of(model, seed=5)
    assert text_of(model, seed=5) != text_of(model, seed=6)
    assert text_of(model) != text_of(model)


def test_generation_equals_the_parallel_form(model):
    prompt = TOKENIZER.encode("def main(")
    generation = generate(model, TOKENIZER, prompt, max_tokens=12, temperature=0)
    list(generation)
    with torch.no_grad():
        logits, state = model(torch.tensor([prompt + generation.tokens]))
    logits[..., 65530:] = -torch.inf
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == generation.tokens
    for got, expected in zip(generation.state, state, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_going_on_from_a_state_equals_one_prompt_and_leaves_the_state_alone(model):
    first = generate(model, TOKENIZER, "def ", max_tokens=0)
    assert list(first) == []
    state = first.state
    before = state.clone()
    texts = {text_of(model, "main(", seed=1, state=state) for _ in range(2)}
    assert texts == {text_of(model, TOKENIZER.encode("def ") + TOKENIZER.encode("main("), seed=1)}
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_prompt_may_be_text_bytes_ids_or_nothing(model):
    ids = TOKENIZER.encode("caf\u00e9")
    texts = {text_of(model, prompt, seed=2) for prompt in ("caf\u00e9", "caf\u00e9".encode(), ids, torch.tensor(ids))}
    assert len(texts) == 1
    assert text_of(model, "", seed=2) == text_of(model, [0], seed=2)


def test_grad_mode_of_the_caller_survives_between_pieces(model):
    for _ in generate(model, TOKENIZER, "a", max_tokens=2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_tokens": -1}, ValueError, "generate: max_tokens must be a whole number >= 0, got -1"),
        ({"max_tokens": 2.0}, ValueError, "max_tokens must be a whole number >= 0, got 2.0"),
        ({"max_tokens": float("inf")}, ValueError, "max_tokens must be a whole number >= 0, got inf"),
        ({"seed": 2**64}, ValueError, "generate: seed must be a whole number from -2"),
        ({"seed": 1.5}, ValueError, "generate: seed must be a whole number .* got 1.5"),
        ({"prompt": [5, VOCAB]}, ValueError, "prompt must hold token ids from 0 to 65535, got 65536 at index 1; check"),
        ({"prompt": [0.5]}, ValueError, "prompt must hold token ids from 0 to 65535, got 0.5 at index 0"),
        ({"stop": ["a", ""]}, ValueError, "generate: stop must not hold an empty string"),
        ({"stop": [0]}, TypeError, "generate: stop must be a string or strings, got 0; token ids go to stop_tokens"),
        ({"stop_tokens": [-1]}, ValueError, "generate: stop_tokens must be token ids >= 0, got -1"),
        ({"stop_tokens": [2.0]}, ValueError, "generate: stop_tokens must be token ids >= 0, got 2.0"),
        ({"prompt": "", "state": RWKVState.zeros(CONFIG)}, ValueError, "prompt must not be empty when a state is"),
        ({"state": RWKVState.zeros(CONFIG, 2)}, ValueError, "generate: state must be of 1 sequence, got 2"),
        ({"temperature": -1}, ValueError, "sampling: temperature must be >= 0"),
        ({"frequency_penalty": float("inf")}, ValueError, "generate: frequency_penalty must be finite, got inf; 0"),
        ({"presence_penalty": float("nan")}, ValueError, "generate: presence_penalty must be finite, got nan"),
        ({"penalty_decay": 1.1}, ValueError, "generate: penalty_decay must be from 0 to 1, got 1.1; 1 never forgets"),
        ({"penalty_exempt": "digits"}, ValueError, "penalty_exempt must be token ids or 'rwkv', got 'digits'"),
        ({"penalty_exempt": [-1]}, ValueError, "generate: penalty_exempt must be token ids >= 0, got -1"),
        ({"penalty_exempt": [VOCAB]}, ValueError, "penalty_exempt must hold token ids from 0 to 65535, got 65536; che"),
        ({"ban": ["a"]}, ValueError, "generate: ban must be token ids >= 0, got 'a'"),
        ({"ban": [3, VOCAB]}, ValueError, "generate: ban must hold token ids from 0 to 65535, got 65536; check"),
        ({"logit_bias": [1]}, TypeError, "generate: logit_bias must map token ids to numbers, got list"),
        ({"logit_bias": {1: float("inf")}}, ValueError, "logit_bias must be finite, or -inf to ban, got inf"),
        ({"logit_bias": {1.5: 0}}, ValueError, "generate: logit_bias must be token ids >= 0, got 1.5"),
        ({"logit_bias": {VOCAB: 0}}, ValueError, "logit_bias must hold token ids from 0 to 65535, got 65536; check"),
        ({"logprobs": -1}, ValueError, "logprobs must be None or how many alternatives to tell, >= 0, got -1"),
        ({"logprobs": VOCAB + 1}, ValueError, "generate: logprobs must be at most vocab_size = 65536, got 65537"),
    ],
)
def test_errors_come_before_any_work(options, error, message):
    with pytest.raises(error, match=message):
        generate(ScriptModel([]), TOKENIZER, **({"prompt": "x"} | options))
