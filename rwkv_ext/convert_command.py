"""rwkv-ext convert: a checkpoint in another form, tensor by tensor, with a report of what was read and written."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoint import files, fla
from .models.config import EAGLE, RWKVConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {"official": "official names", "hf": "Hugging Face names", "fla": "flash-linear-attention names"}


def add_arguments(parser) -> None:
    parser.add_argument("input", metavar="IN", help="a .pth or .safetensors file, or a folder of either layout")
    parser.add_argument("output", metavar="OUT", help="NAME.pth, NAME.safetensors, or a folder (Hugging Face's layout)")
    parser.add_argument("--format", choices=files.FORMS, help="of OUT, where its name does not say it; fla is a folder "
                        "for flash-linear-attention, Finch alone")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of OUT (default: every tensor keeps its own)")
    parser.add_argument("--time-state", metavar="FILE", help="put these tuned initial states into OUT")
    parser.add_argument("--shard-gb", type=float, default=files.SHARD_BYTES / 1e9, metavar="N",
                        help="start another file of a folder beyond this size (default %(default)g)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args) -> int:
    """Convert, and print three lines or four."""
    form = files.form_of(args.output, args.format)
    if not args.shard_gb > 0:
        raise ValueError(f"--shard-gb must be more than 0, got {args.shard_gb:g}")
    if os.path.exists(args.output) and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; choose another OUT, or give --overwrite to replace it")
    config, tensors, container, naming = files.read(args.input)
    print(f"read   {args.input}: {container}, {NAMES[naming]}, {_dtypes(tensors)}")
    if args.time_state is not None:
        tensors = files.with_time_state(config, tensors, files.read_time_state(args.time_state, config))
    print(f"model  {_described(config, tensors)}")
    dtype = DTYPES.get(args.dtype)
    written = files.write(args.output, config, tensors, dtype, form, max(1, int(args.shard_gb * 1e9)))
    what = f"{NAMES[written.naming]}, {args.dtype or 'each tensor in its own dtype'}"
    count = f"{written.files} file{'s' if written.files > 1 else ''}"
    print(f"wrote  {os.fspath(args.output)}: {what}, {count}, {written.bytes / 1e9:.3f} GB")
    if form == "fla":
        print(f"note   {fla.NORM_NOTE}")
    return 0


def _described(config: RWKVConfig, tensors: Mapping[str, Tensor]) -> str:
    name = "Eagle (5.2)" if config.version == EAGLE else "Finch (6.0)"
    parameters = sum(x.numel() for x in tensors.values())
    ranks = "" if config.version == EAGLE else f", ranks {config.mix_rank} and {config.decay_rank}"
    tuned = ", tuned initial state" if any(x.endswith("time_state") for x in tensors) else ""
    return (
        f"{name}, {config.n_layer} layers of width {config.n_embd}, {config.n_head} heads of {config.head_size}, "
        f"channel mix {config.dim_ffn}{ranks}, vocabulary {config.vocab_size}{tuned}: {parameters:,} parameters"
    )


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    kinds = sorted({str(x.dtype).removeprefix("torch.") for x in tensors.values()})
    return " and ".join(kinds)
