"""Checks of the CPU kernels in this process's instruction set; run as a program with ATEN_CPU_CAPABILITY set."""

import torch

from rwkv_ext import _load, ops, reference
from rwkv_ext.testing import assert_close_ratio, make_inputs, outputs_and_gradients

OPS = {
    "5.2": (ops.wkv5, ops.wkv5_step, reference.wkv5),
    "6.0": (ops.wkv6, ops.wkv6_step, reference.wkv6),
}


def check_against_reference(version):
    """Every panel width, with and without padding, in fp32 and fp64, and two chunks."""
    op, _, plain = OPS[version]
    cases = [
        (1, 35, "mixed"),
        (5, 35, "huge"),
        (16, 35, "mixed"),
        (24, 150, "near_zero"),
        (40, 35, "huge"),
        (100, 20, "mixed"),
    ]
    for size, tokens, regime in cases:
        inputs = make_inputs(version, 1, tokens, 2, size, regime=regime)
        exact = outputs_and_gradients(plain, inputs.double())
        assert_close_ratio(outputs_and_gradients(op, inputs), exact, floor=2e-6)
        assert_close_ratio(outputs_and_gradients(op, inputs.double()), exact, floor=1e-13)


def check_summaries(version):
    for size, tokens in ((1, 35), (5, 35), (16, 35), (40, 150), (100, 20)):
        r, k, v, w = make_inputs(version, 1, tokens, 2, size, regime="mixed")[:4]
        for kind, given in (("summary", (k, v, w)), ("adjoint_summary", (r, w, v))):
            run, plain = (getattr(module, f"wkv{version[0]}_{kind}") for module in (ops, reference))
            wide = [x.double() for x in given]
            results = run(*given), run(*wide), plain(*wide)
            if kind == "adjoint_summary":
                results = [(x,) for x in results]
            actual, double, exact = (dict(zip(("state", "decay"), reversed(x), strict=False)) for x in results)
            assert_close_ratio(actual, exact, floor=5e-6)  # a product of 150 rounded decays drifts
            assert_close_ratio(double, exact, floor=1e-13)


def check_cut(version, size):
    """Bitwise: forward and the recomputation in backward contract their multiply-adds in the same way."""
    op = OPS[version][0]

    def in_two_parts(r, k, v, w, u, state, _):
        y = []
        for part in (slice(0, 48), slice(48, 64)):
            own_w = w if version == "5.2" else w[:, part]
            out, state = op(r[:, part], k[:, part], v[:, part], own_w, u, state)
            y.append(out)
        return torch.cat(y, 1), state

    inputs = make_inputs(version, 1, 64, 2, size)
    whole, parts = (outputs_and_gradients(f, inputs) for f in (op, in_two_parts))
    sums = ("du", "dw") if version == "5.2" else ("du",)
    assert all(torch.equal(whole[key], parts[key]) for key in whole if key not in sums), size


def check_step(version, size):
    """Bitwise: the step op is one token of the sequence op."""
    op, step, _ = OPS[version]
    inputs = make_inputs(version, 2, 1, 3, size)
    y, state = op(*inputs)
    w = inputs.w if version == "5.2" else inputs.w[:, 0]
    assert torch.equal(step(*(x[:, 0] for x in inputs[:3]), w, inputs.u, inputs.state), y[:, 0])
    assert torch.equal(inputs.state, state)


def check_halves():
    """Every number of 16 bits is read and rounded as torch does it: with N = 1 and k = v = 1, y = r u."""
    for dtype in (torch.float16, torch.bfloat16):
        r = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, -1, 1)
        r = r.masked_fill(r.isinf(), 1)  # times the empty state they are NaN
        if dtype == torch.bfloat16:  # its denormal numbers are those of fp32, which kernels flush
            r = torch.where(r.abs() < torch.finfo(dtype).tiny, 0, r)
        ones = torch.ones_like(r)
        for factor in (1.0, 1.0078125, 0.7578125, 60000.0):
            u = torch.full((r.shape[2], 1), factor, dtype=dtype)
            y, _ = ops.wkv6(r, ones, ones, -ones, u)
            expected = (r.float() * u.float()).to(dtype)
            if dtype == torch.bfloat16:
                expected = torch.where(expected.abs() < torch.finfo(dtype).tiny, 0, expected)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def check_all():
    check_halves()
    for version in OPS:
        check_against_reference(version)
        check_summaries(version)
        for size in (1, 5, 16, 24, 40, 64, 100, 128):
            check_cut(version, size)
            check_step(version, size)


if __name__ == "__main__":
    torch.set_deterministic_debug_mode("warn")
    torch.set_num_threads(1)
    check_all()
    print(_load.build_info()["cpu_instruction_set"])
