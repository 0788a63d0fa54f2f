"""For every test: a fixed seed, torch's settings restored, and fresh memory full of NaN.

With deterministic algorithms on, torch fills what torch.empty and new_empty return (in C++ too) with NaN, or the
largest integer, so that an element that a kernel never writes cannot pass for a result.
"""

import os
import signal

# OpenMP's threads spin while they wait, and two suites on one machine then spend most of their time spinning at
# each other: ten times slower on two busy cores. libgomp reads this when torch loads it: set before the import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402

MARKERS = {
    "cuda": "needs a CUDA device; skipped, with the reason, where there is none",
    "cpu": "about the CPU kernels or about nothing on a device; skipped with --device cuda or emulated",
    "emulated": "about a GPU's kernels alone: --device emulated runs it without one",
    "slow": "takes more than a few seconds; leave out with -m 'not slow'",
    "dist": "starts several processes",
}


def pytest_addoption(parser):
    where = "where the tests of the ops (test_wkv_*) run: cpu, cuda, cuda:1 or emulated (emulated_device.py)"
    parser.addoption("--device", default="cpu", help=where)


def pytest_configure(config):
    # A shell's background job ignores Ctrl-C, and so would the programs that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    device = config.getoption("--device")
    # before any test module is imported: some make their tensors then
    if device == "emulated":
        import emulated_device

        emulated_device.use()
    elif device != "cpu" and torch.cuda.is_available():
        torch.set_default_device(device)


def reason_to_skip(device, item):
    """Return why a test does not run, or an empty string."""
    if device == "emulated":
        if item.get_closest_marker("cpu"):
            return "needs the CPU kernels"
        return "no CUDA device" if item.get_closest_marker("cuda") and not item.get_closest_marker("emulated") else ""
    if not torch.cuda.is_available():
        return "no CUDA device" if device != "cpu" or item.get_closest_marker("cuda") else ""
    return "needs the CPU kernels" if device != "cpu" and item.get_closest_marker("cpu") else ""


def pytest_collection_modifyitems(config, items):
    for item in items:
        if reason := reason_to_skip(config.getoption("--device"), item):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def torch_settings():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms() would import the whole of inductor
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def world():
    """The World tokenizer."""
    from rwkv_ext.tokenizer import WorldTokenizer

    return WorldTokenizer()


@pytest.fixture(scope="session")
def upstream():
    """The PyPI package rwkv's World tokenizer, with the vocabulary of ours."""
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    from rwkv_ext.vocabulary import WORLD

    return TRIE_TOKENIZER(str(WORLD))
