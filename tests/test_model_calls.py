"""RWKV.forward, hidden and step: splitting, packing, decoding, checkpointing, compilation, dtypes, messages."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from model_cases import SMALL, one_thread, random_model, random_tokens  # noqa: F401

from rwkv_ext.losses import linear_cross_entropy
from rwkv_ext.models import RWKV, RWKVState, time_mix

KINDS = pytest.mark.parametrize("kind", SMALL)
CLOSE = dict(rtol=1e-10, atol=1e-10)


def random_state(config, batch, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = [x.shape for x in RWKVState.zeros(config, batch)]
    return RWKVState(*(torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes))


def gradients(outputs, leaves):
    """Gradients of a fixed random scalar of the outputs, None as zeros."""
    generator = torch.Generator().manual_seed(5)
    total = sum((torch.randn(x.shape, generator=generator).to(x) * x).sum() for x in outputs)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if x is None else x for x, leaf in zip(found, leaves, strict=True)]


def assert_all_close(actual, expected, **tolerance):
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or CLOSE))


@KINDS
@pytest.mark.parametrize("cut", [0, 1, 10, 23])
def test_split_with_carried_state_is_the_whole(kind, cut):
    model = random_model(SMALL[kind], dtype=torch.float64)
    tokens, start = random_tokens(model.config, 2, 23), random_state(model.config, 2)
    leaves = [*model.parameters(), *start]
    logits, end = model(tokens, start)
    first, state = model(tokens[:, :cut], start)
    second, split_end = model(tokens[:, cut:], state)
    split = (torch.cat([first, second], 1), *split_end)
    assert_all_close(split, (logits, *end))
    assert_all_close(gradients(split, leaves), gradients((logits, *end), leaves))


@KINDS
@pytest.mark.parametrize("carried", [True, False], ids=["carried", "start"])
def test_packed_is_separate(kind, carried):
    """Empty sequences included; a state per sequence, in and out, with all gradients."""
    model = random_model(SMALL[kind], dtype=torch.float64)
    cuts = [0, 0, 1, 7, 7, 20]
    tokens = random_tokens(model.config, 1, cuts[-1])
    start = random_state(model.config, len(cuts) - 1) if carried else None
    logits, end = model(tokens, start, torch.tensor(cuts))
    assert end.wkv.shape[1] == len(cuts) - 1
    parts = []
    for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        row = None if start is None else RWKVState(*(x[:, i : i + 1] for x in start))
        parts.append(model(tokens[:, a:b], row))
    separate = [torch.cat([x for x, _ in parts], 1)]
    separate += [torch.cat([state[field] for _, state in parts], 1) for field in range(3)]
    assert_all_close((logits, *end), separate)
    leaves = [*model.parameters(), *(start or ())]
    assert_all_close(gradients((logits, *end), leaves), gradients(separate, leaves))


@KINDS
def test_step_is_forward_in_place(kind):
    model = random_model(SMALL[kind], dtype=torch.float64)
    tokens = random_tokens(model.config, 3, 6)
    state = RWKVState(*(x.detach() for x in random_state(model.config, 3)))
    pointers = [x.data_ptr() for x in state]
    logits, end = model(tokens, state.clone())
    for t in range(6):
        stepped = model.step(tokens[:, t], state)
        torch.testing.assert_close(stepped, logits[:, t], **CLOSE)
        assert not stepped.requires_grad
    assert_all_close(state, end.detach())
    assert [x.data_ptr() for x in state] == pointers


@KINDS
def test_forward_leaves_its_state_alone_and_returns_new_memory(kind):
    model = random_model(SMALL[kind])
    state = random_state(model.config, 1, torch.float32).detach()
    before = state.clone()
    _, end = model(random_tokens(model.config, 1, 0), state)
    assert_all_close(end, before)
    model.step(random_tokens(model.config, 1), end.detach())
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


@KINDS
def test_no_tokens_and_no_sequences(kind):
    model = random_model(SMALL[kind])
    logits, state = model(torch.empty(2, 0, dtype=torch.int64))
    assert logits.shape == (2, 0, model.config.vocab_size) and not any(x.any() for x in state)
    logits, state = model(torch.empty(0, 4, dtype=torch.int64))
    assert logits.shape == (0, 4, model.config.vocab_size) and state.batch == 0
    assert model.step(torch.empty(0, dtype=torch.int64), state.detach()).shape == (0, model.config.vocab_size)


@KINDS
def test_targets_give_the_loss_of_the_logits(kind):
    model = random_model(SMALL[kind], dtype=torch.float64)
    tokens, targets = random_tokens(model.config, 2, 9), random_tokens(model.config, 2, 9, seed=1)
    targets[0, :3] = -100
    loss, state = model(tokens, targets=targets)
    logits, expected_state = model(tokens)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()), **CLOSE)
    assert_all_close(state, expected_state)
    hidden, _ = model.hidden(tokens)
    torch.testing.assert_close(model.head(hidden), logits, **CLOSE)
    parameters = list(model.parameters())
    expected = linear_cross_entropy(hidden, model.head.weight, targets)
    assert_all_close(gradients([loss], parameters), gradients([expected], parameters))


@KINDS
def test_activation_checkpointing_changes_no_bit(kind):
    model = random_model(SMALL[kind])
    tokens, start = random_tokens(model.config, 2, 11), random_state(model.config, 2, torch.float32)
    leaves = [*model.parameters(), *start]
    found = []
    calls = []
    model.blocks[1].att.register_forward_hook(lambda *_: calls.append(1))
    for model.activation_checkpointing in (False, True):
        logits, end = model(tokens, start)
        found.append([logits, *end, *gradients((logits, *end), leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert len(calls) == 3, "the block runs once, and with checkpointing once more in the backward pass"


@pytest.mark.parametrize("mode", ["fp32", "autocast", "bf16"])
@KINDS
def test_decay_bonus_and_state_are_fp32(kind, mode, monkeypatch):
    """What reaches the op: r, k, v in the activations' dtype; omega, u and state in fp32 whatever that is."""
    seen = []
    cls = time_mix.EagleTimeMix if kind == "eagle" else time_mix.FinchTimeMix
    wkv, step = cls._wkv, cls._wkv_step

    def spy(op):
        def call(r, k, v, w, u, state, *rest):
            seen.append([x.dtype for x in (r, k, v, w, u, state)])
            return op(r, k, v, w, u, state, *rest)

        return staticmethod(call)

    monkeypatch.setattr(cls, "_wkv", spy(wkv))
    monkeypatch.setattr(cls, "_wkv_step", spy(step))
    monkeypatch.setattr(RWKV, "_fused_step", lambda self: None)  # which does not come by here
    model = random_model(SMALL[kind]).to(torch.bfloat16 if mode == "bf16" else torch.float32)
    low = torch.float32 if mode == "fp32" else torch.bfloat16
    state = model.initial_state(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        logits, end = model(random_tokens(model.config, 1, 4), state)
        model.step(random_tokens(model.config, 1), end.detach())
    assert len(seen) == 2 * model.config.n_layer
    assert all(dtypes == [low] * 3 + [torch.float32] * 3 for dtypes in seen)
    assert logits.dtype == end.att_shift.dtype == low and end.wkv.dtype == torch.float32


@KINDS
def test_autocast_is_near_fp32(kind):
    """Under bf16 autocast the logits stay within 2% (relative RMS) of fp32."""
    model = random_model(SMALL[kind])
    tokens = random_tokens(model.config, 2, 19)
    expected, _ = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(tokens)
        loss, _ = model(tokens, targets=tokens)
    loss.backward()
    assert (logits.float() - expected).norm() <= 2e-2 * expected.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@KINDS
def test_time_state_is_where_every_text_starts(kind):
    """The parameter is [H, value, key]; it starts forward, step and packed sequences, and gets their gradients."""
    model = random_model(SMALL[kind], dtype=torch.float64)
    tokens = random_tokens(model.config, 1, 12)
    plain = model(tokens)[0]
    model.enable_time_state()
    model.enable_time_state()
    torch.testing.assert_close(model(tokens)[0], plain, **CLOSE)
    tuned = [block.att.time_state for block in model.blocks]
    with torch.no_grad():
        for layer, p in enumerate(tuned):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(layer)))
    zeros = RWKVState.zeros(model.config, 1, dtype=torch.float64)
    given = zeros._replace(wkv=torch.stack([p.transpose(1, 2) for p in tuned]).unsqueeze(1))
    logits, end = model(tokens)
    expected, expected_end = model(tokens, given)
    assert not torch.allclose(logits, plain, rtol=1e-2, atol=1e-2)
    assert_all_close((logits, *end), (expected, *expected_end))
    assert_all_close(gradients([logits], tuned), gradients([expected], tuned))
    packed, _ = model(tokens.repeat(1, 2), cu_seqlens=torch.tensor([0, 12, 24]))
    assert_all_close(packed.split(12, 1), (logits, logits))
    start = model.initial_state(2)
    torch.testing.assert_close(model.step(tokens[:, 0].repeat(2), start.detach())[1], logits[0, 0], **CLOSE)
    assert torch.equal(tuned[0][0], model.initial_state(1).wkv[0, 0, 0].T), "step must not reach the parameter"


@pytest.mark.parametrize("kind, cuts", [("eagle", None), ("finch", [0, 2, 2, 9])], ids=["eagle-state", "finch-packed"])
def test_compiles_without_graph_breaks(kind, cuts):
    torch._dynamo.reset()
    model = random_model(dataclasses.replace(SMALL[kind], n_layer=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 17):
        start = model.initial_state(1 if cuts is None else len(cuts) - 1)
        call = dict(targets=random_tokens(model.config, 1, length, seed=1), state=start)
        if cuts is not None:
            call["cu_seqlens"] = torch.tensor([*cuts[:-1], length])
        tokens, parameters = random_tokens(model.config, 1, length), list(model.parameters())
        (loss, end), (expected, expected_end) = compiled(tokens, **call), model(tokens, **call)
        assert_all_close((loss, *end), (expected, *expected_end), rtol=1e-5, atol=1e-6)
        assert_all_close(gradients([loss], parameters), gradients([expected], parameters), rtol=1e-4, atol=1e-6)


def test_step_refuses_a_state_with_a_graph():
    model = random_model(SMALL["finch"])
    _, state = model(random_tokens(model.config, 1, 3))
    with pytest.raises(ValueError, match=r"state must not require a gradient, .* pass state.detach\(\).clone\(\)"):
        model.step(random_tokens(model.config, 1), state)


def test_messages_name_the_argument():
    model = random_model(SMALL["finch"])
    ids, state = random_tokens(model.config, 2, 5), model.initial_state(2)
    cases = [
        (TypeError, r"tokens must be int64 or int32, got torch.float32", lambda: model(ids.float())),
        (ValueError, r"tokens must have shape \[B, T\], got \[2\]", lambda: model(ids[:, 0])),
        (ValueError, r"tokens must have shape \[B\], got \[2, 5\]", lambda: model.step(ids, state)),
        (ValueError, r"tokens must be from 0 to vocab_size - 1 = 40, got 41", lambda: model(ids * 0 + 41)),
        (ValueError, r"vocab_size - 1 = 40, got -1; check the tokenizer", lambda: model(ids * 0 - 1)),
        (ValueError, r"state.att_shift must have shape \[2, 2, 64\], got \[2, 3, 64\]; use model.initial_state\(2\)",
         lambda: model(ids, model.initial_state(3))),
        (ValueError, r"state.wkv must have shape \[2, 2, 4, 16, 16\], got \[1, 2",
         lambda: model.step(ids[:, 0], state._replace(wkv=state.wkv[:1]))),
        (ValueError, r"tokens must have B = 1 with cu_seqlens, got \[2, 5\]; join",
         lambda: model(ids, cu_seqlens=torch.tensor([0, 5]))),
        (ValueError, r"cu_seqlens must have shape \[nseq \+ 1\], got \[1\]",
         lambda: model(ids[:1], cu_seqlens=torch.tensor([5]))),
        (ValueError, r"tokens must be on the model's device cpu, got meta; move them with .to\('cpu'\)",
         lambda: model(ids.to("meta"))),
        (ValueError, r"state.att_shift must be on the model's device cpu, got meta; move the state with state.to",
         lambda: model.step(ids[:, 0], state.to("meta"))),
        (ValueError, r"cu_seqlens must be on the tokens' device cpu, got meta; move it with .to\(tokens.device\)",
         lambda: model(ids[:1], cu_seqlens=torch.tensor([0, 5], device="meta"))),
        (TypeError, r"tokens must be a tensor \[B, T\], got list; use torch.tensor", lambda: model([[1, 2]])),
        (TypeError, r"cu_seqlens must be a tensor, got list", lambda: model(ids[:1], cu_seqlens=[0, 5])),
        (TypeError, r"state must be an RWKVState, got tuple", lambda: model(ids, tuple(state))),
        (ValueError, r"targets must have .*leading.* \[2, 5\], got \[2, 4\]",
         lambda: model(ids, targets=ids[:, :4])),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("cuts", [[0, 3, 2, 5], [0, 9], [1, 5], [0, 4]], ids=str)
def test_wrong_cu_seqlens_are_reported_by_the_op(cuts):
    model = random_model(SMALL["finch"])
    with pytest.raises(ValueError, match="shift_mix: cu_seqlens must (start with 0|end with T = 5|not decrease)"):
        model(random_tokens(model.config, 1, 5), cu_seqlens=torch.tensor(cuts))


def test_meta_device_takes_no_memory():
    with torch.device("meta"):
        model = RWKV(SMALL["finch"])
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match=r"emb.weight on the meta device; call model.to_empty"):
        model.init_weights()
