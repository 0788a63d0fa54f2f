"""Text to a shard: every document encoded with the World tokenizer, followed by token 0, in the order of the inputs."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rwkv_ext.data.binidx import BinidxWriter
from rwkv_ext.data.documents import find_files, read_documents
from rwkv_ext.data.sampler import magic_prime
from rwkv_ext.tokenizer import WorldTokenizer

CONTEXT_LENGTHS = (512, 1024, 2048, 4096)


@dataclass
class Summary:
    """What `build` wrote."""

    documents: int = 0
    tokens: int = 0  # with the end-of-document tokens
    end_of_documents: int = 0
    text_bytes: int = 0

    def lines(self) -> list[str]:
        """Return the summary as printed."""
        text_tokens = self.tokens - self.end_of_documents
        ratio = f"{self.text_bytes / text_tokens:.3f} bytes a token" if text_tokens else "no text"
        return [
            f"documents        {self.documents:,}",
            f"tokens           {self.tokens:,} ({self.end_of_documents:,} of them end a document)",
            f"text             {self.text_bytes:,} bytes, {ratio}",
            *prime_lines(self.tokens),
        ]


def prime_lines(n_tokens: int) -> list[str]:
    """Return a line for each usual context length: RWKV-LM's magic_prime, or that the data is too short for one."""
    lines = []
    for ctx_len in CONTEXT_LENGTHS:
        try:
            lines.append(f"magic_prime      {magic_prime(n_tokens, ctx_len):,} for ctx_len {ctx_len}")
        except ValueError:
            lines.append(f"magic_prime      none for ctx_len {ctx_len}: that takes {3 * ctx_len:,} tokens")
    return lines


def build(
    inputs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    tokenizer: WorldTokenizer | None = None,
    text_key: str = "text",
    include: Sequence[str] = (),
    eod: bool = True,
    invalid_utf8: str = "error",
    overwrite: bool = False,
    show_progress: bool = True,
) -> Summary:
    """Write the shard OUT.bin, OUT.idx from files and folders; for one epoch in input order, byte for byte RWKV-LM's make_data.py.

    One document is in memory at a time. Nothing is written under the final names unless all of it succeeds. ValueError for text that
    is not what it should be (see `read_documents`) and for inputs without a document.
    """
    files = find_files(inputs, include)
    tokenizer = tokenizer or WorldTokenizer()
    summary = Summary()
    end = np.zeros(1, dtype=np.uint16)
    with BinidxWriter(out, overwrite) as writer, _progress(files, show_progress) as advance:
        for path in files:
            for document in read_documents(path, text_key, invalid_utf8):
                ids = tokenizer.encode_array(document.data)
                if tokenizer.decode_bytes(ids) != document.data:
                    raise ValueError(f"{path}: text must decode to itself, but does not before byte {document.end}; check the vocabulary")
                writer.add_document(np.concatenate([ids, end]) if eod else ids)
                summary.text_bytes += len(document.data)
                advance(document.end)
            advance(None)
        summary.documents, summary.tokens = writer.n_documents, writer.n_tokens
        summary.end_of_documents = writer.n_documents if eod else 0
        if not writer.n_documents:
            raise ValueError(f"the {len(files)} input files must hold a document, got none")
    return summary


@contextmanager
def _progress(files: Sequence[os.PathLike], show: bool):
    """Yield advance(bytes of the current file read so far, or None at its end): a bar on a terminal, else a line every 10 s."""
    sizes = [os.path.getsize(path) for path in files]
    total, done = sum(sizes), 0
    remaining = iter(sizes)

    def track(report: Callable[[int], None]) -> Callable[[int | None], None]:
        def advance(position: int | None) -> None:
            nonlocal done
            if position is None:
                done += next(remaining)
                position = 0
            report(done + position)

        return advance

    if not show:
        yield lambda position: None
    elif sys.stderr.isatty():
        columns = [TextColumn("encoding"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        from rich.console import Console

        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("encoding", total=total)
            yield track(lambda position: bar.update(task, completed=position))
    else:
        next_report = time.monotonic() + 10

        def report(position: int) -> None:
            nonlocal next_report
            if time.monotonic() >= next_report:
                next_report = time.monotonic() + 10
                print(f"encoding: {position / 1e6:,.0f} of {total / 1e6:,.0f} MB", file=sys.stderr, flush=True)

        yield track(report)
