"""Small ONNX networks in every YOLO layout, whose boxes are known: constants, or read from the image's pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIZE = 64
#: Cells of 8, 16 and 32 pixels in a square of 64.
CELLS = 64 + 16 + 4
#: (x1, y1, x2, y2, class, confidence) in the network's pixels.
Row = tuple[float, float, float, float, int, float]


def output_of(layout: str, rows: Sequence[Row], classes: int = 3) -> NDArray[np.float32]:
    """Write boxes as a network of this layout would; the other cells have found nothing."""
    if layout == "end-to-end":
        out = np.zeros((1, 300, 6), np.float32)
        for number, (x1, y1, x2, y2, kind, confidence) in enumerate(rows):
            out[0, number] = x1, y1, x2, y2, confidence, kind
        return out
    old = layout == "v5"
    out = np.zeros((1, 3 * CELLS if old else CELLS, (5 if old else 4) + classes), np.float32)
    out[..., 2:4] = 1
    for number, (x1, y1, x2, y2, kind, confidence) in enumerate(rows):
        at = 7 + 5 * number
        out[0, at, :4] = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        if old:
            out[0, at, 4], out[0, at, 5 + kind] = 0.9, confidence / 0.9
        else:
            out[0, at, 4 + kind] = confidence
    return np.ascontiguousarray(out.transpose(0, 2, 1)) if layout == "v8" else out


def constant_network(
    output: NDArray[np.float32],
    *,
    shape: Sequence[int | str] = (1, 3, SIZE, SIZE),
    metadata: Mapping[str, str] | None = None,
    kind: int = TensorProto.FLOAT,
) -> bytes:
    """A network that answers the same to every image."""
    zero = numpy_helper.from_array(np.zeros(1, helper.tensor_dtype_to_np_dtype(kind)), "zero")
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Cast", ["nothing"], ["none"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["known", "none"], ["output0"]),
    ]
    return build(nodes, [zero, numpy_helper.from_array(output, "known")], shape, output.shape, metadata, kind)


def build(
    nodes: list[onnx.NodeProto],
    tensors: list[onnx.TensorProto],
    shape: Sequence[int | str] = (1, 3, SIZE, SIZE),
    out: Sequence[Any] = (),
    metadata: Mapping[str, str] | None = None,
    kind: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
) -> bytes:
    """Put a model together."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("images", kind, list(shape))],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, list(out))],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    if metadata:
        helper.set_model_props(model, dict(metadata))
    return bytes(model.SerializeToString())
