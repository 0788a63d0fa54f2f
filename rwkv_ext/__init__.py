"""Eagle (RWKV-5.2) and Finch (RWKV-6) of arXiv 2404.05892: WKV ops, models, tokenizer, generation.

Data shards are in rwkv_ext.data; rwkv_ext.testing has tools for those who write or port kernels.
"""

from . import reference, testing
from .generate import generate, generate_batch
from .generation import Generation
from .losses import linear_cross_entropy
from .models import RWKV, RWKVConfig, RWKVState
from .ops import wkv5, wkv5_step, wkv6, wkv6_step
from .tokenizer import WorldTokenizer
from .version import __version__

__all__ = [
    "Generation",
    "RWKV",
    "RWKVConfig",
    "RWKVState",
    "WorldTokenizer",
    "__version__",
    "generate",
    "generate_batch",
    "linear_cross_entropy",
    "reference",
    "testing",
    "wkv5",
    "wkv5_step",
    "wkv6",
    "wkv6_step",
]
