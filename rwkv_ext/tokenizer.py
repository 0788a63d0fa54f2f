"""The RWKV World tokenizer: greedy longest match over bytes with the 65,529 tokens of rwkv_vocab_v20230424.

No normalisation, no special tokens in text: `<|endoftext|>` is seven ordinary tokens unless a call allows it. Id 0
separates documents; encoding never produces it by itself and it decodes to nothing. Ids 65530 to 65535 have a row in
the models but no token.
"""

import hashlib
import itertools
import mmap
import operator
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from rwkv_ext._load import native
from rwkv_ext.vocabulary import WORLD, WORLD_COMPILED


def _load_tables(vocabulary: Path):
    text = vocabulary.read_bytes()
    if vocabulary == WORLD and WORLD_COMPILED.exists():
        compiled = native().Tokenizer.map(str(WORLD_COMPILED))
        if compiled.source_digest == hashlib.sha256(text).digest():
            return compiled
    return native().Tokenizer(text, str(vocabulary))


def _options(function: str, threads: int | None, dtype) -> tuple[int, bool]:
    """The number of threads, and whether ids are uint32."""
    if (dtype := np.dtype(dtype)) not in (np.uint16, np.uint32):
        raise ValueError(f"{function}: dtype must be uint16 or uint32, got {dtype}; use .astype() for others")
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    if operator.index(threads) < 1:
        raise ValueError(f"{function}: threads must be at least 1, or None for all CPUs there are, got {threads}")
    return min(operator.index(threads), 1 << 16), dtype == np.uint32  # no text has work for more


class WorldTokenizer:
    """Encode and decode with the World vocabulary, or with another file of the same grammar.

    Immutable; threads may share one and run in parallel, for the interpreter lock is released at work.

    Example:
        >>> WorldTokenizer().encode("Today is a beautiful day.")
        [33520, 4600, 332, 59219, 21509, 47]
    """

    vocab_size = 65536  # rows of the embedding and the head, not the number of tokens

    def __init__(self, vocabulary: str | os.PathLike | None = None):
        """Read `vocabulary`; ValueError names the file and line of anything but `ID LITERAL LENGTH`.

        The World vocabulary's tables, which the build has made, are mapped instead, if they are there and belong to
        the text; ValueError if that file is damaged. RuntimeError says how to build the tokenizer library where it is
        missing.
        """
        self.vocabulary = Path(vocabulary or WORLD)
        self._native = _load_tables(self.vocabulary)
        # uint8 [65536]: the bytes each id decodes to; 0 for id 0 and for ids without a token
        self.byte_lengths: np.ndarray = self._native.byte_lengths()
        self.byte_lengths.flags.writeable = False

    def __reduce__(self):
        return WorldTokenizer, (self.vocabulary,)

    def encode(self, text: str, allowed_special: Mapping[str, int] | None = None) -> list[int]:
        """Return the ids of `text`. UnicodeEncodeError for a lone surrogate, which no UTF-8 text can hold.

        Nothing in a text is special unless `allowed_special` says so, since whoever writes the text could end the
        document: with {"<|endoftext|>": 0} that text becomes id 0. From left to right the next special text, of those
        that start at the same place the longest, becomes its id (0 to 65535); what lies between is encoded by itself,
        so no token crosses the border. TypeError, ValueError for what is no such mapping. encode_bytes() and
        encode_array() take it too, and find the UTF-8 of the special texts; batches, files and streams are always
        ordinary text.

        Example:
            >>> WorldTokenizer().encode("Today<|endoftext|> is", allowed_special={"<|endoftext|>": 0})
            [33520, 0, 4600]
        """
        if allowed_special and isinstance(text, str):
            return self._encode_special("encode", "text must be a str", text, allowed_special).tolist()
        return self._explained(self._native.encode, text)

    def encode_bytes(self, data: bytes, allowed_special: Mapping[str, int] | None = None) -> list[int]:
        """Return the ids of any contiguous bytes, UTF-8 or not. `allowed_special` as in encode()."""
        if allowed_special and not isinstance(data, str):
            need = "data must be contiguous bytes"
            return self._encode_special("encode_bytes", need, data, allowed_special).tolist()
        return self._native.encode_bytes(data)

    def encode_array(
        self,
        text: str | bytes,
        threads: int | None = 1,
        dtype=np.uint16,
        allowed_special: Mapping[str, int] | None = None,
    ) -> np.ndarray:
        """Return the ids of a str or of any contiguous bytes as a new array, without a Python object per token.

        Bytes may be a memoryview, an mmap, a uint8 array; uint16 or uint32 ids. A long text is cut where a token must
        end, so that several threads encode it; the ids are the same for any number of them. None: all CPUs there are.
        `allowed_special` as in encode(); with it one thread encodes.
        """
        if allowed_special:
            _options("encode_array", threads, dtype)
            need = "text must be a str or contiguous bytes"
            return self._encode_special("encode_array", need, text, allowed_special).astype(dtype, copy=False)
        return self._explained(self._native.encode_array, text, *_options("encode_array", threads, dtype))

    def encode_file(self, path: str | os.PathLike, threads: int | None = None, dtype=np.uint16) -> np.ndarray:
        """Return the ids of a regular file, mapped into memory: encode_array() of its bytes, whatever they are.

        Nobody may change the file meanwhile. ValueError for a pipe or device.
        """
        options = _options("encode_file", threads, dtype)
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"encode_file: path must be a regular file, got {path}; give encode_array() its bytes")
            if status.st_size == 0:
                return np.empty(0, dtype)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return self._native.encode_array(data, *options)

    def encode_batch(
        self, texts: Iterable[str | bytes], threads: int | None = None, dtype=np.uint16
    ) -> list[np.ndarray]:
        """Return an array of ids for each text, views of one array; else as encode_packed()."""
        ids, cu_seqlens = self.encode_packed(texts, threads, dtype)
        return [ids[begin:end] for begin, end in itertools.pairwise(cu_seqlens.tolist())]

    def encode_packed(
        self, texts: Iterable[str | bytes], threads: int | None = None, dtype=np.uint16
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in one array, and cu_seqlens, int64 [len(texts) + 1]: where each text begins.

        A text is a str or contiguous bytes. No id stands between two texts. `threads` share the work, all CPUs there
        are if None; the ids, uint16 or uint32, are the same for any number of them.
        """
        return self._explained(self._native.encode_packed, texts, *_options("encode_batch", threads, dtype))

    def decode_bytes(self, ids) -> bytes:
        """Return the bytes of a sequence of ids. ValueError names the index and value of a bad id."""
        return self._native.decode_bytes(ids)

    def decode(self, ids, errors: str = "replace") -> str:
        """Return the text of a sequence of ids; `errors` says what becomes of bytes that are not UTF-8.

        "replace" puts one U+FFFD for each maximal broken piece, "ignore" drops it, "strict" raises
        UnicodeDecodeError. The rule applies to the bytes of all ids together: a character may be spread over
        several tokens.
        """
        _check_errors("decode", errors)
        return self._native.decode_bytes(ids).decode("utf-8", errors)

    def _encode_special(self, where: str, need: str, text, allowed_special: Mapping[str, int]) -> np.ndarray:
        allowed = _special_bytes(where, allowed_special)
        return self._explained(native().encode_special, self._native, text, allowed, f"{where}: {need}")

    @staticmethod
    def _explained(encode, *arguments):
        try:
            return encode(*arguments)
        except UnicodeEncodeError as error:
            error.reason += "; read the text with errors='replace', or give encode_bytes() its bytes"
            raise

    def stream(self, errors: str = "replace"):
        """Return a decoder for ids that arrive a few at a time: push(id or sequence of ids) -> str, flush() -> str.

        The pieces joined together equal decode(ids, errors). A piece never ends inside a character, and nothing that
        can be shown is held back: neither a genuine U+FFFD (id 19232) nor bytes that can become part of no character
        wait for what follows. flush() ends the text, with what `errors` makes of an incomplete character, and starts
        anew. What push() refuses adds nothing: TypeError and ValueError name the index since the last flush() of what
        is no id; with "strict" UnicodeDecodeError, whose positions count in this piece.
        """
        _check_errors("stream", errors)
        return native().Stream(self._native, errors)

    def stream_encoder(self):
        """Return an encoder for text that arrives in chunks: push(str or bytes) -> ids, flush() -> ids, uint16 arrays.

        All ids joined are those of the whole text, for any chunks: characters, tokens and runs may be cut anywhere, and
        str and bytes may take turns. push() returns every id that no later byte can change and holds the rest, the
        start of one token, fewer than 255 bytes (`held`). flush() ends the text and starts anew; whoever ends
        documents appends the 0. One thread at a time: RuntimeError while another is inside. A push that is refused
        adds nothing: TypeError for other types, UnicodeEncodeError for half a surrogate pair in a str.

        Example:
            >>> stream = WorldTokenizer().stream_encoder()
            >>> [stream.push(chunk).tolist() for chunk in ("Tod", "ay is")], stream.flush().tolist()
            ([[], [33520]], [4600])
        """
        return native().StreamEncoder(self._native)


def _check_errors(where: str, errors: str) -> None:
    if errors not in ("strict", "replace", "ignore"):
        raise ValueError(f"{where}: errors must be 'strict', 'replace' or 'ignore', got {errors!r}")


def _special_bytes(where: str, allowed_special: Mapping[str, int]) -> list[tuple[bytes, int]]:
    """The special texts as UTF-8, each with its id."""
    if not isinstance(allowed_special, Mapping):
        need = "allowed_special must map texts to ids, such as {'<|endoftext|>': 0}"
        raise TypeError(f"{where}: {need}, got {type(allowed_special).__name__}")
    pairs = []
    for text, id in allowed_special.items():
        if not isinstance(text, str) or isinstance(id, bool) or not hasattr(id, "__index__"):
            raise TypeError(f"{where}: allowed_special must map str to int, got {text!r}: {id!r}")
        if not text or not 0 <= id <= 65535:
            need = "allowed_special must map texts that are not empty to ids 0 to 65535"
            raise ValueError(f"{where}: {need}, got {text!r}: {id!r}")
        pairs.append((text.encode(), operator.index(id)))
    return pairs
