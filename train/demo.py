"""Everything once, small: text -> token shards -> a trained Finch -> its loss curve -> text it writes.

    python train/demo.py --out demo [--data PATH] [--minutes N]

What it calls is what a real run calls: rwkv_ext.data.build, torchrun train/pretrain.py, rwkv_ext.generate. Run the same
command again after an interruption: shards and baselines are used again, training goes on from its checkpoint.
"""

import argparse
import hashlib
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

if __package__ in (None, ""):  # started as a script: make `train` importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rwkv_ext.checkpoint.atomic_file import atomic_write
from rwkv_ext.data.binidx import BinidxReader
from rwkv_ext.data.build import build
from train.config_file import dump_config, load_config
from train.demo_baselines import NgramBaseline, held_out_tokens, xz_bytes
from train.demo_corpus import Corpus, collect, write_jsonl
from train.demo_report import ALL_WINDOWS, judge, prompts, report_lines, write_samples
from train.hardware import cuda_problem

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "train" / "configs" / "demo.toml"
GPU_CONFIG = ROOT / "train" / "configs" / "demo-gpu.toml"  # taken where the kernels have a GPU to run on
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]  # what `torchrun` is, and what is called here
PASSES = {CONFIG: 6, GPU_CONFIG: 4}  # over the training text at most: more would teach it by heart
CLOSING_MINUTES = 1.0  # of the time for the last measurement and the samples, less in a short demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, or 1 after printing what went wrong and what to do about it."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    parser.add_argument("--data", type=Path, help="text of your own: a file or folder (default: Python's library)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long all of it may take (default: 10)")
    args = parser.parse_args(argv)
    try:
        return demo(args.out, args.data, args.minutes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130


def demo(out: Path, source: Path | None, minutes: float) -> int:
    """Do all of it; return the exit status."""
    started = time.monotonic()
    if not minutes >= 1:
        raise ValueError(f"demo: MINUTES must be at least 1, got {minutes:g}; 10 is enough to see Python")

    config = choose_config()
    heading("1. Text")
    corpus = collect(source, without=out)
    print("\n".join(corpus.lines()))
    text = write_text(corpus, out)

    heading("2. Token shards")
    build_shards(out, text)

    heading("3. What there is to beat")
    settings = [
        f"data.train={json.dumps([str(out / 'shards' / 'train')])}",
        f"data.validation={json.dumps([str(out / 'shards' / 'held_out')])}",
        f"train.tokens={int(PASSES[config] * BinidxReader(out / 'shards' / 'train').n_tokens)}",
        f"checkpoint.folder={json.dumps(str(out / 'finch'))}",
    ]
    baselines = measure_baselines(out, corpus, text, config, settings)
    drawn = ", ".join(f"{name} = {value:.4f}" for name, value in baselines["picture"].items())
    settings.append(f"log.baselines={{ {drawn} }}")

    heading("4. Training")
    remaining = minutes - (time.monotonic() - started) / 60 - min(CLOSING_MINUTES, minutes / 5)
    settings.append(f"train.minutes={plan_training(out, text, config, minutes, remaining):g}")
    arguments = ["--standalone", "--nproc-per-node", "1", str(ROOT / "train" / "pretrain.py"), str(config)]
    for setting in settings:
        arguments += ["--set", setting]
    status = train(arguments)
    if status or not (out / "finch" / "final.pth").is_file():
        print("training stopped; run the same command again to go on from its checkpoint", file=sys.stderr)
        return status or 130

    heading("5. Result")
    model, results = judge(load_config(config, [*settings, ALL_WINDOWS]), out / "finch" / "final.pth", baselines)
    samples = write_samples(model, prompts(corpus, python=source is None))
    lines = report_lines(out, corpus, results, samples, (time.monotonic() - started) / 60, [*TORCHRUN, *arguments])
    atomic_write(out / "report.md", lambda file: file.write("\n".join(lines).encode() + b"\n"), "demo")
    print("\n".join(lines))
    return 0


def choose_config() -> Path:
    """Return the configuration for a GPU where train.device = "auto" will take one, else the CPU's."""
    return GPU_CONFIG if cuda_problem(0) is None else CONFIG


def heading(title: str) -> None:
    """Print the name of a step."""
    print(f"\n== {title}", flush=True)


def write_text(corpus: Corpus, out: Path) -> str:
    """Write both sets as .jsonl files and return a SHA-256 that names them."""
    digest = hashlib.sha256()
    for name, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
        path = out / "text" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(documents, path)
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def build_shards(out: Path, text: str) -> None:
    """Build shards/train and shards/held_out from text/, unless those there were built from the same text."""
    note = out / "shards" / "built_from.json"
    if read_json(note) == {"text": text} | shard_fingerprints(out):
        print(f"those in {out / 'shards'} are of this text: used again")
        return
    note.unlink(missing_ok=True)
    for name in ("train", "held_out"):
        source, shard = out / "text" / f"{name}.jsonl", out / "shards" / name
        print(f"rwkv-ext data build {source} {shard}")
        summary = build([source], shard, overwrite=True)
        print("\n".join("  " + line for line in summary.lines()[:3]))
    write_json(note, {"text": text} | shard_fingerprints(out))


def shard_fingerprints(out: Path) -> dict[str, str]:
    """Return the fingerprint of each shard that is there and whole."""
    found = {}
    for name in ("train", "held_out"):
        try:
            found[name] = BinidxReader(out / "shards" / name).fingerprint()
        except (ValueError, OSError):  # missing or damaged: it will be built
            pass
    return found


def measure_baselines(out: Path, corpus: Corpus, text: str, path: Path, settings: list[str]) -> dict:
    """Return {"picture": nats by name, "report": nats by name, "xz": ...}, from baselines.json if it is of this text.

    "picture" is over the windows that the trainer's validations measure, "report" over all held-out windows.
    """
    key = hashlib.sha256(f"{text} {dump_config(load_config(path))}".encode()).hexdigest()
    note = out / "baselines.json"
    found = read_json(note)
    if found is None or found["of"] != key:
        config = load_config(path, settings)
        tokens = BinidxReader(config.data.train[0]).tokens
        model = NgramBaseline.fit(tokens, config.model.vocab_size)
        alone, added = xz_bytes((d.data for d in corpus.train), (d.data for d in corpus.held_out))
        found = {
            "of": key,
            "alpha": model.alpha,
            "kappa": model.kappa,
            "picture": model.nats_per_token(*held_out_tokens(config)),
            "report": model.nats_per_token(*held_out_tokens(load_config(path, [*settings, ALL_WINDOWS]))),
            "xz": {"alone": alone, "added": added, "text": sum(len(d.data) for d in corpus.held_out)},
        }
        write_json(note, found)
    for name, value in found["report"].items():
        print(f"  {name:<10}{value:.3f} nats per token of the held-out text")
    return found


def plan_training(out: Path, text: str, config: Path, minutes: float, remaining: float) -> float:
    """Return the minutes of training: what remains, or what an interrupted run of the same plan was given.

    A run of another text, length or configuration is moved aside, not lost and not mixed up with the new one.
    """
    folder, note = out / "finch", out / "finch" / "demo.json"
    plan = {"text": text, "minutes": minutes, "config": dump_config(load_config(config))}
    earlier = read_json(note)
    if earlier is not None and {key: earlier.get(key) for key in plan} == plan:
        return earlier["training_minutes"]
    if folder.exists():
        aside = next(path for i in range(1, 10**6) if not (path := out / f"finch-{i}").exists())
        folder.rename(aside)
        print(f"the run in {folder} had another text, length or configuration: it is {aside} now")
    training = round(max(remaining, minutes / 4), 2)
    write_json(note, plan | {"training_minutes": training})
    return training


def train(arguments: list[str]) -> int:
    """Let torchrun start the trainer and wait for it; return an exit status.

    Ctrl-C and SIGTERM reach the trainer, which saves a checkpoint before it ends.
    """
    print(shlex.join([*TORCHRUN, *arguments]), flush=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        torchrun(arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:  # the trainer has said why
        return next(iter(error.failures.values())).exitcode
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def read_json(path: Path) -> dict | None:
    """Return what write_json wrote, or None where there is nothing readable."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: dict) -> None:
    """Write value whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"), "demo")


if __name__ == "__main__":
    sys.exit(main())
