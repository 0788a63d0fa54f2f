"""What the ops say when the CUDA runtime answers with an error, which the emulated device can be told to do."""

import re

import pytest
import torch

import rwkv_ext
from rwkv_ext.testing import make_inputs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.emulated,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not fail when told to"),
]
NO_KERNEL_IMAGE, NOT_SUPPORTED = "209", "801"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            NO_KERNEL_IMAGE,
            "rwkv_ext was built for compute capability the emulator, which this GPU does not run; rebuild with "
            "TORCH_CUDA_ARCH_LIST set to the GPU's own (8.0 or newer), as `rwkv-ext doctor` says",
        ),
        (NOT_SUPPORTED, "operation not supported"),
    ],
)
def test_wkv_cuda_errors_name_the_op_and_what_it_ran_on(monkeypatch, error, text):
    inputs = make_inputs("6.0", 2, 3, 2, 32, dtype=torch.bfloat16)
    monkeypatch.setenv("EMULATED_DEVICE_ERROR", error)
    where = "wkv6: launch for shape [2, 3, 2, 32] and dtype bfloat16 on cpu failed: "
    with pytest.raises(RuntimeError, match=f"^{re.escape(where + text)}$"):
        rwkv_ext.wkv6(*inputs)
