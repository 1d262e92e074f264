"""From a config and tensors, as `hub.load` returns them, to a network."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detailflow.errors import DetailFlowError, some_names
from detailflow.settings import parse_settings

Network = TypeVar("Network", bound=nn.Module)


def build(
    network: type[Network],
    config_type: type,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: object,
    dtype: torch.dtype | None = None,
) -> Network:
    """A network in evaluation mode that holds `tensors` as `dtype`, or as they are; nothing is initialised and copied over later.

    Raises:
        DetailFlowError: for a bad config, or tensors that are missing, left over or of another shape.
    """
    source = str(source) if isinstance(source, Path) else source
    sizes: Any = parse_settings(config_type, config, source)
    if (depth := _depth(sizes)) > len(tensors):
        raise DetailFlowError(
            f"{source}: the checkpoint does not fit its config: {len(tensors)} tensors are no {depth} layers"
        )
    try:
        with torch.device("meta"), _NoDraws():
            model = network(sizes)
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # sizes beyond what a tensor can have
        raise DetailFlowError(
            f"{source}: the config asks for impossible sizes: {str(error).splitlines()[0]}"
        ) from error
    load_weights(model, {name: tensor.to(dtype) for name, tensor in tensors.items()}, source, assign=True)
    return model.eval()


_DRAWS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_, F.normalize)


class _NoDraws(TorchFunctionMode):
    """Skips what only the values of initial weights need: the meta device has none, and would import a compiler for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _depth(config: Any) -> int:
    """The depth that a config asks for, or one nested in it."""
    values = [getattr(config, f.name) for f in fields(config)]
    return max([getattr(config, "depth", 0), *(_depth(value) for value in values if is_dataclass(value))])


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: object, assign: bool = False) -> None:
    """Copy `tensors` into a network, or put them in place of its own.

    Raises:
        DetailFlowError: if tensors are missing, left over or of another shape.
    """
    wanted = model.state_dict()
    for problem, names in (
        ("lacks", wanted.keys() - tensors.keys()),
        ("should not have", tensors.keys() - wanted.keys()),
    ):
        if names:
            raise DetailFlowError(f"{source}: the checkpoint does not fit its config: it {problem} {some_names(names)}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise DetailFlowError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, where the config asks for {tuple(wanted[name].shape)}"
            )
    model.load_state_dict(tensors, assign=assign)


def require_same(ours: object, theirs: object, keys: Sequence[str], source: object) -> None:
    """Check that weights made for one config fit a network of another.

    Raises:
        DetailFlowError: that names the first of `keys` which differs.
    """
    for key in keys:
        if getattr(ours, key) != getattr(theirs, key):
            raise DetailFlowError(
                f"the weights of {source} do not fit: {key} is {getattr(theirs, key)} there and {getattr(ours, key)} here"
            )


def check_ids(name: str, ids: Tensor, dimensions: int, count: int) -> None:
    """Check that `ids` are integers below `count` in a tensor of so many dimensions.

    Raises:
        DetailFlowError: if not.
    """
    if ids.ndim != dimensions or ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise DetailFlowError(
            f"{name} must be integers in {dimensions} dimension(s), not {tuple(ids.shape)} {ids.dtype}"
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise DetailFlowError(f"{name} must lie in 0 to {count - 1}, not {int(ids.min())} to {int(ids.max())}")
