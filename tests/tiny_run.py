"""A training run of a second or two, shared by the trainer's tests: shards of a small synthetic language and a config.

    PYTHONPATH=. python tests/tiny_run.py finch        records tests/golden/train_finch.json anew (or eagle)
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from rwkv_ext.data.binidx import BinidxWriter
from train.config_file import dump_config, parse_config
from train.metrics import read_log
from train.pretrain import main

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "train" / "pretrain.py"


def write_shard(prefix: Path, seed: int, documents: int = 60, length: int = 200, vocab: int = 128) -> None:
    """Write documents whose token is the one before plus 1, 2 or 3: learnable down to ln 3 = 1.1 nats."""
    rng = np.random.default_rng(seed)
    with BinidxWriter(prefix) as writer:
        for _ in range(documents):
            walk = np.cumsum(rng.integers(1, 4, length)) + rng.integers(0, vocab)
            writer.add_document([*(1 + walk % (vocab - 1)).tolist(), 0])


class TinyRun:
    """A folder with shards and a config; run() trains in this process, command() is for a process of its own."""

    def __init__(self, folder: Path, **changes: dict) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "train.bin").exists():
            write_shard(folder / "train", seed=0)
            write_shard(folder / "held_out", seed=1, documents=6)
        tables = {
            "model": {"n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 128, "mix_rank": 8, "decay_rank": 8},
            "data": {"train": str(folder / "train"), "validation": str(folder / "held_out"), "ctx_len": 32,
                     "vocabulary": "none", "validation_windows": 7},
            "train": {"global_batch": 8, "micro_batch": 2, "tokens": 8 * 32 * 12, "dtype": "fp32", "threads": 1,
                      "device": "cpu"},
            "optim": {"lr": 3e-3, "lr_final": 3e-4, "warmup_steps": 4},
            "checkpoint": {"folder": str(folder / "run"), "every": 6, "keep": 9, "export_dtype": "fp32"},
            "log": {"tensorboard": False, "picture": False, "validate_every": 6},
        }  # fmt: skip
        for table, values in changes.items():
            tables[table].update(values)
        if tables["model"].get("version") == "5.2":
            del tables["model"]["mix_rank"], tables["model"]["decay_rank"]
        self.config = parse_config(tables)
        self.path = folder / "run.toml"
        self.path.write_text(dump_config(self.config), encoding="utf-8")
        self.output = Path(self.config.checkpoint.folder)

    def run(self, *arguments: str) -> int:
        """Train in this process."""
        return main([str(self.path), *arguments])

    def command(self, *arguments: str, ranks: int = 1, script: Path = PRETRAIN) -> list[str]:
        """Return the command line of a run in its own process, or of torchrun."""
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        return [sys.executable, *launcher, str(script), str(self.path), *arguments]

    def start(self, *arguments: str, ranks: int = 1, script: Path = PRETRAIN) -> subprocess.Popen:
        """Start command() with its output kept."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self.command(*arguments, ranks=ranks, script=script), cwd=self.folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def start_ranks(self, script: Path = PRETRAIN) -> list[subprocess.Popen]:
        """Start two ranks without torchrun: nobody ends one because the other failed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(2):
            environment = os.environ | {
                "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            processes.append(
                subprocess.Popen(
                    self.command(script=script), cwd=self.folder, env=environment,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )
            )  # fmt: skip
        return processes

    def steps(self) -> list[dict]:
        """Return the log's record of every step."""
        return [record for record in read_log(self.output / "log.jsonl") if "loss" in record]

    def losses(self) -> list[float]:
        """Return the loss of every step."""
        return [record["loss"] for record in self.steps()]

    def grad_norms(self) -> list[float]:
        """Return every step's gradient norm; AdamW and clipping hide a wrong scale of the gradient from the losses."""
        return [record["grad_norm"] for record in self.steps()]

    def validations(self) -> list[float]:
        """Return the validation losses."""
        return [r["validation_loss"] for r in read_log(self.output / "log.jsonl") if "validation_loss" in r]

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the exported model."""
        return torch.load(self.output / "final.pth", weights_only=True)

    def copy_checkpoint(self, step: int, target: "TinyRun") -> None:
        """Give another run one of this run's checkpoints and the log up to its end."""
        target.output.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.output / f"step_{step}", target.output / f"step_{step}")
        shutil.copy(self.output / "log.jsonl", target.output / "log.jsonl")


def record_golden(name: str) -> None:
    """Write the losses of twenty steps, the changes to the tiny configuration, and the command that does so."""
    config = {
        "model": {"version": {"finch": "6.0", "eagle": "5.2"}[name]},
        "train": {"tokens": 20 * 8 * 32},
        "optim": {"lr": 1e-2, "lr_final": 1e-3},
        "log": {"validate_every": 10},
    }
    with tempfile.TemporaryDirectory() as folder:
        run = TinyRun(Path(folder), **config)
        if run.run() != 0:
            raise SystemExit(1)
        golden = {
            "command": f"PYTHONPATH=. python tests/tiny_run.py {name}",
            "torch": torch.__version__,
            "config": config,
            "losses": run.losses(),
            "grad_norms": run.grad_norms(),
            "validation_losses": run.validations(),
        }
    path = ROOT / "tests" / "golden" / f"train_{name}.json"
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    record_golden(sys.argv[1])
