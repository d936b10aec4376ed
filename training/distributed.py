"""Several processes that train one network together, as `torchrun` or `marina train --processes N` starts them.

Every process runs the same program on the same data. A batch is the recipe's, whatever the number of processes: each
learns from its part of it, DistributedDataParallel adds up the gradients (Li et al., "PyTorch Distributed: Experiences
on Accelerating Data Parallel Training", 2020), and each takes the same step with the same sum. With a part's loss
counted by its share of the batch, the sum is the gradient of the whole batch, so that the number of processes changes
the rounding of sums and nothing else, but for layers that draw at random within the network, such as dropout.

Process 0 leads: it alone writes files and tells of progress.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import Train
from training.errors import PeerFailed, RecipeError
from training.machine import choose_device

_CONNECTING = datetime.timedelta(minutes=3)
"""Longest wait for the connections to all others."""
_PATIENCE = datetime.timedelta(hours=2)
"""Longest wait for another process: the others wait while the first one judges the test split."""
_CPU = torch.device("cpu")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Group:
    """The processes of one training, seen from one of them."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mine(self, count: int) -> slice:
        """This process's part of `count` things in a row; parts differ by one at most and may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def totals(self, *values: float) -> tuple[float, ...]:
        """Each value summed over the processes, in double precision."""
        if self.size == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(summed)
        return tuple(summed.tolist())

    def either(self, *flags: bool) -> tuple[bool, ...]:
        """Whether any process says so, for each flag."""
        return tuple(total > 0 for total in self.totals(*map(float, flags)))

    def collect(self, values: Sequence[int]) -> list[int]:
        """The values of all processes, one process after the other."""
        if self.size == 1:
            return list(values)
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, list(values))
        return [value for part in parts for value in part]

    def first_does(self, work: Callable[[], _T]) -> _T:
        """What `work` gives to process 0, in all. Where it fails there, the others raise PeerFailed."""
        if self.size == 1:
            return work()
        told: list[Any] = [None]
        if self.leads:
            try:
                told = [work()]
            except BaseException:
                distributed.broadcast_object_list([False, None], src=0, device=_CPU)
                raise
        told = [True, *told]
        distributed.broadcast_object_list(told, src=0, device=_CPU)
        if not told[0]:
            raise PeerFailed("process 0 could not go on; it says why")
        value: _T = told[1]
        return value


ALONE = Group()


class Joined:
    """A network whose gradients are those of all processes together; alone, the network itself."""

    def __init__(self, network: nn.Module, group: Group) -> None:
        self._network = network
        self._group = group
        self._frozen: tuple[str, ...] | None = None
        self._wrapped: nn.Module | None = None

    def network(self, frozen: tuple[str, ...]) -> nn.Module:
        """What to call in place of the network while these modules are frozen, which they must be already."""
        if self._group.size == 1:
            return self._network
        if self._wrapped is None or frozen != self._frozen:
            # The one before listens to the same weights until it is gone.
            self._wrapped = None
            gc.collect()
            # Statistics are the same everywhere already: batch norm counts the whole batch.
            self._wrapped = DistributedDataParallel(self._network, broadcast_buffers=False)
            self._frozen = frozen
        return self._wrapped


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def follows() -> bool:
    """Whether another process of the group writes and prints what this one would."""
    return launched() and int(os.environ["RANK"]) > 0


def restarted() -> bool:
    """Whether the group was started again after one of its processes died."""
    return launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def joined(train: Train) -> Iterator[Group]:
    """The group that this process was started in: gloo between CPUs, NCCL between GPUs, one for each process.

    Raises RecipeError when there are more processes on this machine than GPUs, or than images in a batch.
    """
    if not launched():
        yield ALONE
        return
    group = Group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    smallest = min([train.batch_size, *(stage.batch_size or train.batch_size for stage in train.stages)])
    if smallest < group.size:
        raise RecipeError(
            f"a batch of {smallest} cannot be divided among {group.size} processes",
            remedy=f"--set train.batch_size={8 * group.size}, or fewer processes",
        )
    cuda = choose_device(train).type == "cuda"
    if cuda:
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if int(os.environ["LOCAL_WORLD_SIZE"]) > there:
            raise RecipeError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes want a GPU each, this machine has {there}",
                remedy=f"start {there} processes, or --set train.device=cpu",
            )
        torch.cuda.set_device(local)
    # Sums of figures go over the CPU's channel, which does not wait for the GPU.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_CONNECTING)
    distributed.set_timeout(_PATIENCE)
    yield group
    # Not after an error: when a peer is gone, saying goodbye would wait for it.
    distributed.destroy_process_group()
