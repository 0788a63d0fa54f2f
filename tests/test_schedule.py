"""The learning-rate curve and the run length by time."""

import math

import pytest

from train.schedule import learning_rate, steps_that_fit


def rate(step, total_steps=110, step_tokens=100, lr=4e-4, lr_final=2e-5, warmup_steps=10, warmup_floor=0.01):
    return learning_rate(
        step, step * step_tokens, total_steps * step_tokens, step_tokens, lr, lr_final, warmup_steps, warmup_floor
    )


def test_schedule_warmup():
    assert rate(0) == pytest.approx(4e-4 * 0.01)
    assert rate(5) == pytest.approx(4e-4 * (0.01 + 0.99 * 0.5))
    assert rate(10) == pytest.approx(4e-4)
    assert rate(0, warmup_floor=0.2) == pytest.approx(4e-4 * 0.2)
    assert rate(5, warmup_floor=0.2) == pytest.approx(4e-4 * 0.6)
    assert rate(0, warmup_steps=0) == pytest.approx(4e-4)


def test_schedule_cosine():
    assert rate(60) == pytest.approx((4e-4 + 2e-5) / 2)
    assert rate(35) == pytest.approx(2e-5 + (4e-4 - 2e-5) * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(110) == pytest.approx(2e-5) and rate(500) == pytest.approx(2e-5)
    curve = [rate(step) for step in range(10, 111)]
    assert all(a > b for a, b in zip(curve, curve[1:], strict=False))


def test_schedule_depends_on_tokens_not_on_batch():
    """Twice the batch, half the steps: the same rate at the same token, warm-up being over."""
    small = learning_rate(40, 4000, 20000, 100, 1e-3, 1e-4, 0, 0.01)
    large = learning_rate(20, 4000, 20000, 200, 1e-3, 1e-4, 0, 0.01)
    assert small == large


def test_schedule_unknown_length_and_zero_final():
    assert learning_rate(50, 5000, 0, 100, 1e-3, 1e-4, 10, 0.01) == 1e-3
    assert rate(110, lr_final=0.0) == pytest.approx(0.0, abs=1e-12)
    assert rate(3, total_steps=5) > 0  # a run shorter than its warm-up


def test_schedule_steps_that_fit():
    assert steps_that_fit(100.0, 1.0, 0.0, 0, 0.0) == 100
    assert steps_that_fit(100.0, 1.0, 10.0, 10, 0.0) == 45  # each step pays a tenth of a validation
    assert steps_that_fit(100.0, 1.0, 0.0, 0, 3.0) == 97
    assert steps_that_fit(-5.0, 1.0, 0.0, 0, 0.0) == 0
