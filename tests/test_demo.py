"""The demo: corpus, baselines, report; the training in it is one layer wide here and is tested in test_train.py."""

import json
import lzma
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_ext import RWKV, WorldTokenizer
from rwkv_ext.data.binidx import BinidxReader
from train import demo, demo_corpus, pretrain
from train.config_file import load_config
from train.demo_baselines import ALPHAS, KAPPAS, NgramBaseline, xz_bytes
from train.demo_corpus import collect, data_lines, table_share


def write_folder(folder: Path, count: int = 60, seed: int = 0) -> Path:
    """Write `count` different text files of about 3,000 bytes."""
    rng = np.random.default_rng(seed)
    words = [f"word{i}" for i in range(300)]
    for i in range(count):
        lines = [" ".join(rng.choice(words, 8)) for _ in range(60)]
        path = folder / f"part{i % 3}" / f"text{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return folder


# corpus


def test_whole_files_are_held_out_and_stay_so(tmp_path):
    folder = write_folder(tmp_path / "text")
    corpus = collect(folder)
    train, held_out = ({d.name for d in part} for part in (corpus.train, corpus.held_out))
    assert not train & held_out and len(train | held_out) == 60
    size = sum(len(d.data) for d in corpus.held_out) / sum(len(d.data) for d in corpus.train + corpus.held_out)
    assert 0.04 < size < 0.09
    for document in corpus.train + corpus.held_out:
        assert document.data == (folder / document.name).read_bytes()
    assert collect(folder) == corpus
    assert not [d for d in collect(folder, without=folder / "part1").train if d.name.startswith("part1/")]


def test_what_is_left_out(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "text")
    text = (folder / "part0" / "text0.txt").read_text()
    (folder / "copy.txt").write_text(text)
    (folder / "near.txt").write_text(text.replace("word1 ", "word2 ", 3))
    (folder / "short.txt").write_text("short")
    (folder / "latin1.txt").write_bytes("\xe9\xe8 ".encode("latin-1") * 200)
    (folder / "zero.txt").write_bytes(b"text \0" * 200)
    (folder / ".hidden.txt").write_text("hidden " * 100)
    (folder / "table.py").write_text("TABLE = [\n" + "    1, 2, 3,\n" * 1000 + "]\n")
    corpus = collect(folder)
    names = {d.name for d in corpus.train + corpus.held_out}
    left_out = {reason: sorted(name for name, _ in items) for reason, items in corpus.left_out.items()}
    assert left_out.pop("shorter than 200 bytes") == ["short.txt"]
    assert left_out.pop("not UTF-8 text") == ["latin1.txt", "zero.txt"]
    assert left_out.pop("40% or more of the lines are literal data") == ["table.py"]
    repeats = left_out.pop("repeats of other documents")
    assert len(repeats) == 2 and set(repeats) < {"copy.txt", "near.txt", "part0/text0.txt"}
    assert not left_out and len(names) == 60 and ".hidden.txt" not in names
    assert "repeats of other documents (2: " in "\n".join(corpus.lines())

    monkeypatch.setattr(demo_corpus, "MAX_TOTAL", 150_000)
    corpus = collect(folder)
    assert 120_000 < sum(len(d.data) for d in corpus.train + corpus.held_out) <= 150_000
    assert "more than 0 MiB of text" in corpus.left_out


def test_lines_of_jsonl_are_documents(tmp_path):
    path = tmp_path / "text.jsonl"
    rng = np.random.default_rng(1)
    texts = [" ".join(f"{x:x}" for x in rng.integers(0, 1 << 30, 400)) + "\n\u00e9" for _ in range(50)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = collect(path)
    found = {d.name: d.data.decode() for d in corpus.train + corpus.held_out}
    assert found == {f"text.jsonl#{i}": text for i, text in enumerate(texts, start=1)}
    assert 1 <= len(corpus.held_out) <= 4


def test_one_large_file_gives_its_end(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("".join(f"line {i} is not like the others\n" for i in range(5000)))
    corpus = collect(path)
    assert len(corpus.train) == len(corpus.held_out) == 1
    assert corpus.train[0].data + corpus.held_out[0].data == path.read_bytes()
    assert corpus.train[0].data.endswith(b"\n")
    assert 0.04 < len(corpus.held_out[0].data) / path.stat().st_size < 0.06


def test_standard_library_without_tests_and_tables(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    module = "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(100))
    for i in range(40):
        path = library / f"module{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(module.replace("function", f"function{i}"))
    (library / "large.py").write_text("".join(f"def large_{i}(): return {i}\n" for i in range(6000)))
    for name in ("test/a.py", "json/tests/b.py", "site-packages/c.py", "notes.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(module.replace("function", name[0]))
    monkeypatch.setattr(demo_corpus, "standard_library", lambda: library)
    corpus = collect()
    names = {d.name for d in corpus.train + corpus.held_out}
    assert names == {f"module{i}.py" for i in range(40)} | {"large.py"}
    large = next(d for d in corpus.train + corpus.held_out if d.name == "large.py")
    assert 95 << 10 < len(large.data) <= 96 << 10 and large.data.endswith(b"\n")
    assert "what is above 96 KiB of a document" in corpus.left_out


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = [\n1,\n2,\n3,\n]\n", 5),
        ("x = [\n1,\n2,\n]\n", 0),  # below TABLE_LINES
        ("x = {\n'a': (1, -2),\n'b': (3, 4),\n'c': [],\n}\n", 5),
        ("x = [\n1,\ny,\n3,\n4,\n]\n", 0),  # a name in it: code
        ("x = f(\n1,\n[\n2,\n3,\n4,\n],\n)\n", 5),
        ("x = ('a'\n'b'\n'c'\n'd'\n'e')\n", 5),
        ('def f():\n    """Docs.\n\n\n\n\n    """\n', 0),
        ('x = """\n\n\n\n"""\n', 5),
    ],
    ids=["list", "short", "dict", "names", "argument", "joined", "docstring", "string"],
)
def test_data_lines(source, lines):
    assert data_lines(source) == lines


def test_table_share_of_what_does_not_parse():
    assert table_share("print 'Python 2'\n") == 0.0
    assert table_share("x = [\n1,\n2,\n3,\n]") == 1.0


def test_errors_of_the_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="DATA must be a file or a folder, got .*nowhere"):
        collect(tmp_path / "nowhere")
    (tmp_path / "small.txt").write_text("small text\n" * 100)
    with pytest.raises(ValueError, match="DATA must leave at least 100,000 bytes.*got 1,045 from.*give a larger"):
        collect(tmp_path / "small.txt")


# baselines


def brute_force(train, alpha, kappa, vocab):
    def unigram(t):
        return (train.count(t) + alpha) / (len(train) + alpha * vocab)

    pairs = list(zip(train, train[1:]))

    def bigram(s, t):
        context = sum(a == s for a, _ in pairs)
        if not context:
            return unigram(t)
        weight = kappa * len({b for a, b in pairs if a == s})
        return (pairs.count((s, t)) + weight * unigram(t)) / (context + weight)

    return unigram, bigram


def test_ngrams_equal_brute_force_and_sum_to_one():
    vocab = 7
    train = np.random.default_rng(0).integers(0, 5, 60).tolist() + [6]  # 5 is never seen, 6 never has a follower
    unigram, bigram = brute_force(train, 0.3, 1.5, vocab)
    model = NgramBaseline.count(np.array(train, dtype=np.uint16), vocab, 0.3, 1.5)
    before, after = (x.ravel() for x in np.meshgrid(np.arange(vocab), np.arange(vocab), indexing="ij"))
    expected = [-math.log(bigram(int(s), int(t))) for s, t in zip(before, after)]
    np.testing.assert_allclose(model.bigram_nats(before, after), expected, rtol=1e-12)
    np.testing.assert_allclose(model.unigram_nats(after), [-math.log(unigram(int(t))) for t in after], rtol=1e-12)
    np.testing.assert_allclose(np.exp(-model.unigram_nats(np.arange(vocab))).sum(), 1)
    np.testing.assert_allclose(np.exp(-model.bigram_nats(before, after)).reshape(vocab, vocab).sum(1), 1)
    means = model.nats_per_token(before, after)
    assert means["bigram"] == pytest.approx(np.mean(expected))


def test_smoothing_is_chosen_on_the_end_of_the_training_tokens():
    vocab, rng = 50, np.random.default_rng(2)
    tokens = rng.zipf(1.5, 1000).clip(max=vocab - 1)
    model = NgramBaseline.fit(tokens, vocab)
    trials = {}
    for alpha in ALPHAS:
        unigram, _ = brute_force(tokens[:900].tolist(), alpha, 1.0, vocab)
        trials[alpha] = -sum(math.log(unigram(t)) for t in tokens[900:].tolist())
    assert model.alpha == min(trials, key=trials.get)
    losses = {}
    for kappa in KAPPAS:
        counted = NgramBaseline.count(tokens[:900], vocab, model.alpha, kappa)
        losses[kappa] = counted.bigram_nats(tokens[899:-1], tokens[900:]).sum()
    assert model.kappa == min(losses, key=losses.get)
    assert model.unigrams.sum() == 1000 and model.contexts.sum() == 999


def test_full_vocabulary_does_not_overflow():
    tokens = np.array([65535, 65534, 65535, 65534, 65535], dtype=np.uint16)
    model = NgramBaseline.count(tokens, 65536, 0.1, 1.0)
    nats = model.bigram_nats(tokens[:-1], tokens[1:])
    p = (3 + 0.1) / (5 + 0.1 * 65536)
    assert nats[0] == pytest.approx(-math.log((2 + p * 2 / 3 * 1.0) / 3), abs=0.2)
    assert model.bigram_nats(tokens[:1], tokens[:1])[0] > 5


def test_xz_knows_the_training_text():
    rng = np.random.default_rng(3)
    text = rng.integers(97, 123, 20000).astype(np.uint8).tobytes()
    alone, added = xz_bytes([text[:15000], text[15000:]], [text[5000:10000]])
    assert alone == len(lzma.compress(text[5000:10000], preset=9 | lzma.PRESET_EXTREME))
    assert added < 0.1 * alone


# the whole demo, with a model of one layer trained in this process

TINY = """
[model]
n_layer = 1
n_embd = 32
head_size = 32
[data]
train = ["set"]
ctx_len = 32
validation_windows = 3
[train]
global_batch = 16
micro_batch = 16
minutes = 1
threads = 1
dtype = "fp32"
[optim]
lr = 1e-2
lr_final = 1e-3
[checkpoint]
folder = "set"
[log]
tensorboard = false
"""


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """Return a function that runs the demo on a small folder of text."""
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    text = write_folder(tmp_path / "text")

    def train(arguments):
        return pretrain.main(arguments[arguments.index(str(config)) :])

    def run(*arguments):
        return demo.main(["--out", str(tmp_path / "out"), "--data", str(text), "--minutes", "1", *arguments])

    monkeypatch.setattr(demo, "CONFIG", config)
    monkeypatch.setattr(demo, "GPU_CONFIG", config)
    monkeypatch.setattr(demo, "PASSES", {config: 0.05})
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr("train.demo_report.SAMPLE_TOKENS", 5)
    return run


def test_demo_takes_the_larger_model_to_a_gpu(monkeypatch):
    monkeypatch.setattr(demo, "cuda_problem", lambda rank: "torch sees no GPU")
    assert demo.choose_config() == demo.CONFIG
    monkeypatch.setattr(demo, "cuda_problem", lambda rank: None)
    assert demo.choose_config() == demo.GPU_CONFIG
    small, large = (load_config(path) for path in (demo.CONFIG, demo.GPU_CONFIG))
    assert large.model.n_embd > small.model.n_embd and large.train.dtype == "bf16"
    assert set(demo.PASSES) == {demo.CONFIG, demo.GPU_CONFIG}


def test_demo_reports_and_uses_what_is_there_again(tiny_demo, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert tiny_demo() == 0
    assert (out / "report.md").read_text() in capsys.readouterr().out
    report = (out / "report.md").read_text()
    shards = {name: BinidxReader(out / "shards" / name) for name in ("train", "held_out")}
    texts = [json.loads(line)["text"] for line in (out / "text" / "held_out.jsonl").read_text().splitlines()]
    assert shards["held_out"].n_documents == len(texts)
    assert f"{len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes" in report
    for path in ("finch/loss.png", "finch/final.pth", "finch/log.jsonl", "text", "report.md"):
        assert (out / path).exists() and str(out / path) in report
    assert report.count("```") == 6 and texts[0][:40].rstrip() in report

    # Every number of the table, computed in another way.
    rows = {}
    for line in report.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[2][:1].isdigit():
            rows[cells[0]] = (float(cells[1]) if cells[1] else None, float(cells[2]))
    tokens = np.asarray(shards["held_out"].tokens, dtype=np.int64)
    tokens = tokens[: (len(tokens) - 1) // 32 * 32 + 1]
    model = NgramBaseline.fit(shards["train"].tokens, 65536)
    assert rows["unigram"][0] == pytest.approx(model.unigram_nats(tokens[1:]).mean(), abs=1e-3)
    assert rows["bigram"][0] == pytest.approx(model.bigram_nats(tokens[:-1], tokens[1:]).mean(), abs=1e-3)
    size = WorldTokenizer().byte_lengths[tokens[1:]].sum(dtype=np.int64)
    finch = rows["Finch, 1 layers of 32"]
    for nats, bits in (finch, rows["unigram"], rows["bigram"]):
        assert bits == pytest.approx(nats * (len(tokens) - 1) / size / math.log(2), abs=2e-3)
    with torch.no_grad():
        finch_model = RWKV.from_pretrained(out / "finch" / "final.pth", dtype=torch.float32)
        windows = torch.from_numpy(np.stack([tokens[i : i + 33] for i in range(0, len(tokens) - 1, 32)]))
        logits, _ = finch_model(windows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert finch[0] == pytest.approx(loss.item(), abs=1e-3)
    alone = len(lzma.compress("".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME))
    assert rows["xz -9e, the held-out text alone"][1] == pytest.approx(8 * alone / sum(map(len, texts)), abs=1e-3)
    assert rows["xz -9e, knowing the training text"][1] < rows["xz -9e, the held-out text alone"][1]

    before = {path: path.stat().st_mtime_ns for path in out.glob("shards/*")}
    monkeypatch.setattr(demo, "xz_bytes", None)  # would fail if the baselines were computed again
    monkeypatch.setattr(demo, "train", lambda arguments: 3)
    assert tiny_demo() == 3
    assert {path: path.stat().st_mtime_ns for path in out.glob("shards/*")} == before
    assert "used again" in capsys.readouterr().out


def test_a_run_of_another_length_is_kept_beside(tiny_demo, tmp_path):
    out = tmp_path / "out"
    plan = demo.plan_training(out, "text", demo.CONFIG, 10, 8.5)
    assert plan == 8.5
    demo.CONFIG.write_text(TINY + "# a comment changes nothing\n")
    assert demo.plan_training(out, "text", demo.CONFIG, 10, 3.0) == 8.5  # an interrupted run keeps its length
    assert demo.plan_training(out, "text", demo.CONFIG, 60, 58.0) == 58.0
    assert json.loads((out / "finch-1" / "demo.json").read_text())["minutes"] == 10
    assert demo.plan_training(out, "other text", demo.CONFIG, 60, 57.0) == 57.0
    assert (out / "finch-2" / "demo.json").is_file()
    demo.CONFIG.write_text(TINY.replace("n_embd = 32", "n_embd = 64"))
    assert demo.plan_training(out, "other text", demo.CONFIG, 60, 56.0) == 56.0
    assert demo.plan_training(tmp_path / "slow", "text", demo.CONFIG, 10, -3.0) == 2.5


def test_damaged_shards_are_built_again(tiny_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "train", lambda arguments: 3)
    assert tiny_demo() == 3
    assert "training stopped; run the same command again" in capsys.readouterr().err
    shard = tmp_path / "out" / "shards" / "train.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert tiny_demo() == 3
    assert shard.read_bytes() == whole


def test_mistakes_end_in_a_sentence(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "out"), "--minutes", "0.5"]) == 1
    assert "error: demo: MINUTES must be at least 1, got 0.5" in capsys.readouterr().err
    assert demo.main(["--out", str(tmp_path / "out"), "--data", str(tmp_path / "nowhere")]) == 1
    assert "DATA must be a file or a folder, got" in capsys.readouterr().err


def test_trainer_exit_status(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('told', *sys.argv[1:])\nraise SystemExit(int(sys.argv[1]))\n")
    before = signal.getsignal(signal.SIGINT)
    assert demo.train(["--standalone", "--nproc-per-node", "1", str(script), "7"]) == 7
    assert signal.getsignal(signal.SIGINT) is before
    assert "told 7" in capfd.readouterr().out
    # Ctrl-C: the script ends well after it, as the trainer does, and the status says that the demo was stopped.
    script.write_text(
        "import os, signal, time\nsignal.signal(signal.SIGINT, lambda *_: print('saved', flush=True) or os._exit(0))\n"
        "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(30)\n"
    )
    assert demo.train(["--standalone", "--nproc-per-node", "1", str(script)]) == 130
    assert "saved" in capfd.readouterr().out
