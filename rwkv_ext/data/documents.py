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
    is not there and for such a file that is a link to nothing, ValueError for a folder without such a file.
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
        if lost := [path for path in found if not path.exists()]:
            raise FileNotFoundError(f"{lost[0]}: a link to a file that is not there; mend or remove it")
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
        elif entry.is_file() or not os.path.exists(entry.path):  # a link to nothing is not passed over
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
            yield read_text(data, path, file.is_compressed, file.consumed(), invalid_utf8)


def offset_name(is_compressed: bool) -> str:
    """Return what errors call a position in a file."""
    return "decompressed byte offset" if is_compressed else "byte offset"


def _read_lines(file: InputFile, path: Path, text_key: str, invalid_utf8: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(file, start=1):
        end = file.consumed() if file.is_compressed else offset + len(line)
        where = f"{path}: line {number}, {offset_name(file.is_compressed)}"
        document = read_line(line, number, offset, end, where, text_key, invalid_utf8)
        if document is not None:
            yield document
        offset += len(line)


def read_line(
    line: bytes, number: int, offset: int, end: int, where: str, text_key: str, invalid_utf8: str
) -> Document | None:
    """Return the document of line `number`, counted from 1, or None for an empty line; errors as `read_documents`."""
    body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a byte order mark is no JSON
    text, valid = _decode(body, where, offset + len(line) - len(body), invalid_utf8)
    if text is None:
        return Document(None, end, False)
    if not text.strip():
        return None
    text = _read_json(text.rstrip(), f"{where} {offset}", text_key)
    text, paired = _join_surrogates(text, f"{where} {offset}", invalid_utf8)
    return Document(None if text is None else text.encode(), end, valid and paired)


def read_text(data: bytes, path: Path, is_compressed: bool, end: int, invalid_utf8: str) -> Document:
    """Return the document that a whole file is; errors as `read_documents`."""
    text, valid = _decode(data, f"{path}: {offset_name(is_compressed)}", 0, invalid_utf8)
    return Document(None if text is None else text.encode(), end, valid)


def read_row(data: bytes | None, path: Path, row: int, end: int, text_key: str, invalid_utf8: str) -> Document:
    """Return the document of a row, counted from 1, of a table; errors as `read_documents`."""
    if data is None:
        advice = "remove such rows from the table"
        raise ValueError(f"{path}: row {row}: {text_key!r} must be a string, got null; {advice}")
    text, valid = _decode(data, f"{path}: row {row}, byte", 0, invalid_utf8)
    return Document(None if text is None else text.encode(), end, valid)


def _read_table(path: Path, text_key: str, invalid_utf8: str) -> Iterator[Document]:
    row, size = 0, path.stat().st_size
    for texts, rows in read_column(path, text_key):
        for data in texts.to_pylist():
            row += 1
            yield read_row(data, path, row, size * row // rows, text_key, invalid_utf8)


def read_column(path: Path, text_key: str) -> Iterator[tuple]:
    """Yield (texts, rows): pyarrow's LargeBinaryArray of at most TABLE_ROWS texts, and how many the table has."""
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
        for batch in table.iter_batches(TABLE_ROWS, columns=[text_key]):
            column = batch.column(0)
            column = column.dictionary_decode() if arrow.types.is_dictionary(column.type) else column
            # writers do not always check for UTF-8
            yield column.cast(arrow.large_binary()), table.metadata.num_rows
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
