"""GPUs whose blocks have less shared memory than a chunk kernel asks for: the recurrent kernels take over.

The limits here lie between what the kernels of the main instance (Finch, bf16, N = 64) need, so that each of them in
turn does not fit: backward 90 KiB, segment summary 55 KiB, forward 50 KiB, as their launches say below.
"""

import pytest
import torch
from emulator.build import PLAIN_MAIN
from emulator.ops import Emulator, EmulatorError
from kernel_cases import MAIN, Case, complaints

from rwkv_ext import reference
from rwkv_ext.testing import make_inputs, outputs_and_gradients

pytestmark = pytest.mark.cpu
BOTH = ("y", "state_out")


def emulator(**settings):
    return Emulator(PLAIN_MAIN, **settings)


def kernels_of(run):
    """Return {name without template arguments: bytes of shared memory} of the last call."""
    return {x.kernel.split("rwkv::")[1].split("<")[0].split("(")[0]: x.shared_bytes for x in run.launches}


@pytest.fixture(scope="module")
def inputs():
    torch.set_num_threads(1)
    return make_inputs("6.0", 1, 300, 1, 64, dtype=torch.bfloat16, parameter_dtype=torch.bfloat16, regime="mixed")


@pytest.fixture(scope="module")
def needs(inputs):
    """Bytes of shared memory by kernel, where everything fits."""
    run = emulator(segment_tokens=128)
    y, state_out, saved = run.forward(*inputs)
    found = kernels_of(run)
    run.backward(y, state_out, *inputs[:5], saved)
    found |= kernels_of(run)
    assert found["wkv_forward_kernel"] < found["wkv_summary_kernel"] < found["wkv_backward_kernel"]
    return found


def test_without_room_for_the_backward_kernel_training_is_recurrent(inputs, needs):
    run = emulator(most_shared_bytes=needs["wkv_backward_kernel"] - 1)
    *_, saved = run.forward(*inputs)
    assert run.plan.kernel == "recurrent", "scores would be of no use to the kernel that reads them"
    assert not saved.scores.any()
    run.forward(*inputs, save=False)
    assert run.plan.kernel == "chunk"

    actual = outputs_and_gradients(run.wkv6, inputs)
    assert run.plan.kernel == "recurrent" and "wkv_recurrent_backward_kernel" in kernels_of(run)
    exact = outputs_and_gradients(reference.wkv6, inputs.double())
    case = Case(MAIN._replace(kernel="recurrent"), "mixed", 300, "no", 0, True, BOTH, "contiguous")
    plain = outputs_and_gradients(reference.wkv6, inputs)
    assert not (wrong := complaints(case, inputs, actual, exact, plain)), "\n".join(wrong)


def test_without_room_for_the_summary_kernel_segments_are_summed_up_token_by_token(inputs, needs):
    run = emulator(most_shared_bytes=needs["wkv_summary_kernel"] - 1, segment_tokens=128)
    y, state_out, _ = run.forward(*inputs, save=False)
    assert {"wkv_recurrent_summary_kernel", "wkv_forward_kernel"} <= kernels_of(run).keys()
    whole = emulator().forward(*inputs, save=False)
    assert torch.allclose(y.float(), whole[0].float(), atol=0.02 * whole[0].float().abs().max().item())
    assert torch.allclose(state_out, whole[1], atol=2e-3 * whole[1].abs().max().item())


def test_without_room_for_the_forward_kernel_everything_is_recurrent(inputs, needs):
    few = needs["wkv_forward_kernel"] - 1
    run = emulator(most_shared_bytes=few)
    run.forward(*inputs, save=False)
    assert run.plan.kernel == "recurrent" and kernels_of(run).keys() == {"wkv_recurrent_forward_kernel"}
    with pytest.raises(EmulatorError, match="exit code 71"):
        emulator(kernel="chunk", most_shared_bytes=few).forward(*inputs, save=False)
