"""The RWKV World tokenizer: greedy longest match over bytes with the 65,529 tokens of rwkv_vocab_v20230424.

No normalisation, no special tokens in text: `<|endoftext|>` is seven ordinary tokens. Id 0 separates
documents; encoding never produces it and it decodes to nothing. Ids 65530 to 65535 have a row in the models
but no token.
"""

import os
from pathlib import Path

import numpy as np

from rwkv_ext._load import native
from rwkv_ext.vocabulary import WORLD, WORLD_COMPILED


def _load_tables(vocabulary: Path):
    if vocabulary == WORLD and WORLD_COMPILED.exists():
        compiled = native().Tokenizer.map(str(WORLD_COMPILED))
        if compiled.source_size == WORLD.stat().st_size:
            return compiled
    return native().Tokenizer(vocabulary.read_bytes(), str(vocabulary))


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

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. UnicodeEncodeError for a lone surrogate, which no UTF-8 text can hold."""
        try:
            return self._native.encode(text)
        except UnicodeEncodeError as error:
            error.reason += "; read the text with errors='replace', or give encode_bytes() its bytes"
            raise

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any contiguous bytes, UTF-8 or not."""
        return self._native.encode_bytes(data)

    def encode_array(self, data: bytes) -> np.ndarray:
        """Return the ids of any contiguous bytes as a new uint16 array, without a Python object per token."""
        return self._native.encode_array(data)

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
