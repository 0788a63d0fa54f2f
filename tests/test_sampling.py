"""Sampling rules on small distributions written out by hand, and the draw against its distribution."""

import math

import numpy as np
import pytest
import torch

from rwkv_ext.sampling import check_options, draw_key, pick, probabilities, sample

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


def test_wide_nuclei_of_some_rows_and_logits_with_a_graph():
    """Rows that the first guess is enough for and rows that need all tokens, side by side, in any leading shape."""
    scales = torch.tensor([8.0, 0.1, 2.0, 0.0]).view(2, 2, 1)
    x = (scales * torch.randn(2, 2, 5000, generator=torch.Generator().manual_seed(6))).requires_grad_()
    for options in (dict(top_p=0.8), dict(typical_p=0.8)):
        together = probabilities(x, **options)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert torch.equal(together[i, j], probabilities(x[i, j].detach(), **options))
        sizes = (together > 0).sum(-1)
        assert sizes[0, 0] < 256 < sizes[0, 1] and sizes[1, 1] == 5000  # all tokens are equal there
    assert sample(x, top_p=0.8).shape == (2, 2)


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


@pytest.mark.parametrize("min_p, expected", [(0, [0, 1, 2, 3, 4]), (0.2, [0, 1, 3, 4]), (0.51, [1, 3]), (1, [1])])
def test_min_p_keeps_what_is_nearly_as_probable_as_the_best(min_p, expected):
    assert kept(min_p=min_p) == expected


@pytest.mark.parametrize(
    "typical_p, expected", [(0.1, [3]), (0.3, [3, 4]), (0.5, [1, 3, 4]), (0.9, [0, 1, 3, 4]), (1, [0, 1, 2, 3, 4])]
)
def test_typical_p_keeps_what_is_about_as_surprising_as_the_entropy(typical_p, expected):
    # The entropy is 1.415; the surprises are 2.303, 0.916, 2.996, 1.386, 1.609: nearest are 3, 4, 1, 0, 2.
    assert kept(typical_p=typical_p) == expected


def test_typical_p_chooses_among_the_survivors_of_the_others():
    # Alone, 0.1 would choose token 3 (see above); of the two best, it is not the typical one any more.
    assert kept(top_k=1, typical_p=0.1) == [1]
    assert kept(top_p=0.6, min_p=0.1, typical_p=0.5) == [1]  # of 0.615, 0.385: entropy 0.666, surprises 0.486, 0.955


def hugging_face(logits, temperature, top_k, top_p, min_p, typical_p):
    """Hugging Face's warpers in their order, as their documentation tells them, in numpy's fp64."""
    x = logits.double().numpy() / temperature
    if top_k:
        x = np.where(x < np.sort(x)[-top_k], -np.inf, x)
    p = np.exp(x - np.logaddexp.reduce(x))
    order = np.argsort(p)  # ascending: out goes the tail whose sum is at most 1 - top_p, but never the best
    tail = np.cumsum(p[order]) <= 1 - top_p
    tail[-1] = False
    x[order[tail]] = -np.inf
    p = np.exp(x - np.logaddexp.reduce(x))
    x[p < min_p * p.max()] = -np.inf
    log_p = x - np.logaddexp.reduce(x)
    entropy = -(np.exp(log_p) * np.where(np.isinf(log_p), 0, log_p)).sum()
    distance = np.abs(-log_p - entropy)
    order = np.argsort(distance)
    size = (np.cumsum(np.exp(log_p[order])) < typical_p).sum()
    x[distance > distance[order[min(size, len(x) - 1)]]] = -np.inf
    return torch.from_numpy(np.exp(x - np.logaddexp.reduce(x)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    "options",  # top_k, top_p, min_p, typical_p
    [
        (0, 1.0, 0.0, 1.0),
        (40, 1.0, 0.0, 1.0),
        (0, 0.8, 0.0, 1.0),
        (0, 1.0, 0.05, 1.0),
        (0, 1.0, 0.0, 0.7),
        (50, 0.9, 0.02, 0.8),
    ],
    ids=["none", "top_k", "top_p", "min_p", "typical_p", "all"],
)
def test_temperature_first_is_the_order_of_hugging_face(options, temperature):
    x = 2 * torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    top_k, top_p, min_p, typical_p = options
    got = probabilities(x, temperature, top_p, top_k, min_p, typical_p, temperature_first=True)
    torch.testing.assert_close(got, hugging_face(x, temperature, *options))
    if top_p < 1 and temperature != 1:
        last = probabilities(x, temperature, top_p, top_k, min_p, typical_p)
        assert (got > 0).sum() != (last > 0).sum()  # the order matters here


@pytest.fixture(scope="module")
def package():
    from rwkv.utils import PIPELINE

    return object.__new__(PIPELINE)  # its __init__ would read the vocabulary; sample_logits needs nothing of it


@pytest.mark.parametrize(
    "temperature, top_p, top_k",
    [(1.0, 0.85, 0), (0.7, 0.5, 0), (2.0, 0.3, 0), (1.0, 0.9, 20), (1.3, 0.999, 3), (0.0, 0.85, 0), (1.0, 0.0, 0)],
)
def test_probabilities_are_those_of_the_rwkv_package(package, monkeypatch, temperature, top_p, top_k):
    """The distribution that its sample_logits hands to numpy; top_p = 1, where it goes wrong, is the difference."""
    seen = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: seen.append(torch.from_numpy(p)) or 0)
    for seed in range(3):
        x = 3 * torch.randn(65536, generator=torch.Generator().manual_seed(seed))
        package.sample_logits(x.clone(), temperature, top_p, top_k)
        torch.testing.assert_close(probabilities(x, temperature, top_p, top_k), seen.pop(), rtol=1e-4, atol=1e-9)


def test_top_p_one_goes_wrong_in_the_rwkv_package(package, monkeypatch):
    """If this fails, the package has been mended and the documentation may say so."""
    seen = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: seen.append((p > 0).sum()) or 0)
    for seed in range(8):
        package.sample_logits(torch.randn(65536, generator=torch.Generator().manual_seed(seed)), top_p=1.0)
    assert 1 in seen


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_have_the_bits_they_have_alone(threads):
    torch.set_num_threads(threads)
    x = 3 * torch.randn(5, 65536, generator=torch.Generator().manual_seed(3))
    keys = [draw_key(seed, 0) for seed in range(5)]
    for options in (dict(top_p=0.9), dict(top_k=50, min_p=0.01, temperature=0.8), dict(typical_p=0.6, top_p=0.97)):
        for first in (False, True):
            together = probabilities(x, **options, temperature_first=first)
            for row in range(5):
                torch.set_num_threads(3 - threads)
                alone = probabilities(x[row : row + 1].clone(), **options, temperature_first=first)
                torch.set_num_threads(threads)
                assert torch.equal(together[row], alone[0])
            picked = [pick(together[row : row + 1], [keys[row]]).item() for row in range(5)]
            assert pick(together, keys).tolist() == picked


def test_keys_depend_on_seed_and_position_alone():
    keys = {draw_key(seed, position) for seed in (0, 1, -1, 2**64 - 1) for position in range(500)}
    assert len(keys) == 2000 and max(keys) >= 2**63 and min(keys) < 2**55
    assert draw_key(1, 2) == 0xA77FFFB21E1F2C3A and pick(torch.ones(1, 65536), [draw_key(1, 2)]).item() == 27118
    # for ever: the text of a seed must not change


def test_draws_of_consecutive_positions_and_seeds_follow_the_distribution():
    """chi square over 64 equal tokens, and over pairs of draws."""
    equal = torch.ones(1, 64).expand(20000, -1)
    for keys in ([draw_key(0, i) for i in range(20000)], [draw_key(i, 0) for i in range(20000)]):
        drawn = pick(equal, keys)
        counts = drawn.bincount(minlength=64).double()
        assert ((counts - 20000 / 64) ** 2 / (20000 / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5
        pairs = (drawn[:-1] // 8 * 8 + drawn[1:] // 8).bincount(minlength=64).double()
        assert ((pairs - 20000 / 64) ** 2 / (20000 / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5


def test_rounding_rarely_changes_a_draw():
    """Logits off by a ten-thousandth: hardly a draw changes, where a look-up in cumulative sums changes every third."""
    x = 2 * torch.randn(40, 65536, generator=torch.Generator().manual_seed(4))
    other = x * (1 + 1e-4 * torch.randn(65536, generator=torch.Generator().manual_seed(5)))
    keys = [draw_key(0, i) for i in range(40)]
    p, q = x.softmax(-1), other.softmax(-1)
    assert (pick(p, keys) != pick(q, keys)).sum() <= 1
    number = torch.rand(40, 1, dtype=torch.float64)
    looked_up = [torch.searchsorted(z.cumsum(-1, dtype=torch.float64), number) for z in (p, q)]
    assert (looked_up[0] != looked_up[1]).sum() > 5


def test_draws_follow_the_distribution():
    rows = 20000
    options = dict(temperature=1.5, top_p=0.9)
    drawn = sample(logits().expand(rows, -1), **options, generator=torch.Generator().manual_seed(0))
    expected = probabilities(logits(), **options)
    frequencies = drawn.bincount(minlength=5) / rows
    assert drawn.shape == (rows,) and drawn.dtype == torch.int64
    assert frequencies[2] == expected[2] == 0
    assert (frequencies - expected).abs().max() < 4 * 0.5 / math.sqrt(rows)


def test_impossible_tokens_are_never_drawn():
    p = torch.tensor([[0, 0.5, 0.5, 0], [0, 0, 0, 1e-30]])
    for key in range(200):
        drawn = pick(p, [key, key]).tolist()
        assert drawn[0] in (1, 2) and drawn[1] == 3


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
        ("min_p", -0.1, "min_p must be from 0 to 1, got -0.1; 0 turns it off"),
        ("min_p", 1.5, "min_p must be from 0 to 1, got 1.5"),
        ("typical_p", 0, "typical_p must be > 0, got 0; 1 turns it off"),
        ("typical_p", math.nan, "typical_p must be > 0, got nan"),
    ],
)
def test_errors(option, value, message):
    with pytest.raises(ValueError, match="sampling: " + message):
        check_options(**{option: value})
    with pytest.raises(ValueError, match=message):
        sample(logits(), **{option: value})
