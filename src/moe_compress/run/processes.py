"""The processes of one command, joined: what the first says to all, sums over all, and an end for all together."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from moe_compress.run.launch import ElsewhereError, Launch, launched, require_known
from moe_compress.utils.devices import resolve_device

# The others wait while the first prunes, quantizes or writes; one that dies ends their wait at once.
PATIENCE = timedelta(days=7)
# Numbers that are summed at a time.
BUCKET = 1 << 24
CPU = torch.device("cpu")
_joinings = itertools.count()


@dataclass(frozen=True, slots=True)
class Processes:
    """This is the one of this rank, of `count`; `local` of them are on this machine.

    mesh: among whom layers are shared out; None where each has all of them.
    """

    rank: int = 0
    count: int = 1
    local: int = 1
    mesh: DeviceMesh | None = None

    def share(self, rows_B: Tensor) -> Tensor:
        """The rows of a step that this one computes."""
        return rows_B[self.rank :: self.count]

    def first(self, what: Any = None) -> Any:
        """What the first of them says, in all of them."""
        if self.count == 1:
            return what
        said = [what]
        with connected():
            dist.broadcast_object_list(said, src=0, device=CPU)
        return said[0]

    def all_say(self, what: Any) -> list[Any]:
        """What each of them says, in all of them."""
        if self.count == 1:
            return [what]
        said: list[Any] = [None] * self.count
        with connected():
            dist.all_gather_object(said, what)
        return said

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all of them, in place."""
        if self.count == 1:
            return
        with connected():
            for bucket in _buckets(tensors):
                if len(bucket) == 1 and bucket[0].is_contiguous():
                    dist.all_reduce(bucket[0])
                    continue
                flat = torch.cat([each.reshape(-1) for each in bucket])
                dist.all_reduce(flat)
                for each, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                    each.copy_(part.view_as(each))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What all of them do: where it fails in one, it fails in all, and the first says why."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            failed = error
        said = self.all_say(failed and (" ".join(str(failed).split()) or type(failed).__name__))
        if failed is not None and not self.rank:
            raise failed
        for rank, reason in enumerate(said):
            if reason:
                raise ElsewhereError(f"process {rank}: {reason}") from failed


ALONE = Processes()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes of this launch, each on a device of its own (`device` is what the run was told).

    When the first is through, the others are told. ValueError for launches that cannot be.
    """
    launch = launched()
    if launch.count == 1:
        yield ALONE
        return
    require_known()
    own = process_device(device, launch)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    with connected():
        store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
        # A command may join more than once, and what it left in the store is not to be met again.
        store = PrefixStore(f"moe_compress/{next(_joinings)}", store)
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
        mesh = init_device_mesh(own.type, (count,)) if launch.sharded else None
    processes = Processes(rank, count, launch.local_count, mesh)
    yield processes
    if not rank:
        processes.first(None)
    # Not after an error: the others may be waiting in a sum, and go when this process has.
    dist.destroy_process_group()


def process_device(name: str, launch: Launch) -> torch.device:
    """The device of one process: of several on GPUs, each has its own. ValueError where they would share one."""
    if launch.count > 1 and name.startswith("cuda:"):
        raise ValueError(
            f"device={name}: each of {launch.count} processes takes a GPU of its own: leave device= out, and choose "
            "among them with CUDA_VISIBLE_DEVICES=."
        )
    if launch.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{launch.local_rank}"
    return resolve_device(name)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Say in a sentence that another process has gone, where that ends what is inside."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        raise ElsewhereError(
            "another process of this command has ended or cannot be reached: the same command goes on from whatever "
            "was kept."
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one kind and device, as many as are summed at a time."""
    bucket: list[Tensor] = []
    for each in tensors:
        full = sum(other.numel() for other in bucket) + each.numel() > BUCKET
        if bucket and (full or (each.dtype, each.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(each)
    if bucket:
        yield bucket
