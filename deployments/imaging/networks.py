"""ONNX files: what is safe is loaded, what they are is found out, and they are run."""

from __future__ import annotations

import ast
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from deployments.imaging.layouts import Layout, recognise
from scangraph import metrics
from scangraph.contracts.errors import InvalidModel
from scangraph.models import Detector, choose_detector, verify_files

_DEPLOYMENT = "imaging"
_MAX_BYTES = 2**30
#: Operators that onnxruntime has itself; others would be somebody's code.
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_DEFAULT_SIZE = 640


def check_onnx(data: bytes, name: str) -> onnx.ModelProto:
    """Parse a file and refuse what reaches beyond itself.

    Raises
    ------
    InvalidModel
        If it is no ONNX file, keeps weights in other files, or wants operators that are not onnxruntime's own.
    """
    try:
        if len(data) > _MAX_BYTES:
            raise InvalidModel(folder=name, reason=f"it has over {_MAX_BYTES} bytes")
        model = onnx.load_model_from_string(data)
    except DecodeError:
        raise InvalidModel(folder=name, reason="it is no ONNX file") from None
    if not model.graph.node:
        raise InvalidModel(folder=name, reason="it is no ONNX file, or an empty one")
    for node, tensors in _parts(model):
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data for tensor in tensors):
            raise InvalidModel(folder=name, reason="it keeps weights in other files; save it in one")
        if node is not None and node.domain not in _DOMAINS:
            raise InvalidModel(
                folder=name, reason=f"it wants the operator {node.op_type} of {node.domain!r}, which is not known"
            )
    return model


def _parts(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto | None, list[onnx.TensorProto]]]:
    """Yield each node with its tensors, and each graph's own, those inside of nodes and functions included."""
    graphs: list[onnx.GraphProto] = [model.graph]
    nodes: list[onnx.NodeProto] = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if not nodes:
            graph = graphs.pop()
            sparse = [part for tensor in graph.sparse_initializer for part in (tensor.values, tensor.indices)]
            yield None, [*graph.initializer, *sparse]
            nodes.extend(graph.node)
            continue
        node, tensors = nodes.pop(), list[onnx.TensorProto]()
        for attribute in node.attribute:
            sparse = [*attribute.sparse_tensors, attribute.sparse_tensor]
            tensors += [attribute.t, *attribute.tensors, *(part for one in sparse for part in (one.values, one.indices))]
            graphs += [graph for graph in (attribute.g, *attribute.graphs) if graph.node or graph.initializer]
        yield node, tensors


@dataclass(frozen=True)
class Facts:
    """What a file says, or shows, of itself.

    Parameters
    ----------
    input_size : (height, width)
    layout : Layout
    names : tuple of str
        As exporters write them into the file; empty where they do not.
    """

    input_size: tuple[int, int]
    layout: Layout
    names: tuple[str, ...]


class Network:
    """A loaded detector.

    Parameters
    ----------
    data : bytes
        The ONNX file.
    name : str
        What it is called in messages.
    input_size : (height, width), optional
        Where the file takes any.
    layout : str, optional
        Where the output's shape is not to be trusted.
    threads : int
        CPU threads.
    gpu : bool
        Run on the GPU, if onnxruntime can.

    Raises
    ------
    InvalidModel
        If it cannot be loaded, or is no YOLO network.
    """

    def __init__(
        self,
        data: bytes,
        name: str,
        input_size: tuple[int, int] | None = None,
        layout: str | None = None,
        *,
        threads: int = 0,
        gpu: bool = False,
    ) -> None:
        check_onnx(data, name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other stages want the cores in between
        wanted = ["CUDAExecutionProvider"] if gpu else []
        providers = [p for p in (*wanted, "CPUExecutionProvider") if p in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=providers)
        except Exception as error:  # onnxruntime's errors share no class of their own
            raise InvalidModel(folder=name, reason=f"onnxruntime cannot load it: {_first_line(error)}") from None
        self.stored_bytes = len(data)
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self.facts = self._look(name, input_size, layout)

    def _look(self, name: str, given: tuple[int, int] | None, wanted: str | None) -> Facts:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _TYPES or inputs[0].shape[1] not in {3, "3"}:
            found = "; ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs)
            raise InvalidModel(folder=name, reason=f"it must take one image (1, 3, height, width) of floats, and takes {found}")
        self._input, self._output, self._dtype = inputs[0].name, outputs[0].name, _TYPES[inputs[0].type]
        metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        fixed = [side for side in inputs[0].shape[2:] if isinstance(side, int)]
        told = _literal(metadata.get("imgsz", ""))
        size = tuple(fixed) if len(fixed) == 2 else given or (tuple(told) if isinstance(told, list) else None)
        height, width = size or (_DEFAULT_SIZE, _DEFAULT_SIZE)
        if len(fixed) == 2 and given not in {None, (height, width)}:
            raise InvalidModel(folder=name, reason=f"it takes {height}×{width} pixels, and its manifest says {given}")
        try:
            shape = self(np.zeros((1, 3, height, width), np.float32)).shape
        except Exception as error:
            raise InvalidModel(folder=name, reason=f"it does not run: {_first_line(error)}") from None
        layout = recognise(shape, (height, width), wanted)
        if layout is None:
            text = f"its output {list(shape)} is that of no YOLO network (v5, v8, v11 or end to end) of {height}×{width} pixels"
            raise InvalidModel(folder=name, reason=text)
        names = _literal(metadata.get("names", ""))
        listed = tuple(str(names[key]) for key in sorted(names)) if isinstance(names, dict) else tuple(map(str, names or ()))
        return Facts((height, width), layout, listed)

    def __call__(self, planes: NDArray[np.float32]) -> NDArray[Any]:
        """Run it: (1, 3, height, width) RGB, 0 to 1."""
        return np.asarray(self._session.run([self._output], {self._input: planes.astype(self._dtype, copy=False)})[0])


def _literal(text: str) -> Any:
    """Return the list or dict that an exporter wrote as Python's text; nothing is evaluated."""
    try:
        value = ast.literal_eval(text) if len(text) < 2**16 else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list | dict) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class Networks:
    """Detectors by what they are, a few of them in memory.

    Parameters
    ----------
    folders : sequence of Path
        Where models are installed.
    held : int
        How many stay; the least recently used leaves.
    """

    def __init__(self, folders: Sequence[Path], held: int, threads: int, *, gpu: bool) -> None:
        self._folders, self._held, self._threads, self._gpu = tuple(folders), held, threads, gpu
        self._loaded: OrderedDict[str, Network] = OrderedDict()

    @property
    def warm(self) -> list[str]:
        """SHA-256 of the manifests of those in memory."""
        return list(self._loaded)

    def choose(self, task: str, model_id: str | None) -> Detector:
        """Return the detector that is used; raises `ModelNotFound`."""
        return choose_detector(self._folders, task, model_id)

    def get(self, model: Detector) -> Network:
        """Return a detector's network, loaded now if it was not; its files are verified first."""
        fresh = model.digest not in self._loaded
        if fresh:
            verify_files(model)
            manifest = model.manifest
            data, name = (model.folder / manifest.network).read_bytes(), str(model.folder)
            network = Network(data, name, manifest.input_size, manifest.layout, threads=self._threads, gpu=self._gpu)
            if network.facts.layout.classes not in {0, len(manifest.classes)}:
                reason = f"it has {network.facts.layout.classes} classes, its manifest names {len(manifest.classes)}"
                raise InvalidModel(folder=name, reason=reason)
            self._loaded[model.digest] = network
        self._loaded.move_to_end(model.digest)
        while len(self._loaded) > self._held:
            self._loaded.popitem(last=False)
            metrics.MODEL_EVICTIONS.add(deployment=_DEPLOYMENT)
        (metrics.MODEL_LOADS if fresh else metrics.MODEL_HITS).add(deployment=_DEPLOYMENT)
        self.tell()
        return self._loaded[model.digest]

    def tell(self) -> None:
        """Report how much is held; from any thread, while another one loads."""
        held = list(self._loaded.values())
        metrics.MODELS_HELD.set(len(held), deployment=_DEPLOYMENT)
        metrics.MODELS_HELD_BYTES.set(sum(network.stored_bytes for network in held), deployment=_DEPLOYMENT)
