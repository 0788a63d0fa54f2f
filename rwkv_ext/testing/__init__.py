"""Tools for testing a WKV kernel against rwkv_ext.reference, here or in a port of your own; docs/testing.md shows how.

    inputs = make_inputs("6.0", batch=2, tokens=257, heads=3, size=64, regime="resets", dtype=torch.bfloat16)
    exact = outputs_and_gradients(reference.wkv6, inputs.double())
    plain = outputs_and_gradients(reference.wkv6, inputs)
    assert_close_ratio(outputs_and_gradients(my_wkv6, inputs), exact, plain, inputs=inputs)

Every op here has the signature of rwkv_ext.wkv6. Errors are relative root-mean-square errors, one per named tensor,
judged in fp64 and against the error that plain PyTorch makes in the same dtype: no tolerance has to be guessed.
"""

from .errors import DECAY_BINS, assert_close_ratio, decay_bins, error_ratio
from .gradients import GRADIENTS, gradcheck_wkv, outputs_and_gradients
from .inputs import WkvInputs, decay_regimes, layouts, make_inputs

__all__ = [
    "DECAY_BINS",
    "GRADIENTS",
    "WkvInputs",
    "assert_close_ratio",
    "decay_bins",
    "decay_regimes",
    "error_ratio",
    "gradcheck_wkv",
    "layouts",
    "make_inputs",
    "outputs_and_gradients",
]
