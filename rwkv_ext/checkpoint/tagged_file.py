"""Safetensors files of our own, each kind told apart by a format name in its metadata: states, generations."""

import json
from os import PathLike

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .atomic_file import atomic_write


def write(path: str | PathLike, kind: str, tensors: dict[str, Tensor], values: object, where: str) -> None:
    """Write tensors and JSON values; a failure (OSError that begins with `where`) leaves an earlier file untouched."""
    metadata = {"format": kind, "values": json.dumps(values)}
    content = safetensors_bytes({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, metadata)
    atomic_write(path, lambda file: file.write(content), where)


def read(
    path: str | PathLike, kind: str, maker: str, where: str, device: torch.device | str | None = None
) -> tuple[dict[str, Tensor], object]:
    """Return the tensors and values of a file of this kind; maker names the function that writes such files.

    Raises FileNotFoundError, OSError, or ValueError where the file is something else or damaged.
    """
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise ValueError(
                    f"{where}: {path} must be a file of {maker}, got a safetensors file with "
                    f"tensors {sorted(file.keys())}; load models with RWKV.from_pretrained"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata.get("values", "null"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: {path} does not exist; check the path") from None
    except OSError as error:  # such as a folder, which safetensors calls "No such device"
        raise OSError(f"{where}: {path} must be a readable file, got an error from it ({error})") from error
    except SafetensorError as error:
        raise ValueError(
            f"{where}: {path} must be a complete file of {maker}, got one that cannot be read ({error}); save it again"
        ) from error
