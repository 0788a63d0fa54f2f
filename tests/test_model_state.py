"""RWKVState: shapes and dtypes, copies, forks, files."""

import pytest
import torch
from file_limits import largest_file
from model_cases import SMALL, one_thread, random_model, random_tokens  # noqa: F401
from safetensors.torch import save_file

from rwkv_ext.models import RWKVState

CONFIG = SMALL["finch"]


@pytest.fixture
def state():
    shapes = [x.shape for x in RWKVState.zeros(CONFIG, 2)]
    return RWKVState(*(torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)))


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_zeros(dtype):
    state = RWKVState.zeros(CONFIG, 3, dtype=dtype)
    assert [list(x.shape) for x in state] == [[2, 3, 64], [2, 3, 4, 16, 16], [2, 3, 64]]
    assert state.att_shift.dtype == state.ffn_shift.dtype == dtype
    assert state.wkv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not any(x.any() for x in state) and state.batch == 3
    assert all(x.is_meta for x in RWKVState.zeros(CONFIG, device="meta"))


def test_to_keeps_the_matrix_in_fp32(state):
    low = state.to(dtype=torch.bfloat16)
    assert [x.dtype for x in low] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert [x.dtype for x in state.to(dtype=torch.float64)] == [torch.float64] * 3
    assert all(x.is_meta and x.dtype == torch.float32 for x in state.to("meta"))
    assert_equal(state.to("cpu"), state)


def test_clone_is_new_memory_and_detach_is_not(state):
    grown = RWKVState(*(x.requires_grad_() for x in state))
    copy, view = grown.clone(), grown.detach()
    assert all(x.requires_grad for x in copy) and not any(x.requires_grad for x in view)
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(copy, grown, strict=True))
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(view, grown, strict=True))


def test_select_and_cat_are_copies_of_sequences(state):
    both = RWKVState.cat([state.select([1]), state.select([0])])
    assert_equal(both, RWKVState(*(x.flip(1) for x in state)))
    assert state.select([]).batch == 0 and state.select([1, 1, 0]).batch == 3
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(state.select([0, 1]), state, strict=True))


def test_fork_makes_independent_sequences():
    """Both copies of both rows go different ways, as they do when each is run by itself."""
    model = random_model(CONFIG, dtype=torch.float64)
    with torch.no_grad():
        _, state = model(random_tokens(CONFIG, 2, 5))
    before, forked = state.clone(), state.fork(2)
    assert forked.batch == 4
    logits = model.step(torch.tensor([1, 2, 3, 4]), forked)
    for row, token in enumerate((1, 2, 3, 4)):
        single = RWKVState(*(x[:, row // 2 : row // 2 + 1] for x in state)).clone()
        torch.testing.assert_close(model.step(torch.tensor([token]), single)[0], logits[row])
    assert_equal(state, before)
    with pytest.raises(ValueError, match=r"RWKVState.fork: n must be at least 1, got 0"):
        state.fork(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_file_round_trip_keeps_every_bit(state, dtype, tmp_path):
    state = state.to(dtype=dtype)
    state.save(tmp_path / "a.state")
    assert_equal(RWKVState.load(tmp_path / "a.state"), state)
    assert_equal(RWKVState.load(str(tmp_path / "a.state"), device="cpu"), state)
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]


def test_a_view_of_a_graph_is_saved_as_values(state, tmp_path):
    part = RWKVState(*(x.requires_grad_()[:, :1] for x in state))
    part.save(tmp_path / "a")
    assert_equal(RWKVState.load(tmp_path / "a"), part.detach())


def test_loading_something_else_is_refused(state, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"RWKVState.load: .*missing does not exist"):
        RWKVState.load(tmp_path / "missing")
    with pytest.raises(OSError, match=r"RWKVState.load: .* must be a readable file, got an error from it"):
        RWKVState.load(tmp_path)
    save_file({"wkv": state.wkv, "other": state.wkv.clone()}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be a file of RWKVState.save, got .* tensors \['other', 'wkv'\]"):
        RWKVState.load(tmp_path / "other")
    state.save(tmp_path / "cut")
    content = (tmp_path / "cut").read_bytes()
    for size in (0, 7, 200, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut must be a complete file of RWKVState.save, got one that cannot"):
            RWKVState.load(tmp_path / "cut")
    torch.save(list(state), tmp_path / "pickle")
    with pytest.raises(ValueError, match=r"pickle must be a complete file of RWKVState.save"):
        RWKVState.load(tmp_path / "pickle")


def test_a_full_disk_leaves_the_old_file(state, tmp_path):
    path = tmp_path / "a.state"
    state.save(path)
    message = r"RWKVState.save: .*a.state could not be written .*free space"
    with largest_file(4096), pytest.raises(OSError, match=message):
        RWKVState(*(x + 1 for x in state)).save(path)
    assert_equal(RWKVState.load(path), state)
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]
    with pytest.raises(FileNotFoundError, match=r"RWKVState.save: .*nowhere.* could not be written"):
        state.save(tmp_path / "nowhere" / "a.state")
