"""The run configuration: types, limits, suggestions, overrides, and the files in train/configs."""

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

import train.config
from train.config import Config
from train.config_file import TABLES, apply_override, dump_config, load_config, parse_config

CONFIGS = sorted((Path(__file__).parents[1] / "train" / "configs").glob("*.toml"))
RELEASED = ["eagle-0.4b", "eagle-1.5b", "eagle-3b", "eagle-7b", "finch-0.1b", "finch-1.6b", "finch-3b", "finch-7b"]


def tables(**changes) -> dict:
    result = {
        "model": {"n_layer": 2, "n_embd": 64},
        "data": {"train": ["shard"], "ctx_len": 16},
        "train": {"global_batch": 8, "micro_batch": 2, "tokens": 1024},
        "optim": {"lr": 1e-3, "lr_final": 1e-4},
        "checkpoint": {"folder": "runs/x"},
        "log": {},
    }
    for table, values in changes.items():
        result.setdefault(table, {}).update(values)
    return result


def test_config_defaults_and_conversions():
    config = parse_config(tables(data={"train": "one"}, train={"tokens": 1e9, "minutes": 3}))
    assert config.data.train == ["one"]
    assert config.train.tokens == 10**9 and isinstance(config.train.tokens, int)
    assert config.train.minutes == 3.0 and isinstance(config.train.minutes, float)
    assert config.model.sizes() == {
        "version": "6.0", "n_layer": 2, "n_embd": 64, "vocab_size": 65536, "head_size": 64,
    }  # fmt: skip
    assert config.step_tokens == 128 and config.whole_steps(1025) == 1152 and config.whole_steps(1024) == 1024


def test_config_every_field_has_a_docstring():
    tree = ast.parse(inspect.getsource(train.config))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Table"):
            for item, following in zip(node.body, node.body[1:], strict=False):
                if isinstance(item, ast.AnnAssign):
                    assert isinstance(following, ast.Expr), f"{node.name}.{item.target.id} has no docstring"
                    assert isinstance(following.value.value, str)
    assert {kind.__name__ for kind in TABLES.values()} == {
        node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "Config"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {"n_layer": 1}}, r"\[modle\] is not a table of the configuration; did you mean model\?"),
        ({"zzz": {}}, r"\[zzz\] is not a table of the configuration; known: model, data"),
        ({"model": {"n_layers": 1}}, r"model.n_layers is not a key of the configuration; did you mean model.n_layer\?"),
        ({"train": {"weight_decay": 1}}, r"train.weight_decay is not a key .*; did you mean optim.weight_decay\?"),
        ({"model": {"n_layer": 2.5}}, r"model.n_layer must be a whole number, got 2.5"),
        ({"model": {"n_layer": True}}, r"model.n_layer must be a whole number, got True"),
        ({"model": {"n_layer": 0}}, r"model.n_layer must be at least 1, got 0"),
        ({"model": {"dim_att": "x"}}, r"model.dim_att must be a whole number, got 'x'"),
        ({"model": {"version": "7"}}, r'model.version must be "6.0" or "5.2", got \'7\''),
        ({"data": {"mode": "carry"}}, r'data.mode must be "stream" or "packed", got \'carry\''),
        ({"data": {"train": []}}, r"data.train must name at least one shard prefix, got \[\]"),
        ({"data": {"train": 3}}, r"data.train must be a list of strings, got 3"),
        ({"data": {"train": [3]}}, r"data.train must be a string, got 3"),
        ({"data": {"ctx_len": 0}}, r"data.ctx_len must be at least 1, got 0"),
        ({"data": {"prefetch": 0}}, r"data.prefetch must be at least 1, got 0"),
        ({"data": {"validation_windows": -1}}, r"data.validation_windows must be 0 or more, got -1"),
        ({"train": {"tokens": 0}}, r"train.tokens must be above 0, got 0; or set train.minutes"),
        ({"train": {"minutes": -1.0}}, r"train.minutes must be 0 or more, got -1.0"),
        ({"train": {"micro_batch": 0}}, r"train.micro_batch must be at least 1, got 0"),
        ({"train": {"activation_checkpointing": 1}}, r"train.activation_checkpointing must be true or false, got 1"),
        ({"optim": {"lr": "fast"}}, r"optim.lr must be a number, got 'fast'"),
        ({"optim": {"lr": float("inf")}}, r"optim.lr must be a number, got inf"),
        ({"train": {"minutes": float("nan")}}, r"train.minutes must be a number, got nan"),
        ({"train": {"seed": 1e30}}, r"train.seed must lie between 0 and 2\*\*63 - 1, got 1000"),
        ({"train": {"seed": -1}}, r"train.seed must lie between 0 and 2\*\*63 - 1, got -1"),
        ({"train": {"threads": 10**9}}, r"train.threads must be at most 4096, got 1000000000"),
        ({"optim": {"lr": 0.0}}, r"optim.lr must be above 0, got 0.0"),
        ({"optim": {"lr_final": 1.0}}, r"optim.lr_final must lie between 0 and optim.lr, got 1.0"),
        ({"optim": {"beta2": 1.0}}, r"optim.beta2 must be at least 0 and below 1, got 1.0"),
        ({"optim": {"warmup_floor": 2}}, r"optim.warmup_floor must lie between 0 and 1, got 2.0"),
        ({"optim": {"grad_clip": -1}}, r"optim.grad_clip must be 0 or more, got -1.0"),
        ({"checkpoint": {"folder": ""}}, r"checkpoint.folder must be a path, got ''"),
        ({"checkpoint": {"keep": 0}}, r"checkpoint.keep must be at least 1, got 0"),
        ({"checkpoint": {"every": -1}}, r"checkpoint.every must be 0 or more, got -1"),
        ({"log": {"every": 0}}, r"log.every must be at least 1, got 0"),
        ({"log": {"validate_every": -2}}, r"log.validate_every must be 0 or more, got -2"),
        ({"log": {"baselines": 3}}, r"log.baselines must be a table of numbers .*, got 3"),
        ({"log": {"baselines": {"a": "b"}}}, r"log.baselines.a must be a number, got 'b'"),
    ],
)  # fmt: skip
def test_config_mistakes_name_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_config(tables(**changes))


def test_config_missing_key_and_flat_table():
    broken = tables()
    del broken["model"]["n_embd"]
    with pytest.raises(ValueError, match="model.n_embd is missing; it has no default"):
        parse_config(broken)
    with pytest.raises(ValueError, match=r"model must be a table, got 3; write \[model\]"):
        parse_config(tables() | {"model": 3})


def test_config_accumulation():
    config = parse_config(tables(train={"global_batch": 24, "micro_batch": 2}))
    assert [config.train.accumulation(ranks) for ranks in (1, 2, 3, 12)] == [12, 6, 4, 1]
    message = (
        r"train.global_batch must be a multiple of micro_batch x ranks = 2 x 8 = 16, got 24; "
        r"nearest legal values of train.global_batch: 16, 32; or train.micro_batch: 1, 3"
    )
    with pytest.raises(ValueError, match=message):
        config.train.accumulation(8)
    with pytest.raises(ValueError, match=r"= 2 x 50 = 100, got 24; nearest legal values of train.global_batch: 100$"):
        config.train.accumulation(50)


def test_config_overrides(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(dump_config(parse_config(tables())))
    config = load_config(
        path,
        ["optim.lr=3e-3", "train.dtype=fp32", 'data.train=["a", "b"]', "log.baselines.unigram=6.9", "data.prime=5"],
    )
    assert config.optim.lr == 3e-3 and config.train.dtype == "fp32" and config.data.train == ["a", "b"]
    assert config.log.baselines == {"unigram": 6.9} and config.data.prime == 5
    for bad in ("optim.lr", "lr=3", "=3", "optim.=3"):
        with pytest.raises(ValueError, match="--set must look like table.key=value, got"):
            load_config(path, [bad])
    with pytest.raises(ValueError, match="lr must be a table, got 3"):
        apply_override({"optim": {"lr": 3}}, "optim.lr.x=1")
    with pytest.raises(ValueError, match=r"run.toml: optim.ler is not a key .* did you mean optim.lr\?"):
        load_config(path, ["optim.ler=1"])


def test_config_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.toml is not a file; examples are in train/configs"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(ValueError, match="broken.toml: not a TOML file"):
        load_config(tmp_path / "broken.toml")


def test_config_round_trip(tmp_path):
    odd = 'quote " back \\ tab \t line \n umlaut \u00fc del \x7f'
    config = parse_config(
        tables(
            data={"train": [odd, "b"], "prime": 7},
            optim={"lr": 0.1 + 0.2, "eps": 1e-18},
            log={"baselines": {odd: 1.5, "plain": 2}},
            checkpoint={"folder": odd, "resume": False},
        )
    )
    (tmp_path / "a.toml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "a.toml") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_shipped_files_load(path):
    config = load_config(path)
    assert isinstance(config, Config)
    assert path.read_text().startswith("# "), "the header comment says what the file is for"
    for table in fields(config):
        assert getattr(config, table.name) is not None


@pytest.mark.parametrize("name", RELEASED)
def test_config_released_sizes(name):
    """The table of the paper's appendix H: GPUs x micro-batch divides the batch; tokens per step."""
    path = Path(__file__).parents[1] / "train" / "configs" / f"{name}.toml"
    config = load_config(path)
    gpus, step_tokens, lr = {
        "0.1b": (1, 8_192, 6e-4),
        "0.4b": (24, 786_432, 4e-4),
        "1.5b": (48, 1_572_864, 3e-4),
        "1.6b": (48, 1_572_864, 3e-4),
        "3b": (48, 786_432, 2e-4),
        "7b": (64, 2_359_296, 1.5e-4),
    }[name.split("-")[1]]
    assert config.step_tokens == step_tokens and config.optim.lr == lr
    assert config.train.accumulation(gpus) == 1
    assert config.model.version == {"eagle": "5.2", "finch": "6.0"}[name.split("-")[0]]
