"""torch.compile: whole graphs, changing lengths, equal to eager; the in-place step inside a graph."""

import pytest
import torch
from wkv_cases import DEVICE, OPS, head_size, make_inputs

from rwkv_ext import ops
from rwkv_ext.testing import outputs_and_gradients

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def surrounded(op):
    """The op between ordinary ones, so that a graph has something to compile around it."""

    def run(r, k, v, w, u, state, cu_seqlens):
        y, last = op(r * 2, k, v.tanh(), w, u, state, cu_seqlens)
        return y * y.shape[1] + 1, last * 0.5

    return run


@pytest.mark.parametrize("version", OPS)
def test_wkv_compile_changing_lengths(version):
    """Two dynamic graphs for every B and T (one chunk state; several): all gradients equal eager's, bit for bit."""
    eager = surrounded(OPS[version])
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=BACKEND)
    for batch, tokens in ((2, 20), (2, 129), (4, 300), (5, 16), (3, 260)):
        inputs = make_inputs(version, batch, tokens, 6, 8)
        expected, actual = (outputs_and_gradients(f, inputs) for f in (eager, compiled))
        assert all(torch.equal(actual[name], x) for name, x in expected.items())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_wkv_compile_packed():
    """Lengths and their number change, the graph does not."""
    eager = surrounded(ops.wkv6)
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=BACKEND)
    for lengths in ([20, 0, 5], [150, 3, 7], [9, 9, 0, 130]):
        inputs = make_inputs("6.0", heads=2, size=8, lengths=lengths)
        expected, actual = (outputs_and_gradients(f, inputs) for f in (eager, compiled))
        assert all(torch.equal(actual[name], x) for name, x in expected.items())


def test_wkv_compile_without_gradients():
    """No state, no graph to save for; also under no_grad with leaves that require gradients."""
    compiled = torch.compile(ops.wkv6, fullgraph=True, dynamic=True, backend=BACKEND)
    inputs = make_inputs("6.0", 1, 20, 2, 8, state=False)
    assert torch.equal(compiled(*inputs)[0], ops.wkv6(*inputs)[0])
    inputs.r.requires_grad_()
    with torch.no_grad():
        assert torch.equal(compiled(*inputs)[0], ops.wkv6(*inputs)[0])


def test_wkv_compile_autocast():
    def run(*arguments):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return ops.wkv6(*arguments)

    compiled = torch.compile(run, fullgraph=True, backend=BACKEND)
    inputs = make_inputs("6.0", 1, 20, 2, 8)
    expected, actual = (outputs_and_gradients(f, inputs) for f in (run, compiled))
    assert actual["y"].dtype == torch.bfloat16
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


def test_wkv_compile_checkpointed():
    """Activation checkpointing inside the graph recomputes the op."""

    def run(*arguments):
        return torch.utils.checkpoint.checkpoint(ops.wkv6, *arguments, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend=BACKEND)
    inputs = make_inputs("6.0", 1, 20, 2, 8)
    expected, actual = (outputs_and_gradients(f, inputs) for f in (ops.wkv6, compiled))
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


def test_wkv_compile_inductor():
    """The default backend, forward and backward; nothing around the op, so that no C++ has to be compiled."""
    compiled = torch.compile(ops.wkv6, fullgraph=True, dynamic=True)
    for tokens in (20, 33):
        inputs = make_inputs("6.0", 1, tokens, 2, 8)
        expected, actual = (outputs_and_gradients(f, inputs) for f in (ops.wkv6, compiled))
        assert all(torch.equal(actual[name], x) for name, x in expected.items())


@pytest.mark.parametrize("version", OPS)
def test_wkv_compile_step_twice(version):
    """Two steps on one state in one graph: neither is reordered, dropped or run on a copy."""
    step = {"5.2": ops.wkv5_step, "6.0": ops.wkv6_step}[version]

    def run(r, k, v, w, u, state):
        first = step(r, k, v, w, u, state)
        second = step(r + first, k, v, w, u, state)
        return first, second, state.sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=BACKEND)
    for batch in (2, 3):
        inputs = make_inputs(version, batch, 1, 2, 8)
        token = [x[:, 0] if x.dim() == 4 else x for x in inputs[:4]]
        state, expected_state = inputs.state.clone(), inputs.state.clone()
        with torch.no_grad():
            expected, actual = run(*token, inputs.u, expected_state), compiled(*token, inputs.u, state)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert torch.equal(state, expected_state) and not torch.equal(state, inputs.state)


def test_wkv_compile_step_slots():
    compiled = torch.compile(ops.wkv6_step, fullgraph=True, backend=BACKEND)
    inputs = make_inputs("6.0", 2, 1, 2, 8)
    token = [x[:, 0] for x in inputs[:4]]
    pool = torch.randn(4, 2, head_size(8), head_size(8))
    expected_pool, slots = pool.clone(), torch.tensor([3, -1])
    assert torch.equal(compiled(*token, inputs.u, pool, slots), ops.wkv6_step(*token, inputs.u, expected_pool, slots))
    assert torch.equal(pool, expected_pool)


def test_wkv_export():
    """torch.export keeps the op as one node."""

    class Module(torch.nn.Module):
        def forward(self, r, k, v, w, u):
            return ops.wkv6(r, k, v, w, u)

    inputs = make_inputs("6.0", 1, 20, 2, 8, state=False)[:5]
    program = torch.export.export(Module(), inputs)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "rwkv_ext.wkv6_forward.default" in targets
    for a, b in zip(program.module()(*inputs), ops.wkv6(*inputs), strict=True):
        assert torch.equal(a, b)
