"""LoRA: matrices of a trained AR model stay as they are, and a product of two thin ones is learnt beside each.

Hu et al. 2021, arXiv 2106.09685, by the package peft.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from detailflow.errors import DetailFlowError, missing_package
from detailflow.models.gpt import DetailFlowGPT

MATRICES = ("qkv", "proj", "gate", "up", "down")  # of all blocks


class LoRA:
    """A model whose blocks have LoRA's matrices; only these and the class table are trained.

    W + 2 · B A takes the place of W (out, in), with A (rank, in) and B (out, rank). B begins as zeros: at first nothing
    changes.

    Args:
        model: it is changed in place.
        rank: of the product.
    """

    def __init__(self, model: DetailFlowGPT, rank: int) -> None:
        try:
            from peft import LoraConfig, LoraModel
        except ImportError as error:
            raise missing_package("lora", "peft", extra="lora") from error
        if rank > model.config.width:
            raise DetailFlowError(f"lora must be at most the model's width, {model.config.width}, not {rank}")
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(MATRICES))
        self.layers: Any = LoraModel(model, settings, "default")
        self.model = model
        model.class_embedding.requires_grad_(True)  # its rows are of new classes
        self._names = [name for name, weight in model.named_parameters() if weight.requires_grad]

    def average(self) -> "LoRA":
        """Return a copy for a moving average. It shares the matrices that stay as they are."""
        average = copy.copy(self)
        shared = {id(weight): weight for weight in self.model.parameters() if not weight.requires_grad}
        average.layers = copy.deepcopy(self.layers, shared)
        average.model = average.layers.model
        return average

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the weights that are trained, by name."""
        weights = dict(self.model.named_parameters())
        return {name: weights[name] for name in self._names}

    def merged(self) -> DetailFlowGPT:
        """Return a model of its own with W + 2 · B A in place of W, as any other AR model."""
        return copy.deepcopy(self.layers).merge_and_unload()

    def load_start(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the weights of the model to start from, which all averages share but for the class table."""
        own = {name.replace(".base_layer.", "."): name for name in self.model.state_dict()}
        self.model.load_state_dict({own[name]: tensor for name, tensor in tensors.items()}, strict=False)

    def load(self, trained: Mapping[str, Tensor]) -> None:
        """Set what `trained` returned."""
        if trained.keys() != self.trained().keys():
            raise ValueError("these are LoRA matrices of another model")
        self.model.load_state_dict(trained, strict=False)
