"""Documents from files and folders, one at a time: what `rwkv-ext data build` reads."""

import fnmatch
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_ext.data.input_file import STANDARD_INPUT, InputFile, inner_suffix, optional_package

INVALID_UTF8 = ("error", "replace", "skip")
FOLDERS_GIVE = ("*.txt", "*.jsonl", "*.txt.gz", "*.jsonl.gz", "*.txt.zst", "*.jsonl.zst", "*.parquet")
TABLE_ROWS = 1024  # of a .parquet file in memory together
CHOICES = "choose --invalid-utf8=replace or --invalid-utf8=skip"


@dataclass
class Document:
    """One document of a file."""

    data: bytes | None  # UTF-8; None where it is left out because it was not
    end: int  # how far the file has been read, in its own bytes
    valid: bool = True  # False where U+FFFD was put in and where it is left out


def find_files(inputs: Sequence[str | os.PathLike], include: Sequence[str] = ()) -> list[Path]:
    """Return the files to read, in the order of `inputs`; a folder gives its own by sorted name, depth first.

    Folders give *.txt, *.jsonl, both compressed (.gz, .zst), *.parquet and what matches a pattern of `include`: the
    file's name, or its path below the folder where the pattern holds a slash. Hidden entries and links to folders
    are left out. A file named in `inputs` is always taken; "-" is standard input. FileNotFoundError for an input that
    is not there, ValueError for a folder without such a file.
    """
    patterns = [*FOLDERS_GIVE, *include]
    files = []
    for item in map(Path, inputs):
        if item.is_file() or item == STANDARD_INPUT:
            files.append(item)
            continue
        if item.exists() and not item.is_dir():
            raise ValueError(f"{item}: an input must be a file or a folder, got neither; give - for standard input")
        if not item.is_dir():
            raise FileNotFoundError(f"{item}: no such file or folder; name .jsonl or text files, or folders")
        found = [path for path in _walk(item) if _matches(path.relative_to(item), patterns)]
        if not found:
            names = ", ".join(["*.txt, *.jsonl (or either with .gz, .zst), *.parquet", *include])
            advice = "name others with --include"
            raise ValueError(f"{item}: the folder must hold {names}, got no such file; {advice}")
        files += found
    return files


def _walk(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    for entry in visible:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name)
        elif entry.is_file():
            yield folder / entry.name


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path.as_posix() if "/" in p else path.name, p) for p in patterns)


def read_documents(path: Path, text_key: str = "text", invalid_utf8: str = "error") -> Iterator[Document]:
    """Yield the documents of one file: one a line of .jsonl, one a row of .parquet, the whole of any other.

    .gz and .zst files are decompressed; standard input is .jsonl. A line is a JSON object with a string under
    `text_key`, empty lines are passed over; a row has its string in that column. ValueError names the file, the line
    and the byte offset of anything else, and of bytes that are not UTF-8 where invalid_utf8 is "error"; "replace"
    puts U+FFFD in their place, "skip" gives a document without data. ImportError where a package is missing.
    """
    if invalid_utf8 not in INVALID_UTF8:
        raise ValueError(f"invalid_utf8 must be one of {', '.join(INVALID_UTF8)}, got {invalid_utf8!r}")
    if inner_suffix(path) == ".parquet":
        yield from _read_table(path, text_key, invalid_utf8)
        return
    with InputFile(path) as file:
        if inner_suffix(path) == ".jsonl":
            yield from _read_lines(file, path, text_key, invalid_utf8)
        else:
            data = file.read()
            text, valid = _decode(data, f"{path}: {_offset(file)}", 0, invalid_utf8)
            yield Document(None if text is None else text.encode(), file.consumed(), valid)


def _offset(file: InputFile) -> str:
    return "decompressed byte offset" if file.is_compressed else "byte offset"


def _read_lines(file: InputFile, path: Path, text_key: str, invalid_utf8: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(file, start=1):
        where = f"{path}: line {number}, {_offset(file)}"
        end = file.consumed() if file.is_compressed else offset + len(line)
        body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a byte order mark is no JSON
        text, valid = _decode(body, where, offset + len(line) - len(body), invalid_utf8)
        if text is not None and text.strip():
            text = _read_json(text.rstrip(), f"{where} {offset}", text_key)
            text, paired = _join_surrogates(text, f"{where} {offset}", invalid_utf8)
            yield Document(None if text is None else text.encode(), end, valid and paired)
        elif text is None:
            yield Document(None, end, False)
        offset += len(line)


def _read_table(path: Path, text_key: str, invalid_utf8: str) -> Iterator[Document]:
    arrow = optional_package("pyarrow.parquet", path)
    try:
        table = arrow.parquet.ParquetFile(path)
        columns = table.schema_arrow
        kind = columns.field(text_key).type if text_key in columns.names else None
        if kind is None:
            names = ", ".join(map(repr, columns.names)) or "no column at all"
            raise ValueError(
                f"{path}: table must have the column {text_key!r}, got {names}; name the right one with --text-key"
            )
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
            raise ValueError(f"{path}: column {text_key!r} must hold strings, got {kind}; name another with --text-key")
        size, row = path.stat().st_size, 0
        for batch in table.iter_batches(TABLE_ROWS, columns=[text_key]):
            column = batch.column(0)
            column = column.dictionary_decode() if arrow.types.is_dictionary(column.type) else column
            for data in column.cast(arrow.large_binary()).to_pylist():  # writers do not always check for UTF-8
                row += 1
                if data is None:
                    raise ValueError(
                        f"{path}: row {row}: {text_key!r} must be a string, got null; remove such rows from the table"
                    )
                text, valid = _decode(data, f"{path}: row {row}, byte", 0, invalid_utf8)
                data = None if text is None else text.encode()
                yield Document(data, size * row // table.metadata.num_rows, valid)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path}: must be a whole .parquet file, got an error ({error}); copy it again") from error


def _decode(data: bytes, where: str, offset: int, invalid_utf8: str) -> tuple[str | None, bool]:
    """Return the text, None where it is to be skipped, and whether it was UTF-8."""
    try:
        return data.decode(), True
    except UnicodeDecodeError as error:
        if invalid_utf8 != "error":
            return (data.decode(errors="replace") if invalid_utf8 == "replace" else None), False
        got = f"byte {data[error.start]:#04x} ({error.reason})"
        where = f"{where} {offset + error.start}"
        raise ValueError(f"{where}: text must be UTF-8, got {got}; convert the file, or {CHOICES}") from error


def _read_json(line: str, where: str, text_key: str) -> str:
    need, advice = "line must be a JSON object", "mend or remove the line"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        bad = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{where}: {need}, got bad JSON ({bad}); {advice}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {need}, got {type(record).__name__}; {advice}")
    if text_key not in record:
        keys = ", ".join(map(repr, record)) or "no key at all"
        advice = "name the right one with --text-key"
        raise ValueError(f"{where}: object must have the key {text_key!r}, got {keys}; {advice}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_key!r} must be a string, got {type(text).__name__}; {advice}")
    return text


def _join_surrogates(text: str, where: str, invalid_utf8: str) -> tuple[str | None, bool]:
    """Do as `_decode` about the halves of surrogate pairs that JSON may escape and no UTF-8 can hold."""
    try:
        text.encode()
        return text, True
    except UnicodeEncodeError as error:
        if invalid_utf8 == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), False
        if invalid_utf8 == "skip":
            return None, False
        got = f"the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise ValueError(f"{where}: text must be Unicode, got {got}; mend the line, or {CHOICES}") from error
