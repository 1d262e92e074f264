"""The processes that work on one thing together, and what they tell each other."""

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from detailflow.device import choose_device
from detailflow.errors import DetailFlowError, ReportedElsewhereError, missing_package

Result = TypeVar("Result")
LONGEST_WAIT = timedelta(hours=3)  # for one that does what only one should, such as reading all of a token store
BEAT_SECONDS = 20.0  # between the signs of life of one that may take longer still


@dataclass(frozen=True)
class Processes:
    """This process's number among all that work together; alone, every method returns at once."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None  # this process's own, where there are several

    @classmethod
    def of_this_launch(cls, cpu: bool = False) -> "Processes":
        """As `torchrun` or `accelerate launch` started them; one where neither did.

        Raises:
            DetailFlowError: if Accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise missing_package("work by several processes", "accelerate") from error
        # Without an accelerator it joins processes only where it is told so; of a Mac's GPU there is one only.
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        state = PartialState(cpu=cpu or accelerator is None or accelerator.type == "mps", timeout=LONGEST_WAIT)
        atexit.register(state.destroy_process_group)  # or its threads may outlive what they use, and abort the program
        device = (
            torch.device("cpu") if state.device.type == "cpu" else state.device
        )  # which it numbers, and torch does not
        return cls(state.process_index, state.num_processes, device)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes what only one should write."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This process's part of a batch of `total`, which the parts of all make up in order.

        Raises:
            DetailFlowError: where the batch can't be parted evenly.
        """
        if total % self.count:
            raise DetailFlowError(
                f"a batch of {total} can't be shared evenly by {self.count} processes: choose a multiple"
            )
        size = total // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error in one process be an error in all of them, instead of leaving the others to wait for it.

        Every process must come through here; the block itself may not talk to the others, unless what it does so comes before
        all that can fail in one process alone.

        Raises:
            ReportedElsewhereError: in all processes but the first one with an error, which raises its own.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        if self.count > 1:
            texts: list[str | None] = [None] * self.count
            torch.distributed.all_gather_object(
                texts, None if problem is None else str(problem) or type(problem).__name__
            )
            first = next((rank for rank, text in enumerate(texts) if text is not None), self.rank)
            if first != self.rank:
                raise ReportedElsewhereError(str(texts[first])) from problem
        if problem is not None:
            raise problem

    def from_main(self, work: Callable[[], Result]) -> Result:
        """Return in all processes what `work` returns in the main one, where alone it is called.

        Args:
            work: returns a plain value.

        Raises:
            DetailFlowError: in all of them, if it does in the main one.
        """
        values: list[Any] = [None]
        with self.together():
            if self.is_main:
                values = [work()]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        result: Result = values[0]
        return result

    @contextmanager
    def main_at_work(self) -> Iterator[Callable[[], None]]:
        """Let the main process work in the block for as long as it takes, while the others wait at the block's end.

        Yields:
            A function that the main process calls now and then: who does not hear from it within `LONGEST_WAIT` gives up.
        """
        heard = time.monotonic()

        def beat() -> None:
            nonlocal heard
            if self.is_main and time.monotonic() - heard > BEAT_SECONDS:
                self.any(True)
                heard = time.monotonic()

        try:
            yield beat
        finally:
            while self.any(False):  # as long as the main process, which is never here, says so
                pass

    def mean(self, value: Tensor) -> Tensor:
        """The average of all processes' tensors of one shape, without gradients."""
        return self.sum(value) / self.count

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape, without gradients."""
        value = value.detach()
        if self.count > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def gather_uneven(self, value: Tensor, counts: Sequence[int]) -> Tensor:
        """(counts[rank], …) of each → (sum of counts, …) in the processes' order, on the CPU where there are several."""
        if self.count == 1:
            return value.detach()
        padded = torch.zeros(max(counts), *value.shape[1:], dtype=value.dtype, device=self.device)
        padded[: len(value)] = value
        parts = self.gather(padded).cpu().split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, value: Tensor) -> Tensor:
        """(B, …) of each → (processes · B, …) in the processes' order, without gradients."""
        if self.count == 1:
            return value.detach()
        parts = [torch.empty_like(value) for _ in range(self.count)]
        torch.distributed.all_gather(parts, value.detach().contiguous())
        return torch.cat(parts)


def launched(device: str | None) -> tuple[Processes, torch.device]:
    """The processes of this launch, and this one's device: its own where there are several, else the one asked for.

    Raises:
        DetailFlowError: if Accelerate is not installed, or for a device that can't be used.
    """
    processes = Processes.of_this_launch(cpu=device == "cpu")
    return processes, processes.device or choose_device(device)


def in_group() -> bool:
    """Return whether this process is one of several that have joined."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def lost(error: BaseException) -> bool:
    """Return whether a collective call failed because another process has ended."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave_after_error(status: int) -> NoReturn:
    """End this process at once, so that the launcher ends the others.

    An ordinary exit destroys the process group first, which may wait for processes that wait for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
