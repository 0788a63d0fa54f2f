"""rwkv_ext.testing: the judge by decay, and the example of docs/testing.md as it is printed there."""

import math
import re
from pathlib import Path

import pytest
import torch
from model_cases import one_thread  # noqa: F401
from torch.autograd.gradcheck import GradcheckError

from rwkv_ext import reference
from rwkv_ext.testing import (
    DECAY_BINS,
    assert_close_ratio,
    decay_bins,
    error_ratio,
    gradcheck_wkv,
    make_inputs,
    outputs_and_gradients,
)

PAGE = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL)
CODE, USE = (text for language, text in BLOCKS if language)
MESSAGE, TABLE = (text for language, text in BLOCKS if not language)


@pytest.fixture(scope="module")
def example():
    names = {}
    exec(CODE, names)
    return names


def test_the_right_kernel_of_the_page_passes(example):
    example["check"](lambda *x: example["wkv6_loop"](*x))
    exec(USE, example)


def test_the_wrong_kernel_of_the_page_fails_as_the_page_says(example):
    with pytest.raises(AssertionError) as caught:
        example["check"](example["my_kernel"])
    message = str(caught.value)

    def same(text, printed):
        """Compare lines, errors apart: their digits depend on the machine."""
        return re.sub(r"\d\.\d+e[+-]\d+", "#", text) == re.sub(r"\d\.\d+e[+-]\d+", "#", printed)

    first, second = MESSAGE.splitlines()
    assert message.splitlines()[0] == first and same(message.splitlines()[1], second)
    got, printed = message[message.index("error ratio by decay") :].splitlines(), TABLE.splitlines()
    assert len(got) == len(printed) and all(map(same, got, printed)), message
    for ours, theirs in zip(got[2:], printed[2:]):
        numbers, expected = (re.findall(r"\d\.\d+e[+-]\d+", line.split("]")[1]) for line in (ours, theirs))
        assert [float(x) for x in numbers] == pytest.approx([float(x) for x in expected], rel=0.05)


def test_gradcheck_sees_wrong_gradients_and_not_a_wrong_function(example):
    inputs = make_inputs("6.0", 1, 3, 2, 2, regime="mixed", dtype=torch.float64)
    gradcheck_wkv(example["my_kernel"], inputs)
    with pytest.raises(GradcheckError):
        gradcheck_wkv(lambda r, k, v, w, *others: example["wkv6_loop"](r, k, v, w.detach() + 0 * w, *others), inputs)


def test_decay_bins_hold_every_element_once():
    log_decay = torch.tensor([0.0, -0.5, -1, -1.5, -3, -5, -6, -11, -12, -39, -40, -41, -math.inf], dtype=torch.float64)
    bins = dict(decay_bins(torch.log(-log_decay)))
    assert sum(here.int() for here in bins.values()).eq(1).all() and len(bins) == len(DECAY_BINS)
    assert [here.sum().item() for here in bins.values()] == [2, 2, 2, 2, 2, 3]
    assert list(bins) == ["(0.37, 1]", "(0.05, 0.37]", "(0.0025, 0.05]", "(6.1e-06, 0.0025]", "(4.2e-18, 6.1e-06]",
                          "(0, 4.2e-18]"]  # fmt: skip
    assert [label for label, _ in decay_bins(torch.tensor([-math.inf, math.inf]))] == ["(0.37, 1]", "(0, 4.2e-18]"]
    assert list(decay_bins(torch.zeros(0))) == []


@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_an_error_that_a_ratio_over_all_is_blind_to_is_found_in_its_bin(version):
    """dw where the decay is strong is so small that losing all of it leaves the ratio over all elements as it was."""
    op = {"5.2": reference.wkv5, "6.0": reference.wkv6}[version]
    inputs = make_inputs(version, 1, 20, 64, 64, regime="mixed")
    exact = outputs_and_gradients(op, inputs.double())
    actual = outputs_and_gradients(op, inputs)
    assert_close_ratio(actual, exact, actual, inputs=inputs)
    strong = torch.exp(-torch.exp(inputs.w.double())) < 4.2e-18
    assert strong.sum() > 64
    wrong = actual | {"dw": actual["dw"].masked_fill(strong, 0)}
    assert error_ratio(wrong["dw"], exact["dw"]) < 1e-6
    assert_close_ratio(wrong, exact, actual)
    with pytest.raises(AssertionError, match=r"^too inexact: dw where the decay is in \(0, 4.2e-18\]\n") as caught:
        assert_close_ratio(wrong, exact, actual, inputs=inputs)
    columns = {"5.2": "dr dk dw du dstate state_out", "6.0": "dr dk dw"}[version].split()
    assert set(str(caught.value).split("elements")[1].splitlines()[0].split()) == set(columns)
    assert str(caught.value).count("!") == 2  # the legend's and one


def test_a_bin_of_few_elements_is_told_and_not_judged():
    inputs = make_inputs("6.0", 1, 10, 2, 16, regime="near_one")
    inputs.w[0, 0, 0, :10] = 2.0
    exact = outputs_and_gradients(reference.wkv6, inputs.double())
    wrong = outputs_and_gradients(reference.wkv6, inputs)
    wrong["dw"][0, 0, 0, :10] *= 1.5
    assert_close_ratio({"dk": wrong["dk"]}, {"dk": exact["dk"]}, inputs=inputs, floor=1e-5)
    with pytest.raises(AssertionError) as caught:
        assert_close_ratio(wrong, exact, inputs=inputs, floor=1e-12)
    row = next(line for line in str(caught.value).splitlines() if line.startswith("(6.1e-06, 0.0025]"))
    assert row.split()[2] == "10" and row.endswith("5.0e-01")
