"""Documents from files and folders, one at a time: what `rwkv-ext data build` reads."""

import fnmatch
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INVALID_UTF8 = ("error", "replace", "skip")


@dataclass
class Document:
    """The UTF-8 bytes of one document; `end` is how far its file has been read, in bytes."""

    data: bytes
    path: Path
    end: int


def find_files(inputs: Sequence[str | os.PathLike], include: Sequence[str] = ()) -> list[Path]:
    """Return the files to read, in the order of `inputs`; a folder gives its files by sorted name, depth first.

    Folders give *.txt, *.jsonl and what matches a pattern of `include` (on the file's name, or on its path below the folder
    where the pattern holds a slash). Hidden entries and links to folders are left out. A file named in `inputs` is always taken.
    FileNotFoundError for an input that does not exist; ValueError for a folder without any such file.
    """
    patterns = ["*.txt", "*.jsonl", *include]
    files = []
    for item in map(Path, inputs):
        if item.is_file():
            files.append(item)
            continue
        if not item.is_dir():
            raise FileNotFoundError(f"{item}: no such file or folder; the inputs are .jsonl and .txt files and folders of them")
        found = [path for path in _walk(item) if _matches(path.relative_to(item), patterns)]
        if not found:
            raise ValueError(f"{item}: the folder must hold files named {' or '.join(patterns)}, got none; name others with --include")
        files += found
    return files


def _walk(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name)
            elif entry.is_file():
                yield folder / entry.name


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path.as_posix() if "/" in pattern else path.name, pattern) for pattern in patterns)


def read_documents(path: Path, text_key: str = "text", invalid_utf8: str = "error") -> Iterator[Document]:
    """Yield the documents of one file: one a line of a .jsonl file, the whole of any other.

    A .jsonl line is a JSON object with a string under `text_key`; empty lines are passed over. ValueError names the file, the line
    and the byte offset of a line that is something else, and of bytes that are not UTF-8 under invalid_utf8="error"; "replace" puts
    U+FFFD in their place, "skip" leaves the document out.
    """
    if invalid_utf8 not in INVALID_UTF8:
        raise ValueError(f"invalid_utf8 must be one of {', '.join(INVALID_UTF8)}, got {invalid_utf8!r}")
    with open(path, "rb") as file:
        if path.suffix.lower() == ".jsonl":
            yield from _read_lines(file, path, text_key, invalid_utf8)
        else:
            data = file.read()
            text = _decode(data, f"{path}: byte offset", 0, invalid_utf8)
            if text is not None:
                yield Document(text.encode(), path, len(data))


def _read_lines(file, path: Path, text_key: str, invalid_utf8: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(file, start=1):
        where = f"{path}: line {number}, byte offset"
        body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if body.strip():
            text = _decode(body, where, offset + len(line) - len(body), invalid_utf8)
            text = text and _read_json(text, f"{where} {offset}", text_key)
            text = text and _join_surrogates(text, f"{where} {offset}", invalid_utf8)
            if text is not None:
                yield Document(text.encode(), path, offset + len(line))
        offset += len(line)


def _decode(data: bytes, where: str, offset: int, invalid_utf8: str) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if invalid_utf8 == "skip":
            return None
        if invalid_utf8 == "replace":
            return data.decode(errors="replace")
        raise ValueError(
            f"{where} {offset + error.start}: text must be UTF-8, got byte {data[error.start]:#04x} ({error.reason}); convert the "
            "file, or choose --invalid-utf8=replace or --invalid-utf8=skip"
        ) from error


def _read_json(line: str, where: str, text_key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: line must be a JSON object, got bad JSON at column {error.colno}: {error.msg}; mend or remove it") from error
    except RecursionError as error:
        raise ValueError(f"{where}: line must be a JSON object, got one nested too deeply; mend or remove it") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: line must be a JSON object, got {type(record).__name__}; mend or remove it")
    if text_key not in record:
        keys = ", ".join(map(repr, record)) or "no key at all"
        raise ValueError(f"{where}: object must have the key {text_key!r}, got {keys}; name the right one with --text-key")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_key!r} must be a string, got {type(text).__name__}; mend or remove the line")
    return text


def _join_surrogates(text: str, where: str, invalid_utf8: str) -> str | None:
    """JSON may escape half of a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        if invalid_utf8 == "skip":
            return None
        if invalid_utf8 == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise ValueError(
            f"{where}: text must be Unicode, got the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; mend the "
            "line, or choose --invalid-utf8=replace or --invalid-utf8=skip"
        ) from error
