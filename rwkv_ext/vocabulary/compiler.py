"""Compiles the World vocabulary with a tokenizer library that was just built; setup.py runs it.

    python rwkv_ext/vocabulary/compiler.py FOLDER/_native.so     writes FOLDER/vocabulary/rwkv_vocab_v20230424.bin
"""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("rwkv_vocab_v20230424.txt")


def load(library: Path):
    """Return the module in `library`, without the package around it, which needs torch."""
    spec = importlib.util.spec_from_file_location("rwkv_ext._native", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(library: Path):
    text = SOURCE.read_bytes()
    image = load(library).compile_vocabulary(text, str(SOURCE), hashlib.sha256(text).digest())
    compiled = library.parent / "vocabulary" / SOURCE.with_suffix(".bin").name
    if compiled.exists() and compiled.read_bytes() == image:
        return
    # Programs that run have the old file mapped: a new one takes its place, and they keep theirs.
    compiled.parent.mkdir(exist_ok=True)
    unfinished = compiled.with_suffix(f".{os.getpid()}")
    try:
        unfinished.write_bytes(image)
        unfinished.replace(compiled)
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
