"""The whole-model step: RWKV.step on the CPU as one op, against the plain step, which is its specification."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import fused_step_checks
import pytest
import torch
from fused_step_checks import CONFIGS, DTYPES, check_against_fp64, plain_step, relative_error
from model_cases import CASES, SMALL, random_model, random_tokens

from rwkv_ext import RWKVState, _load
from rwkv_ext.models.fused_step import FusedStep, weight_names

OPS = {"5.2": torch.ops.rwkv_ext.rwkv5_step.default, "6.0": torch.ops.rwkv_ext.rwkv6_step.default}


@pytest.fixture
def fused_calls(monkeypatch):
    """A list that grows by one with every fused step."""
    calls, call = [], FusedStep.__call__
    monkeypatch.setattr(FusedStep, "__call__", lambda self, *given: calls.append(given) or call(self, *given))
    return calls


def states_of(model, batch, *, seed=0):
    state = model.initial_state(batch)
    generator = torch.Generator().manual_seed(seed)
    return RWKVState(*(torch.randn(x.shape, generator=generator).to(x.dtype) for x in state))


def arguments(model, state, tokens, slots=None):
    weights = dict(model.state_dict())
    x = model.emb(tokens).detach()
    return x, [weights[name] for name in weight_names(model.config)], [], *state, slots


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_step_equals_the_plain_step(name, batch, dtype, fused_calls):
    check_against_fp64(CONFIGS[name], dtype, batch)
    assert len(fused_calls) == 5


@pytest.mark.parametrize("limit", ["default", "avx2", "avx512"])
def test_fused_step_instruction_sets(limit):
    best, names = _load.build_info()["cpu_instruction_set"], {"default": "generic"}
    if names.get(limit, limit) == best:
        return fused_step_checks.check_all()
    program = Path(fused_step_checks.__file__)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": limit, "PYTHONPATH": str(program.parent.parent)}
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] in (names.get(limit, limit), best)


@pytest.mark.parametrize("name", ["small-eagle", "finch-32-64"])
def test_fused_step_is_the_same_for_any_threads(name):
    model, tokens = random_model(CONFIGS[name]), random_tokens(CONFIGS[name], 3)
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        state = states_of(model, 3)
        runs.append([model.step(tokens, state) for _ in range(20)] + [*state])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_step_rows_do_not_depend_on_each_other(dtype):
    """Bitwise: a row among others is the row alone, whatever the number of rows; NaN stays in its own."""
    model = random_model(CASES["finch-32-64"], dtype=dtype)
    tokens, state = random_tokens(model.config, 8), states_of(model, 8)
    whole = state.clone()
    logits = model.step(tokens, whole)
    for rows in (slice(0, 1), slice(1, 3), slice(2, 5), slice(3, 8)):
        part = RWKVState(*(x[:, rows].clone() for x in state))
        assert torch.equal(model.step(tokens[rows], part), logits[rows])
        assert all(torch.equal(a, b[:, rows]) for a, b in zip(part, whole, strict=True))
    state.wkv[1, 2, 0, 3, 3] = float("nan")
    dirty = model.step(tokens, state)
    assert dirty[2].isnan().all() and torch.equal(dirty[3:], logits[3:]) and torch.equal(dirty[:2], logits[:2])


@pytest.mark.parametrize("name", SMALL)
def test_fused_step_takes_states_of_any_strides(name, fused_calls):
    """Rows out of a larger state: the same numbers, and the other rows keep every bit."""
    model = random_model(SMALL[name])
    tokens, pool = random_tokens(model.config, 2), states_of(model, 6)
    for rows in (slice(1, 3), slice(0, 6, 3)):
        whole = pool.clone()
        view, dense = (RWKVState(*(x[:, rows] for x in s)) for s in (whole, pool))
        dense = RWKVState(*(x.contiguous() for x in dense.clone()))
        assert torch.equal(model.step(tokens, view), model.step(tokens, dense))
        assert all(torch.equal(a, b) for a, b in zip(view, dense, strict=True))
        others = [row for row in range(6) if row not in range(6)[rows]]
        assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(whole, pool, strict=True))
    assert len(fused_calls) == 4


def test_fused_step_updates_in_place_and_says_so():
    """The memory stays, its version counters do not: autograd notices a state that it has saved."""
    model = random_model(SMALL["finch"])
    state = model.initial_state(1)
    memory, versions = [x.data_ptr() for x in state], [x._version for x in state]
    scale = torch.ones_like(state.wkv, requires_grad=True)
    product = (scale * state.wkv).sum()  # saves state.wkv
    model.step(torch.tensor([3]), state)
    assert [x.data_ptr() for x in state] == memory and all(x.any() for x in state)
    assert all(x._version > version for x, version in zip(state, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("name", SMALL)
def test_fused_step_slots(name):
    """The op's rows use the named slots in any order; -1 gives zeros; slots that nobody names keep every bit."""
    model = random_model(SMALL[name])
    tokens, pool = random_tokens(model.config, 4), states_of(model, 6)
    before, slots = pool.clone(), torch.tensor([5, -1, 0, 3])
    op = OPS[model.config.version]
    logits = op(*arguments(model, pool, tokens, slots))
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert not logits[row].any()
            continue
        own = RWKVState(*(x[:, slot : slot + 1].clone() for x in before))
        assert torch.equal(model.step(tokens[row : row + 1], own)[0], logits[row])
        assert all(torch.equal(a[:, slot], b[:, 0]) for a, b in zip(pool, own, strict=True))
    assert all(torch.equal(a[:, [1, 2, 4]], b[:, [1, 2, 4]]) for a, b in zip(pool, before, strict=True))


def test_fused_step_finds_weights_that_were_replaced(fused_calls):
    """Changed in place, assigned, cast or in new modules: the next step computes with what is there now."""
    model, other = random_model(SMALL["finch"]), random_model(SMALL["finch"], seed=1)
    tokens = random_tokens(model.config, 2)

    def check(expected):
        a, b = states_of(model, 2), states_of(expected, 2)
        assert relative_error(model.step(tokens, a), plain_step(expected, tokens, b).double()) < 1e-2
        assert len(fused_calls) == check.steps
        check.steps += 1

    check.steps = 1
    check(model)
    model.load_state_dict(other.state_dict())
    check(other)
    model.load_state_dict(random_model(SMALL["finch"]).state_dict(), assign=True)
    check(random_model(SMALL["finch"]))
    model.blocks[1] = copy.deepcopy(other.blocks[1])
    mixed = random_model(SMALL["finch"])
    mixed.blocks[1] = other.blocks[1]
    check(mixed)
    model.to(torch.bfloat16)
    check(mixed)


def test_fused_step_leaves_the_unusual_to_the_plain_step(fused_calls):
    model = random_model(SMALL["finch"])
    tokens = random_tokens(model.config, 2)

    def same_as_plain(m, tokens=tokens, odd=lambda state: state):
        a, b = (odd(states_of(m, len(tokens))) for _ in range(2))
        with torch.no_grad():
            result = m.step(tokens, a), m._plain_step(m.emb(tokens), b)
        assert not fused_calls and torch.equal(*result)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        return result[0]

    assert same_as_plain(random_model(SMALL["finch"], dtype=torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_as_plain(model).dtype == torch.bfloat16
    same_as_plain(model, random_tokens(model.config, 9))
    same_as_plain(model, odd=lambda s: s._replace(att_shift=s.att_shift.transpose(1, 2).contiguous().transpose(1, 2)))
    seen = []
    hook = model.blocks[1].ffn.key.register_forward_hook(lambda *given: seen.append(1))
    same_as_plain(model)
    assert len(seen) == 2
    hook.remove()
    wrapped = copy.deepcopy(model)
    wrapped.blocks[0].att.key = torch.nn.Sequential(wrapped.blocks[0].att.key, torch.nn.Dropout(0.0))
    same_as_plain(wrapped)
    torch.nn.utils.parametrizations.weight_norm(wrapped.blocks[1].ffn.value)
    same_as_plain(wrapped)
    model.step(tokens, model.initial_state(2))
    assert len(fused_calls) == 1


def test_fused_step_no_rows(fused_calls):
    model = random_model(SMALL["eagle"])
    assert model.step(torch.zeros(0, dtype=torch.int64), model.initial_state(0)).shape == (0, 41)
    assert len(fused_calls) == 1


@pytest.mark.parametrize("name", SMALL)
def test_fused_step_opcheck(name):
    model = random_model(SMALL[name])
    given = arguments(model, states_of(model, 2), random_tokens(model.config, 2))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    results = torch.library.opcheck(OPS[model.config.version], given, test_utils=utilities)
    assert set(results.values()) == {"SUCCESS"}


REFUSED = {
    "x-rank": (0, lambda x: x[0], r"x must have 2 dimensions \[B, D\], got \[64\]"),
    "x-rows": (0, lambda x: x[:1].repeat(9, 1), "x must have at most 8 rows, got 9; take them in several calls"),
    "x-dtype": (0, lambda x: x.double(), "x must be float32, bfloat16 or float16, got float64"),
    "few-weights": (1, lambda w: w[:-1], r"weights must go on with blocks.1.ffn.value.weight, got \d+ tensors"),
    "many-weights": (1, lambda w: [*w, w[0]], r"weights must have \d+ tensors, got \d+"),
    "weight-shape": (1, lambda w: [w[0][:-1], *w[1:]], r"blocks.0.ln0.weight must have shape \[64\] .* got \[63\]"),
    "matrix-shape": (
        1,
        lambda w: [*w[:4], w[4][:, 1:].contiguous(), *w[5:]],
        r"head.weight must have shape \[-1, 64\]",
    ),
    "weight-strides": (1, lambda w: [*w[:4], w[4].T.contiguous().T, *w[5:]], r"head.weight must be contiguous"),
    "vector-dtype": (1, lambda w: [w[0].double(), *w[1:]], "ln0.weight must be float32, bfloat16 or float16, got floa"),
    "matrix-dtype": (1, lambda w: [*w[:4], w[4].double(), *w[5:]], "head.weight must be .* or int8, got float64"),
    "no-scale": (1, lambda w: [*w[:4], w[4].char(), *w[5:]], "scales must go on with that of head.weight, got 0 ten"),
    "extra-scale": (2, lambda s: [torch.ones(41)], "scales must have one tensor for each int8 matrix, 0 in all, got 1"),
    "shift-shape": (3, lambda s: s[:, :1], r"att_shift must have shape \[L, S, D\] = \[2, 2, 64\], got \[2, 1, 64\]"),
    "shift-dtype": (5, lambda s: s.double(), "ffn_shift must be float32, bfloat16 or float16, got float64"),
    "wkv-rank": (4, lambda s: s[0], r"wkv must have 5 dimensions \[L, S, H, N, N\]"),
    "wkv-shape": (4, lambda s: s[..., :8, :], r"wkv must have shape \[L, S, H, N, N\] = \[2, 2, 4, 16, 16\], got"),
    "wkv-dtype": (4, lambda s: s.bfloat16(), "wkv must be float32, got bfloat16"),
    "wkv-strides": (4, lambda s: s.transpose(-1, -2), "wkv must have contiguous rows, because it is updated in place"),
    "slots-shape": (6, lambda s: torch.zeros(3, dtype=torch.int64), r"slots must have shape \[B\] = \[2\], got \[3\]"),
    "slots-dtype": (6, lambda s: torch.zeros(2), "slots must be int64, got float32"),
    "slots-twice": (6, lambda s: torch.tensor([1, 1]), "slots must not repeat, got 1 again at index 1"),
    "slots-range": (
        6,
        lambda s: torch.tensor([0, 2]),
        r"slots must be -1 \(skip the row\) or 0 to 1, got 2 at index 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fused_step_refuses_and_changes_nothing(case):
    model = random_model(SMALL["finch"])
    state = states_of(model, 2)
    before, given = state.clone(), list(arguments(model, state, random_tokens(model.config, 2)))
    place, change, message = REFUSED[case]
    given[place] = change(given[place])
    with pytest.raises(IndexError if case == "slots-range" else ValueError, match=rf"^rwkv6_step: .*{message}"):
        OPS["6.0"](*given)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_fused_step_refuses_widths_out_of_step():
    """RWKVConfig refuses them too; the op must not read beyond its rows when called with anything."""
    x, weights, _, *rest = arguments(random_model(SMALL["eagle"]), *step_input())
    narrow = [w[..., :40].contiguous() if w.shape[-1] == 64 else w for w in weights]
    with pytest.raises(ValueError, match=r"^rwkv5_step: "):
        OPS["5.2"](x[:, :40], narrow, [], *rest)


def step_input():
    model = random_model(SMALL["eagle"])
    return states_of(model, 1), torch.tensor([1])


def test_fused_step_vmap_is_refused():
    model = random_model(SMALL["eagle"])
    x, *rest = arguments(model, states_of(model, 1), torch.tensor([1]))
    with pytest.raises(NotImplementedError, match="rwkv5_step: torch.vmap is not implemented; give it a batch axis B"):
        torch.vmap(lambda row: OPS["5.2"](row, *rest))(x.unsqueeze(0))
