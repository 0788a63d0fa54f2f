"""Special texts, only where they are allowed: against splitting by hand, in every call that takes them."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

END = {"<|endoftext|>": 0}
ORDINARY = [61, 125, 25258, 7588, 2318, 125, 63]


def by_hand(tokenizer, data, allowed):
    """The definition: a regular expression that tries the longest special text first at each position."""
    special = {text.encode(): id for text, id in allowed.items()}
    parts = re.split(b"(" + b"|".join(map(re.escape, sorted(special, key=len, reverse=True))) + b")", data)
    return [
        id
        for number, part in enumerate(parts)
        for id in ([special[part]] if number % 2 else tokenizer.encode_bytes(part))
    ]


def check(tokenizer, text, allowed):
    ids = by_hand(tokenizer, text.encode(), allowed)
    assert tokenizer.encode(text, allowed_special=allowed) == ids
    assert tokenizer.encode_bytes(text.encode(), allowed_special=allowed) == ids
    for data in (text, text.encode()):
        array = tokenizer.encode_array(data, allowed_special=allowed)
        assert array.dtype == np.uint16 and array.tolist() == ids
    return ids


def test_text_is_ordinary_unless_allowed(world):
    for allowed in (None, {}):
        assert world.encode("<|endoftext|>", allowed_special=allowed) == ORDINARY
        assert world.encode_bytes(b"<|endoftext|>", allowed_special=allowed) == ORDINARY
        assert world.encode_array("<|endoftext|>", allowed_special=allowed).tolist() == ORDINARY
    assert world.encode_batch(["<|endoftext|>"])[0].tolist() == ORDINARY
    stream = world.stream_encoder()
    assert [*stream.push("<|endoftext|>"), *stream.flush()] == ORDINARY


def test_an_allowed_text_is_its_id(world):
    assert check(world, "Today<|endoftext|> is", END) == [33520, 0, 4600]
    assert check(world, "<|endoftext|>", END) == [0]
    assert check(world, "<|endoftext|><|endoftext|>\n<|endoftext|>", END) == [0, 0, 11, 0]
    assert check(world, "<|endoftext|", END) == ORDINARY[:-1]
    assert check(world, "", END) == []
    assert check(world, "a", {"a": 65535}) == [65535]


def test_what_lies_between_is_encoded_by_itself(world):
    # " is" is one token, and so is "\n\n": neither is found across a special text.
    assert check(world, " <s>is", {"<s>": 0}) == [33, 0, *world.encode("is")]
    assert check(world, "\n<s>\n", {"<s>": 7}) == [11, 7, 11]


def test_leftmost_then_longest(world):
    assert check(world, "xabcd", {"bcd": 1, "abc": 2}) == [121, 2, 101]
    assert check(world, "abcabab", {"ab": 1, "abc": 2, "a": 3, "b": 4}) == [2, 1, 1]
    assert check(world, "aaaaa", {"aa": 1, "aaa": 2}) == [2, 1]
    assert check(world, "\u00e9\u00e9", {"\u00e9": 9}) == [9, 9]


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab<|\u00e9\U0001f980", max_size=60),
    st.dictionaries(
        st.text("ab<|\u00e9\U0001f980", min_size=1, max_size=4), st.integers(0, 65535), min_size=1, max_size=6
    ),
)
def test_any_texts(world, text, allowed):
    check(world, text, allowed)


def test_bytes_that_are_no_text(world):
    data = b"\xff<|endoftext|>\xe4\xbd"
    assert world.encode_bytes(data, allowed_special=END) == [256, 0, 3030]


def test_options_of_arrays_hold(world):
    ids = world.encode_array("a<|endoftext|>", threads=2, dtype=np.uint32, allowed_special=END)
    assert ids.dtype == np.uint32 and ids.tolist() == [98, 0]
    with pytest.raises(ValueError, match="encode_array: dtype must be uint16 or uint32"):
        world.encode_array("a", dtype=np.int8, allowed_special=END)


@pytest.mark.parametrize(
    "allowed, error, message",
    [
        (
            {"<|endoftext|>"},
            TypeError,
            r"allowed_special must map texts to ids, such as {'<\|endoftext\|>': 0}, got set",
        ),
        ("all", TypeError, "allowed_special must map texts to ids, .*, got str"),
        ({b"x": 0}, TypeError, "allowed_special must map str to int, got b'x': 0"),
        ({"x": 1.0}, TypeError, "allowed_special must map str to int, got 'x': 1.0"),
        ({"x": True}, TypeError, "allowed_special must map str to int, got 'x': True"),
        ({"": 0}, ValueError, "allowed_special must map texts that are not empty to ids 0 to 65535, got '': 0"),
        ({"x": -1}, ValueError, "allowed_special must .* to ids 0 to 65535, got 'x': -1"),
        ({"x": 65536}, ValueError, "allowed_special must .* to ids 0 to 65535, got 'x': 65536"),
    ],
)
def test_what_is_no_such_mapping(world, allowed, error, message):
    for encode, text in ((world.encode, "x"), (world.encode_bytes, b"x"), (world.encode_array, "x")):
        with pytest.raises(error, match=f"{encode.__name__}: {message}"):
            encode(text, allowed_special=allowed)


def test_other_refusals_stay(world):
    with pytest.raises(TypeError, match="encode: text must be a str, got bytes"):
        world.encode(b"x", allowed_special=END)
    with pytest.raises(TypeError, match="encode_bytes: data must be contiguous bytes, got str"):
        world.encode_bytes("x", allowed_special=END)
    with pytest.raises(TypeError, match="encode_bytes: data must be contiguous bytes, got int"):
        world.encode_bytes(3, allowed_special=END)
    with pytest.raises(TypeError, match="encode_array: text must be a str or contiguous bytes, got int"):
        world.encode_array(3, allowed_special=END)
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed; read the text with errors='replace'"):
        world.encode("a\ud800", allowed_special=END)
