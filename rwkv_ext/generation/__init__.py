"""Texts from models as they are written: what generate() and generate_batch() return, and what that is made of."""

from .batch import BatchGeneration
from .continuation import Continuation, TokenLogprob
from .generation import Generation
from .options import GenerateOptions

__all__ = ["BatchGeneration", "Continuation", "GenerateOptions", "Generation", "TokenLogprob"]
