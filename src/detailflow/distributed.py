"""Distributed helpers: rank, world size, barrier, all-reduce, gather."""

import atexit
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from detailflow.device import choose_device
from detailflow.errors import DetailFlowError, ReportedElsewhereError, explained, missing_package

Result = TypeVar("Result")
TIMEOUT = timedelta(hours=3)  # long enough for what only one rank does, such as checking a whole token store
HEARTBEAT_SECONDS = 20.0  # between the signs of life of a main process that may need longer still


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank and the world size that the environment names; 0 and 1 without a launcher."""
    size = _number("WORLD_SIZE", "1")
    rank = _number("RANK", "0") if size > 1 else 0
    if rank >= max(size, 1):
        raise DetailFlowError(f"RANK in the environment must be below WORLD_SIZE, {size}, not {rank}: unset both")
    return rank, max(size, 1)


def _number(variable: str, default: str) -> int:
    text = os.environ.get(variable, default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise DetailFlowError(f"{variable} in the environment must be a whole number, not {text!r}: unset it")
    return int(text)


@dataclass(frozen=True)
class World:
    """The processes of this launch as one of them sees it. With one process every method returns at once."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # this rank's own, if there are several

    @classmethod
    def from_launch(cls, cpu: bool = False) -> "World":
        """Join the processes that `torchrun` or `accelerate launch` started; a world of one without a launcher."""
        size = rank_and_world_size()[1]
        if size < 2:
            return cls()
        for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if variable not in os.environ:
                raise DetailFlowError(
                    f"WORLD_SIZE in the environment is {size} and {variable} is not set: start the processes with "
                    "torchrun, or unset WORLD_SIZE"
                )
        for variable in ("MASTER_PORT", "LOCAL_RANK"):
            _number(variable, "0")
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise missing_package("work by several processes", "accelerate") from error
        # Without an accelerator it joins processes only if it is told to; a Mac's GPU cannot be shared.
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        with explained("the processes of this launch cannot meet", (ValueError, RuntimeError)):
            state = PartialState(cpu=cpu or accelerator is None or accelerator.type == "mps", timeout=TIMEOUT)
        if state.num_processes != size:
            raise DetailFlowError(f"WORLD_SIZE in the environment is {size} and LOCAL_RANK is not set: use torchrun")
        atexit.register(state.destroy_process_group)  # its threads must not outlive what they use
        device = torch.device("cpu") if state.device.type == "cpu" else state.device  # torch gives a CPU no number
        return cls(state.process_index, state.num_processes, device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what only one process should write."""
        return self.rank == 0

    def shard(self, total: int) -> slice:
        """Return this rank's part of a batch of `total`; the parts of all ranks make it up in order."""
        if total % self.size:
            raise DetailFlowError(
                f"a batch of {total} cannot be divided evenly among {self.size} processes: choose a multiple"
            )
        size = total // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Make an error on one rank an error on all, so that the others do not wait for it.

        Every rank must pass through here. The block may use collectives only before anything that can fail on one rank
        alone.

        Raises:
            ReportedElsewhereError: on all ranks but the first with an error, which raises its own.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        texts = self.gather(None if problem is None else str(problem) or type(problem).__name__)
        first = next((rank for rank, text in enumerate(texts) if text is not None), self.rank)
        if first != self.rank:
            raise ReportedElsewhereError(str(texts[first])) from problem
        if problem is not None:
            raise problem

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all ranks, in rank order; they must be of kinds that can be sent as objects."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            torch.distributed.all_gather_object(values, value)
        return values

    def check_same(self, values: Mapping[str, object]) -> None:
        """Check that all ranks were given the same, as each reads its own command line and its own files.

        Args:
            values: what must be equal, by its name in the message.
        """
        found = self.gather(dict(values))
        with self.raise_together():
            names = dict.fromkeys(name for one in found for name in one)
            differ = [name for name in names if any(one.get(name) != found[0].get(name) for one in found)]
            if self.is_main and differ:
                raise DetailFlowError(
                    f"the {self.size} processes of this launch differ in {', '.join(differ[:5])}: start all of them "
                    "with the same command, on machines of one kind, and give them the same files"
                )

    def from_main(self, work: Callable[[], Result]) -> Result:
        """Call `work` on rank 0 and return its value on all ranks.

        Args:
            work: returns a value that can be sent as an object.
        """
        values: list[Any] = [None]
        with self.raise_together():
            if self.is_main:
                values = [work()]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        result: Result = values[0]
        return result

    @contextmanager
    def others_wait(self) -> Iterator[Callable[[], None]]:
        """Let rank 0 work in the block for as long as it takes; the other ranks wait at its end.

        Yields:
            A heartbeat that rank 0 calls now and then: the others give up after `TIMEOUT` without one.
        """
        last = time.monotonic()

        def heartbeat() -> None:
            nonlocal last
            if self.is_main and time.monotonic() - last > HEARTBEAT_SECONDS:
                self.any(True)
                last = time.monotonic()

        try:
            yield heartbeat
        finally:
            while self.any(False):  # rank 0 says True as long as it works, and comes here last
                pass

    def all_reduce(self, value: Tensor) -> Tensor:
        """Return the sum over ranks of tensors of one shape, on any device, without gradients."""
        value = value.detach()
        if self.size == 1:
            return value
        total = value.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(value.device)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over ranks of tensors of one shape, without gradients."""
        return self.all_reduce(value) / self.size

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag))) > 0)

    def all_gather(self, value: Tensor) -> Tensor:
        """Return (world size · B, …) from (B, …) of each rank, in rank order, without gradients."""
        if self.size == 1:
            return value.detach()
        parts = [torch.empty_like(value) for _ in range(self.size)]
        torch.distributed.all_gather(parts, value.detach().contiguous())
        return torch.cat(parts)

    def all_gather_uneven(self, value: Tensor) -> Tensor:
        """Return the rows of all ranks, which may have different numbers, in rank order; on the CPU if size > 1."""
        if self.size == 1:
            return value.detach()
        counts = self.all_gather(torch.tensor([len(value)], device=self.device)).tolist()
        padded = torch.zeros(max(counts), *value.shape[1:], dtype=value.dtype, device=self.device)
        padded[: len(value)] = value
        parts = self.all_gather(padded).cpu().split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def launched(device: str | None) -> tuple[World, torch.device]:
    """Join this launch's processes and choose this rank's device: its own if there are several, else `device`."""
    world = World.from_launch(cpu=device == "cpu")
    return world, world.device or choose_device(device)


def in_group() -> bool:
    """Return whether this process has joined a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def lost(error: BaseException) -> bool:
    """Return whether a collective failed because another rank has ended."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave(status: int) -> NoReturn:
    """End this process at once, without what Python does at an ordinary exit.

    After an error, that would destroy the process group first, which may wait for ranks that wait for this one. After
    success, sharded weights keep the group's threads alive (torch caches their device mesh), and a thread that frees a
    tensor while Python shuts down aborts the program.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
