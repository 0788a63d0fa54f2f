"""The kernels that cut sequences into segments and put them together again, run from their own sources on the CPU."""

import struct
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from emulator.build import ASAN, PLAIN, ROOT, TSAN, build, run

from rwkv_ext import reference
from rwkv_ext.testing import decay_regimes, error_ratio, make_inputs

pytestmark = pytest.mark.cpu
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int32: 0, torch.int64: 5}
EXACT = 2e-5  # k~ in two 16-bit numbers, fp32 sums
CUT = 128


class Item(NamedTuple):
    sequence: int
    segment: int
    segments: int
    first_token: int
    tokens: int


def sources(variant):
    sizes = "bf16_64" if variant.main_instances_only else "*"
    instances = ROOT / "csrc/cuda/instances"
    return [instances / "wkv_segments.cu", *sorted(instances.glob(f"wkv_summary_{sizes}.cu"))]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segments")

    def call(kind, shape, arrays, *, work, eagle=False, fp64=False, adjoint=False, order=0, variant=PLAIN):
        program = build(variant, "segments", sources=sources(variant))
        header = [" ".join(str(int(x)) for x in (*shape, eagle, fp64, adjoint, *work, order))]
        blobs = []
        for name, x in arrays.items():
            strides = {4: x.stride()[:3], 2: (0, 0, x.stride(0))}.get(x.dim(), (0, 0, 0))
            memory = x.as_strided(
                (sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1 if x.numel() else 0,), (1,)
            )
            size = memory.numel() * x.element_size()
            header.append(" ".join(map(str, (name, DTYPES.get(x.dtype, 0), size, *strides))))
            blobs.append(memory.contiguous().view(torch.uint8).numpy().tobytes() if size else b"")
        paths = folder / "problem", folder / "result"
        paths[0].write_bytes("\n".join([*header, "", ""]).encode() + b"".join(blobs))
        done = run(variant, program, kind, *paths, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        call.launches = [(x[2], int(x[0]), int(x[1])) for x in (y.split(" ", 2) for y in done.stdout.splitlines())]
        data, results = bytearray(paths[1].read_bytes()), {}
        for name, x in arrays.items():
            if name.startswith("out_"):
                size = x.numel() * x.element_size()
                part, data = data[:size], data[size:]
                results[name[4:]] = torch.frombuffer(part, dtype=x.dtype).view(x.shape).clone() if size else x
        assert not data
        return results

    return call


def bounds_of(cu_seqlens, tokens):
    """What the kernels make of cu_seqlens, right or wrong: from 0, never down, never past T, to T."""
    bounds, last = [0], 0
    for x in cu_seqlens[1:-1]:
        last = min(tokens, max(last, x))
        bounds.append(last)
    return [*bounds, tokens]


def segments_of(bounds, cut, packed):
    """Every segment of every sequence as an Item, in order, and its slot."""
    found = []
    for sequence, (begin, end) in enumerate(pairwise(bounds)):
        count = max(-(-(end - begin) // cut), 1)
        if packed and end - begin <= 2 * cut:
            count = 1
        for i in range(count):
            first = begin + i * cut
            item = Item(sequence, i, count, first, (end if i + 1 == count else first + cut) - first)
            found.append((item, begin // cut + sequence + i))
    return found


def read_list(raw):
    items = [Item(*x[:3], *x[4:]) for x in struct.iter_unpack("<iiiiqq", raw.numpy().tobytes())]
    used = [x for x in items if x.sequence >= 0]
    assert items[: len(used)] == used and all(x.tokens == 0 for x in items[len(used) :])
    return used


GOOD = [[0, 7], [0, 0], [0, 0, 0, 300], [0, 128, 256, 300], [0, 256, 513, 513, 900, 901, 1000], [0, 1000]]
BAD = [[3, 7], [0, 9], [0, 500, 200, 400], [-5, -3, 900], [0, 2**31 - 1, 5, 400], [400, 300, 200, 100]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_work_list(emulate, dtype):
    """Every token in exactly one segment, long segments first; also of what is no cu_seqlens."""
    generator = torch.Generator().manual_seed(0)
    many = torch.randint(0, 40, (1500,), generator=generator).cumsum(0).tolist()
    for cu_seqlens, tokens in [*((x, x[-1]) for x in GOOD), *((x, 400) for x in BAD), ([0, *many], many[-1])]:
        for cut in (128, 256, 1152):
            items = tokens // cut + len(cu_seqlens) - 1
            arrays = {
                "cu_seqlens": torch.tensor(cu_seqlens, dtype=dtype),
                "out_list": torch.full((items * 32,), 255, dtype=torch.uint8),
            }
            found = read_list(
                emulate("list", (1, tokens, 1, 32, len(cu_seqlens) - 1), arrays, work=(cut, items))["list"]
            )
            expected = [item for item, _ in segments_of(bounds_of(cu_seqlens, tokens), cut, True)]
            assert sorted(found) == expected
            classes = [x.tokens * 16 // (2 * cut + 1) for x in found]
            assert classes == sorted(classes, reverse=True)
            slots = [slot for _, slot in segments_of(bounds_of(cu_seqlens, tokens), cut, True)]
            assert len(set(slots)) == len(slots) and all(0 <= slot < items for slot in slots)


def is_eagle(inputs):
    return inputs.w.dim() == 2


def summaries(inputs, adjoint, tokens):
    """Exact decay and state of the tokens begin to end - 1 of a row, or of the adjoint."""
    row, begin, end = tokens
    r, k, v, w = (x.double() if x.dim() == 2 else x[row : row + 1, begin:end].double() for x in inputs[:4])
    kind = reference.wkv5_summary if is_eagle(inputs) else reference.wkv6_summary
    if not adjoint:
        return kind(k, v, w)
    of_adjoint = reference.wkv5_adjoint_summary if is_eagle(inputs) else reference.wkv6_adjoint_summary
    return kind(k, v, w)[0], of_adjoint(r, w, v)  # v stands for dy


def problem(inputs, cut, adjoint, *, result, absent=()):
    """Shape, work and arrays of a call. result: "op" or "cuts"."""
    batch, tokens, heads, size = inputs.r.shape
    packed = inputs.cu_seqlens is not None
    bounds = inputs.cu_seqlens.tolist() if packed else [0, tokens]
    sequences = len(bounds) - 1 if packed else batch
    cut = cut or (tokens // CUT + 1) * CUT
    per_row = max(-(-tokens // cut), 1)
    items = tokens // cut + sequences if packed else batch * per_row
    arrays = {"k": inputs.r if adjoint else inputs.k, "v": inputs.v, "w": inputs.w}
    arrays = {name: x for name, x in arrays.items() if name not in absent}
    nan = float("nan")
    if packed:
        arrays |= {"cu_seqlens": inputs.cu_seqlens, "out_list": torch.zeros(items * 32, dtype=torch.uint8)}
    if cut < tokens:
        arrays["segment_decays"] = torch.full((items, heads, size), nan)
        arrays["out_segment_states"] = torch.full((items, heads, size, size), nan)
    if result == "op":
        arrays["out_state"] = torch.full((sequences, heads, size, size), nan)
        if not adjoint:
            arrays["out_decay"] = torch.full((sequences, heads, size), nan)
    if packed:
        places = [(0, item, slot) for item, slot in segments_of(bounds, cut, True)]
    else:
        found = segments_of([0, tokens], cut, False)
        places = [(row, x._replace(sequence=row), row * per_row + slot) for row in range(batch) for x, slot in found]
    return (batch, tokens, heads, size, sequences), (cut, items), arrays, places


def check_op(emulate, inputs, cut=0, adjoint=False, **options):
    shape, work, arrays, places = problem(inputs, cut, adjoint, result="op", absent=options.pop("absent", ()))
    found = emulate("op", shape, arrays, work=work, eagle=is_eagle(inputs), adjoint=adjoint, **options)
    if "v" not in arrays:
        assert not found["state"].any()
        return found
    for sequence in range(shape[4]):
        own = [(row, item) for row, item, _ in places if item.sequence == sequence]
        tokens = own[0][0], own[0][1].first_token, own[-1][1].first_token + own[-1][1].tokens
        decay, state = summaries(inputs, adjoint, tokens)
        assert error_ratio(found["state"][sequence], state[0]) < EXACT
        if not adjoint:
            assert error_ratio(found["decay"][sequence], decay[0]) < EXACT
    return found


TOKENS = [0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 128, 129, 200, 300]


@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("regime", decay_regimes)
@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_summary_regimes(emulate, version, regime, adjoint):
    for tokens in (17, 200) if regime != "typical" else TOKENS:
        inputs = make_inputs(version, 1, tokens, 2, 64, regime=regime, dtype=torch.bfloat16)
        check_op(emulate, inputs, adjoint=adjoint)


@pytest.mark.parametrize("parameter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_summary_instances(emulate, version, size, dtype, parameter):
    """Every instance, in rows of a batch and in packed ones, whole and cut."""
    w_dtype = dtype if parameter == "same" else torch.float32
    for shape, cut in ((dict(batch=2, tokens=75), 0), (dict(lengths=[70, 0, 300, 1]), CUT)):
        inputs = make_inputs(version, heads=2, size=size, regime="mixed", dtype=dtype, parameter_dtype=w_dtype, **shape)
        check_op(emulate, inputs, cut)
        check_op(emulate, inputs, cut, adjoint=True)


@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_summary_segment_counts(emulate, version, adjoint):
    """One to five segments give the same, and the whole sequence's error."""
    for count in range(1, 6):
        for tokens in (CUT * count, CUT * count - 127):
            inputs = make_inputs(version, 2, tokens, 1, 32, regime="typical", dtype=torch.bfloat16)
            check_op(emulate, inputs, CUT, adjoint)


LENGTHS = [0, 400, 128, 0, 257, 1, 256, 640, 0]


@pytest.mark.parametrize("regime", ["typical", "near_one", "resets"])
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
def test_summary_packed(emulate, adjoint, regime):
    for version in ("5.2", "6.0"):
        inputs = make_inputs(version, heads=2, size=32, lengths=LENGTHS, regime=regime, dtype=torch.bfloat16)
        check_op(emulate, inputs, CUT, adjoint)
        inputs = inputs._replace(cu_seqlens=inputs.cu_seqlens.int())
        check_op(emulate, inputs, 0, adjoint)


@pytest.mark.parametrize("name, value", [("k", "nan"), ("k", "inf"), ("v", "nan"), ("v", "-inf"), ("w", "nan")])
def test_summary_shows_what_is_not_finite(emulate, name, value):
    """Nothing hides a broken activation: its key's row, or value's column, is not finite either, and no other is."""
    inputs = make_inputs("6.0", 1, 70, 1, 32, dtype=torch.bfloat16)
    getattr(inputs, name)[0, 50, 0, 3] = float(value)
    shape, work, arrays, _ = problem(inputs, 0, False, result="op")
    found = emulate("op", shape, arrays, work=work)
    bad = torch.zeros(32, 32, dtype=torch.bool)
    bad[3] = True
    assert torch.equal(~found["state"][0, 0].isfinite(), bad.T if name == "v" else bad)


def test_summary_strides(emulate):
    """r, k, v, w as views of a wider tensor, heads apart or batch rows interleaved."""
    inputs = make_inputs("6.0", 2, 140, 2, 64, dtype=torch.bfloat16, parameter_dtype=torch.bfloat16)
    expected = check_op(emulate, inputs, CUT)
    fused = torch.stack(inputs[:4], 3)  # [B, T, H, 4, N]
    views = inputs._replace(**{name: fused[:, :, :, i] for i, name in enumerate("rkvw")})
    batch_last = inputs._replace(**{x: getattr(inputs, x).transpose(0, 2).contiguous().transpose(0, 2) for x in "rkvw"})
    for other in (views, batch_last):
        found = check_op(emulate, other, CUT)
        assert all(torch.equal(found[name], expected[name]) for name in ("state", "decay"))


def test_summary_without_a_gradient_of_y(emulate):
    """The gradient may come through the final state alone: no dy, and the adjoint is 0."""
    inputs = make_inputs("6.0", 1, 300, 1, 64, dtype=torch.bfloat16)
    check_op(emulate, inputs, adjoint=True, absent=("v",))
    check_cuts(emulate, inputs, CUT, True, absent=("v",))


def check_cuts(emulate, inputs, cut, adjoint, initial=True, **options):
    absent = options.pop("absent", ())
    shape, work, arrays, places = problem(inputs, cut, adjoint, result="cuts", absent=absent)
    states = torch.randn(shape[4], *shape[2:4], shape[3]) if initial else None
    if initial:
        arrays["initial"] = states
    found = emulate("cuts", shape, arrays, work=work, eagle=is_eagle(inputs), adjoint=adjoint, **options)
    cuts = 0
    for row, item, slot in places:
        own = [x for _, x, _ in places if x.sequence == item.sequence]
        begin, end = own[0].first_token, own[-1].first_token + own[-1].tokens
        if item == (own[-1] if adjoint else own[0]):
            continue
        cuts += 1
        tokens = (row, item.first_token + item.tokens, end) if adjoint else (row, begin, item.first_token)
        decay, state = summaries(inputs, adjoint, tokens)
        expected = state[0] * (0 if absent else 1)
        if initial:
            expected = expected + decay[0, :, :, None] * states[item.sequence]
        assert error_ratio(found["segment_states"][slot], expected) < EXACT
    return cuts, found


@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial"])
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_states_at_the_cuts(emulate, version, adjoint, initial):
    """What an op's own kernel starts each segment with."""
    for count in range(2, 8):  # more than one batch of loads in the scan
        inputs = make_inputs(version, 2, CUT * count - 60, 1, 32, regime="typical", dtype=torch.bfloat16)
        assert check_cuts(emulate, inputs, CUT, adjoint, initial)[0] == 2 * (count - 1)
    inputs = make_inputs(version, heads=2, size=32, lengths=LENGTHS, regime="near_one", dtype=torch.bfloat16)
    assert check_cuts(emulate, inputs, CUT, adjoint, initial)[0] == 3 + 2 + 4


def test_segments_move_no_more_bytes_than_designed(emulate):
    """k, v, w once, of the segments that others need; a state and a decay written; the scan touches each once."""
    tokens, heads, size = 3 * CUT, 2, 64
    state = heads * size * size * 4
    for version, parameter_dtype, each in (("6.0", torch.bfloat16, 6), ("6.0", torch.float32, 8), ("5.2", None, 4)):
        inputs = make_inputs(version, 1, tokens, heads, size, dtype=torch.bfloat16, parameter_dtype=parameter_dtype)
        constant = heads * 128 * 2 * 4 if version == "5.2" else 0  # every thread reads the decay of its two keys
        check_op(emulate, inputs)
        [(kernel, read, written)] = emulate.launches
        assert "wkv_summary_kernel" in kernel
        assert (read, written) == (tokens * heads * size * each + constant, state + state // size)
        check_cuts(emulate, inputs, CUT, False)
        (_, read, written), (kernel, *of_scan) = emulate.launches
        assert (read, written) == (2 * CUT * heads * size * each + 2 * constant, 2 * (state + state // size))
        assert "wkv_scan_kernel" in kernel
        assert of_scan == [3 * state + 2 * state // 4, 2 * state]  # initial, two segments, a decay for four elements


def test_segments_nobody_needs_are_not_summarised(emulate):
    """Of an op's own passes the last segment's summary, or the adjoint's first, is of use to no other segment."""
    inputs = make_inputs("6.0", 1, 3 * CUT, 1, 32, dtype=torch.bfloat16)
    for adjoint, unused in ((False, 0), (True, 2)):
        _, found = check_cuts(emulate, inputs, CUT, adjoint)
        untouched = found["segment_states"].flatten(1).isnan().all(1)
        assert not untouched.any()  # the scan leaves the unused one as its own summary
        kept = found["segment_states"][unused][0]
        exact = summaries(inputs, adjoint, (0, unused * CUT, (unused + 1) * CUT))[1][0, 0]
        assert error_ratio(kept, exact) < EXACT


@pytest.mark.parametrize("eagle", [False, True], ids=["finch", "eagle"])
@pytest.mark.parametrize("real", [torch.float32, torch.float64], ids=str)
def test_reduce(emulate, real, eagle):
    """Sums over the slots in use, in u's and w's dtype; slots that no segment has hold NaN."""
    for lengths in (None, LENGTHS):
        dtypes = (32, torch.bfloat16, torch.float32), (64, torch.float32, torch.float16), (128, real, real)
        for size, u_dtype, w_dtype in dtypes:
            if real == torch.float64:
                u_dtype = w_dtype = real
            heads, batch, tokens = 3, 3, 500
            bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else None
            if lengths:
                batch, tokens = 1, bounds[-1]
                items = tokens // CUT + len(lengths)
                slots = [slot for _, slot in segments_of(bounds, CUT, True)]
            else:
                items = batch * -(-tokens // CUT)
                slots = list(range(items))
            arrays = {}
            if lengths:
                arrays["cu_seqlens"] = torch.tensor(bounds)
                arrays["out_list"] = torch.zeros(items * 32, dtype=torch.uint8)
            outputs = [("du", u_dtype)] + [("dw", w_dtype)] * eagle
            exact = {}
            for name, dtype in outputs:
                partial = torch.full((items, heads, size), float("nan"), dtype=real)
                partial[slots] = torch.randn(len(slots), heads, size, dtype=real)
                arrays[f"{name}_partial"] = partial
                arrays[f"out_{name}"] = torch.full((heads, size), float("nan"), dtype=dtype)
                exact[name] = partial[slots].double().sum(0)
            sequences = len(lengths) if lengths else batch
            shape = (batch, tokens, heads, size, sequences)
            found = emulate("reduce", shape, arrays, work=(CUT, items), eagle=eagle, fp64=real == torch.float64)
            for name, dtype in outputs:
                assert error_ratio(found[name], exact[name]) < torch.finfo(dtype).eps


@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("real", [torch.float32, torch.float64], ids=str)
def test_scan(emulate, real, adjoint):
    """From given decays and states, of fp64 recurrences too: each cut's state, one decay and one addition at a time."""
    heads, size, rows, count = 2, 32, 2, 6
    decays, own = (
        torch.rand(rows * count, heads, size, dtype=real),
        torch.randn(rows * count, heads, size, size, dtype=real),
    )
    initial = torch.randn(rows, heads, size, size, dtype=real)
    arrays = {"segment_decays": decays, "out_segment_states": own, "initial": initial}
    options = dict(work=(CUT, rows * count), fp64=real == torch.float64, adjoint=adjoint)
    found = emulate("scan", (rows, count * CUT, heads, size, rows), arrays, **options)["segment_states"]
    for row in range(rows):
        state = initial[row].double()
        order = range(row * count, (row + 1) * count)
        for slot, following in pairwise(reversed(order) if adjoint else order):
            state = decays[slot, :, :, None].double() * state + own[slot].double()
            assert error_ratio(found[following], state) < 4 * torch.finfo(real).eps


@pytest.mark.parametrize("variant", [TSAN, ASAN], ids=["tsan", "asan"])
def test_segments_under_sanitizers(emulate, variant):
    """No race, no access outside an array: every kernel once, in both orders of threads between them."""
    rows = make_inputs("6.0", 1, 290, 1, 64, dtype=torch.bfloat16, parameter_dtype=torch.bfloat16)
    check_op(emulate, rows, CUT, variant=variant)
    packed = make_inputs("6.0", heads=1, size=64, lengths=[5, 0, 290, 66], dtype=torch.bfloat16)
    check_cuts(emulate, packed, CUT, True, variant=variant, order=1)
    partial = torch.randn(3, 1, 64)
    arrays = {"du_partial": partial, "out_du": torch.empty(1, 64)}
    found = emulate("reduce", (1, 290, 1, 64, 1), arrays, work=(CUT, 3), variant=variant)
    assert error_ratio(found["du"], partial.double().sum(0)) < 1e-7
