"""Numbers of a run on disk: log.jsonl (one JSON object per line, only ever appended) and TensorBoard events."""

import json
import sys
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to FOLDER/log.jsonl and scalars to FOLDER/tensorboard.

    Training never dies of its log: a failing write (a full disk, say) is reported once on stderr.
    """

    def __init__(self, folder: Path, tensorboard: bool, step: int) -> None:
        """Open both; events recorded after `step`, by a run that was stopped before its next checkpoint, are hidden."""
        self._path = folder / "log.jsonl"
        self._warned = False
        self._events = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                pass
            else:
                self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if self._path.is_file() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size:
            self._append("\n")  # the last writer was cut off inside a line

    def event(self, name: str, step: int, **values: Any) -> None:
        """Record a start or a resume: readers drop what was recorded after `step` before it."""
        self._append(json.dumps({"event": name, "step": step, **values}) + "\n")

    def record(self, step: int, tokens: int, **values: float | None) -> None:
        """Record measurements after optimizer step number `step`; None values are left out."""
        values = {key: value for key, value in values.items() if value is not None}
        self._append(json.dumps({"step": step, "tokens": tokens, **values}) + "\n")
        if self._events is not None:
            try:
                for key, value in values.items():
                    self._events.add_scalar(key, value, step)
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """Flush TensorBoard's writer."""
        if self._events is not None:
            try:
                self._events.close()
            except OSError as error:
                self._warn(error)

    def _append(self, text: str) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            print(f"log: {self._path} cannot be written ({error}); training goes on without it", file=sys.stderr)
            self._warned = True


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log.jsonl as one continuous run: what a later start or resume replaced is left out."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill
        if "event" in record:
            records = [kept for kept in records if kept["step"] <= record["step"]]
        else:
            records.append(record)
    return records
