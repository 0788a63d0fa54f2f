"""The World vocabulary of RWKV: a text file, one `ID LITERAL LENGTH` a line, ids 1 to 65529 (see NOTICE for its origin)."""

from pathlib import Path

WORLD = Path(__file__).with_name("rwkv_vocab_v20230424.txt")
