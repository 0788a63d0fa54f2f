"""rwkv-ext data: build a shard from text; describe, check, read, merge and split shards."""

import argparse
import sys
from pathlib import Path

import numpy as np

from rwkv_ext.data.binidx import BinidxReader, shard_files
from rwkv_ext.data.build import build
from rwkv_ext.data.build_summary import prime_lines
from rwkv_ext.data.documents import INVALID_UTF8
from rwkv_ext.data.shards import hold_out, merge, split_evenly
from rwkv_ext.data.token_stream import TokenStream, find_shards
from rwkv_ext.host_memory import keep_freed_memory
from rwkv_ext.tokenizer import WorldTokenizer

BUILD_HELP = """Write OUT.bin and OUT.idx: one document for each line of a .jsonl file, each row of a .parquet file and
each text file, in the order of the inputs; .gz and .zst are decompressed, - is standard input (JSON lines); a folder
gives its *.txt, *.jsonl and *.parquet files by sorted name. After a crash or Ctrl-C the same command goes on where it
stopped. Options go before IN or after OUT."""
PREFIX_HELP = "a shard's name without .bin and .idx, or a folder: its shards by sorted name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    command = actions.add_parser("build", help="write OUT.bin and OUT.idx from text", description=BUILD_HELP)
    add = command.add_argument
    add("inputs", nargs="+", metavar="IN", help="a .jsonl, .parquet or text file, a folder, or -")
    add("out", metavar="OUT", help="the shard's name without .bin and .idx")
    add("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    add("--include", action="append", metavar="PATTERN", help="take more files of folders, such as '*.py'")
    _add_vocabulary(command)
    eod = argparse.BooleanOptionalAction
    add("--eod", action=eod, default=True, help="end each document with token 0 (default)")
    add("--invalid-utf8", choices=INVALID_UTF8, default="error", help="what is not UTF-8 (default: error)")
    add("--drop-empty", action="store_true", help="leave out documents of white space alone")
    add("--drop-duplicates", action="store_true", help="leave out documents that an earlier one equals")
    add("--shuffle", action="store_true", help="put the documents in an order that --seed decides")
    add("--seed", type=int, default=0, metavar="N", help="of --shuffle (default: 0)")
    add("--epochs", type=int, default=1, metavar="N", help="every document N times, each time in another order")
    add("--shard-tokens", type=int, metavar="N", help="OUT-00000-of-00003 and so on, at most N tokens each")
    add("--threads", type=int, metavar="N", help="pieces encoded at once (default: one for each core)")
    add("--overwrite", action="store_true", help="replace the shard OUT if it exists")
    command.set_defaults(run_action=_build)

    summaries = {_info: "print what shards hold", _check: "read shards whole and print what is wrong"}
    for function, summary in summaries.items():
        name, sentence = function.__name__[1:], summary.capitalize() + "."
        command = actions.add_parser(name, help=summary, description=sentence)
        command.add_argument("prefixes", nargs="+", metavar="PREFIX", help=PREFIX_HELP)
        if function is _check:
            _add_vocabulary(command)
        command.set_defaults(run_action=function)
    _add_sample(actions)
    _add_merge(actions)
    _add_split(actions)


def _add_sample(actions) -> None:
    summary = "print documents drawn from shards, decoded"
    command = actions.add_parser("sample", help=summary, description=summary.capitalize() + ".")
    command.add_argument("prefixes", nargs="+", metavar="PREFIX", help=PREFIX_HELP)
    command.add_argument("--documents", type=int, default=3, metavar="N", help="how many of each shard (default: 3)")
    command.add_argument("--tokens", type=int, default=200, metavar="N", help="of each, at most (default: 200)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="another seed draws others (default: 0)")
    _add_vocabulary(command)
    command.set_defaults(run_action=_sample)


def _add_merge(actions) -> None:
    summary = "write the documents of several shards to one"
    command = actions.add_parser("merge", help=summary, description=summary.capitalize() + ", in the order given.")
    command.add_argument("inputs", nargs="+", metavar="IN", help=PREFIX_HELP)
    command.add_argument("out", metavar="OUT", help="the new shard's name")
    command.add_argument("--overwrite", action="store_true", help="replace the shard OUT if it exists")
    command.set_defaults(run_action=_merge)


def _add_split(actions) -> None:
    summary = "write the documents of one shard to several"
    command = actions.add_parser("split", help=summary, description=summary.capitalize() + "; none is cut.")
    command.add_argument("prefix", metavar="IN", help="a shard's name without .bin and .idx")
    command.add_argument("out", metavar="OUT", help="the new shards' names begin with it")
    way = command.add_mutually_exclusive_group(required=True)
    way.add_argument("--parts", type=int, metavar="N", help="OUT-00000-of-N and so on, about as many tokens in each")
    way.add_argument("--hold-out", type=float, metavar="SHARE", help="OUT-train, OUT-holdout: each document by chance")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of --hold-out (default: 0)")
    command.add_argument("--overwrite", action="store_true", help="replace shards that exist")
    command.set_defaults(run_action=_split)


def _add_vocabulary(command: argparse.ArgumentParser) -> None:
    command.add_argument("--vocabulary", metavar="FILE", help="another vocabulary than rwkv_vocab_v20230424")


def run(args: argparse.Namespace) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a text is no damaged shard
    return args.run_action(args)


def _build(args) -> int:
    out = Path(args.out)
    is_input = out.suffix in (".txt", ".jsonl", ".gz", ".zst", ".parquet") or (
        out.is_file() and out.suffix not in (".bin", ".idx")
    )
    if is_input or out.is_dir():
        advice = "give it last, such as data/corpus"
        raise ValueError(f"OUT must be the name of a shard, got {out}, which looks like an input; {advice}")
    keep_freed_memory()  # every piece of the input needs as much as the one before
    summary = build(
        args.inputs,
        out,
        tokenizer=WorldTokenizer(args.vocabulary),
        text_key=args.text_key,
        include=args.include or (),
        eod=args.eod,
        invalid_utf8=args.invalid_utf8,
        drop_empty=args.drop_empty,
        drop_duplicates=args.drop_duplicates,
        shuffle=args.shuffle,
        seed=args.seed,
        epochs=args.epochs,
        shard_tokens=args.shard_tokens,
        threads=args.threads,
        overwrite=args.overwrite,
    )
    shards = [shard_files(name) for name in summary.shards]
    size = f"({sum(path.stat().st_size for path, _ in shards):,} bytes)"
    if args.shard_tokens is None:
        print(f"wrote            {shards[0][0]} {size} and {shards[0][1].name}")
    else:
        print(f"wrote            {shards[0][0]} to {shards[-1][0].name} {size}, each with its .idx")
    print("\n".join(summary.lines()))
    return 0


def _info(args) -> int:
    return _each(args.prefixes, _describe) or _describe_stream(args.prefixes)


def _check(args) -> int:
    tokenizer = WorldTokenizer(args.vocabulary)
    known = tokenizer.byte_lengths > 0
    known[0] = True  # ends a document

    def check(reader: BinidxReader) -> None:
        reader.check_documents()
        reader.check_tokens(known)
        _describe(reader)
        share = reader.eod_share()
        remark = "" if share == 1 else "; RWKV's models expect it after each"
        print(f"end in token 0   {share:.1%} of the documents{remark}")
        last = reader.n_documents - 1
        for index in sorted({0, last // 2, last}) if last >= 0 else ():
            text = tokenizer.decode(reader.document(index)[:64])
            print(f"document {index:<7} {text[:72]!r}")
        print("no fault found")

    return _each(args.prefixes, check) or _describe_stream(args.prefixes)


def _sample(args) -> int:
    tokenizer = WorldTokenizer(args.vocabulary)
    for name in ("documents", "tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if args.seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {args.seed}")

    def show(reader: BinidxReader) -> None:
        count = min(args.documents, reader.n_documents)
        for index in sorted(np.random.default_rng(args.seed).choice(reader.n_documents or 1, count, replace=False)):
            ids = reader.document(int(index))
            print(f"--- {reader.prefix}, document {index:,} of {reader.n_documents:,}, {len(ids):,} tokens")
            print(tokenizer.decode(ids[: args.tokens]))

    return _each(args.prefixes, show)


def _merge(args) -> int:
    _describe(merge(args.inputs, args.out, args.overwrite))
    return 0


def _split(args) -> int:
    if args.parts is not None:
        readers = split_evenly(args.prefix, args.out, args.parts, args.overwrite)
    else:
        readers = hold_out(args.prefix, args.out, args.hold_out, args.seed, args.overwrite)
    for reader in readers:
        print(f"{reader.prefix}  {reader.n_documents:,} documents, {reader.n_tokens:,} tokens")
    return 0


def _describe(reader: BinidxReader) -> None:
    size = reader.n_tokens * reader.dtype.itemsize
    print(f"{reader.prefix}\ndocuments        {reader.n_documents:,}")
    print(f"tokens           {reader.n_tokens:,} ({reader.dtype.name}, {size:,} bytes)")
    if reader.n_documents:
        mean = reader.n_tokens / reader.n_documents
        print(f"document length  {reader.sizes.min():,} to {reader.sizes.max():,} tokens, mean {mean:,.1f}")
    print("\n".join(prime_lines(reader.n_tokens)))
    print(f"fingerprint      {reader.fingerprint()[:16]} of the files, {_print_of(TokenStream(reader))} of the tokens")


def _describe_stream(entries: list[str]) -> int:
    """Say what several shards are together; return 0."""
    stream = TokenStream(entries)
    if len(stream.shards) > 1:
        print(f"all {len(stream.shards):,} shards as one stream, in this order")
        print(f"documents        {stream.n_documents:,}\ntokens           {stream.n_tokens:,}")
        print("\n".join(prime_lines(stream.n_tokens)))
        print(f"fingerprint      {_print_of(stream)} of the tokens")
    return 0


def _print_of(stream: TokenStream) -> str:
    return stream.fingerprint()[:16]


def _each(entries: list[str], look) -> int:
    """Look at every shard, whatever is wrong with those before it; 1 if any is damaged or missing."""
    status = 0
    for entry in entries:
        try:
            prefixes = find_shards(entry)
        except (ValueError, OSError) as error:
            prefixes, status = [], _complain(error)
        for prefix in prefixes:
            try:
                look(BinidxReader(prefix))
            except (ValueError, OSError) as error:
                status = _complain(error)
    return status


def _complain(error: Exception) -> int:
    print(f"rwkv-ext data: {error}", file=sys.stderr)
    return 1
