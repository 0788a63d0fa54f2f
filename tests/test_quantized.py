"""Int8 weights: their error, prefill and decoding with them, and what such a model refuses."""

import copy

import pytest
import torch
from model_cases import CASES, SMALL, random_model, random_tokens

from rwkv_ext import RWKV, RWKVConfig, RWKVState, generate
from rwkv_ext.models.fused_step import FusedStep
from rwkv_ext.models.quantized import QuantizedProjection, QuantizedRows

KINDS = pytest.mark.parametrize("kind", SMALL)


def dequantized_twin(model):
    """The same function in fp64, by ordinary modules."""
    twin = RWKV(model.config).double()
    tensors = {name: x.double() for name, x in model.state_dict().items() if not name.endswith(".scale")}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedProjection):
            tensors[f"{name}.weight"] = module.dequantized(torch.float64)
    twin.load_state_dict(tensors)
    return twin


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_number_is_within_half_a_step(dtype):
    matrix = torch.randn(7, 33, dtype=torch.float64).to(dtype) * torch.logspace(-4, 3, 7, dtype=torch.float64)[:, None]
    matrix = matrix.to(dtype)
    matrix[2] = 0
    weight, scale = QuantizedRows.of("head.weight", matrix)
    assert weight.dtype == torch.int8 and scale.dtype == torch.float32
    assert weight.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127, 127] and scale[2] == 0
    step = scale.double()[:, None]
    assert ((weight * step - matrix.double()).abs() <= 0.5001 * step).all()


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_prefill_and_steps_compute_with_the_dequantised_matrices(kind, dtype):
    """Within the rounding of the activations' dtype; the fused step (not fp64's) as well as the modules."""
    model = random_model(SMALL[kind], dtype=dtype).quantize_()
    exact_model = dequantized_twin(model)
    tokens = random_tokens(model.config, 2, 6)
    with torch.no_grad():
        exact, _ = exact_model(tokens)
        logits, state = model(tokens[:, :3])
        steps = [model.step(tokens[:, t], state) for t in range(3, 6)]
        whole, _ = model(tokens)
    bound = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert logits.dtype == steps[0].dtype == dtype
    assert error(whole, exact) < bound
    assert error(torch.cat([logits, torch.stack(steps, 1)], 1), exact) < bound


@pytest.mark.parametrize("name", CASES)
def test_logits_are_near_the_unquantised_ones(name):
    """Matrices of normal numbers, the worst case of a trained model's: a few percent of the logits."""
    model = random_model(CASES[name])
    tokens = random_tokens(model.config, 2, 40)
    with torch.no_grad():
        exact, _ = model(tokens)
        logits, _ = copy.deepcopy(model).quantize_()(tokens)
    assert 1e-4 < error(logits, exact.double()) < 0.05


@pytest.mark.parametrize("batch", [1, 3, 8, 9, 32, 33])
def test_steps_of_any_batch(batch):
    model = random_model(SMALL["finch"]).quantize_()
    exact_model, tokens = dequantized_twin(model), random_tokens(SMALL["finch"], batch)
    logits = model.step(tokens, model.initial_state(batch))
    assert error(logits, exact_model.step(tokens, exact_model.initial_state(batch))) < 3e-6


def test_the_fused_step_takes_it(monkeypatch):
    calls, call = [], FusedStep.__call__
    monkeypatch.setattr(FusedStep, "__call__", lambda *given: calls.append(1) or call(*given))
    model = random_model(SMALL["finch"])
    model.step(torch.tensor([1]), model.initial_state())
    model.quantize_()
    model.step(torch.tensor([1]), model.initial_state())
    assert len(calls) == 2


def test_matrices_and_nothing_else_become_integers():
    model = random_model(CASES["finch-32-64"])
    count, flops = model.parameter_count(), model.flops_per_token()
    before = sum(x.nbytes for x in model.state_dict().values())
    assert model.quantize_("int8") is model
    integers = {name for name, x in model.state_dict().items() if x.dtype == torch.int8}
    assert len(integers) == 8 * model.config.n_layer + 1 and "emb.weight" not in integers
    assert {"head.weight", "blocks.1.att.gate.weight", "blocks.2.ffn.value.weight"} <= integers
    assert sum(x.nbytes for x in model.state_dict().values()) < 0.5 * before
    assert (model.parameter_count(), model.flops_per_token()) == (count, flops)
    assert model.initial_state().att_shift.dtype == torch.float32


def test_a_cast_keeps_the_scales():
    model = random_model(SMALL["eagle"]).quantize_()
    scale, weight = model.head.scale.clone(), model.head.weight.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.head.scale, scale) and torch.equal(model.head.weight, weight)
    assert model.emb.weight.dtype == torch.bfloat16
    assert model.step(torch.tensor([1]), model.initial_state()).dtype == torch.bfloat16


@KINDS
def test_quantised_at_load_is_quantised_after(kind, tmp_path):
    """The same integers, read from a file one matrix at a time; with tuned initial states too."""
    model = random_model(SMALL[kind])
    model.enable_time_state()
    model.save_pretrained(tmp_path / "a.pth", dtype=torch.float32)
    loaded = RWKV.from_pretrained(tmp_path / "a.pth", quantize="int8")
    expected = model.quantize_().state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())
    low = RWKV.from_pretrained(tmp_path / "a.pth", dtype=torch.bfloat16, quantize="int8")
    assert low.initial_state().att_shift.dtype == low.emb.weight.dtype == torch.bfloat16
    assert low.head.scale.dtype == torch.float32


def test_its_state_dict_loads_into_another():
    model, other = random_model(SMALL["eagle"]).quantize_(), random_model(SMALL["eagle"], seed=1).quantize_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.head.weight, model.head.weight) and torch.equal(other.head.scale, model.head.scale)
    message = "head.weight must be int8 with a scale, got torch.float32; load it into a model that is not quantised"
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(random_model(SMALL["eagle"]).state_dict())
    assert torch.equal(other.head.weight, model.head.weight)


def test_generate_and_loss(world):
    model = RWKV(RWKVConfig(n_layer=2, n_embd=64, head_size=32)).quantize_()
    text = "".join(generate(model, world, "import ", max_tokens=5, seed=1))
    assert text == "".join(generate(model, world, "import ", max_tokens=5, seed=1))
    tokens = torch.randint(65530, (1, 9))
    with torch.no_grad():
        loss, state = model(tokens[:, :-1], targets=tokens[:, 1:])
        logits, _ = model(tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
    assert isinstance(state, RWKVState) and abs(loss - expected) < 1e-3 * expected


def test_training_is_refused():
    model = random_model(SMALL["finch"]).quantize_()
    tokens = random_tokens(model.config, 1, 4)
    message = "a model with int8 weights cannot be trained, got targets with gradients enabled; load it without quant"
    with pytest.raises(RuntimeError, match=message):
        model(tokens, targets=tokens)
    assert not model(tokens)[0].requires_grad
    model.emb.requires_grad_(True)
    with pytest.raises(RuntimeError, match="int8 weights cannot be trained, got an input that requires a gradient"):
        model(tokens)
    with pytest.raises(ValueError, match="init_weights: the weights must be floating point, got int8"):
        model.init_weights()


def test_saving_is_refused_and_leaves_what_is_there(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    model = random_model(SMALL["finch"]).quantize_()
    message = r"save_pretrained: .*a.pth must hold floating-point weights, got int8 ones, .*; keep the file"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(path)
    assert path.read_bytes() == b"old"


def test_wrong_use_is_refused(tmp_path):
    model = random_model(SMALL["finch"])
    for call in (model.quantize_, lambda kind: RWKV.from_pretrained(tmp_path / "none.pth", quantize=kind)):
        with pytest.raises(ValueError, match="quantize: kind must be \"int8\", got 'int4'"):
            call("int4")
    model.blocks[1].ffn.value.weight.data[3, 5] = float("inf")
    with pytest.raises(ValueError, match=r"quantize: blocks.1.ffn.value.weight must be finite, got NaN or infinity"):
        model.quantize_()
    assert not any(isinstance(module, QuantizedProjection) for module in model.modules())
    model = random_model(SMALL["finch"]).quantize_()
    with pytest.raises(ValueError, match="quantize: the model must have floating-point weights, got int8 ones already"):
        model.quantize_()
    with pytest.raises(ValueError, match="quantize: the model must have memory, got one on the meta device; load it"):
        random_model(SMALL["finch"]).to("meta").quantize_()
