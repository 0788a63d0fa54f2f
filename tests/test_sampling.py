"""Sampling rules on small distributions written out by hand, and the draw against its distribution."""

import math

import pytest
import torch

from rwkv_ext.sampling import check_options, penalize, probabilities, sample

P = [0.1, 0.4, 0.05, 0.25, 0.2]  # ranking: 1, 3, 4, 0, 2


def logits(p=P):
    return torch.tensor(p, dtype=torch.float64).log()


def assert_distribution(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype))


def kept(**options):
    return probabilities(logits(), **options).nonzero().flatten().tolist()


def test_defaults_are_the_softmax():
    assert_distribution(probabilities(logits() + 7), P)
    assert probabilities(logits().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "top_p, expected",
    [(0, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.96, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, expected):
    assert kept(top_p=top_p) == expected


@pytest.mark.parametrize("top_k, expected", [(1, [1]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_top_k(top_k, expected):
    assert kept(top_k=top_k) == expected


def test_a_token_must_be_chosen_by_top_p_and_top_k_of_the_same_ranking():
    assert kept(top_p=0.9, top_k=2) == [1, 3]
    assert kept(top_p=0.5, top_k=4) == [1, 3]


def test_survivors_keep_their_proportions_and_temperature_comes_last():
    assert_distribution(probabilities(logits(), top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0])
    # at temperature 2 first, the nucleus of 0.6 would hold three tokens
    a, b = 0.4**0.5, 0.25**0.5
    assert_distribution(probabilities(logits(), temperature=2, top_p=0.6), [0, a / (a + b), 0, b / (a + b), 0])


def test_equal_tokens_stay_together():
    equal = logits([0.2, 0.3, 0.2, 0.1, 0.2])
    assert probabilities(equal, top_p=0.5).nonzero().flatten().tolist() == [0, 1, 2, 4]
    assert probabilities(equal, top_k=2).nonzero().flatten().tolist() == [0, 1, 2, 4]
    assert probabilities(equal, top_p=0).nonzero().flatten().tolist() == [1]


def test_top_p_one_is_off_for_a_distribution_whose_rounded_sum_misses_one():
    p = torch.randn(65536, generator=torch.Generator().manual_seed(0)).softmax(0)
    assert (probabilities(p.log(), top_p=1.0) > 0).all()
    assert (probabilities(p.log(), top_p=7.0) > 0).all()


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.9999])
def test_nucleus_of_a_large_vocabulary_equals_a_full_sort(top_p):
    x = 3 * torch.randn(65536, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p, order = x.softmax(0).sort(descending=True)
    size = int((p.cumsum(0) < top_p).sum()) + 1
    expected = torch.zeros(65536, dtype=torch.float64)
    expected[order[:size]] = p[:size] / p[:size].sum()
    torch.testing.assert_close(probabilities(x, top_p=top_p), expected)


def test_temperature_zero_takes_the_lowest_of_the_best():
    assert_distribution(probabilities(logits([0.2, 0.3, 0.3, 0.2]), temperature=0), [0, 1, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-30])
def test_tiny_temperature_is_greedy_without_nan(temperature, dtype):
    assert_distribution(probabilities(logits().to(dtype), temperature=temperature), [0, 1, 0, 0, 0])


def test_banned_tokens_are_never_drawn():
    banned = logits()
    banned[1] = -math.inf
    assert_distribution(probabilities(banned), [0.1 / 0.6, 0, 0.05 / 0.6, 0.25 / 0.6, 0.2 / 0.6])
    assert probabilities(banned, temperature=0).argmax() == 3


def test_penalties_lower_used_tokens():
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    got = penalize(x, torch.tensor([0.0, 1.0, 3.0]), presence_penalty=0.5, frequency_penalty=0.25)
    assert got.dtype == torch.float32 and got.tolist() == [1.0, 1.25, 1.75]
    assert penalize(x, torch.tensor([0.0, 1.0, 3.0]), -0.5, 0.0).tolist() == [1.0, 2.5, 3.5]


def test_draws_follow_the_distribution():
    rows = 20000
    options = dict(temperature=1.5, top_p=0.9)
    drawn = sample(logits().expand(rows, -1), **options, generator=torch.Generator().manual_seed(0))
    expected = probabilities(logits(), **options)
    frequencies = drawn.bincount(minlength=5) / rows
    assert drawn.shape == (rows,) and drawn.dtype == torch.int64
    assert frequencies[2] == expected[2] == 0
    assert (frequencies - expected).abs().max() < 4 * 0.5 / math.sqrt(rows)


def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch):
    p = logits([0, 0.5, 0.5, 0])
    for uniform, token in ((0.0, 1), (1 - 2**-53, 2), (0.5 - 2**-54, 1), (0.5, 2)):
        number = torch.tensor([uniform], dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *shape, number=number, **_: number)
        assert sample(p).item() == token


def test_seed_repeats_and_rows_are_independent():
    def draw(seed):
        return sample(logits().expand(3, 50, -1), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator belongs to the caller


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    x = logits()
    x[3] = bad
    message = rf"logits must be finite, or -inf where banned, got \[{bad}\] as the largest"
    with pytest.raises(ValueError, match=message):
        sample(x)


def test_banning_everything_is_refused():
    with pytest.raises(ValueError, match=r"got \[-inf\] as the largest; .* or every token is banned"):
        sample(torch.full((4,), -math.inf))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("temperature", -0.1, "temperature must be >= 0 and finite, got -0.1; 0 takes the best token"),
        ("temperature", math.inf, "temperature must be >= 0 and finite, got inf"),
        ("temperature", math.nan, "temperature must be >= 0 and finite, got nan"),
        ("top_p", -0.5, "top_p must be >= 0, got -0.5; 1 turns it off"),
        ("top_p", math.nan, "top_p must be >= 0, got nan"),
        ("top_k", -1, "top_k must be a whole number >= 0, got -1; 0 turns it off"),
        ("top_k", 1.5, "top_k must be a whole number >= 0, got 1.5"),
        ("top_k", math.inf, "top_k must be a whole number >= 0, got inf"),
        ("presence_penalty", math.inf, "presence_penalty must be finite, got inf; 0 turns it off"),
        ("frequency_penalty", math.nan, "frequency_penalty must be finite, got nan"),
    ],
)
def test_errors(option, value, message):
    with pytest.raises(ValueError, match="sampling: " + message):
        check_options(**{option: value})
    if option in ("temperature", "top_p", "top_k"):
        with pytest.raises(ValueError, match=message):
            sample(logits(), **{option: value})
