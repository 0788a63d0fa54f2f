"""Checkpoints of a run: FOLDER/step_N/ with weights, moments, config.toml, state.json and, last of all, DONE.

A checkpoint is written into a hidden folder, flushed to the disk and renamed, so step_N is complete or absent. Whatever
fails, the checkpoints before it stay as they were.
"""

import errno
import fcntl
import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from rwkv_ext.checkpoint.atomic_file import sync_folder
from train.distributed import Ranks
from train.optim import materialise_state


@dataclass
class Progress:
    """Where a run is: with weights and moments the whole state, because a step draws no random numbers."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen."""
    next_sample: int = 0
    """Number of samples used; the next step takes the samples numbered from next_sample + 1 on."""
    total_tokens: int = 0
    """Tokens at which the run ends; 0 while a run with a time limit has not been calibrated."""
    seconds: float = 0.0
    """Time the run has taken so far, over all its parts."""
    dtype: str = ""
    """The number format in use, "bf16" or "fp32"."""
    limits: list[float] = field(default_factory=list)
    """[train] minutes and tokens that total_tokens was chosen for."""


class CheckpointStore:
    """Saves, finds, checks and loads the checkpoints of one run's folder, which one run at a time may use."""

    def __init__(self, folder: str | Path, keep: int, ranks: Ranks) -> None:
        """Create and lock the folder (OSError if another run holds it) and clear what an interrupted save left."""
        self.folder, self._keep, self._ranks = Path(folder), keep, ranks
        self._lock = None
        error = None
        if ranks.first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = open(self.folder / ".lock", "w")
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for leftover in self.folder.glob(".step_*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            except BlockingIOError:
                error = OSError(f"checkpoint.folder {self.folder} is in use by another run; stop it or choose another")
            except OSError as problem:
                error = OSError(f"checkpoint.folder {self.folder} cannot be used ({problem}); choose another")
        ranks.raise_together(error)

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return complete_checkpoints(self.folder)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, as rank 0 sees it."""
        return self._ranks.from_first(self.complete()[-1] if self._ranks.first and self.complete() else None)

    def save(
        self, model: nn.Module, optimizer: torch.optim.AdamW, progress: Progress, identity: dict[str, Any], config: str
    ) -> Path:
        """Write step_N and remove the oldest beyond `keep`. OSError on every rank, with advice, if any rank cannot."""
        target = self.folder / f"step_{progress.step}"
        if self.newest() == target:
            return target
        partial = self.folder / f".step_{progress.step}.partial"
        problem = None
        try:
            self._ranks.raise_together(self._make_room(partial, model))
            _dcp(dcp.save, _tensors(model, optimizer), dcp.FileSystemWriter(partial), self._ranks)
            self._ranks.raise_together(self._finish(partial, target, progress, identity, config))
        except (OSError, dcp.CheckpointException) as error:
            problem = _disk_error(error)
            if problem is None:
                raise
        if problem is not None:
            raise self._explain(problem, partial, target)
        return target

    def _make_room(self, partial: Path, model: nn.Module) -> OSError | None:
        """Rank 0: empty the partial folder and compare the free space with the size to come."""
        if self._ranks.first:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                need = 12 * sum(parameter.numel() for parameter in model.parameters())
                free = shutil.disk_usage(self.folder).free
                if free < need:
                    return OSError(errno.ENOSPC, f"{need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
            except OSError as error:
                return error
        return None

    def _finish(
        self, partial: Path, target: Path, progress: Progress, identity: dict[str, Any], config: str
    ) -> OSError | None:
        """Rank 0: add the text files, DONE last, make the folder visible and remove the oldest ones."""
        if self._ranks.first:
            state = {
                "progress": asdict(progress),
                "identity": identity,
                "ranks": self._ranks.size,
                "threads": self._ranks.threads,
                "torch": torch.__version__,
            }
            try:
                _write(partial / "config.toml", config)
                _write(partial / "state.json", json.dumps(state, indent=1))
                sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
                _write(partial / "DONE", json.dumps({"bytes": sizes}, indent=1))
                sync_folder(partial)
                shutil.rmtree(target, ignore_errors=True)  # a folder of that name without DONE
                os.rename(partial, target)
                sync_folder(self.folder)
            except OSError as error:
                return error
            for old in self.complete()[: -self._keep]:
                hidden = self.folder / f".{old.name}.old"
                os.rename(old, hidden)  # never half a checkpoint under a good name
                shutil.rmtree(hidden, ignore_errors=True)
        return None

    def _explain(self, error: OSError, partial: Path, target: Path) -> OSError:
        newest = self.newest()
        if self._ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        kept = f"{newest.name} is intact" if newest else "there is no earlier checkpoint"
        return OSError(
            error.errno or errno.EIO,
            f"checkpoint: {target} could not be saved ({error.strerror or error}); {kept}; free space on that disk, or "
            f"move {self.folder} to a larger one and change checkpoint.folder, then run the same command again",
        )

    @staticmethod
    def read_state(path: Path) -> dict[str, Any]:
        """Return state.json after comparing every file's size with DONE; ValueError if the checkpoint is damaged."""
        error = None
        for name, size in json.loads((path / "DONE").read_text())["bytes"].items():
            file = path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                error = f"{file} must have {size} bytes, got {'no file' if found is None else found}"
        if error:
            raise ValueError(
                f"resume: {error}; the checkpoint is damaged: remove {path} to go on from the one before it"
            )
        return json.loads((path / "state.json").read_text())

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        """Read weights and moments in place, for any number of ranks."""
        materialise_state(optimizer)
        _dcp(dcp.load, _tensors(model, optimizer), dcp.FileSystemReader(path), self._ranks)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    found = [(int(path.name[5:]), path) for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return [path for _, path in sorted(found) if (path / "DONE").is_file()]


def check_identity(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse a resume whose data or model is not that of the checkpoint: ValueError naming the key."""
    for key, value in current.items():
        if key not in saved:
            raise ValueError(
                f"resume: {path} does not say its {key}: an older version saved it, whose order may be another; "
                "finish that run with the version that began it, or set checkpoint.folder to a new folder "
                "to start afresh"
            )
        if saved[key] != value:
            raise ValueError(
                f"resume: {key} must be {saved[key]!r} as in {path}, got {value!r}; "
                "restore it, or set checkpoint.folder to a new folder to start afresh"
            )


def _tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Name every tensor of the checkpoint: weights by their .pth name, moments by name and kind."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter in optimizer.state, f"no moments for {name}"
            tensors |= {f"optim.{name}.{kind}": tensor for kind, tensor in optimizer.state[parameter].items()}
    return tensors


def _dcp(function: Any, tensors: dict[str, torch.Tensor], storage: Any, ranks: Ranks) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        if function is dcp.save:
            function(tensors, storage_writer=storage, no_dist=ranks.size == 1)
        else:
            function(tensors, storage_reader=storage, no_dist=ranks.size == 1)


def _disk_error(error: Exception) -> OSError | None:
    """Return the OSError inside what torch.distributed.checkpoint raises, or None if it is about something else."""
    if isinstance(error, OSError):
        return error
    for failure, _ in error.failures.values():
        while failure is not None:
            if isinstance(failure, OSError):
                return failure
            if "PytorchStreamWriter failed" in str(failure):  # torch.save hides the errno of its stream
                return OSError(errno.EIO, str(failure).splitlines()[0])
            failure = failure.__cause__ or failure.__context__
    return None


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
