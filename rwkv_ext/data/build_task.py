"""BuildTask: the stages of a build. Each can be entered where the journal says that an earlier run left it.

encode    pieces of the inputs -> documents, in order: shards at once, unless they have to be arranged
encoded   (documents that an earlier one equals are marked)
arrange   documents -> shards in their order or shuffled, without the marked ones
publish   shards -> their names
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rwkv_ext.checkpoint.atomic_file import sync_folder
from rwkv_ext.data import pieces
from rwkv_ext.data.binidx import is_part, part_names, shard_files
from rwkv_ext.data.build_folder import BuildFolder
from rwkv_ext.data.build_summary import Summary
from rwkv_ext.data.document_store import DocumentStore, abandon, open_at, read_blocks
from rwkv_ext.data.duplicates import DIGEST, find_duplicates
from rwkv_ext.data.input_file import STANDARD_INPUT
from rwkv_ext.data.piece_encoder import Encoded, PieceEncoder
from rwkv_ext.data.progress import Report, show_progress
from rwkv_ext.data.shuffle import BLOCK_TOKENS, Buckets, keys
from rwkv_ext.data.worker_threads import in_order

SECONDS_PER_RECORD = 2  # of the journal: what a crash costs at most, and the piece that is being written


@dataclass(frozen=True)
class Arrangement:
    """What becomes of the documents once they are encoded. ValueError for what cannot be."""

    shuffle: bool = False
    seed: int = 0
    epochs: int = 1
    drop_duplicates: bool = False
    shard_tokens: int | None = None  # in one shard, at most, unless one document has more; None: one shard

    def __post_init__(self):
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be 0 to 2**64 - 1, got {self.seed}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be 1 or more, got {self.epochs}")
        if self.epochs > 1 and not self.shuffle:
            advice = "each epoch has an order of its own; add --shuffle"
            raise ValueError(f"epochs must be 1 without shuffle, got {self.epochs}: {advice}")
        if self.shard_tokens is not None and self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be 1 or more, got {self.shard_tokens}")

    @property
    def is_needed(self) -> bool:
        """Whether documents cannot go straight to their shards."""
        return self.shuffle or self.drop_duplicates


class BuildTask:
    """One run of `build`, in the folder where an earlier one may have left something."""

    def __init__(
        self,
        files: Sequence[Path],
        states: Sequence[tuple | None],
        encoder: PieceEncoder,
        arrangement: Arrangement,
        folder: BuildFolder,
        overwrite: bool,
        threads: int,
        begin: float,
    ):
        self.files, self.states = files, states
        self.encoder, self.arrangement, self.folder = encoder, arrangement, folder
        self.overwrite, self.threads = overwrite, threads
        self.summary = Summary(**self.record.get("summary", {}))
        self.begin = begin - self.summary.seconds

    @property
    def record(self) -> dict:
        """What the journal says last."""
        return self.folder.record or {"stage": "encode"}

    def run(self, show: bool) -> Summary:
        if self.record["stage"] != "publish":
            self._check_free()
        if self.record["stage"] == "encode":
            with show_progress("encoding", sum(map(pieces.file_size, self.files)), show) as report:
                self._encode(report)
        if self.record["stage"] == "encoded":
            self._mark_duplicates()
        if self.record["stage"] == "arrange":
            passes = 2 * self.arrangement.epochs if self.arrangement.shuffle else 1
            total, what = 2 * self.record["encoded"]["tokens"] * passes, "shuffling" if passes > 1 else "copying"
            with show_progress(what, total, show) as report:
                self._arrange(report)
        self._publish()
        return self.summary

    # encode

    def _encode(self, report: Report) -> None:
        """Encode every piece behind the journal's last one, and write the documents in order."""
        record, arrangement = self.record, self.arrangement
        name, limit = ("encoded", None) if arrangement.is_needed else ("shard", arrangement.shard_tokens)
        with contextlib.closing(DocumentStore(self.folder.path, name, limit, record.get("store"))) as store:
            size = DIGEST.itemsize * store.n_documents if arrangement.drop_duplicates else 0
            digests = open_at(self.folder.path / "digests", size)
            try:
                self._encode_pieces(store, digests, report)
            finally:
                abandon(digests)
            self._check_unchanged()
            if not store.n_documents:
                raise ValueError(f"the {len(self.files)} input files must hold a document, got none{self._left_out()}")
            if arrangement.is_needed:
                with self._explained(store):
                    store.sync()
                    self._write_record("encoded", encoded=store.state())
            else:
                self._finish(store)

    def _encode_pieces(self, store: DocumentStore, digests, report: Report) -> None:
        sources = pieces.find_sources(self.files)
        before = [0, *itertools.accumulate(source.size for source in sources)]
        number, piece, lines, done = self.record.get("position", (0, 0, 0, 0))
        if store.n_documents:
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
                for part in encoded.digests:
                    digests.write(part.data)
            lines += encoded.lines
            self._count(encoded)
            done = before[source] + encoded.end
            report.update(done, f"{store.n_documents:,} documents, {store.n_tokens:,} tokens")
            if can_resume and time.monotonic() >= next_record:
                with self._explained(store):
                    store.sync()
                    _sync(digests)
                    position = [number, index + 1, lines, done]
                    self._write_record("encode", position=position, store=store.state())
                next_record = time.monotonic() + SECONDS_PER_RECORD
        with self._explained(store):
            _sync(digests)

    def _check_unchanged(self) -> None:
        for path, state in zip(self.files, self.states, strict=True):
            if state and pieces.file_state(path) != state:
                raise ValueError(f"{path}: must not change while it is read, got another size or time; run it again")

    def _count(self, encoded: Encoded) -> None:
        self.summary.text_bytes += encoded.text_bytes
        self.summary.skipped += encoded.skipped
        self.summary.repaired += encoded.repaired
        self.summary.empty += encoded.blank

    def _left_out(self) -> str:
        counts = {"were not UTF-8": self.summary.skipped, "were empty": self.summary.empty}
        counts = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f" ({counts})" if counts else ""

    # arrange

    def _mark_duplicates(self) -> None:
        """Write which documents are duplicates, one byte each, if they are to be dropped."""
        encoded = self.record["encoded"]
        if self.arrangement.drop_duplicates:
            path = self.folder.path / "duplicates"
            with self._explained(), open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, encoded["documents"])  # a map of a file with holes may fail later
            duplicates = np.memmap(path, bool, "r+", shape=(encoded["documents"],))
            find_duplicates(self.folder.path / "digests", duplicates)
            self.summary.duplicates = int(np.count_nonzero(duplicates))
            if self.summary.duplicates:
                lengths = self.encoder.tokenizer.byte_lengths
                for first, ids, sizes in self._encoded_blocks():
                    dropped = np.repeat(duplicates[first : first + len(sizes)], sizes)
                    self.summary.text_bytes -= int(lengths[ids[dropped]].sum(dtype=np.int64))
            duplicates.flush()
            with open(path, "r+b") as file:
                _sync(file)
        self.summary.text_bytes *= self.arrangement.epochs
        self._write_record("arrange", encoded=encoded, store=None, position=[0, 0])

    def _encoded_blocks(self, first: int = 0, begin: int = 0) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        paths = shard_files(self.folder.path / "encoded-00000")
        return read_blocks(*paths, self.record["encoded"]["documents"], BLOCK_TOKENS, first, begin)

    def _kept(self, first: int, count: int) -> np.ndarray:
        if not self.arrangement.drop_duplicates:
            return np.ones(count, bool)
        return np.fromfile(self.folder.path / "duplicates", bool, count, offset=first) == 0

    def _arrange(self, report: Report) -> None:
        state, limit = self.record["store"], self.arrangement.shard_tokens
        with contextlib.closing(DocumentStore(self.folder.path, "shard", limit, state)) as store:
            with self._explained(store):
                if self.arrangement.shuffle:
                    for epoch in range(self.record["position"][0], self.arrangement.epochs):
                        self._shuffle(epoch, store, report)
                else:
                    self._copy(store, report)
            self._finish(store)

    def _copy(self, store: DocumentStore, report: Report) -> None:
        position, begin = self.record["position"]
        for first, ids, sizes in self._encoded_blocks(position, begin):
            begin += len(ids)
            kept = self._kept(first, len(sizes))
            store.add([ids[np.repeat(kept, sizes)]], [sizes[kept]])
            report.update(2 * begin, f"{store.n_documents:,} documents")
            self._arranged(store, [first + len(sizes), begin])

    def _shuffle(self, epoch: int, store: DocumentStore, report: Report) -> None:
        """Deal all documents to buckets, unless that was done, then add one bucket after the other, in order."""
        n_tokens = self.record["encoded"]["tokens"]
        buckets = Buckets(self.folder.path, n_tokens)
        done = 4 * n_tokens * epoch
        if self.record["position"] == [epoch, 0]:
            buckets.clear()
            for first, ids, sizes in self._encoded_blocks():
                document_keys = keys(np.arange(first, first + len(sizes)), self.arrangement.seed, epoch)
                buckets.deal(ids, sizes, document_keys, self._kept(first, len(sizes)))
                done += 2 * len(ids)
                report.update(done, f"epoch {epoch + 1}: dealing")
            buckets.sync()
            self._arranged(store, [epoch, 1])
        if epoch == self.arrangement.epochs - 1:
            for path in shard_files(self.folder.path / "encoded-00000"):
                path.unlink(missing_ok=True)  # the buckets hold it all
        for number in range(self.record["position"][1] - 1, buckets.count):
            for ids, sizes in buckets.ordered(number):
                store.add([ids], [sizes])
                done += 2 * len(ids)
                report.update(done, f"epoch {epoch + 1}: {store.n_documents:,} documents")
            self._arranged(store, [epoch, number + 2])
            buckets.remove(number)
        self._arranged(store, [epoch + 1, 0])

    def _arranged(self, store: DocumentStore, position: list[int]) -> None:
        store.sync()
        self._write_record("arrange", encoded=self.record["encoded"], store=store.state(), position=position)

    # publish

    def _finish(self, store: DocumentStore) -> None:
        """Write the last index and the record after which only names are missing."""
        summary, name = self.summary, self.folder.name
        summary.documents, summary.tokens = store.n_documents, store.n_tokens
        summary.end_of_documents = store.n_documents if self.encoder.eod else 0
        with self._explained(store):
            store.finish()
            stems = [path.stem for path, _ in store.files()]
            names = [name]
            if self.arrangement.shard_tokens is not None:
                names = part_names(name, len(stems))
            self._check_free()  # another program may have been faster
            old = [path.name for path in self._taken() if path.name[: -len(".bin")] not in names]
            self._write_record("publish", shards=list(zip(stems, names, strict=True)), old=old)

    def _publish(self) -> None:
        """Give the files their names. What has its name already is left as it is."""
        beside = self.folder.bin_path.with_name  # the journal has no folders: this process may work in another one
        for name in self.record["old"]:
            beside(name).unlink(missing_ok=True)
        shards = [
            (*shard_files(self.folder.path / stem), *shard_files(beside(name))) for stem, name in self.record["shards"]
        ]
        self.summary.shards = [str(beside(name)) for _, name in self.record["shards"]]
        for made_bin, _, bin_path, idx_path in shards:
            if made_bin.exists():
                # Between the renames there is no index at all rather than one that belongs to other tokens.
                idx_path.unlink(missing_ok=True)
                os.replace(made_bin, bin_path)
        for _, made_idx, _, idx_path in shards:
            if made_idx.exists():
                os.replace(made_idx, idx_path)
        sync_folder(self.folder.bin_path.parent)

    def _taken(self) -> list:
        """Return the files in the place of the shards."""
        if self.arrangement.shard_tokens is None:
            return [path for path in shard_files(self.folder.bin_path) if path.exists()]
        parent, name = self.folder.bin_path.parent, self.folder.name
        return sorted(path for path in parent.iterdir() if is_part(path.name, name))

    def _check_free(self) -> None:
        for path in self._taken():
            if path.is_dir() or not self.overwrite:
                advice = "choose another name, remove it or overwrite it"
                raise FileExistsError(f"{path}: already exists; {advice}")

    def _write_record(self, stage: str, **fields) -> None:
        self.summary.seconds = time.monotonic() - self.begin
        self.folder.write({"stage": stage, "summary": asdict(self.summary), **fields})

    @contextlib.contextmanager
    def _explained(self, store: DocumentStore | None = None) -> Iterator[None]:
        """Say what a failed write means for the user."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileExistsError):
                raise
            encoded = self.record.get("encoded")
            done = (store.n_documents, store.n_tokens) if store else (encoded["documents"], encoded["tokens"])
            place = f"after {done[0]} documents and {done[1]} tokens"
            kept = "what is finished was kept" if self.folder.record else "nothing was kept"
            message = f"cannot write {place}: {error.strerror}; {kept}: make room on the disk and run it again"
            raise OSError(error.errno, message, str(self.folder.bin_path)) from error


def _numbered(sources, text_key: str, first_source: int, first_piece: int) -> Iterator[tuple[tuple[int, int], object]]:
    """Yield ((source, piece), the piece itself) from there on."""
    for number in range(first_source, len(sources)):
        first = first_piece if number == first_source else 0
        for piece in enumerate(sources[number].pieces(text_key, first), start=first):
            yield (number, piece[0]), piece[1]


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
