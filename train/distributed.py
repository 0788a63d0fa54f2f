"""The ranks of a run: start-up, sums and broadcasts, gradient reduction, sharding; all of it works with one rank too.

Under torchrun every rank is a process; plain `python` is one rank without a process group. A rank that fails raises;
its exit closes its connections, so the collectives of the others fail and torchrun ends them: nobody waits for ever.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from train.config import TrainTable
from train.hardware import choose_device, cores

BUCKET_ELEMENTS = 1 << 24  # fp32 gradients reduced together: 64 MiB
TIMEOUT = timedelta(minutes=30)  # longer than the slowest rank's checkpoint


@dataclass(frozen=True)
class Ranks:
    """Who this process is among how many, and the device it computes on."""

    device: torch.device
    threads: int = 1
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes the log, the display and the picture."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Add up a short list of numbers over all ranks in fp64; every rank gets the same result."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def raise_together(self, error: OSError | None) -> None:
        """Raise on every rank what any rank reports, so that none is left waiting for the others."""
        found = next((item for item in self.gather(error) if item is not None), None)
        if found is not None:
            raise found

    def stop(self) -> None:
        """Leave the process group after a run that ended well."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start_ranks(table: TrainTable) -> Ranks:
    """Read torchrun's environment, choose device and threads, and join the process group if there are others."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    here, local_rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    threads = table.threads or max(1, cores() // here)
    torch.set_num_threads(threads)
    device = choose_device(table.device, local_rank)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT)
    return Ranks(device, threads, rank, size)


def shard_model(model: nn.Module, table: TrainTable, ranks: Ranks) -> None:
    """Split the parameters over the ranks with FSDP2 when [train] sharding asks for it and there are others.

    One unit per block; block 0 stays in the root unit because its ln0 is used before the block itself runs. Gradients
    are summed, not averaged: the loss is already divided by the tokens of all ranks. They are fp32 like the parameters.
    """
    if table.sharding != "fsdp" or ranks.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for block in list(model.blocks)[1:]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo has too
    # A block returns its last token's activations as a view; nobody writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def reshard(model: nn.Module) -> None:
    """Put an FSDP2 model's parameters back into pieces: a forward pass without a backward leaves the root's whole."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def sum_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Add the gradients of a replicated model over the ranks, in buckets whose layout never changes.

    A fixed layout (unlike one that follows the order of the backward pass) makes a resumed run reduce in the same
    order, bit for bit. An FSDP2 model is left alone: its backward pass has reduced already.
    """
    if ranks.size == 1 or hasattr(model, "set_requires_gradient_sync"):
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for bucket in _buckets(parameters):
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in bucket])
        dist.all_reduce(flat)
        pieces = flat.split([parameter.numel() for parameter in bucket])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad.copy_(piece.view_as(parameter))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        if bucket and elements + parameter.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.numel()
    if bucket:
        yield bucket
