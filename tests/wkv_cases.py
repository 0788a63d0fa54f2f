"""The cases that the forward and backward tests of the ops share."""

import torch

from rwkv_ext import ops, reference

OPS = {"5.2": ops.wkv5, "6.0": ops.wkv6}
REFERENCES = {"5.2": reference.wkv5, "6.0": reference.wkv6}
# version, B, T, H, N, regime: a saved chunk is 128 tokens, a recomputed block 16.
SHAPES = [
    ("6.0", 1, 0, 2, 64, "typical"),
    ("5.2", 2, 1, 3, 64, "mixed"),
    ("6.0", 3, 15, 2, 3, "near_one"),
    ("5.2", 1, 16, 1, 40, "huge"),
    ("6.0", 2, 17, 3, 32, "huge"),
    ("6.0", 1, 31, 1, 1, "mixed"),
    ("5.2", 3, 33, 2, 1, "near_zero"),
    ("6.0", 1, 127, 2, 40, "resets"),
    ("6.0", 2, 128, 1, 16, "near_zero"),
    ("5.2", 1, 129, 1, 128, "typical"),
    ("6.0", 1, 129, 1, 128, "mixed"),
    ("5.2", 2, 200, 2, 32, "near_one"),
    ("6.0", 2, 257, 2, 64, "typical"),
    ("5.2", 1, 300, 2, 3, "resets"),
    ("6.0", 1, 300, 2, 5, "huge"),
    ("6.0", 0, 4, 2, 8, "typical"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name(case):
    version, batch, tokens, heads, size, regime = case
    return f"v{version[0]}-B{batch}-T{tokens}-H{heads}-N{size}-{regime}"
