"""Memory that runs out inside an op: torch's own words and type."""

import re
from types import SimpleNamespace

import pytest
import torch

import rwkv_ext
from rwkv_ext import _load
from rwkv_ext._registration import with_torchs_errors
from rwkv_ext.testing import make_inputs

TEXT = "CUDA out of memory. Tried to allocate 256.00 GiB. GPU 0 has a total capacity of 139.72 GiB"


def raising(error):
    def op(*_arguments):
        raise error

    return op


def test_wkv_out_of_memory_keeps_its_type():
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(TEXT)):
        with_torchs_errors(raising(RuntimeError(TEXT)), 1, 2)
    for error in (RuntimeError("wkv6: launch failed"), ValueError("wkv6: r must have 4 dimensions")):
        with pytest.raises(type(error), match=str(error)):
            with_torchs_errors(raising(error))
    assert with_torchs_errors(lambda *x: x, 1, 2) == (1, 2)


def test_wkv_out_of_memory_has_a_type_where_torch_gives_no_reason():
    """Torch 2.11 and 2.12 say this of any failed allocation."""
    error = RuntimeError("aoti_torch_aten_new_empty(self, ...) API call failed at torch/csrc/stable/ops.h, line 70")
    on_gpu, elsewhere = SimpleNamespace(is_cuda=True), torch.zeros(1)
    with pytest.raises(torch.OutOfMemoryError, match=f"CUDA out of memory in .*{re.escape(torch.__version__)}"):
        with_torchs_errors(raising(error), on_gpu)
    with pytest.raises(RuntimeError, match="API call failed") as caught:
        with_torchs_errors(raising(error), elsewhere)
    assert caught.type is RuntimeError


@pytest.mark.cpu
@pytest.mark.skipif(_load.error is not None, reason="the op library is not built")
def test_wkv_out_of_memory_on_the_cpu_is_torchs_sentence():
    """An output of 2^58 bytes: no machine has them, so nothing is written."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("this torch does not tell a library why a call failed")
    inputs = make_inputs("6.0", 1, 1, 1, 1)
    r = torch.empty(1).expand(1 << 28, 1 << 28, 1, 1)
    with pytest.raises(RuntimeError, match="allocate") as caught:
        rwkv_ext.wkv6(r, r, r, r, inputs.u, None)
    assert "API call failed" not in str(caught.value)
