"""rwkv-ext data: build a shard from text, describe shards, check them."""

import argparse
import sys
from pathlib import Path

import numpy as np

from rwkv_ext.data.binidx import BinidxReader, shard_files
from rwkv_ext.data.build import build, prime_lines
from rwkv_ext.data.documents import INVALID_UTF8
from rwkv_ext.tokenizer import WorldTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    command = actions.add_parser("build", help="write OUT.bin and OUT.idx from .jsonl and .txt files and folders of them")
    command.add_argument("inputs", nargs="+", metavar="IN", help="a .jsonl file (a document a line), a text file (one document) or a folder")
    command.add_argument("out", metavar="OUT", help="the shard's name without .bin and .idx")
    command.add_argument("--text-key", default="text", metavar="KEY", help="where a .jsonl object holds its text (default: text)")
    command.add_argument("--include", action="append", default=[], metavar="PATTERN", help="take these files of folders too, e.g. '*.py'")
    command.add_argument("--vocabulary", metavar="FILE", help="another vocabulary file (default: rwkv_vocab_v20230424)")
    command.add_argument("--eod", action=argparse.BooleanOptionalAction, default=True, help="end each document with token 0 (default)")
    command.add_argument("--invalid-utf8", choices=INVALID_UTF8, default="error", help="what to do about text that is not UTF-8 (default: error)")
    command.add_argument("--overwrite", action="store_true", help="replace the shard OUT if it exists")
    command.set_defaults(run_action=_build)

    for name, function, summary in (("info", _info, "print what shards hold"), ("check", _check, "read shards whole and print what is wrong")):
        command = actions.add_parser(name, help=summary)
        command.add_argument("prefixes", nargs="+", metavar="PREFIX", help="a shard's name without .bin and .idx")
        if name == "check":
            command.add_argument("--vocabulary", metavar="FILE", help="the vocabulary file of the shard (default: rwkv_vocab_v20230424)")
        command.set_defaults(run_action=function)


def run(args: argparse.Namespace) -> int:
    return args.run_action(args)


def _build(args) -> int:
    out = Path(args.out)
    if out.suffix in (".txt", ".jsonl") or out.is_dir() or out.is_file() and out.suffix not in (".bin", ".idx"):
        raise ValueError(f"OUT must be the name of a new shard, got {out}, which looks like an input; give OUT last, e.g. data/corpus")
    options = {name: getattr(args, name) for name in ("text_key", "include", "eod", "invalid_utf8", "overwrite")}
    summary = build(args.inputs, out, tokenizer=WorldTokenizer(args.vocabulary), **options)
    bin_path, idx_path = shard_files(out)
    print(f"wrote            {bin_path} ({bin_path.stat().st_size:,} bytes) and {idx_path.name}")
    print("\n".join(summary.lines()))
    return 0


def _info(args) -> int:
    return _each(args.prefixes, _describe)


def _check(args) -> int:
    tokenizer = WorldTokenizer(args.vocabulary)
    known = tokenizer.byte_lengths > 0
    known[0] = True

    def check(reader: BinidxReader) -> None:
        reader.check_documents()
        reader.check_tokens(known)
        _describe(reader)
        share = reader.eod_share()
        print(f"ends in token 0  {share:.1%} of the documents" + ("" if share == 1 else "; RWKV's own data has it after every one"))
        for index in np.unique(np.linspace(0, reader.n_documents - 1, min(3, reader.n_documents), dtype=np.int64)):
            text = tokenizer.decode(np.asarray(reader.document(int(index))[:64]))
            print(f"document {index:<7} {text[:72]!r}")
        print("no fault found")

    return _each(args.prefixes, check)


def _describe(reader: BinidxReader) -> None:
    print(f"{reader.prefix}")
    print(f"documents        {reader.n_documents:,}")
    print(f"tokens           {reader.n_tokens:,} ({reader.dtype.name}, {reader.n_tokens * reader.dtype.itemsize:,} bytes)")
    if reader.n_documents:
        sizes = np.asarray(reader.sizes)
        print(f"document length  {sizes.min():,} to {sizes.max():,} tokens, mean {reader.n_tokens / reader.n_documents:,.1f}")
    print("\n".join(prime_lines(reader.n_tokens)))
    print(f"fingerprint      {reader.fingerprint()[:16]}")


def _each(prefixes: list[str], look) -> int:
    """Look at every shard, whatever is wrong with those before it; 1 if any is damaged or missing."""
    status = 0
    for prefix in prefixes:
        try:
            look(BinidxReader(prefix))
        except (ValueError, OSError) as error:
            print(f"rwkv-ext data: {error}", file=sys.stderr)
            status = 1
    return status
