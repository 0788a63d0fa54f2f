"""The encoder's memo: it grows with a text of many words, and changes no id."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_ext._load import native
from rwkv_ext.vocabulary import WORLD_COMPILED

ROOT = Path(__file__).parents[1]


def test_table_grows_with_what_is_in_it(tmp_path):
    program = tmp_path / "memo_table"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", ROOT / "tests/memo_table.cpp"]
    subprocess.run([*command, "-o", program], check=True)
    for arguments in ([], [str(1 << 20)]):  # the second: fewer addresses than the program itself takes
        result = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (0, ""), arguments


@pytest.fixture(scope="module")
def words():
    """More words than any memo keeps, of up to 15 bytes and of up to 31, in texts of whole words."""
    rng = random.Random(5)
    letters = ["etaoinshrdlcumwfgypbvk", "оеаинтсрвлкмдпуя"]
    texts = []
    for _ in range(40):
        lengths = rng.choices(range(4, 14), k=10_000)
        texts.append("".join(" " + "".join(rng.choices(letters[n % 3 == 0], k=n)) for n in lengths).encode())
    return texts


@pytest.mark.parametrize("use_vectors", [True, False])
def test_ids_of_more_words_than_the_memo_keeps(words, use_vectors):
    def tokenizer():
        return native().Tokenizer.map(str(WORLD_COMPILED), use_vectors)

    grown, text = tokenizer(), b"".join(words)
    expected = np.concatenate([tokenizer().encode_array(part, 1, False) for part in words])  # none long enough to grow
    offsets = np.cumsum([0, *map(len, words)])
    for _ in range(2):
        np.testing.assert_array_equal(grown.encode_array(text, 1, False), expected)
        ids, _, size, *_, done = native().encode_texts(grown, text, offsets, 0, False, False)  # which verifies them
        np.testing.assert_array_equal(ids, expected)
        assert (size, done) == (len(text), len(words))


GROWTH = """
import sys, numpy as np
from rwkv_ext._load import native

def kept():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) >> 10

tokenizer = native().Tokenizer.map(sys.argv[1])
text = sys.stdin.buffer.read()
few = text[:2_000] * (len(text) // 2_000)
encode = {
    "encode_array": lambda text: tokenizer.encode_array(text, 1, False),
    "encode_texts": lambda text: native().encode_texts(tokenizer, text, np.array([0, len(text)]), 0, False, False),
}[sys.argv[2]]
sizes = []
for data in (few, text):
    for _ in range(8):
        encode(data)
    sizes.append(kept())
print(sizes[1] - sizes[0])
"""


@pytest.mark.parametrize(("name", "least", "most"), [("encode_array", 7, 12), ("encode_texts", 28, 40)])
def test_memory_grows_with_words_not_with_text(words, name, least, most):
    command = [sys.executable, "-c", GROWTH, WORLD_COMPILED, name]
    result = subprocess.run(command, input=b"".join(words), capture_output=True, check=True)
    assert least <= int(result.stdout) <= most  # MiB on top of what as many bytes of a few words take; builds keep more
