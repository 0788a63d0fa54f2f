"""Text to shards: every document encoded with the World tokenizer and ended by token 0."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict

from rwkv_ext.data import pieces
from rwkv_ext.data.build_folder import BuildFolder
from rwkv_ext.data.build_summary import Summary
from rwkv_ext.data.build_task import Arrangement, BuildTask
from rwkv_ext.data.documents import INVALID_UTF8, find_files
from rwkv_ext.data.input_file import STANDARD_INPUT
from rwkv_ext.data.piece_encoder import PieceEncoder
from rwkv_ext.tokenizer import WorldTokenizer

FORMAT = 1  # of the journal and the files beside it


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
    drop_duplicates: bool = False,
    shuffle: bool = False,
    seed: int = 0,
    epochs: int = 1,
    shard_tokens: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Summary:
    """Write the shard OUT.bin, OUT.idx from files and folders: what RWKV-LM's make_data.py makes of one epoch
    whose lines are not shuffled, byte for byte, whatever the number of `threads` (None: one for each core).

    drop_empty leaves out documents of white space alone, drop_duplicates all but the first of equal ones. shuffle puts
    the documents in an order that depends on `seed` and their numbers alone, `epochs` times, each time in another.
    shard_tokens makes OUT-00000-of-00003 and so on, as many documents in each as have at most that many tokens.

    Two pieces of 16 MiB of text for each thread are in memory, as text or as ids, or one document if that is longer.
    Nothing appears under the final names unless all of it succeeds. After a crash, Ctrl-C or a full disk the same call
    goes on where the journal in .NAME.building says, if it is for the same inputs and options. ValueError for text that
    is not what `read_documents` needs, for inputs without a document, and while another process builds OUT.
    """
    begin = time.monotonic()
    if invalid_utf8 not in INVALID_UTF8:
        raise ValueError(f"invalid_utf8 must be one of {', '.join(INVALID_UTF8)}, got {invalid_utf8!r}")
    if not text_key.isascii() and text_key.encode(errors="replace").decode() != text_key:
        raise ValueError(f"text_key must be UTF-8, got {text_key!r}; is the terminal's encoding another?")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, or None for one a core, got {threads}")
    arrangement = Arrangement(shuffle, seed, epochs, drop_duplicates, shard_tokens)
    files = find_files(inputs, include)
    encoder = PieceEncoder(
        tokenizer or WorldTokenizer(), text_key, eod, invalid_utf8, drop_empty, make_digests=drop_duplicates
    )
    states = [None if path == STANDARD_INPUT else pieces.file_state(path) for path in files]
    with BuildFolder(out, _identity(states, encoder, arrangement)) as folder:
        threads = threads or len(os.sched_getaffinity(0))
        return BuildTask(files, states, encoder, arrangement, folder, overwrite, threads, begin).run(show_progress)


def _identity(states: Sequence[tuple | None], encoder: PieceEncoder, arrangement: Arrangement) -> str:
    """Return a digest of all that decides what the shards hold."""
    # Nobody can tell whether standard input is the same again, so no other build has its digest.
    states = [state or os.urandom(16).hex() for state in states]
    tokenizer = encoder.tokenizer
    options = [encoder.text_key, encoder.eod, encoder.invalid_utf8, encoder.drop_empty, pieces.PIECE_BYTES]
    vocabulary = hashlib.sha256(tokenizer.vocabulary.read_bytes()).hexdigest()
    whole = [FORMAT, states, options, asdict(arrangement), type(tokenizer).__qualname__, vocabulary]
    return hashlib.sha256(json.dumps(whole).encode(errors="surrogateescape")).hexdigest()
