"""The demo's text: whole documents of the running Python's standard library, or of the user's path, in two sets.

The rules, in the order they are applied (Corpus.left_out names what each of them removed):
  tests       standard library only: nothing below a folder test, tests or idle_test, and no installed packages
  total       above MAX_TOTAL bytes the rest is left out
  text        not UTF-8, or with a zero byte; shorter than MIN_BYTES
  tables      a .py file above TABLE_BYTES of which TABLE_SHARE or more of the lines are literal data (data_lines)
  repeats     REPEAT_SHARE or more of its runs of three lines are in documents before it: copies and near copies
  length      standard library only: above MAX_BYTES a document is cut at its last whole line
Files are taken in the order of hashes of their names, which spreads any selection over all folders and is the same on
every run. The first HELD_OUT_SHARE of the bytes in that order are held out, whole documents only. Where there are fewer
than FEW documents, the last HELD_OUT_SHARE of each is held out instead.
"""

import ast
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_ext.checkpoint.atomic_file import atomic_write
from rwkv_ext.data.documents import read_documents

TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
MIN_BYTES = 200
TABLE_BYTES, TABLE_LINES, TABLE_SHARE = 4096, 5, 0.4
REPEAT_SHARE = 0.5
MAX_BYTES = 96 << 10
MAX_TOTAL = 64 << 20
HELD_OUT_SHARE, FEW = 0.05, 20


@dataclass(frozen=True)
class Document:
    """One document: its path below the source (with #LINE in a .jsonl file) and its UTF-8 text."""

    name: str
    data: bytes


@dataclass
class Corpus:
    """Both sets, and what was left out: reason -> [(name, bytes)]."""

    source: Path
    train: list[Document] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)
    left_out: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def drop(self, reason: str, name: str, size: int) -> None:
        """Note size bytes of a document that are in neither set."""
        self.left_out.setdefault(reason, []).append((name, size))

    def lines(self) -> list[str]:
        """Describe the sets and the rules that removed something."""
        out = [f"text          {self.source}"]
        for title, documents in (("train", self.train), ("held out", self.held_out)):
            size = sum(len(document.data) for document in documents)
            out.append(f"  {title:<12}{len(documents):,} documents, {size / 1e6:,.2f} MB")
        for reason, items in self.left_out.items():
            largest = sorted(items, key=lambda item: -item[1])[:3]
            names = ", ".join(name for name, _ in largest) + (", ..." if len(items) > 3 else "")
            size = sum(size for _, size in items)
            out.append(f"  left out    {size / 1e6:,.2f} MB: {reason} ({len(items)}: {names})")
        return out


def standard_library() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def collect(source: Path | None = None, without: Path | None = None) -> Corpus:
    """Apply the rules above to a file or folder, or to the standard library's .py files when source is None.

    The folder `without` is not looked into: what an earlier demo wrote below source is no text to learn from.
    FileNotFoundError for a path that does not exist; ValueError where too little text is left to train on.
    """
    corpus = Corpus(Path(source) if source else standard_library())
    if not corpus.source.exists():
        raise FileNotFoundError(f"demo: DATA must be a file or a folder, got {corpus.source}, which does not exist")
    documents = list(_select(corpus, _read(corpus, source is not None, without)))
    documents.sort(key=lambda document: _hash(document.name))  # a .jsonl file's lines have names, too
    if len(documents) < FEW or not _hold_out_whole(corpus, documents):
        _hold_out_ends(corpus, documents)
    size = sum(len(document.data) for document in corpus.train)
    if size < 100_000:
        raise ValueError(
            f"demo: DATA must leave at least 100,000 bytes of text to learn from, got {size:,} from {corpus.source}; "
            "give a larger file or folder"
        )
    return corpus


def write_jsonl(documents: list[Document], path: Path) -> None:
    """Write one JSON object a line, {"name", "text"}: an input of `rwkv-ext data build`. Whole or not at all."""
    records = ({"name": document.name, "text": document.data.decode()} for document in documents)
    lines = (json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
    atomic_write(path, lambda file: file.writelines(lines), "demo")


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _read(corpus: Corpus, own: bool, without: Path | None) -> Iterator[Document]:
    """Yield what is text, long enough and no table; own: the user's path, with everything in it."""
    root = corpus.source
    paths = {root.name: root} if root.is_file() else dict(_walk(root, set() if own else TEST_FOLDERS, without))
    left = MAX_TOTAL
    for name in sorted(paths, key=_hash):
        path = paths[name]
        if not own and path.suffix != ".py":
            continue
        if left <= 0:
            corpus.drop(f"more than {MAX_TOTAL >> 20} MiB of text", name, path.stat().st_size)
            continue
        end = 0
        try:
            for number, document in enumerate(read_documents(path), start=1):
                if left <= 0:
                    break
                label = f"{name}#{number}" if path.suffix == ".jsonl" else name
                data, end = document.data[:left], document.end
                if len(data) < len(document.data):  # a character may be cut
                    data = data.decode(errors="ignore").encode()
                    corpus.drop(f"more than {MAX_TOTAL >> 20} MiB of text", label, len(document.data) - len(data))
                left -= len(document.data)
                reason = _unfit(data, path.suffix == ".py")
                if reason:
                    corpus.drop(reason, label, len(data))
                else:
                    yield Document(label, data)
        except ValueError:
            corpus.drop("not UTF-8 text", name, path.stat().st_size - end)
        else:
            if left <= 0 and end < path.stat().st_size:
                corpus.drop(f"more than {MAX_TOTAL >> 20} MiB of text", name, path.stat().st_size - end)


def _walk(folder: Path, skip: set[str], without: Path | None) -> Iterator[tuple[str, Path]]:
    without = without and without.resolve()
    for here, folders, names in os.walk(folder):
        if Path(here).resolve() == without:
            folders.clear()
            continue
        folders[:] = (f for f in folders if f not in skip and f != "__pycache__" and not f.startswith("."))
        for path in (Path(here, name) for name in names if not name.startswith(".")):
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _unfit(data: bytes, python: bool) -> str:
    """Return why a document is left out, or nothing."""
    if b"\0" in data:
        return "not UTF-8 text"
    if len(data) < MIN_BYTES:
        return f"shorter than {MIN_BYTES} bytes"
    if python and len(data) > TABLE_BYTES and table_share(data.decode()) >= TABLE_SHARE:
        return f"{TABLE_SHARE:.0%} or more of the lines are literal data"
    return ""


def table_share(source: str) -> float:
    """Return data_lines(source) / lines; 0.0 for what this Python cannot parse."""
    try:
        return data_lines(source) / (source.count("\n") + 1)
    except (SyntaxError, ValueError, RecursionError):
        return 0.0


def data_lines(source: str) -> int:
    """Count the lines of Python inside literals of TABLE_LINES or more lines: displays that hold constants only (nested
    ones too), strings and bytes (implicitly joined ones too); docstrings and other bare strings are not data."""
    lines: set[int] = set()
    stack: list[ast.AST] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.expr):
            if node.end_lineno - node.lineno + 1 < TABLE_LINES:
                continue
            if _is_constant(node):
                lines.update(range(node.lineno, node.end_lineno + 1))
                continue
        stack.extend(ast.iter_child_nodes(node))
    return len(lines)


def _is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.Dict):
        return all(key is not None and _is_constant(key) for key in node.keys) and all(map(_is_constant, node.values))
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return all(map(_is_constant, node.elts))
    return isinstance(node, ast.Constant) or isinstance(node, ast.UnaryOp) and _is_constant(node.operand)


def _select(corpus: Corpus, documents: Iterator[Document]) -> Iterator[Document]:
    """Drop repeats; shorten what is too long."""
    seen: set[int] = set()
    for document in documents:
        runs = _runs_of_lines(document.data)
        if len(runs & seen) >= REPEAT_SHARE * len(runs):
            corpus.drop("repeats of other documents", document.name, len(document.data))
            continue
        seen |= runs
        data = document.data
        if corpus.source == standard_library() and len(data) > MAX_BYTES:
            data = _whole_lines(data, MAX_BYTES)
            cut = len(document.data) - len(data)
            corpus.drop(f"what is above {MAX_BYTES >> 10} KiB of a document", document.name, cut)
        yield Document(document.name, data)


def _runs_of_lines(data: bytes) -> set[int]:
    """Return a hash of every three lines that follow each other (blank ones aside), of all where there are fewer."""
    lines = [line for line in map(bytes.strip, data.splitlines()) if line]
    return {hash(tuple(lines[i : i + 3])) for i in range(max(1, len(lines) - 2))}


def _whole_lines(data: bytes, limit: int) -> bytes:
    """Return data up to the last line end before limit; where there is none, up to a character's end."""
    end = data.rfind(b"\n", 0, limit) + 1
    return data[:end] if end else data[:limit].decode(errors="ignore").encode()


def _hold_out_whole(corpus: Corpus, documents: list[Document]) -> bool:
    """Return False if no document is small enough to be held out."""
    wanted, size = HELD_OUT_SHARE * sum(len(document.data) for document in documents), 0
    for document in documents:
        fits = size < wanted and size + len(document.data) <= 1.5 * wanted
        (corpus.held_out if fits else corpus.train).append(document)
        size += fits * len(document.data)
    if not corpus.held_out:
        corpus.train.clear()
    return bool(corpus.held_out)


def _hold_out_ends(corpus: Corpus, documents: list[Document]) -> None:
    for document in documents:
        begin = _whole_lines(document.data, int((1 - HELD_OUT_SHARE) * len(document.data)))
        corpus.train.append(Document(document.name, begin))
        corpus.held_out.append(Document(document.name, document.data[len(begin) :]))
