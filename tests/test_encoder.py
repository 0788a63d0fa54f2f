"""Encoding against its definition, the longest token at each position (longest_match.py)."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longest_match import LongestMatch

from rwkv_ext._load import native
from rwkv_ext.tokenizer import WorldTokenizer
from rwkv_ext.vocabulary import WORLD


@pytest.fixture(scope="module")
def tokens(world):
    return [world.decode_bytes([id]) for id in range(1, 65530)]


@pytest.fixture(scope="module")
def definition(tokens):
    return LongestMatch({token: id for id, token in enumerate(tokens, 1)})


def check(tokenizer, definition, data):
    ids = tokenizer.encode_array(data)
    assert ids.dtype == np.uint16
    assert ids.tolist() == definition.encode(data)


def check_all(tokenizer, definition, cases):
    for data in cases:
        assert tokenizer.encode_bytes(data) == definition.encode(data), data


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=700))
def test_any_bytes(world, definition, data):
    check(world, definition, data)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_any_text(world, definition, text):
    check(world, definition, text.encode())
    assert world.encode(text) == definition.encode(text.encode())


def test_concatenations_of_two_tokens(world, definition, tokens):
    rng = random.Random(1)
    check_all(world, definition, (rng.choice(tokens) + rng.choice(tokens) for _ in range(20000)))


def test_every_token_and_a_byte(world, definition, tokens):
    rng = random.Random(2)
    check_all(world, definition, (token + bytes([rng.randrange(256)]) for token in tokens))
    for token in rng.sample(tokens, 60):
        check_all(world, definition, (token + bytes([byte]) for byte in range(256)))


def test_every_prefix_of_every_token(world, definition):
    # All in one text as well, where each is a part of something longer.
    prefixes = sorted(definition.prefixes)
    check_all(world, definition, prefixes)
    check(world, definition, b"".join(prefixes))


@pytest.mark.parametrize("piece", [b" ", b"=", b"#", b"- ", b"\n", b"\0", "\u3042".encode(), b"a", b"\xff"], ids=repr)
def test_runs_of_any_length(world, definition, piece):
    lengths = [*range(300), 335, 336, 337, 1023, 1024, 1025, 1087, 1088, 1089, 1152, 5000, 65536, 65537]
    check_all(world, definition, (piece * length for length in lengths))
    check_all(world, definition, (b"x" * 70 + piece * length + b"word. " * 30 for length in lengths[-12:]))


def test_segments_about_as_long_as_a_memo_entry(world, definition):
    # Letters and a dot: a segment each. Every length twice, so that the second time it is known; zeros at its end
    # are told from the zeros behind a shorter one.
    rng = random.Random(3)
    for letters in (b"abcdefgh", b"zqxj", b"\0\1", "\u0431\u0438".encode(), b" =#-"):
        words = [bytes(rng.choices(letters, k=length)) for length in range(1, 48) for _ in range(5)]
        words += [word + b"\0" * zeros for word in words[:40] for zeros in range(1, 4)]
        check(world, definition, b".".join(words * 2))
        check_all(world, definition, words)


@pytest.mark.parametrize("where", range(0, 200, 7))
def test_texts_of_every_length(world, definition, where):
    # Blocks, pieces and the copy of a text's end meet at other places for each.
    text = WORLD.read_bytes()[40_000 + where : 40_700]
    check_all(world, definition, (text[:length] for length in range(0, len(text), 3)))


def test_pieces_of_a_long_text(world, definition):
    text = WORLD.read_bytes()
    for length in (65_000, 65_616, 65_617, 131_152, 200_000):
        check(world, definition, text[-length:])


def test_vector_code_changes_no_id(world, definition):
    plain = native().Tokenizer(WORLD.read_bytes(), "World", use_vectors=False)
    text = WORLD.read_bytes()
    np.testing.assert_array_equal(plain.encode_array(text), world.encode_array(text))
    rng = random.Random(7)
    for length in (1, 63, 64, 65, 128, 129, 400, 5000):
        check(plain, definition, rng.randbytes(length))
        check(plain, definition, text[5000 : 5000 + length])


def test_every_pair_of_bytes_where_blocks_meet(world, definition):
    # The shift by 0 to 2 letters brings the 65,536 pairs to every position of a block.
    for first in range(256):
        pairs = b"".join(bytes([first, second]) + b"a" * (second % 3) for second in range(256))
        check(world, definition, pairs)


def test_a_full_memo_replaces_its_entries(world, definition):
    # Far more different words than it holds, each seen again after it was replaced.
    rng = random.Random(4)
    words = [bytes(rng.choices(b"abcdefghij", k=rng.randrange(3, 35))) for _ in range(80_000)]
    expected = [id for word in words for id in definition.encode(b" " + word)]
    text = b" " + b" ".join(words)
    for _ in range(2):
        assert world.encode_array(text).tolist() == expected


def test_threads_encode_different_texts_at_once(world, definition):
    text = WORLD.read_bytes()
    parts = [text[start : start + 60_000] for start in range(0, 600_000, 60_000)]
    expected = [definition.encode(part) for part in parts]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            results = list(pool.map(world.encode_array, parts))
            assert [ids.tolist() for ids in results] == expected


def test_a_text_that_changes_meanwhile_spoils_no_other():
    # Two threads, one of which writes to the text that the other encodes: whatever ids that gives, what the encoder
    # keeps of it must be right for the next text.
    rng = np.random.default_rng(8)
    text = rng.integers(ord("a"), ord("q"), 60_000, dtype=np.uint8)
    text[::7] = ord(" ")
    change = np.where(text == ord(" "), 0, 1).astype(np.uint8)
    texts = [text.copy(), text ^ change]
    tokenizer, done = WorldTokenizer(), threading.Event()

    def write():
        while not done.is_set():
            np.bitwise_xor(text, change, out=text)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(1000):
        tokenizer.encode_array(text)
    done.set()
    writer.join()
    for text in texts:
        np.testing.assert_array_equal(tokenizer.encode_array(text), WorldTokenizer().encode_array(text))


def write_vocabulary(path, tokens):
    path.write_text("".join(f"{id} {token!r} {len(token)}\n" for token, id in tokens.items()), encoding="utf-8")
    return WorldTokenizer(path)


def test_small_vocabularies(tmp_path):
    # Few letters, so that tokens overlap in every way; ids in any order; tokens up to the longest allowed.
    rng = random.Random(5)
    for number in range(40):
        letters = bytes(rng.sample(range(256), rng.choice((1, 2, 3, 8))))
        found = {bytes([byte]) for byte in range(256)}
        for _ in range(rng.choice((0, 5, 60, 400))):
            found.add(bytes(rng.choices(letters, k=rng.choice((2, 3, 4, 9, 40, 255)))))
        tokens = dict(zip(found, rng.sample(range(1, 65536), len(found)), strict=True))
        tokenizer = write_vocabulary(tmp_path / f"{number}.txt", tokens)
        definition = LongestMatch(tokens)
        alphabet = letters + bytes(rng.sample(range(256), 2))
        lengths = (0, 1, 2, 3, 15, 16, 17, 90, 400, 3000)
        check_all(tokenizer, definition, (bytes(rng.choices(alphabet, k=length)) for length in lengths * 2))
        check_all(tokenizer, definition, found)


def test_small_vocabularies_of_wide_characters(tmp_path):
    # Tokens of whole characters and of parts cut anywhere: behind which characters of three bytes a token must end
    # differs between the vocabularies, and between the texts, with bytes that are no characters, whether there is one.
    rng = random.Random(9)
    characters = [
        character.encode() for character in "\u4e2d\u6587\u65e5\u3042\u3044\uac00\u0e01\uff01\u044f\U0001f600a. "
    ]
    bytes_ = [bytes([byte]) for byte in b"\x80\xbf\xc0\xe3\xe4\xe9\xef\xf0"]
    for number in range(60):
        found = {bytes([byte]) for byte in range(256)}
        used = rng.sample(characters, rng.choice((3, 6, len(characters))))
        for _ in range(rng.choice((3, 20, 100))):
            joined = b"".join(rng.choices(used, k=rng.choice((1, 1, 2, 3))))
            cuts = rng.choice(((0, 0), (0, 0), (0, 1), (1, 0), (2, 0), (2, 2)))
            found.add(joined[cuts[0] : len(joined) - cuts[1]] or b" ")
        tokens = dict(zip(found, rng.sample(range(1, 65536), len(found)), strict=True))
        tokenizer, definition = write_vocabulary(tmp_path / f"{number}.txt", tokens), LongestMatch(tokens)
        for length in (1, 3, 30, 100, 1500):
            for alphabet in (characters, characters + bytes_):
                check(tokenizer, definition, b"".join(rng.choices(alphabet, k=length)))


def test_a_vocabulary_where_no_pair_is_a_boundary(tmp_path):
    # Every pair of bytes is a token: 65536 - 1 ids hold the 256 bytes and all pairs but 257.
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    tokens = [bytes([byte]) for byte in range(256)] + pairs[: 65535 - 256]
    tokens = {token: id for id, token in enumerate(tokens, 1)}
    tokenizer, definition = write_vocabulary(tmp_path / "pairs.txt", tokens), LongestMatch(tokens)
    rng = random.Random(6)
    for length in (1, 17, 80, 1100, 1101, 70_000):
        check(tokenizer, definition, rng.randbytes(length))


def test_lists_share_no_state(world):
    first = world.encode("Today is")
    first[0] = 7
    assert world.encode("Today is") == [33520, 4600]
    assert world.encode_bytes(b"") == [] and world.encode_array(b"").tolist() == []
