"""Generations that stop and go on: Ctrl-C at every place, copies, files, a step that fails."""

import json
import signal
import sys
import threading
from itertools import islice

import pytest
import torch
from file_limits import largest_file
from model_cases import one_thread, random_model  # noqa: F401
from safetensors.torch import save_file
from script_model import VOCAB, ScriptModel, bytewise

from rwkv_ext.generate import generate, generate_batch
from rwkv_ext.generation import Generation
from rwkv_ext.generation.interruption import uninterrupted
from rwkv_ext.models import RWKVConfig, RWKVState
from rwkv_ext.tokenizer import WorldTokenizer

TOKENIZER = WorldTokenizer()
CONFIG = RWKVConfig(version="6.0", vocab_size=VOCAB, n_layer=2, n_embd=32, head_size=16, mix_rank=8, decay_rank=8)
SCRIPTS = (bytewise("a\u00e9\n\u4e2d"), bytewise("xy\n\nz"))
OPTIONS = dict(temperature=0, stop="\n\n", frequency_penalty=0.5, logprobs=1)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def script_batch():
    model = ScriptModel(*SCRIPTS, prompt_tokens=(1, 2))
    return model, generate_batch(model, TOKENIZER, ["", "a b"], **OPTIONS)


def facts(batch):
    rows = [(row.text, row.tokens, row.logprobs, row.finish_reason) for row in batch.rows]
    return rows, [x.tolist() for x in batch.state]


def interrupt_at(number, function):
    """Call function with a SIGINT at the number-th bytecode of rwkv_ext; return whether there were that many."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "rwkv_ext" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == number:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return count >= number


def test_ctrl_c_at_any_place_loses_nothing():
    """At every 43rd bytecode of two texts, prompt to end, in turn: going on gives the undisturbed texts and states."""
    undisturbed = script_batch()[1]
    pieces = list(undisturbed)
    expected = facts(undisturbed)
    assert [row[0] for row in expected[0]] == ["a\u00e9\n\u4e2d", "xy"]
    interrupted = False
    for number in range(1, 100_000, 43):
        model, batch = script_batch()
        got = []
        try:
            came = interrupt_at(number, lambda batch=batch, got=got: got.extend(batch))
        except KeyboardInterrupt:
            came, interrupted = True, True
            got_before = len(got)
            assert got == pieces[:got_before]
        got += list(batch)
        assert facts(batch) == expected
        # The one piece that can miss is the one on its way to a caller whose own code was interrupted.
        assert got == pieces or len(got) == len(pieces) - 1
        if not came:
            break
    assert interrupted and not came and number > 3000


def test_ctrl_c_in_a_step_waits_for_its_end_and_in_a_prompt_does_not():
    model = ScriptModel(bytewise("abc"), prompt_tokens=2500)
    generation = generate(model, TOKENIZER, [7] * 2500, temperature=0)
    interrupts = iter([False, True, False, False, True, False, False])

    def halfway():
        if next(interrupts, False):
            signal.raise_signal(signal.SIGINT)
            model.seen.append("after the signal")

    model.halfway = halfway
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert model.seen == [7] * 1024  # at once: the second piece is read again
    assert next(generation) == "a"
    seen = [7] * 2500
    assert model.seen == seen
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert model.seen == [*seen, "after the signal", *bytewise("a")]
    assert generation.text == "ab"  # decided, though the caller has not seen it yet
    assert list(generation) == ["b", "c"] and generation.state.wkv.item() == 2503
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_uninterrupted_passes_on_to_any_handler_and_to_threads():
    calls = []
    previous = signal.signal(signal.SIGINT, lambda *_: calls.append("handler"))
    try:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            assert calls == []
        assert calls == ["handler"]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        with pytest.raises(ZeroDivisionError), uninterrupted():
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
    texts = []
    batch = script_batch()[1]
    thread = threading.Thread(target=lambda: texts.extend(batch))
    thread.start()
    thread.join()
    assert texts == list(script_batch()[1])


def test_a_failed_step_is_told_and_the_text_stays():
    model = ScriptModel(bytewise("abc"))
    generation = generate(model, TOKENIZER, temperature=0)
    assert next(generation) == "a"

    def fail():
        raise MemoryError("no memory")

    model.halfway = fail
    with pytest.raises(MemoryError):
        next(generation)
    for use in (lambda: next(generation), lambda: generation.state, lambda: generation.fork()):
        with pytest.raises(RuntimeError, match="the model's step failed on the way, so the state is lost; the text so"):
            use()
    assert generation.text == "a"


WAYS = dict(top_p=0.9, presence_penalty=0.3, frequency_penalty=0.2, penalty_decay=0.9, logprobs=2, stop=["ee", "10"])


def going_on(model, taken, **options):
    generation = generate(model, TOKENIZER, "def main(", 30, seed=4, **(WAYS | options))
    pieces = list(islice(generation, taken))
    return generation, pieces


def all_of(generation, pieces):
    text = "".join([*pieces, *generation])
    return (
        text,
        generation.tokens,
        generation.logprobs,
        generation.finish_reason,
        [x.tolist() for x in generation.state],
    )


@pytest.mark.parametrize("taken", [0, 1, 9])
@pytest.mark.parametrize("penalty_exempt", ["rwkv", [300, 5]])
def test_a_fork_and_a_file_go_on_as_if_undisturbed(model, tmp_path, taken, penalty_exempt):
    expected = all_of(*going_on(model, 0, penalty_exempt=penalty_exempt))
    assert len(expected[1]) > 15
    generation, pieces = going_on(model, taken, penalty_exempt=penalty_exempt)
    fork = generation.fork()
    generation.save(tmp_path / "generation")
    loaded = Generation.load(tmp_path / "generation", model, TOKENIZER)
    assert loaded.text == fork.text == generation.text == "".join(pieces)
    assert all_of(generation, pieces) == all_of(fork, pieces) == all_of(loaded, pieces) == expected


def test_forks_with_other_seeds_part_and_leave_the_original_alone(model):
    expected = all_of(*going_on(model, 0))
    generation, pieces = going_on(model, 5)
    others = [generation.fork(seed) for seed in range(3)]
    texts = [all_of(other, pieces)[0] for other in others]
    assert len(set(texts)) == 3 and all(text.startswith("".join(pieces)) for text in texts)
    assert [other.seed for other in others] == [0, 1, 2]
    assert all_of(generation, pieces) == expected


def test_an_ended_generation_is_saved_with_its_reason(tmp_path):
    for script, options, reason in (
        ([*bytewise("ab"), 0], {}, "stop_token"),
        (bytewise("abX"), {"stop": "X"}, "stop"),
        (bytewise("abcd"), {"max_tokens": 2}, "length"),
        ([*bytewise("ab"), 1 + 0xE4, 0], {"stop": "\ufffd"}, "stop"),
    ):
        model = ScriptModel(script)
        generation = generate(model, TOKENIZER, temperature=0, **options)
        list(generation)
        generation.save(tmp_path / "ended")
        for other in (Generation.load(tmp_path / "ended", model, TOKENIZER), generation.fork()):
            assert (other.text, other.finish_reason, list(other)) == ("ab", reason, [])
            assert torch.equal(other.state.wkv, generation.state.wkv)


def test_pieces_that_wait_are_saved_too(tmp_path):
    model = ScriptModel(bytewise("abc"))
    generation = generate(model, TOKENIZER, temperature=0)
    next(generation)
    model.halfway = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    model.halfway = lambda: None
    generation.save(tmp_path / "waiting")
    assert list(Generation.load(tmp_path / "waiting", model, TOKENIZER)) == list(generation.fork()) == ["b", "c"]


def test_batches_fork_with_rows_that_have_ended():
    expected = script_batch()[1]
    pieces = list(expected)
    for taken in range(len(pieces) + 1):
        batch = script_batch()[1]
        first = list(islice(batch, taken))
        fork = batch.fork()
        assert first + list(fork) == first + list(batch) == pieces
        assert facts(fork) == facts(batch) == facts(expected)


def test_fork_checks_its_seeds(model):
    with pytest.raises(ValueError, match="fork: seed must be a whole number from -2.* got 'x'"):
        generate(model, TOKENIZER, "a").fork("x")
    with pytest.raises(ValueError, match="fork: seeds must be one per row, 2, got 1"):
        generate_batch(model, TOKENIZER, ["a", "b"]).fork([1])


def test_files_of_something_else_are_refused(model, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match=f"Generation.load: {path} does not exist; check the path"):
        Generation.load(path, model, TOKENIZER)
    with pytest.raises(OSError, match=f"Generation.load: {tmp_path} must be a readable file, got an error"):
        Generation.load(tmp_path, model, TOKENIZER)
    RWKVState.zeros(CONFIG).save(path)
    with pytest.raises(ValueError, match=f"{path} must be a file of Generation.save, got a safetensors file with tens"):
        Generation.load(path, model, TOKENIZER)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"got a safetensors file with tensors \['x'\]; load models with"):
        Generation.load(path, model, TOKENIZER)
    generation = going_on(model, 3)[0]
    generation.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="must be a complete file of Generation.save, got one that cannot be read"):
        Generation.load(path, model, TOKENIZER)
    path.write_bytes(whole)
    other = random_model(RWKVConfig(**(CONFIG.__dict__ | {"n_layer": 1})))
    with pytest.raises(
        ValueError, match=r"whose att_shift has shape \[1, 1, 32\], got \[2, 1, 32\]; load the model tha"
    ):
        Generation.load(path, other, TOKENIZER)
    other = random_model(RWKVConfig(**(CONFIG.__dict__ | {"vocab_size": 300})))
    with pytest.raises(ValueError, match="whose vocabulary has 300 ids, got 65536; load the model that"):
        Generation.load(path, other, TOKENIZER)
    with largest_file(1000), pytest.raises(OSError, match=f"Generation.save: {path} could not be written"):
        generation.save(path)
    assert path.read_bytes() == whole


def test_files_hold_biases_and_bans(model, tmp_path):
    options = dict(logit_bias={5: -float("inf"), 7: 2.5}, ban=[9], stop=["x"], min_p=0.01, temperature_first=True)
    generation = generate(model, TOKENIZER, "a", seed=1, **options)
    generation.save(tmp_path / "file")
    loaded = Generation.load(tmp_path / "file", model, TOKENIZER)
    assert json.dumps(loaded.options.as_dict()) == json.dumps(generation.options.as_dict())
    assert loaded.options.logit_bias == options["logit_bias"] and loaded.options.temperature_first is True


def test_unknown_attributes_are_attribute_errors(model):
    with pytest.raises(AttributeError, match="Generation has no attribute 'tokes'"):
        generate(model, TOKENIZER, "a").tokes  # noqa: B018
