"""The World vocabulary: a text file, one `ID LITERAL LENGTH` a line, ids 1 to 65529; origin in NOTICE.

The build makes a compiled file of it, tables that are mapped into memory instead of read (compiler.py).
"""

from pathlib import Path

WORLD = Path(__file__).with_name("rwkv_vocab_v20230424.txt")
WORLD_COMPILED = WORLD.with_suffix(".bin")
