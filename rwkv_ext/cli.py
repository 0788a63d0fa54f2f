"""The rwkv-ext command: each subcommand lives in the module of its noun and offers add_arguments() and run()."""

import argparse
import importlib
import sys

from ._load import MissingLibraryError

SUBCOMMANDS = {
    "doctor": ("rwkv_ext.doctor", "what was built, what runs where, and what to do if something is missing"),
    "data": ("rwkv_ext.data.command", "build, describe and check token shards"),
    "convert": ("rwkv_ext.convert_command", "a checkpoint in another form: .pth, .safetensors, Hugging Face, FLA"),
    "generate": ("rwkv_ext.generate_command", "write text with a model"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; a user's mistake ends in one sentence on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("rwkv-ext", description="Eagle (RWKV-5.2) and Finch (RWKV-6) tools.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted:  # the others stay unimported: --help and doctor answer at once
            importlib.import_module(module).add_arguments(command)
    args, rest = parser.parse_known_args(argv)
    # Before Python 3.12 argparse takes an optional positional for absent at the first option, and this one for unknown.
    if len(rest) == 1 and (rest == ["-"] or not rest[0].startswith("-")) and getattr(args, "prompt", "") is None:
        args.prompt = rest[0]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return importlib.import_module(SUBCOMMANDS[args.command][0]).run(args)
    except (ValueError, TypeError, OSError, ImportError, MissingLibraryError) as error:
        print(f"rwkv-ext {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rwkv-ext {args.command}: interrupted; nothing was left half-written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
