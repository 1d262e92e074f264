"""From a config and tensors, as `hub.load` returns them, to a network."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detailflow.errors import DetailFlowError, some_names

Network = TypeVar("Network", bound=nn.Module)
Config = TypeVar("Config")


def config_from_dict(kind: type[Config], values: Mapping[str, Any], source: object) -> Config:
    """A config dataclass from plain values, nested ones included.

    Raises:
        DetailFlowError: for a key that is unknown, missing or of the wrong type; the sentence names `source`.
    """
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise DetailFlowError(f"{source}: unknown key {unknown[0]!r} in the config; the keys are {', '.join(known)}")
    arguments = {}
    for key, value in values.items():
        hint = hints[key]
        if is_dataclass(hint) and isinstance(value, Mapping):
            value = config_from_dict(hint, value, source)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        _check_type(key, value, hint, source)
        if isinstance(value, int) and not isinstance(value, bool) and hint is float:
            try:
                value = float(value)
            except OverflowError:
                raise DetailFlowError(f"{source}: {key} is too large a number") from None
        arguments[key] = value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise DetailFlowError(f"{source}: the config is incomplete: {error}") from None
    except DetailFlowError as error:
        raise DetailFlowError(f"{source}: {error}") from None


def _check_type(key: str, value: Any, hint: Any, source: object) -> None:
    several = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = tuple(get_origin(k) or k for k in several if isinstance(k, type) or get_origin(k))
    if float in kinds:
        kinds += (int,)
    if value is None and type(None) in kinds:
        return
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise DetailFlowError(f"{source}: {key} must be {wanted}, not {value!r}")


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
    sizes: Any = config_from_dict(config_type, config, source)
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
