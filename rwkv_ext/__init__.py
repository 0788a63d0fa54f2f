"""Eagle (RWKV-5.2) and Finch (RWKV-6) of arXiv 2404.05892: WKV ops, models, tokenizer, data, generation."""

from . import reference
from .ops import wkv5, wkv5_step, wkv6, wkv6_step
from .version import __version__

__all__ = ["__version__", "reference", "wkv5", "wkv5_step", "wkv6", "wkv6_step"]
