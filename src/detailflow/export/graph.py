"""An ONNX graph that grows operation by operation. Knows nothing of the models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

OPSET, IR_VERSION = 20, 9  # of 2023, so that runtimes from then on can read the files
BLOCK = 32  # weights that share a scale, along an input of the product
PRODUCER = "detailflow"

Shape = Sequence[str | int]  # a text is the name of a size that may differ from call to call


class Graph:
    """Operations, weights, inputs and outputs; a value is known by its name.

    Args:
        name: of the graph.
        bits: 32, or 8 for weights of matrix products as 8-bit integers with a scale for every `BLOCK` of them
            (`MatMulNBits`, an operation of onnxruntime's own).
    """

    def __init__(self, name: str, bits: int = 32) -> None:
        self.name, self.bits = name, bits
        self._nodes: list[NodeProto] = []
        self._weights: dict[str, TensorProto] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, kind: type, shape: Shape) -> str:
        """Add an input of `float` (32 bits) or `int` (64 bits) numbers."""
        self._inputs.append(_described(name, kind, shape))
        return name

    def output(self, name: str, value: str, kind: type, shape: Shape) -> None:
        """Add an output: `value` under that name."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(_described(name, kind, shape))

    def weight(self, tensor: Tensor) -> str:
        """Add a constant tensor."""
        return self._constant(tensor.detach().cpu().contiguous().numpy(), f"weight_{len(self._weights)}")

    def numbers(self, *values: int) -> str:
        """Return a constant list of integers; the same list is kept once."""
        return self._constant(np.array(values, np.int64), f"numbers_{'_'.join(map(str, values))}")

    def number(self, value: float) -> str:
        """Return a constant floating-point number."""
        return self._constant(np.array(value, np.float32), f"number_{value}")

    def _constant(self, array: np.ndarray, name: str) -> str:
        if name not in self._weights:
            self._weights[name] = numpy_helper.from_array(array, name)
        return name

    def __call__(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """Add an operation; return its output."""
        return self.several(operation, *inputs, count=1, **attributes)[0]

    def several(self, operation: str, *inputs: str, count: int, **attributes: Any) -> list[str]:
        """Add an operation with `count` outputs; return them."""
        outputs = [f"{operation}_{len(self._nodes)}_{i}" for i in range(count)]
        self._nodes.append(helper.make_node(operation, list(inputs), outputs, **attributes))
        return outputs

    def reshape(self, x: str, *shape: int) -> str:
        """Change a shape; 0 keeps that size, −1 is what remains."""
        return self("Reshape", x, self.numbers(*shape))

    def size(self, x: str, axis: int) -> str:
        """Return the size of an axis, as a list of one number."""
        return self("Shape", x, start=axis, end=axis + 1)

    def first(self, x: str, count: str, axis: int) -> str:
        """Return the first `count` (a list of one number) along an axis."""
        return self("Slice", x, self.numbers(0), count, self.numbers(axis))

    def linear(self, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
        """Return x · weightᵀ + bias for a weight (out, in), as `torch.nn.Linear` does."""
        y = self("MatMul", x, self.weight(weight.T)) if self.bits == 32 else self._product_of_bytes(x, weight)
        return y if bias is None else self("Add", y, self.weight(bias))

    def _product_of_bytes(self, x: str, weight: Tensor) -> str:
        outputs, inputs = weight.shape
        blocks = torch.nn.functional.pad(weight.detach().cpu(), (0, -inputs % BLOCK)).unflatten(1, (-1, BLOCK))
        scales = blocks.abs().amax(-1) / 127
        codes = (blocks / scales.clamp(min=1e-30)[..., None]).round() + 128  # 128 is zero
        return self(
            "MatMulNBits",
            x,
            self.weight(codes.to(torch.uint8)),
            self.weight(scales.flatten()),
            domain="com.microsoft",
            K=inputs,
            N=outputs,
            bits=8,
            block_size=BLOCK,
            accuracy_level=4,  # the inputs become 8-bit integers too
        )

    def attend(self, q: str, k: str, v: str, head: int, bias: str | None = None) -> str:
        """Return softmax(q·kᵀ/√head + bias)·v over (B, heads, T, head) as (B, T, width)."""
        scores = self("MatMul", self("Mul", q, self.number(head**-0.5)), self("Transpose", k, perm=(0, 1, 3, 2)))
        if bias is not None:
            scores = self("Add", scores, bias)
        mixed = self("MatMul", self("Softmax", scores, axis=-1), v)
        return self.reshape(self("Transpose", mixed, perm=(0, 2, 1, 3)), 0, 0, -1)

    def model(self) -> ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, list(self._weights.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        if self.bits != 32:
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=PRODUCER)


def _described(name: str, kind: type, shape: Shape) -> Any:
    types = {float: TensorProto.FLOAT, int: TensorProto.INT64}
    return helper.make_tensor_value_info(name, types[kind], list(shape))
