"""Text to a shard: every document encoded with the World tokenizer and ended by token 0, in input order."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from rwkv_ext.data.binidx import BinidxWriter
from rwkv_ext.data.documents import find_files, read_documents
from rwkv_ext.data.input_file import STANDARD_INPUT
from rwkv_ext.data.sampler import magic_prime
from rwkv_ext.tokenizer import WorldTokenizer

CONTEXT_LENGTHS = (512, 1024, 2048, 4096)
SECONDS_PER_LINE = 10  # of progress, where there is no terminal


@dataclass
class Summary:
    """What `build` wrote."""

    documents: int = 0
    tokens: int = 0  # with the end-of-document tokens
    end_of_documents: int = 0
    text_bytes: int = 0
    skipped: int = 0  # documents left out because they were not UTF-8
    repaired: int = 0  # documents with U+FFFD in the place of what was not UTF-8

    def lines(self) -> list[str]:
        """Return the summary as printed."""
        text_tokens = self.tokens - self.end_of_documents
        ratio = f"{self.text_bytes / text_tokens:.3f} bytes a token" if text_tokens else "no text"
        faults = {"left out": self.skipped, "repaired with U+FFFD": self.repaired}
        return [
            f"documents        {self.documents:,}",
            *(f"not UTF-8        {count:,} documents, {what}" for what, count in faults.items() if count),
            f"tokens           {self.tokens:,} ({self.end_of_documents:,} of them end a document)",
            f"text             {self.text_bytes:,} bytes, {ratio}",
            *prime_lines(self.tokens),
        ]


def prime_lines(n_tokens: int) -> list[str]:
    """Return a line for each usual context length: RWKV-LM's magic_prime, or what the data lacks for one."""
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
    """Write the shard OUT.bin, OUT.idx from files and folders: what RWKV-LM's make_data.py makes of one epoch
    whose lines are not shuffled, byte for byte.

    One document is in memory at a time, of a table 1024. Nothing appears under the final names unless all of it
    succeeds. ValueError for text that is not what `read_documents` needs and for inputs without a document.
    """
    files = find_files(inputs, include)
    sizes = [0 if path == STANDARD_INPUT else path.stat().st_size for path in files]
    tokenizer = tokenizer or WorldTokenizer()
    summary = Summary()
    end = np.zeros(1, dtype=np.uint16)
    before = 0
    with BinidxWriter(out, overwrite) as writer, _progress(sum(sizes), show_progress) as report:
        for path, size in zip(files, sizes, strict=True):
            for document in read_documents(path, text_key, invalid_utf8):
                if document.data is None:
                    summary.skipped += 1
                    continue
                summary.repaired += not document.valid
                ids = tokenizer.encode_array(document.data)
                if tokenizer.decode_bytes(ids) != document.data:
                    what = f"the document that ends at byte {document.end}"
                    raise ValueError(f"{path}: {what} must decode to itself, but it does not; report this")
                writer.add_document(np.concatenate([ids, end]) if eod else ids)
                summary.text_bytes += len(document.data)
                report(before + document.end)
            before += size
        summary.documents, summary.tokens = writer.n_documents, writer.n_tokens
        summary.end_of_documents = writer.n_documents if eod else 0
        if not writer.n_documents:
            skipped = f" ({summary.skipped} were not UTF-8)" if summary.skipped else ""
            raise ValueError(f"the {len(files)} input files must hold a document, got none{skipped}")
    return summary


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yield report(bytes read so far): a bar on a terminal, a line every ten seconds elsewhere; total 0: unknown."""
    if not show:
        yield lambda done: None
    elif sys.stderr.isatty():
        columns = [TextColumn("encoding"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("encoding", total=total or None)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield _LineProgress(total).report


class _LineProgress:
    def __init__(self, total: int):
        self.total, self.next_line = total, time.monotonic() + SECONDS_PER_LINE

    def report(self, done: int) -> None:
        if time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SECONDS_PER_LINE
            whole = f" of {self.total / 1e6:,.1f}" if self.total else ""
            print(f"encoding: {done / 1e6:,.1f}{whole} MB", file=sys.stderr, flush=True)
