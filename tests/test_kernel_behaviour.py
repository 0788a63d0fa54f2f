"""What the CUDA kernels promise beside small errors, in the emulator: main instance (Finch, bf16, N = 64)."""

import pytest
import torch
from emulator.build import PLAIN_MAIN
from emulator.ops import Emulator, EmulatorError
from kernel_cases import MAIN, REFERENCES, Case, complaints

from rwkv_ext import reference
from rwkv_ext.testing import assert_close_ratio, make_inputs, outputs_and_gradients

pytestmark = pytest.mark.cpu
BOTH = ("y", "state_out")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def emulator(kernel="chunk", **settings):
    return Emulator(PLAIN_MAIN, kernel=kernel, **settings)


def inputs_for(tokens, batch=1, heads=1, version="6.0", dtype=torch.bfloat16, parameter_dtype=None, **options):
    parameter_dtype = parameter_dtype or dtype
    return make_inputs(version, batch, tokens, heads, dtype=dtype, parameter_dtype=parameter_dtype, **options)


def same_bits(x, y):
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def names_of(launches):
    return [x.kernel.split("rwkv::")[1].split("<")[0].split("(")[0] for x in launches]


CUTS = [(1, 300, 0), (2, 300, 256), (3, 600, 256), (4, 500, 128), (5, 600, 128)]


@pytest.mark.parametrize("segments, tokens, segment_tokens", CUTS)
@pytest.mark.parametrize("version", ("6.0", "5.2"))
def test_any_number_of_segments_gives_the_result(version, segments, tokens, segment_tokens):
    instance = MAIN._replace(version=version)
    case = Case(instance, "mixed", tokens, "no", segment_tokens, True, BOTH, "contiguous")
    inputs = inputs_for(tokens, version=version, regime="mixed")
    run = emulator(segment_tokens=segment_tokens)
    actual = outputs_and_gradients(run.wkv6, inputs)
    assert -(-tokens // run.plan.segment_tokens) == segments
    assert ("wkv_summary_kernel" in names_of(run.launches)) == (segments > 1)
    exact = outputs_and_gradients(REFERENCES[version], inputs.double())
    assert not (wrong := complaints(case, inputs, actual, exact, exact)), "\n".join(wrong)


@pytest.mark.parametrize("kernel, dtype", [("chunk", torch.bfloat16), ("recurrent", torch.float32)])
@pytest.mark.parametrize("lengths", [None, [0, 130, 20, 0, 50]], ids=["rows", "packed"])
def test_the_order_of_threads_and_blocks_changes_no_bit(kernel, dtype, lengths):
    inputs = inputs_for(200, heads=2, dtype=dtype, lengths=lengths)
    orders = ("ascending", "descending", "random 1", "random 2")
    results = [
        outputs_and_gradients(emulator(kernel, segment_tokens=128, order=order).wkv6, inputs) for order in orders
    ]
    for order, result in zip(orders[1:], results[1:]):
        for name, x in result.items():
            assert same_bits(x, results[0][name]), f"{name} differs in order {order}"


@pytest.mark.parametrize("kernel, dtype", [("chunk", torch.bfloat16), ("recurrent", torch.float32)])
def test_saving_for_backward_changes_no_bit(kernel, dtype):
    inputs = inputs_for(200, dtype=dtype)
    saving, plain = (emulator(kernel).forward(*inputs, save=save) for save in (True, False))
    assert same_bits(saving[0], plain[0]) and same_bits(saving[1], plain[1])
    assert plain[2] is None


@pytest.mark.parametrize("version", ("6.0", "5.2"))
@pytest.mark.parametrize("cut", (16, 48, 128))
def test_cutting_at_a_multiple_of_16_changes_no_bit(cut, version):
    inputs = inputs_for(150, version=version, regime="mixed")
    run = emulator()
    y, state_out, _ = run.forward(*inputs)
    halves = [[x[:, part] if x.dim() == 4 else x for x in inputs[:5]] for part in (slice(None, cut), slice(cut, None))]
    first, between, _ = run.forward(*halves[0], inputs.state)
    second, last, _ = run.forward(*halves[1], between)
    assert same_bits(torch.cat([first, second], 1), y) and same_bits(last, state_out)


@pytest.mark.parametrize("tokens, kernel", [(1, "recurrent"), (31, "recurrent"), (32, "chunk"), (65, "chunk")])
def test_the_plan_takes_tensor_cores_from_32_tokens_on(tokens, kernel):
    inputs = inputs_for(tokens)
    run = emulator("auto")
    case = Case(MAIN, "typical", tokens, "no", 0, True, BOTH, "contiguous")
    actual = outputs_and_gradients(run.wkv6, inputs)
    assert run.plan.kernel == kernel
    exact = outputs_and_gradients(reference.wkv6, inputs.double())
    assert not (wrong := complaints(case, inputs, actual, exact, exact)), "\n".join(wrong)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 64), (torch.bfloat16, 48)])
def test_what_has_no_kernel_is_refused(dtype, size):
    with pytest.raises(EmulatorError, match="launch error 801"):
        emulator().forward(*make_inputs("6.0", 1, 40, 1, size, dtype=dtype, parameter_dtype=dtype))


@pytest.mark.parametrize("kernel, dtype", [("chunk", torch.bfloat16), ("recurrent", torch.float32)])
@pytest.mark.parametrize("name", ("r", "k", "v", "w", "u", "state"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite_does_not_get_lost(name, value, kernel, dtype):
    """It reaches every output that depends on it, and none of a 16-token chunk before."""
    inputs = inputs_for(40, dtype=dtype)
    inputs = inputs._replace(**{name: getattr(inputs, name).clone()})
    x, token = getattr(inputs, name), 21
    x[(0, token, 0, 7) if name in "rkvw" else (0,) * x.dim()] = value
    y, state_out, _ = emulator(kernel).forward(*inputs)
    exact, exact_state = reference.wkv6(*inputs)
    assert not (y.isfinite() & ~exact.isfinite()).any()
    assert torch.equal(state_out.isfinite(), exact_state.isfinite())
    if name in "rkvw":
        assert y[:, : token // 16 * 16].isfinite().all()
    if value == float("inf") and name == "w":  # legal: the decay is 0
        assert y.isfinite().all()


# ---- global memory ----


def test_memory_traffic_is_as_designed():
    """Bytes asked of global memory, per token-channel: forward 10 in bf16, + 1 for scores and + 2 for the state kept
    every 128 tokens when saving; backward 21. Those and nothing else, but for the states at the ends, u and du."""
    tokens, size, batch, heads = 512, 64, 1, 2
    inputs = inputs_for(tokens, heads=heads)
    channels = batch * tokens * heads * size
    state_bytes = 4 * batch * heads * size * size
    small = 4 * heads * size * 4  # u, du

    run = emulator()
    run.forward(*inputs, save=False)
    (forward,) = run.launches
    assert 0 <= forward.bytes_read - (8 * channels + state_bytes) <= small
    assert forward.bytes_written == 2 * channels + state_bytes

    y, state_out, saved = run.forward(*inputs)
    (saving,) = run.launches
    assert saving.bytes_read == forward.bytes_read
    assert saving.bytes_written - forward.bytes_written == 1 * channels + 2 * channels

    run.backward(y, state_out, *inputs[:5], saved)
    backward = run.launches[0]
    read = (10 + 1 + 2) * channels + state_bytes
    assert 0 <= backward.distinct_bytes_read - read <= small
    # Again, from the caches: k, v and w of the 64 tokens before half of the stages, a state for each half of the tokens
    # between two, and the scores by each of four warps.
    assert 0 <= backward.bytes_read - read - (3 + 2 + 3) * channels <= small
    assert 0 <= backward.bytes_written - (8 * channels + state_bytes) <= small


def test_eagle_reads_no_decay_per_token():
    run = emulator()
    run.forward(*inputs_for(512, version="5.2", state=False), save=False)
    channels = 512 * 64
    assert 0 <= run.launches[0].bytes_read - 6 * channels <= 4 * 64 * 4


# ---- one step ----


@pytest.mark.parametrize("version", ("6.0", "5.2"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_step_is_one_token_of_the_recurrence(dtype, version):
    inputs = inputs_for(1, batch=3, heads=2, version=version, dtype=dtype)
    rows = [x[:, 0] for x in inputs[:3]]
    w = inputs.w if version == "5.2" else inputs.w[:, 0]
    exact = REFERENCES[version](*inputs.double())
    plain = REFERENCES[version](*inputs)
    named = [dict(y=y[:, 0], state=state) for y, state in (exact, plain)]
    y, state = emulator("auto").step(*rows, w, inputs.u, inputs.state)
    assert_close_ratio(dict(y=y, state=state), *named)

    slots = torch.tensor([4, -1, 0])
    states = torch.randn(5, 2, 64, 64)
    states[slots[slots >= 0]] = inputs.state[slots >= 0]
    y, after = emulator("auto").step(*rows, w, inputs.u, states, slots)
    assert_close_ratio(dict(y=y[slots >= 0]), dict(y=exact[0][slots >= 0, 0]), dict(y=plain[0][slots >= 0, 0]))
    assert (y[1] == 0).all()
    assert same_bits(after[1:4], states[1:4])
    assert same_bits(after[4], state[0]) and same_bits(after[0], state[2])
