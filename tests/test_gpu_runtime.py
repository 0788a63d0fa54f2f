"""How the ops behave as CUDA programs: streams, graphs, compilation, autocast, other devices, memory, messages."""

import re

import pytest
import torch
from gpu_tools import DEVICE, check, make_inputs, needs_kernels, run, same_bits
from wkv_cases import OPS

from rwkv_ext import ops
from rwkv_ext.testing import WkvInputs, assert_close_ratio, outputs_and_gradients

pytestmark = needs_kernels
VERSIONS = pytest.mark.parametrize("version", OPS)
STEPS = {"5.2": ops.wkv5_step, "6.0": ops.wkv6_step}
CASES = {  # every kind of launch: one segment, several, packed, the kernel for short sequences, other dtypes
    "rows": dict(batch=2, tokens=200, heads=3),
    "segments": dict(batch=1, tokens=2300, heads=1),
    "packed": dict(heads=2, lengths=[700, 0, 33, 1400]),
    "short": dict(batch=2, tokens=9, heads=2),
    "fp32": dict(batch=2, tokens=140, heads=2, dtype=torch.float32),
    "fp64": dict(batch=2, tokens=40, heads=2, dtype=torch.float64),
}
CASE = pytest.mark.parametrize("case", CASES)


def token_of(inputs):
    """r, k, v, w, u, state of the first token."""
    return [*(x[:, 0] if x.dim() == 4 else x for x in inputs[:4]), inputs.u, inputs.state]


def leaves_of(inputs):
    return [x if x is None else x.clone().requires_grad_(i < 6) for i, x in enumerate(inputs)]


@CASE
def test_gpu_runtime_waits_for_nothing(case):
    """Neither forward nor backward nor step waits for the device."""
    inputs = make_inputs("6.0", **CASES[case])
    leaves = leaves_of(inputs)
    ops.wkv6(*leaves)  # the first call may load the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, state = ops.wkv6(*leaves)
        torch.autograd.grad((y, state), leaves[:6], (y, state))
        if inputs.cu_seqlens is None:
            ops.wkv6_step(*(x.detach() for x in token_of(inputs)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CASE
def test_gpu_runtime_graph(case):
    """Forward and backward in one CUDA graph; a replay reads whatever its inputs hold then, cu_seqlens too."""
    first, second = (make_inputs("6.0", **CASES[case], seed=seed) for seed in (0, 1))
    leaves = leaves_of(first)

    def step():
        y, state = ops.wkv6(*leaves)
        return y, state, *torch.autograd.grad((y, state), leaves[:6], (y, state))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    if case == "packed":
        second = second._replace(cu_seqlens=torch.tensor([0, 0, 17, 2000, 2133], device=DEVICE))
    for inputs in (second, first, second):
        with torch.no_grad():
            for leaf, x in zip(leaves, inputs, strict=True):
                if x is not None:
                    leaf.copy_(x)
        graph.replay()
        replayed = [x.clone() for x in results]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@VERSIONS
def test_gpu_runtime_decoding_graph(version):
    """Steps replayed one after another update the state as steps run by themselves do."""
    inputs = make_inputs(version, 4, 1, 2, state=True)
    token = token_of(inputs)
    state, slots = torch.randn(6, 2, 64, 64, device=DEVICE), torch.tensor([5, -1, 0, 2], device=DEVICE)
    expected = state.clone()
    with torch.no_grad():
        STEPS[version](*token[:5], state.clone(), slots)
        graph = torch.cuda.CUDAGraph()
        kept = state.clone()
        with torch.cuda.graph(graph):
            y = STEPS[version](*token[:5], state, slots)
        state.copy_(kept)
        for _ in range(5):
            graph.replay()
            expected_y = STEPS[version](*token[:5], expected, slots)
            assert torch.equal(y, expected_y) and torch.equal(state, expected)


@CASE
def test_gpu_runtime_side_stream(case):
    """On another stream, behind work that is still running there: the kernels go to the current stream."""
    inputs = make_inputs("6.0", **CASES[case])
    expected = run("6.0", inputs)
    leaves = [None if x is None else torch.zeros_like(x).requires_grad_(i < 6) for i, x in enumerate(inputs)]
    if inputs.cu_seqlens is not None:
        leaves[6] = inputs.cu_seqlens
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: what runs elsewhere would see zeros
        with torch.no_grad():
            for leaf, x in zip(leaves[:6], inputs[:6], strict=True):
                leaf.copy_(x, non_blocking=True)
        y, state = ops.wkv6(*leaves)
    stream.synchronize()
    assert torch.equal(y, expected["y"]) and torch.equal(state, expected["state_out"])


def test_gpu_runtime_two_streams_at_once():
    """Two calls at the same time share no scratch memory."""
    cases = [make_inputs("6.0", 1, 3000, 2, seed=seed) for seed in (0, 1)]
    expected = [run("6.0", inputs) for inputs in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(run("6.0", cases[i]))
    torch.cuda.synchronize()
    assert all(same_bits(x, expected[i]) for i in (0, 1) for x in results[i])


def test_gpu_runtime_second_device():
    """Tensors on cuda:1 while cuda:0 is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    inputs = make_inputs("6.0", 2, 200, 2)
    other = type(inputs)(*(None if x is None else x.to("cuda:1") for x in inputs))
    assert torch.cuda.current_device() == 0
    here, there = run("6.0", inputs), run("6.0", other)
    assert all(x.device.index == 1 and torch.equal(x.cpu(), here[name].cpu()) for name, x in there.items())
    text = "k must be on r's device cuda:0, got cuda:1; move it with .to(r.device)"
    with pytest.raises(ValueError, match=re.escape(text)):
        ops.wkv6(*inputs._replace(k=other.k))


@CASE
def test_gpu_runtime_compile(case):
    """torch.compile(fullgraph=True) with the default backend, among ordinary operations; gradients as in eager mode."""
    inputs = make_inputs("6.0", **CASES[case])

    def surrounded(r, k, v, w, u, state, cu_seqlens):
        y, last = ops.wkv6(r * 2, k, v.tanh(), w, u, state, cu_seqlens)
        return y * y.shape[1] + 1, last * 0.5

    torch._dynamo.reset()
    actual = outputs_and_gradients(torch.compile(surrounded, fullgraph=True), inputs)
    expected = outputs_and_gradients(surrounded, inputs)
    assert_close_ratio(actual, expected, floor=2 * torch.finfo(inputs.r.dtype).eps)  # tanh is fused otherwise
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@VERSIONS
def test_gpu_runtime_autocast(version, dtype):
    """fp32 tensors under autocast run on tensor cores; w, u, state and every gradient stay fp32."""
    inputs = make_inputs(version, 2, 150, 2, dtype=torch.float32)
    halves = inputs._replace(**{name: getattr(inputs, name).to(dtype) for name in "rkv"})

    def under_autocast(*arguments):
        with torch.autocast(DEVICE.type, dtype):
            return OPS[version](*arguments)

    actual, expected = outputs_and_gradients(under_autocast, inputs), run(version, halves)
    for name, x in expected.items():
        assert torch.equal(actual[name].to(x.dtype), x), name
    assert actual["y"].dtype == dtype and all(actual[f"d{name}"].dtype == torch.float32 for name in ("r", "w", "state"))


@VERSIONS
def test_gpu_runtime_zero_sizes(version):
    for batch, tokens, heads in ((0, 5, 2), (2, 0, 2), (2, 5, 0), (0, 0, 0)):
        for state in (True, False):
            check(version, make_inputs(version, batch, tokens, heads, state=state))


def test_gpu_runtime_memory():
    """Forward without gradients allocates its outputs; forward and backward what they save and return, little more.

    With so many heads nothing is cut into segments, which would need memory for their states.
    """
    r, k, v = (torch.randn(8, 2048, 64, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    state = torch.randn(8, 64, 64, 64, device=DEVICE)
    inputs = WkvInputs(r, k, v, r.float() - 2, torch.randn(64, 64, device=DEVICE), state, None)
    one, state = r.nbytes, state.nbytes
    torch.utils.deterministic.fill_uninitialized_memory = False

    def peak(function):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    with torch.no_grad():
        assert peak(lambda: ops.wkv6(*inputs)) <= 1.02 * (one + state) + (1 << 20)
    leaves = leaves_of(inputs)
    cotangents = [torch.randn_like(inputs.r), torch.randn_like(inputs.state)]

    def train():
        y, last = ops.wkv6(*leaves)
        torch.autograd.grad((y, last), leaves[:6], cotangents)

    # y, dr, dk, dv: one each; dw fp32: two; scores (16 fp32 per 64 channels) half; a state per 128 tokens: one
    saved_and_returned = 7.5 * one + 3 * state
    assert peak(train) <= 1.1 * saved_and_returned + (1 << 20)


def test_gpu_runtime_out_of_memory_is_torchs_own():
    """Torch's type, with the sizes from torch 2.13 on; and the op works again afterwards."""
    inputs = make_inputs("6.0", 1, 512, 8)
    expected = ops.wkv6(*inputs)[0]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    # expanded: no memory of its own, but y would need all there is
    tokens = 2 * total // (8 * 64 * 2 * 512)
    huge = [x.expand(int(tokens), *x.shape[1:]) for x in inputs[:4]]
    with torch.no_grad(), pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        ops.wkv6(*huge, inputs.u)
    assert torch.equal(ops.wkv6(*inputs)[0], expected)


@pytest.mark.parametrize("size", [1, 16, 48, 65, 256])
def test_gpu_runtime_head_sizes_without_kernels(size):
    """The message says what is supported, for every op."""
    for version in OPS:
        inputs = make_inputs(version, 1, 3, 2, size)
        op = f"wkv{version[0]}"
        text = f"{op}: head size must be 32, 64 or 128 on CUDA, got {size}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
            OPS[version](*inputs)
        with pytest.raises(ValueError, match=f"^{re.escape(text.replace(op, f'{op}_step'))}"):
            STEPS[version](*token_of(inputs))


def test_gpu_runtime_cu_seqlens_are_clamped():
    """Wrong offsets cannot be seen without waiting: they are clamped, and nothing outside the tensors is touched."""
    inputs = make_inputs("6.0", heads=2, lengths=[40, 60])
    guard = torch.full((3, 100, 2, 64), 7.0, device=DEVICE, dtype=torch.bfloat16)
    for offsets in ([0, 40, 1 << 40], [-5, 40, 100], [0, 90, 30], [0, 40, 90]):
        wrong = inputs._replace(cu_seqlens=torch.tensor(offsets, device=DEVICE))
        y, state = ops.wkv6(*wrong)
        torch.cuda.synchronize()
        assert y.shape == inputs.r.shape and (guard == 7).all()
    check("6.0", inputs)
