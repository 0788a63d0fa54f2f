"""Eagle (RWKV-5.2) and Finch (RWKV-6.0) as plain torch modules, named as in the released .pth files."""

from .config import RWKVConfig
from .rwkv import RWKV
from .state import RWKVState

__all__ = ["RWKV", "RWKVConfig", "RWKVState"]
