"""Penalties, bans and biases by hand, and whole texts against the `rwkv` package's own loop."""

import math
import os
from unittest import mock

import pytest
import torch
from model_cases import one_thread, random_model  # noqa: F401
from script_model import VOCAB, ScriptModel, bytewise

from rwkv_ext.generate import generate
from rwkv_ext.generation.penalties import Penalties, rwkv_exempt
from rwkv_ext.models import RWKVConfig
from rwkv_ext.tokenizer import WorldTokenizer

TOKENIZER = WorldTokenizer()


def lowered(tokens, presence=0.0, frequency=0.0, decay=1.0, exempt=(), logits=None):
    """What the penalties of a text of these tokens leave of logits 0."""
    penalties = Penalties(presence, frequency, decay, exempt, TOKENIZER)
    logits = torch.zeros(1, 300) if logits is None else logits
    penalties.start(logits)
    for token in tokens:
        penalties.count(torch.tensor([token]))
    return penalties.apply(logits)[0]


def test_penalties_lower_used_tokens():
    got = lowered([1, 2, 1, 1], presence=0.5, frequency=0.25)
    assert got[:4].tolist() == [0, -1.25, -0.75, 0] and not got[4:].any()
    assert lowered([1], presence=-0.5)[1] == 0.5


def test_counts_decay_and_the_newest_counts_whole_but_presence_stays():
    got = lowered([1, 2, 1, 3], presence=1.0, frequency=1.0, decay=0.5)
    assert got[1:4].tolist() == [-(1 + 0.125 + 0.5), -(1 + 0.25), -(1 + 1)]
    assert lowered([1, 2, 3], presence=1.0, frequency=1.0, decay=0.0)[1:4].tolist() == [-1, -1, -2]


def test_exempt_ids_have_no_penalty_and_those_of_the_package_keep_presence():
    assert lowered([1, 2, 2], presence=1.0, frequency=1.0, exempt=[2])[1:3].tolist() == [-2, 0]
    space = TOKENIZER.encode(" ")[0]
    assert lowered([space, space, 2], presence=1.0, frequency=1.0, exempt="rwkv")[[space, 2]].tolist() == [-1, -2]


def test_exempt_tokens_are_those_of_the_package(upstream):
    expected = []
    for token in range(1, 65530):
        text = upstream.idx2token[token].decode("utf-8", "replace")
        if text in " \t0123456789":
            expected.append(token)
    assert rwkv_exempt(TOKENIZER) == expected and len(expected) > 20


def test_replay_and_select_have_the_same_bits():
    tokens = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(0))
    options = (0.3, 0.7, 0.996, "rwkv", TOKENIZER)
    step_by_step, at_once = Penalties(*options), Penalties(*options)
    for penalties in (step_by_step, at_once):
        penalties.start(torch.zeros(3, 300))
    for column in tokens.T:
        step_by_step.count(column)
    for row in range(3):
        at_once.replay(row, tokens[row].tolist())
    logits = torch.randn(3, 300)
    assert torch.equal(step_by_step.apply(logits), at_once.apply(logits))
    at_once.select([2, 0])
    assert torch.equal(step_by_step.apply(logits)[[2, 0]], at_once.apply(logits[[2, 0]]))


class Flat(ScriptModel):
    """Prefers a, then b, then c, whatever came before."""

    def __init__(self):
        super().__init__([])

    def row_logits(self, row, position):
        logits = torch.full((VOCAB,), -100.0)
        logits[bytewise("abc")] = torch.tensor([3.0, 2.0, 1.0])
        return logits


def text(**options):
    return "".join(generate(Flat(), TOKENIZER, "aaa", **({"temperature": 0, "max_tokens": 6} | options)))


def test_penalties_count_only_sampled_tokens():
    assert text() == "aaaaaa"
    assert text(presence_penalty=1.5) == "abaaaa"
    assert text(frequency_penalty=0.75) == "aababc"  # 3; 2.25; b 2 > 1.5; 1.5; b 1.25 > 0.75; c 1
    assert text(frequency_penalty=1.5, penalty_decay=0.5) == "ababab"  # a 3; b 2 > 1.5; a 2.25; b 1.25 > 1.125; a; b
    assert text(frequency_penalty=1.5) == "abacba"
    assert text(frequency_penalty=9, penalty_exempt=bytewise("a")) == "aaaaaa"


def test_bans_and_biases():
    a, b, c = bytewise("abc")
    assert text(ban=[a]) == "bbbbbb" and text(ban=[a, b]) == "cccccc"
    assert text(logit_bias={c: 2.5}) == "cccccc" and text(logit_bias={a: -math.inf, b: -1.5}) == "cccccc"
    assert text(logit_bias={a: -1.5}, frequency_penalty=0.4) == "bbabac"
    assert text(ban=[0], logit_bias={0: 200}) == "aaaaaa"  # a stop token is banned like any other
    with pytest.raises(ValueError, match="or every token is banned"):
        text(ban=range(VOCAB))


@pytest.fixture(scope="module")
def models(upstream, tmp_path_factory):
    """A Finch with the whole vocabulary, here and as the package's pipeline."""
    os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0", RWKV_V7_ON="0")
    from rwkv.model import RWKV
    from rwkv.utils import PIPELINE

    model = random_model(RWKVConfig(version="6.0", vocab_size=VOCAB, n_layer=2, n_embd=64, mix_rank=32, decay_rank=64))
    with torch.no_grad():
        model.head.weight.mul_(0.3)  # logits within the reach of penalties
    path = tmp_path_factory.mktemp("penalties") / "model.pth"
    model.save_pretrained(path, torch.float32)
    pipeline = object.__new__(PIPELINE)  # its __init__ would read the vocabulary once more
    with mock.patch("gc.collect"):  # the package calls it after every tensor
        pipeline.model, pipeline.tokenizer = RWKV(str(path), "cpu fp32", verbose=False), upstream
    return model, pipeline


@pytest.mark.parametrize("presence, frequency, decay", [(0, 0, 0.996), (0.2, 0.2, 0.996), (1.0, 3.0, 0.9)])
def test_greedy_texts_equal_those_of_the_package(models, monkeypatch, presence, frequency, decay):
    """Prompt, penalties in their order, exemptions, decay, ban, text: all but the draw, which is numpy's there."""
    from rwkv.utils import PIPELINE_ARGS

    model, pipeline = models
    digits = rwkv_exempt(TOKENIZER)
    bias = {token: 6.0 for token in (*digits, *bytewise("abcdef \n"))}  # so that exemptions and repetitions matter
    forward = pipeline.model.forward

    def biased(tokens, state):
        logits, state = forward(tokens, state)
        logits[list(bias)] += 6.0
        return logits, state

    monkeypatch.setattr(pipeline.model, "forward", biased)
    arguments = dict(alpha_presence=presence, alpha_frequency=frequency, alpha_decay=decay)
    args = PIPELINE_ARGS(temperature=0, **arguments, token_ban=[0, 49, *range(65530, VOCAB)])
    expected = pipeline.generate("12 abc", token_count=60, args=args)
    generation = generate(
        model, TOKENIZER, "12 abc", 60, temperature=0, presence_penalty=presence, frequency_penalty=frequency,
        penalty_decay=decay, penalty_exempt="rwkv", ban=[0, 49], logit_bias=bias, stop_tokens=[],
    )  # fmt: skip
    assert "".join(generation) == expected
    if frequency > 1:
        assert len(set(generation.tokens)) > 20 and set(generation.tokens) & set(digits)
