"""Build networks from configs and tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detailflow import hub_client
from detailflow.errors import DetailFlowError, first_line
from detailflow.published import KEYS
from detailflow.settings import parse_settings
from detailflow.tensors import WEIGHTS_FILE, check_finite, read_state_dict, read_tensors
from detailflow.torch_files import load_torch
from detailflow.words import some_names

TOKEN_KEYS = ("num_tokens", "group_size", "causal_tokens", "codebook_size")  # of the configs of both models
Network = TypeVar("Network", bound=nn.Module)


def build(
    network: type[Network],
    config_type: type,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: object,
    dtype: torch.dtype | None = None,
) -> Network:
    """Return a network of these tensors in evaluation mode, as `dtype` or as they are; without initial weights."""
    source = str(source) if isinstance(source, Path) else source
    sizes: Any = parse_settings(config_type, config, f"the {getattr(network, 'kind', 'model')} config of {source}")
    if (depth := _depth(sizes)) > len(tensors):
        raise DetailFlowError(
            f"{source}: the checkpoint does not fit its config: {len(tensors)} tensors are not {depth} layers"
        )
    try:
        with torch.device("meta"), _NoDraws():
            model = network(sizes)
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # sizes beyond what a tensor can have
        reason = first_line(error)
        raise DetailFlowError(f"{source}: the config asks for impossible sizes: {reason}") from error
    load_weights(model, {name: tensor.to(dtype) for name, tensor in tensors.items()}, source, assign=True)
    return model.eval()


_DRAWS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_, F.normalize)


class _NoDraws(TorchFunctionMode):
    """Skip initial values: the meta device has none, and would import a compiler for them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _depth(config: Any) -> int:
    """Return the largest depth in a config, nested ones included."""
    values = [getattr(config, f.name) for f in fields(config)]
    return max([getattr(config, "depth", 0), *(_depth(value) for value in values if is_dataclass(value))])


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: object, assign: bool = False) -> None:
    """Copy `tensors` into a network, or with `assign` put them in place of its own."""
    wanted = model.state_dict()
    misfit = f"{source}: the checkpoint does not fit its config: it"
    if missing := wanted.keys() - tensors.keys():
        raise DetailFlowError(f"{misfit} lacks {some_names(missing)}")
    if extra := tensors.keys() - wanted.keys():
        raise DetailFlowError(f"{misfit} should not have {some_names(extra)}")
    for name, tensor in tensors.items():
        shape, needed = tuple(tensor.shape), tuple(wanted[name].shape)
        if shape != needed:
            by = _key_of(model, name) if shape[1:] == needed[1:] else ""
            raise DetailFlowError(f"{source}: {name} has shape {shape}, and the config asks for {needed}{by}")
    check_finite(tensors, source)
    model.load_state_dict(tensors, assign=assign)


def _key_of(model: nn.Module, tensor: str) -> str:
    """Return which key of the config says how many rows a tensor has, for a message."""
    if key := getattr(model, "keys", {}).get(tensor):
        theirs = KEYS[model.kind].get(key, key)  # type: ignore[index]
        return f" by its {key}" + (f" (in the published layout {theirs})" if theirs != key else "")
    return ""


def require_same(ours: object, theirs: object, keys: Sequence[str], problem: str) -> None:
    """Check that two configs have the same values of `keys`; the error begins with `problem`."""
    for key in keys:
        there, here = getattr(theirs, key), getattr(ours, key)
        if there != here:
            raise DetailFlowError(f"{problem}: {key} is {there} there and {here} here")


def torch_weights(url: str, path: str | Path | None) -> dict[str, Tensor]:
    """Read a state dict from a local file, or from where torch.hub keeps it or loads it to."""
    if path is not None:
        return load_torch(Path(path).expanduser(), mmap=True)
    return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)


def timm_weights(name: str, path: str | Path | None) -> dict[str, Tensor]:
    """Read the weights of one of timm's networks from a local file, or from the hub."""
    if path is None:
        return read_tensors(hub_client.fetch(f"timm/{name}", [WEIGHTS_FILE]))
    return read_state_dict(Path(path).expanduser())
