"""Text to a shard: every document encoded with the World tokenizer and ended by token 0, in input order."""

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rwkv_ext.checkpoint.atomic_file import sync_folder
from rwkv_ext.data import pieces
from rwkv_ext.data.binidx import shard_files
from rwkv_ext.data.build_folder import BuildFolder
from rwkv_ext.data.document_store import DocumentStore
from rwkv_ext.data.documents import INVALID_UTF8, find_files
from rwkv_ext.data.input_file import STANDARD_INPUT
from rwkv_ext.data.piece_encoder import Encoded, PieceEncoder
from rwkv_ext.data.progress import Report, show_progress
from rwkv_ext.data.sampler import magic_prime
from rwkv_ext.tokenizer import WorldTokenizer

CONTEXT_LENGTHS = (512, 1024, 2048, 4096)
SECONDS_PER_RECORD = 2  # of the journal: what a crash costs at most, and the piece that is being written
FORMAT = 1  # of the journal and the files beside it


@dataclass
class Summary:
    """What `build` wrote."""

    documents: int = 0
    tokens: int = 0  # with the end-of-document tokens
    end_of_documents: int = 0
    text_bytes: int = 0
    skipped: int = 0  # documents left out because they were not UTF-8
    repaired: int = 0  # documents with U+FFFD in the place of what was not UTF-8
    empty: int = 0  # documents of white space alone that were dropped
    seconds: float = 0.0  # of this run and of those that it went on from

    def lines(self) -> list[str]:
        """Return the summary as printed."""
        text_tokens = self.tokens - self.end_of_documents
        ratio = f"{self.text_bytes / text_tokens:.3f} bytes a token" if text_tokens else "no text"
        faults = {"left out": self.skipped, "repaired with U+FFFD": self.repaired}
        speed = f", {self.text_bytes / 1e6 / self.seconds:,.1f} MB/s" if self.seconds else ""
        return [
            f"documents        {self.documents:,}",
            *(f"not UTF-8        {count:,} documents, {what}" for what, count in faults.items() if count),
            *([f"dropped          {self.empty:,} empty documents"] if self.empty else []),
            f"tokens           {self.tokens:,} ({self.end_of_documents:,} of them end a document)",
            f"text             {self.text_bytes:,} bytes, {ratio}",
            f"time             {self.seconds:,.1f} s{speed}",
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
    drop_empty: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Summary:
    """Write the shard OUT.bin, OUT.idx from files and folders: what RWKV-LM's make_data.py makes of one epoch
    whose lines are not shuffled, byte for byte, whatever the number of `threads` (None: one for each core).

    Each thread has a piece of 16 MiB of text in memory, or one document if that is longer. Nothing appears under the
    final names unless all of it succeeds. After a crash, Ctrl-C or a full disk the same call goes on where the journal
    in .NAME.building says, if it is for the same inputs and options. ValueError for text that is not what
    `read_documents` needs, for inputs without a document, and while another process builds OUT.
    """
    begin = time.monotonic()
    if invalid_utf8 not in INVALID_UTF8:
        raise ValueError(f"invalid_utf8 must be one of {', '.join(INVALID_UTF8)}, got {invalid_utf8!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, or None for one a core, got {threads}")
    files = find_files(inputs, include)
    encoder = PieceEncoder(tokenizer or WorldTokenizer(), text_key, eod, invalid_utf8, drop_empty)
    with BuildFolder(out, _identity(files, encoder)) as folder:
        task = _Build(files, encoder, folder, overwrite, threads or len(os.sched_getaffinity(0)), begin)
        return task.run(show_progress)


def _identity(files: Sequence[Path], encoder: PieceEncoder) -> str:
    """Return a digest of all that decides what the shard holds."""
    stats = [(str(path), 0, 0) if path == STANDARD_INPUT else _stat(path) for path in files]
    tokenizer = encoder.tokenizer
    options = [encoder.text_key, encoder.eod, encoder.invalid_utf8, encoder.drop_empty, pieces.PIECE_BYTES]
    vocabulary = hashlib.sha256(tokenizer.vocabulary.read_bytes()).hexdigest()
    whole = [FORMAT, stats, options, type(tokenizer).__qualname__, vocabulary]
    return hashlib.sha256(json.dumps(whole).encode(errors="surrogateescape")).hexdigest()


def _stat(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


class _Build:
    """One run of `build`, in the folder where an earlier one may have left something."""

    def __init__(self, files, encoder: PieceEncoder, folder: BuildFolder, overwrite: bool, threads: int, begin: float):
        self.files, self.encoder, self.folder = files, encoder, folder
        self.overwrite, self.threads, self.begin = overwrite, threads, begin
        record = folder.record or {}
        self.summary = Summary(**record.get("summary", {}))
        self.begin -= self.summary.seconds

    def run(self, show: bool) -> Summary:
        record = self.folder.record
        if record is None or record["stage"] != "publish":
            self._check_free()
            with show_progress("encoding", sum(map(pieces.file_size, self.files)), show) as report:
                store = DocumentStore(self.folder.path, "shard", state=record and record["store"])
                with contextlib.closing(store):
                    self._encode(store, report)
                    with self._explained(store):
                        self._finish(store)
                self._check_free()  # another program may have been faster
        self._publish()
        return self.summary

    def _check_free(self) -> None:
        for path in shard_files(self.folder.bin_path):
            if path.is_dir() or (path.exists() and not self.overwrite):
                advice = "choose another name, remove it or overwrite it"
                raise FileExistsError(f"{path}: already exists; {advice}")

    def _encode(self, store: DocumentStore, report: Report) -> None:
        """Encode every piece behind the journal's last one, and write the documents in order."""
        sources = pieces.find_sources(self.files)
        before = [0, *itertools.accumulate(source.size for source in sources)]
        number, piece, lines, done = self.folder.record["position"] if self.folder.record else (0, 0, 0, 0)
        if self.folder.record:
            report.skip(done)
            report.note(f"going on after {store.n_documents:,} documents, {store.n_tokens:,} tokens")
        elif self.folder.replaced:
            report.note(f"{self.folder.path}: held an unfinished build of other inputs or options; beginning anew")
        can_resume = STANDARD_INPUT not in self.files
        next_record = time.monotonic() + SECONDS_PER_RECORD
        numbered = _numbered(sources, self.encoder.text_key, number, piece)
        for (source, index), encoded in in_order(self.encoder.encode, numbered, self.threads):
            if source != number:
                number, lines = source, 0
            if encoded.fail:
                encoded.fail(lines)
                raise AssertionError("a line that could not be read was read when it was read again")
            with self._explained(store):
                store.add(encoded.ids, encoded.sizes)
            lines += encoded.lines
            self._count(encoded)
            status = f"{store.n_documents:,} documents, {store.n_tokens:,} tokens"
            done = before[source] + encoded.end
            report.update(done, status)
            if can_resume and time.monotonic() >= next_record:
                with self._explained(store):
                    store.sync()
                    self._write_record("encode", position=[number, index + 1, lines, done], store=store.state())
                next_record = time.monotonic() + SECONDS_PER_RECORD

    def _count(self, encoded: Encoded) -> None:
        self.summary.text_bytes += encoded.text_bytes
        self.summary.skipped += encoded.skipped
        self.summary.repaired += encoded.repaired
        self.summary.empty += encoded.blank

    def _write_record(self, stage: str, **fields) -> None:
        self.summary.seconds = time.monotonic() - self.begin
        self.folder.write({"stage": stage, "summary": asdict(self.summary), **fields})

    def _finish(self, store: DocumentStore) -> None:
        """Write the last index and the record after which only names are missing."""
        summary = self.summary
        summary.documents, summary.tokens = store.n_documents, store.n_tokens
        summary.end_of_documents = store.n_documents if self.encoder.eod else 0
        if not store.n_documents:
            left_out = {"were not UTF-8": summary.skipped, "were empty": summary.empty}
            left_out = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
            left_out = f" ({left_out})" if left_out else ""
            raise ValueError(f"the {len(self.files)} input files must hold a document, got none{left_out}")
        store.finish()
        self._write_record("publish", shards=[path.stem for path, _ in store.files()])

    def _publish(self) -> None:
        """Give the files their names. What has its name already is left as it is."""
        for stem in self.folder.record["shards"]:
            made_bin, made_idx = shard_files(self.folder.path / stem)
            bin_path, idx_path = shard_files(self.folder.bin_path)
            if made_bin.exists():
                # Between the renames there is no index at all rather than one that belongs to other tokens.
                idx_path.unlink(missing_ok=True)
                os.replace(made_bin, bin_path)
            if made_idx.exists():
                os.replace(made_idx, idx_path)
        sync_folder(self.folder.bin_path.parent)

    @contextlib.contextmanager
    def _explained(self, store: DocumentStore) -> Iterator[None]:
        """Say what a failed write means for the user."""
        try:
            yield
        except OSError as error:
            place = f"after {store.n_documents} documents and {store.n_tokens} tokens"
            kept = "what is finished was kept" if self.folder.record else "nothing was kept"
            message = f"cannot write {place}: {error.strerror}; {kept}: make room on the disk and run it again"
            raise OSError(error.errno, message, str(self.folder.bin_path)) from error


def _numbered(sources, text_key: str, first_source: int, first_piece: int) -> Iterator[tuple[tuple[int, int], object]]:
    """Yield ((source, piece), the piece itself) from there on."""
    for number in range(first_source, len(sources)):
        first = first_piece if number == first_source else 0
        for piece in enumerate(sources[number].pieces(text_key, first), start=first):
            yield (number, piece[0]), piece[1]


def in_order(work: Callable, numbered: Iterable[tuple], threads: int) -> Iterator[tuple]:
    """Yield (number, work(item)) for each (number, item), in order; `threads` work at once, one item waits for each.

    An error, of `work` or of the iterable, is raised in its turn.
    """
    if threads == 1:
        for number, item in numbered:
            yield number, work(item)
        return
    items, error = iter(numbered), None
    pending: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                try:
                    number, item = next(items)
                except StopIteration:
                    break
                except Exception as failure:
                    error = failure
                    break
                pending.append((number, pool.submit(work, item)))
                del item
                if len(pending) >= 2 * threads:
                    number, future = pending.popleft()
                    yield number, future.result()
            while pending:
                number, future = pending.popleft()
                yield number, future.result()
            if error:
                raise error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
