"""What both models share: loading, saving and compiling."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from detailflow import graphs, hub
from detailflow.device import choose_device, choose_dtype, compiled
from detailflow.models.loading import build
from detailflow.published import Kind, Variant
from detailflow.sampling import EngineName
from detailflow.settings import BatchSize, require

Program = Callable[..., Tensor]  # what runs a network's layers


class Pretrained(nn.Module):
    """A network that is made from a config, and loaded from and saved to model folders."""

    kind: ClassVar[Kind]
    config_type: ClassVar[type]
    keys: ClassVar[Mapping[str, str]] = {}  # of the config, by tensors whose rows it counts; for messages

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.program: Program | None = None  # compiled, for batches of `compiled_for` images
        self.compiled_for: int | None = None
        self.engine: EngineName = "auto"  # that generates, encodes and decodes
        self.graphs: graphs.Graphs[Any] = graphs.Graphs()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        *,
        variant: Variant = "ema",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a model from a local folder or a hub id, in our layout or the published one, in evaluation mode.

        Args:
            path_or_id: see `hub.resolve`; `None` is the model in the package.
            variant: of an AR model, "ema" (the averaged weights, to sample from) or "model".
            device: `None` is the GPU if there is one, else the CPU.
            dtype: of the weights and of the arithmetic, also as text ("bfloat16"); `None` is bfloat16 on a GPU
                that has it, else float32.
            revision: a branch, tag or commit of a model on the hub; `None` is the newest.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        config, tensors = hub.load(path_or_id, cls.kind, variant, dtype, revision)
        return build(cls, cls.config_type, config, tensors, path_or_id, dtype).to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`, in the dtype that the weights have here.

        A model of the same kind there is replaced; a `DetailFlowError` for other models and for training runs.
        """
        self.export(hub.targets(folder, [self.kind])[self.kind])

    def export(self, folder: Path) -> None:
        """Write as `save_pretrained` does, whatever is there."""
        hub.save(folder, self.kind, asdict(self.config), self.state_dict())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def fingerprint(self) -> str:
        """Return a checksum of the weights' signs, which no rounding to another dtype changes."""
        return self._checksum(self.state_dict())

    @staticmethod
    def _checksum(weights: Mapping[str, Tensor]) -> str:
        return hub.fingerprint({}, {name: torch.signbit(x) for name, x in weights.items()})

    def compile_for(
        self, batch_size: int, function: Program, program: Callable[[Program], Program] = lambda compiled: compiled
    ) -> None:
        """Compile `function` for batches of that many images; `forget_compiled` undoes it.

        Args:
            program: from the compiled function to what runs in place of the layers, if it is not all of that.
        """
        require(BatchSize, batch_size=batch_size)
        self.forget_compiled()
        self.program, self.compiled_for = program(compiled(function, self.device)), batch_size

    def forget_compiled(self) -> None:
        """Drop the compiled program and all CUDA graphs, as after a change of the weights or their device."""
        self.program = self.compiled_for = None
        self.graphs.clear()

    @property
    def uses_graphs(self) -> bool:
        """Whether work that is repeated is captured as CUDA graphs (docs/gpu.md#cuda-graphs)."""
        return self.engine in ("auto", "graphs") and graphs.why_not(self) is None
