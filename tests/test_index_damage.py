"""Every small damage to a small shard: a clear error or the same data, never a crash or other data."""

import random

import pytest

from rwkv_ext.data.binidx import BinidxReader, BinidxWriter, shard_files

DOCUMENTS = {
    "documents": [[5, 6, 7, 0], [0], [65529, 1, 0]],
    "with empty ones": [[], [40000, 0], []],
    "none": [],
}


@pytest.fixture(params=DOCUMENTS, ids=lambda name: name.replace(" ", "_"))
def shard(request, tmp_path):
    documents = DOCUMENTS[request.param]
    with BinidxWriter(tmp_path / "shard") as writer:
        for document in documents:
            writer.add_document(document)
    return tmp_path / "shard", documents


def rewrite(path, data):
    with open(path, "r+b") as file:  # in place: some file systems write what replaces a file to the disk at once
        file.write(data)
        file.truncate()


def read(prefix):
    """All documents and all tokens, after no other check than opening makes."""
    reader = BinidxReader(prefix)
    documents = [reader.document(i).tolist() for i in range(reader.n_documents)]
    return documents, reader.tokens.tolist()


def check(prefix, path, data, documents):
    """Write `data` to one of the two files; whether the reader refused it."""
    rewrite(path, data)
    try:
        found = read(prefix)
    except ValueError as error:
        message = str(error)
        assert message.startswith((f"{prefix}.idx: ", f"{prefix}.bin: ")), message
        assert "got " in message and any(word in message for word in ("copy both files", "rebuild", "give the name")), (
            message
        )
        return True
    assert found == (documents, sum(documents, [])), data
    return False


def test_every_length_of_the_index(shard):
    prefix, documents = shard
    path = shard_files(prefix)[1]
    whole = path.read_bytes()
    for length in range(len(whole)):
        assert check(prefix, path, whole[:length], documents), length
    for extra in (b"\0", b"\0" * 8, b"\0" * 12, b"\0" * 20, whole):
        assert check(prefix, path, whole + extra, documents)
    assert not check(prefix, path, whole, documents)


def test_every_byte_of_the_index(shard):
    prefix, documents = shard
    path = shard_files(prefix)[1]
    whole, rng, n = path.read_bytes(), random.Random(1), len(documents)
    for at, right in enumerate(whole):
        bits = {right ^ 1 << bit for bit in range(8)}
        some = set(range(256)) if at < 34 else {0, 255, *rng.choices(range(256), k=8)}
        wrong = (bits | some) - {right}
        refused = {
            value for value in wrong if check(prefix, path, whole[:at] + bytes([value]) + whole[at + 1 :], documents)
        }
        # Small tokens read the same in other integer types; reading makes no use of the list behind the offsets.
        assert refused == wrong or at == 17 or at >= 34 + 12 * n, at


def test_random_damage_to_the_index(shard):
    prefix, documents = shard
    path = shard_files(prefix)[1]
    whole, rng = path.read_bytes(), random.Random(1)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.choice((2, 3, 8))):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 2, 4, 8, 255, rng.randrange(256)))
        # Two damages may make another shard that is right in itself, of the same tokens: it reads as what it says.
        rewrite(path, data)
        try:
            _, tokens = read(prefix)
        except ValueError:
            continue
        assert tokens == sum(documents, [])


def test_every_length_of_the_tokens(shard):
    prefix, documents = shard
    path = shard_files(prefix)[0]
    whole = path.read_bytes()
    for length in range(len(whole) + 20):
        data = (whole + bytes(20))[:length]
        assert check(prefix, path, data, documents) == (length != len(whole)), length


def test_a_file_that_shrinks_between_the_checks_is_an_error(shard, monkeypatch):
    prefix, documents = shard
    path = shard_files(prefix)[1]
    whole, read_header = path.read_bytes(), BinidxReader._read_header

    def shrink(self):
        header = read_header(self)
        path.write_bytes(whole[:34])
        return header

    monkeypatch.setattr(BinidxReader, "_read_header", shrink)
    with pytest.raises(ValueError):
        BinidxReader(prefix)
