"""Inputs and right answers of every case of cases.cuh, from the PTX ISA's tables, in numpy.

Data movement, barriers, packing and rounding must agree bit for bit (any NaN for a NaN). Two primitives may round:
mma sums, to SUM_ERROR of the sum of the absolute terms, and exp2_fast, to EXP2_ERROR of the result.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SUM_ERROR = 2.0**-21  # 4 ulp: tensor cores align the terms of a sum to the largest one and cut what is below
EXP2_ERROR = 2.0**-22  # 2 ulp, as the PTX ISA states for ex2.approx
THREADS, ROUNDS, COPY_THREADS, PRODUCTS, NUMBERS = 128, 8, 64, 64, 1 << 16
LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


class Case(NamedTuple):
    make: Callable[[np.random.Generator], np.ndarray]  # the input
    answer: Callable[[np.ndarray], np.ndarray]  # from the input
    allowed: Callable[[np.ndarray], np.ndarray] | None = None  # absolute error of each answer; None: none
    bf16: bool = False  # the output is bf16, which numpy lacks, and answers are fp32


def errors(case: Case, given: np.ndarray, output: bytes) -> str:
    """Return what is wrong with a case's output, or an empty string."""
    expected = case.answer(given)
    actual = from_bf16(np.frombuffer(output, np.uint16)) if case.bf16 else np.frombuffer(output, expected.dtype)
    actual = actual.reshape(expected.shape)
    both_nan = (actual != actual) & (expected != expected)
    if case.allowed is None:
        bits = f"u{expected.dtype.itemsize}"
        right = (actual.view(bits) == expected.view(bits)) | both_nan
    else:
        with np.errstate(invalid="ignore"):
            near = np.abs(actual.astype(np.float64) - expected) <= case.allowed(given)
        right = near | (actual == expected) | both_nan
    if right.all():
        return ""
    first = np.unravel_index(np.argmin(right), right.shape)
    place = ", ".join(str(i) for i in first)
    return f"{(~right).sum()} of {right.size} answers differ; at [{place}] {actual[first]!r}, not {expected[first]!r}"


def _words(*shape):
    return lambda random: random.integers(0, 2**32, shape, dtype=np.uint32)


def _nothing(random):
    return np.zeros(0, np.uint32)


def _indices(_):
    block, thread = np.divmod(np.arange(3 * 96, dtype=np.uint32), 96)
    return np.stack([block, thread, thread // 32, thread % 32], -1).astype(np.uint32)


def _rounds(other):
    def answer(values):
        for _ in range(ROUNDS):
            values = 3 * values[other] + np.arange(THREADS, dtype=np.uint32)
        return values

    return answer


def _copies(values):
    first, second, third = values[:, ::-1].copy()
    third[(COPY_THREADS - 1 - np.arange(COPY_THREADS)) % 3 == 0] = 0
    return np.stack([first, second, third])


def _make_shuffles(random):
    return np.stack([_words(32)(random), random.integers(0, 32, 32, dtype=np.uint32)])


def _shuffles(given):
    bits, source = given
    return np.stack([bits[source], bits[source], *(bits[LANE ^ mask] for mask in range(1, 32))])


def _make_matrices(random):
    return np.concatenate([_words(32, 4)(random).ravel(), random.permutation(32).astype(np.uint32)])


def _matrices(transposed):
    def answer(given):
        rows = given[:128].reshape(32, 4)[given[128:]]  # by the lane that names them
        tiles = rows.view(np.uint16).reshape(4, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(1, 2)
        pairs = np.ascontiguousarray(tiles).view(np.uint32)  # [matrix, row g, pair t]
        return np.stack([pairs[m, GROUP, MEMBER] for m in range(4)], -1)

    return answer


def _matrices_stored(given):
    pairs = given[:128].reshape(32, 4)  # [lane, matrix]: rows 2t and 2t + 1 of column g
    tiles = np.zeros((4, 8, 8), np.uint32)
    for m in range(4):
        tiles[m, 2 * MEMBER, GROUP] = pairs[:, m] & 0xFFFF
        tiles[m, 2 * MEMBER + 1, GROUP] = pairs[:, m] >> 16
    rows = np.zeros((32, 4), np.uint32)
    rows[given[128:]] = tiles.astype(np.uint16).reshape(32, 8).view(np.uint32)
    return rows


# ---- 16-bit and tf32 numbers ----


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Return the bits of fp32 numbers rounded to the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_fp16(x):
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float16).view(np.uint16)


def from_fp16(bits):
    return bits.view(np.float16).astype(np.float32)


def to_tf32(bits: np.ndarray) -> np.ndarray:
    """Return the bits of fp32 numbers rounded to the nearest tf32, ties to even; NaN becomes the hardware's."""
    nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
    rounded = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(nan, np.uint32(0x7FFFFFFF), rounded)


FORMATS = {"bf16": (to_bf16, from_bf16), "fp16": (to_fp16, from_fp16)}


# ---- matrix products: [product, lane, 10 words]: a0 .. a3, b0, b1, c0 .. c3 ----


def _tables(depth):
    """Rows and columns of a's, b's and c's elements: [lane, register, element of the register]."""
    half, quarter, element = np.arange(2), np.arange(2), np.arange(2)
    h, q = np.tile(half, 2), np.repeat(quarter, 2)  # of a's register h + 2q
    g, t = GROUP[:, None, None], MEMBER[:, None, None]
    if depth == 16:
        a = g + 8 * h[:, None] + 0 * element, 8 * q[:, None] + 2 * t + element
        b = 8 * quarter[:, None] + 2 * t + element, g + 0 * quarter[:, None] + 0 * element
    else:
        a = g + 8 * h[:, None], t + 4 * q[:, None]
        b = t + 4 * quarter[:, None], g + 0 * quarter[:, None]
    c = g + 8 * half[:, None] + 0 * element, 2 * t + 0 * half[:, None] + element  # register 2h + e: [lane, h, e]
    return tuple(np.broadcast_arrays(*pair) for pair in (a, b, c))


def _make_product(depth, pack):
    def make(random):
        shapes = (PRODUCTS, 16, depth), (PRODUCTS, depth, 8), (PRODUCTS, 16, 8)
        exact = [random.integers(-8, 9, shape).astype(np.float32) for shape in shapes]  # sums that nothing rounds
        wide = [
            (random.standard_normal(shape) * np.exp2(random.uniform(-6, 6, shape))).astype(np.float32)
            for shape in shapes
        ]
        a, b, c = (np.where(np.arange(PRODUCTS)[:, None, None] % 2, x, y) for x, y in zip(wide, exact))
        a[1, 3, 2], b[3, 1, 4], c[5, 6, 7], c[7, 0, 0] = np.inf, np.nan, -np.inf, np.nan
        a_at, b_at, c_at = _tables(depth)
        words = [pack(x[:, rows, columns]) for x, (rows, columns) in ((a, a_at), (b, b_at))]
        sums = c[:, c_at[0], c_at[1]].reshape(PRODUCTS, 32, 4)
        return np.concatenate([*words, sums.view(np.uint32)], -1)

    return make


def _product(depth, unpack, magnitude=False, from_zero=False):
    def answer(given):
        a_at, b_at, c_at = _tables(depth)
        a, b = np.zeros((PRODUCTS, 16, depth)), np.zeros((PRODUCTS, depth, 8))
        a[:, a_at[0], a_at[1]], b[:, b_at[0], b_at[1]] = unpack(given[..., :4]), unpack(given[..., 4:6])
        c = given[..., 6:].copy().view(np.float32).astype(np.float64).reshape(PRODUCTS, 32, 2, 2)
        if from_zero:
            c = np.zeros_like(c)
        if magnitude:
            a, b, c = abs(a), abs(b), abs(c)
        with np.errstate(invalid="ignore"):
            sums = (a @ b)[:, c_at[0], c_at[1]] + c
        if magnitude:
            sums[::2] = 0  # small integers: exact
            return SUM_ERROR * np.nan_to_num(sums, posinf=0)
        return sums.astype(np.float32)

    return answer


def _product16(number):
    to_bits, from_bits = FORMATS[number]

    def pack(pairs):
        return np.ascontiguousarray(to_bits(pairs)).view(np.uint32)[..., 0]

    def unpack(words):
        return from_bits(np.ascontiguousarray(words).view(np.uint16)).reshape(*words.shape, 2)

    return Case(_make_product(16, pack), _product(16, unpack), _product(16, unpack, magnitude=True))


def _product_tf32(from_zero=False):
    def pack(values):
        return np.ascontiguousarray(values[..., 0]).view(np.uint32)

    def unpack(words):  # the low 13 bits are ignored
        return np.ascontiguousarray(words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]

    answers, allowed = (_product(8, unpack, magnitude, from_zero) for magnitude in (False, True))
    return Case(_make_product(8, pack), answers, allowed)


# ---- number formats ----


def _make_exponents(random):
    special = [0, -0.0, 1e-45, -1e-39, np.inf, -np.inf, np.nan, 127.99999, 128, -126, -126.00001, -149, 3e38, -3e38]
    x = np.concatenate([special, random.uniform(-152, 130, NUMBERS // 2), random.standard_normal(NUMBERS)])
    return x[:NUMBERS].astype(np.float32)


def _exponentials(x):
    with np.errstate(over="ignore", under="ignore"):
        y = np.exp2(x.astype(np.float64))
        return np.where(y < 2.0**-126, 0, y).astype(np.float32)  # a subnormal result is 0


def _exponential_errors(x):
    y = np.nan_to_num(_exponentials(x).astype(np.float64), posinf=0)
    return EXP2_ERROR * y


def _make_pairs(random):
    """Random bits (every exponent, inf and NaN), all halfway cases of bf16, and numbers around fp16's range."""
    bits = random.integers(0, 2**32, 2 * NUMBERS, dtype=np.uint32)
    bits[: NUMBERS // 2] = bits[: NUMBERS // 2] & 0xFFFF0000 | 0x8000
    small = np.exp2(random.uniform(-26, 17, NUMBERS // 2)) * random.choice([-1, 1], NUMBERS // 2)
    small[: NUMBERS // 4] = to_fp16(small[: NUMBERS // 4]).view(np.float16)
    small *= random.choice([1, 1 + 2.0**-11], NUMBERS // 2)
    bits[NUMBERS // 2 : NUMBERS] = small.astype(np.float32).view(np.uint32)
    return random.permutation(bits).view(np.float32).reshape(NUMBERS, 2)


def _make_halves(random):
    bits = np.arange(NUMBERS, dtype=np.uint16)
    return np.stack([bits, random.permutation(bits)], -1)


CASES = {
    "indices": Case(_nothing, _indices),
    "block_barriers": Case(_words(THREADS), _rounds(np.arange(THREADS)[::-1])),
    "warp_barriers": Case(_words(THREADS), _rounds(np.arange(THREADS).reshape(4, 32)[:, ::-1].ravel())),
    "move_uint16": Case(lambda random: _words(16)(random).view(np.uint16), lambda x: x[::-1].copy()),
    **{
        f"move_{name}": Case(_words(32, words), lambda x: x[::-1].copy())
        for name, words in dict(uint32=1, float=1, uint2=2, float2=2, uint4=4, float4=4).items()
    },
    "copies": Case(_words(3, COPY_THREADS, 4), _copies),
    "shuffles": Case(_make_shuffles, _shuffles),
    "matrices": Case(_make_matrices, _matrices(transposed=False)),
    "matrices_transposed": Case(_make_matrices, _matrices(transposed=True)),
    "matrices_stored": Case(_make_matrices, _matrices_stored),
    "product_bf16": _product16("bf16"),
    "product_fp16": _product16("fp16"),
    "product_tf32": _product_tf32(),
    "product_tf32_from_zero": _product_tf32(from_zero=True),
    "exponentials": Case(_make_exponents, _exponentials, _exponential_errors),
    "tf32_numbers": Case(_words(NUMBERS), to_tf32),
    "packs_bf16": Case(_make_pairs, lambda pairs: from_bf16(to_bf16(pairs)), bf16=True),
    "packs_fp16": Case(_make_pairs, lambda pairs: to_fp16(pairs).view(np.float16)),
    "unpacks_bf16": Case(_make_halves, from_bf16),
    "unpacks_fp16": Case(_make_halves, from_fp16),
    "unpacks_again_bf16": Case(_make_halves, from_bf16),
    "unpacks_again_fp16": Case(_make_halves, from_fp16),
}
