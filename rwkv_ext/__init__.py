"""Eagle (RWKV-5.2) and Finch (RWKV-6) of arXiv 2404.05892: WKV ops, models, tokenizer, generation.

Data shards are in rwkv_ext.data, tools for testing kernels in rwkv_ext.testing.
"""

from . import reference
from .losses import linear_cross_entropy
from .models import RWKV, RWKVConfig, RWKVState
from .ops import wkv5, wkv5_step, wkv6, wkv6_step
from .tokenizer import WorldTokenizer
from .version import __version__

__all__ = [
    "RWKV",
    "RWKVConfig",
    "RWKVState",
    "WorldTokenizer",
    "__version__",
    "linear_cross_entropy",
    "reference",
    "wkv5",
    "wkv5_step",
    "wkv6",
    "wkv6_step",
]
