"""Ways to compute a network: OpenVINO on processors, torch on GPUs and wherever OpenVINO cannot.

Each is called as `runtime(patches, poll) -> tiles`: at most `batch` patches of the image, (channels, z, y, x), to what is added
up at each voxel with channels last. `poll` is called a few times a second meanwhile and may raise, which stops the computation.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.nnunet.accumulate import Head
from scangraph.contracts.errors import InvalidModel

Precision = Literal["exact", "fast", "draft"]
Poll = Callable[[], None]
#: How often `poll` is called while OpenVINO works.
_POLL_MS = 200
#: Side of the patch with which the network is traced; its shape is set afterwards, so a small one will do.
_TRACED_CELLS = 2
#: Side of the blocks whose means are taken first.
_BLOCK = 8


class Runtime(Protocol):
    """A network that is ready."""

    name: str
    batch: int

    def __call__(self, patches: Sequence[Any], poll: Poll) -> Sequence[Any]:
        """Compute up to `batch` patches."""
        ...


def complete_state(network: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give every name of a network's state its tensor; nnU-Net's modules know one tensor by up to three names, files by one.

    Raises
    ------
    InvalidModel
        If the weights are not this network's.
    """
    state = network.state_dict()
    shared = {state[name].data_ptr(): tensor for name, tensor in weights.items() if name in state}
    complete = {name: weights.get(name, shared.get(tensor.data_ptr())) for name, tensor in state.items()}
    wrong = [name for name, tensor in complete.items() if tensor is None or tensor.shape != state[name].shape]
    wrong += [name for name in weights if name not in state]
    if wrong:
        raise InvalidModel(folder="weights", reason=f"they do not fit the network of the plans, first at {wrong[0]}")
    return {name: tensor for name, tensor in complete.items() if tensor is not None}


def last_layer(network: Any) -> Any:
    """Return a network's last layer where it is linear at each voxel, else None."""
    layers = getattr(getattr(network, "decoder", None), "seg_layers", None)
    last = layers[-1] if layers else None
    linear = isinstance(last, torch.nn.Conv2d | torch.nn.Conv3d) and set(last.kernel_size) == {1} and last.groups == 1
    return last if linear else None


def split_head(network: Any) -> Head | None:
    """Take the last layer off a network, where it is linear at each voxel; the network then gives that layer's input."""
    last = last_layer(network)
    if last is None:
        return None
    network.decoder.seg_layers[-1] = torch.nn.Identity()
    weight = last.weight.detach().reshape(last.out_channels, last.in_channels).float().clone()
    bias = torch.zeros(last.out_channels) if last.bias is None else last.bias.detach().float().clone()
    return Head(weight, bias)


def has_compiler() -> bool:
    """Tell whether there is the C++ compiler that torch's inductor needs on a processor."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether this processor multiplies bfloat16 in hardware (AMX, AVX-512 BF16, Arm's BF16)."""
    with contextlib.suppress(OSError):
        flags = cpuinfo.read_text()
        return any(flag in flags for flag in ("amx_bf16", "avx512_bf16", " bf16"))
    return False


class OpenVino:
    """A network compiled by OpenVINO (Apache-2.0, Intel): of all that was measured the fastest on processors.

    Parameters
    ----------
    network : Module
        With its weights, its last layer taken off where that is applied later.
    channels : int
        Of its input.
    patch : (z, y, x)
        Of its input; one slice for a 2-D network.
    flat : bool
        Whether it is 2-D.
    bf16 : bool
        Compute in bfloat16, and give it (as bits); else float32.
    logits : bool
        Whether the last layer is still on; its output stays float32.
    threads : int
        To use.
    cache : Path or None
        Folder for converted networks; tracing takes longer than everything else at a start.
    """

    batch = 1

    def __init__(
        self,
        network: torch.nn.Module,
        channels: int,
        patch: Sequence[int],
        *,
        flat: bool,
        bf16: bool,
        logits: bool,
        threads: int,
        cache: Path | None,
    ) -> None:
        import openvino

        self._ov, self._flat, self._patch = openvino, flat, tuple(patch)
        self._bits = bf16 and not logits
        shape = [1, channels, *(patch[1:] if flat else patch)]
        model = self._converted(network, shape, cache)
        if not bf16:
            _sum_in_blocks(openvino, model)
        layout = "NCHW" if flat else "NCDHW"
        steps = openvino.preprocess.PrePostProcessor(model)
        steps.output().model().set_layout(openvino.Layout(layout))
        steps.output().tensor().set_layout(openvino.Layout("NHWC" if flat else "NDHWC"))
        steps.output().tensor().set_element_type(openvino.Type.bf16 if self._bits else openvino.Type.f32)
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        compiled = openvino.Core().compile_model(steps.build(), "CPU", settings)
        self._request = compiled.create_infer_request()
        self._shape = tuple(int(n) for n in compiled.output().shape)
        self._out = np.empty(self._shape, np.uint16 if self._bits else np.float32)
        kind = openvino.Type.bf16 if self._bits else openvino.Type.f32
        self._request.set_output_tensor(
            openvino.Tensor(self._out, openvino.Shape(self._shape), kind)
            if self._bits
            else openvino.Tensor(self._out, shared_memory=True)
        )
        self.name = f"OpenVINO {'bf16' if bf16 else 'fp32'}"

    def __call__(self, patches: Sequence[NDArray[np.float32]], poll: Poll) -> list[NDArray[Any]]:
        """Compute one patch; the result is overwritten by the next."""
        (patch,) = patches
        given = np.ascontiguousarray(patch[None, :, 0] if self._flat else patch[None])
        self._request.set_input_tensor(self._ov.Tensor(given, shared_memory=True))
        self._request.start_async()
        try:
            while not self._request.wait_for(_POLL_MS):
                poll()
        except BaseException:
            self._request.cancel()
            self._request.wait_for(60_000)
            raise
        return [self._out.reshape(*self._patch, self._shape[-1])]

    def _converted(self, network: torch.nn.Module, shape: Sequence[int], cache: Path | None) -> Any:
        """Convert the network, or take what an earlier start has converted; its weights are then mapped from the file."""
        path = None if cache is None else cache / f"{_fingerprint(network, shape, self._ov.__version__)}.xml"
        if path is not None and path.is_file():
            with contextlib.suppress(RuntimeError):  # a damaged one is made again
                return self._ov.Core().read_model(path)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OpenVINO traces in a way of which torch says that it will go
            model = self._ov.convert_model(network, example_input=torch.zeros(_example(network, shape)), input=list(shape))
        if path is not None:
            _keep(self._ov, model, path)
        return model


def _sum_in_blocks(openvino: Any, model: Any) -> None:
    """Let normalisations add up in blocks.

    OpenVINO's adds a whole volume's values one after the other in single precision: on 64×64×80 voxels the deviation was off by
    2e-5, and a network's logits by 4e-3. Means of means of blocks are 1800 times as exact, and no slower.
    """
    ops = openvino.opset13

    def mean(value: Any, shape: Sequence[int]) -> Any:
        for _ in range(2):
            block = [next(n for n in range(_BLOCK, 0, -1) if length % n == 0) for length in shape]
            nothing = [0] * len(shape)
            value = ops.avg_pool(value, block, nothing, nothing, block, exclude_pad=True)
            shape = [length // n for length, n in zip(shape, block, strict=True)]
        return ops.reduce_mean(value, ops.constant(np.arange(2, 2 + len(shape))), keep_dims=True)

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MVN":
            continue
        given = node.input_value(0)
        shape = [int(n) for n in given.get_shape()][2:]
        centred = ops.subtract(given, mean(given, shape))
        variance = mean(ops.multiply(centred, centred), shape)
        eps = ops.constant(np.float32(node.get_attributes()["eps"]))
        deviation = ops.sqrt(ops.add(variance, eps))
        node.output(0).replace(ops.divide(centred, deviation).output(0))


def _example(network: torch.nn.Module, shape: Sequence[int]) -> list[int]:
    """Return the smallest input that the network takes: two voxels an axis at its coarsest, or a norm has no variance."""
    strides = getattr(getattr(network, "encoder", None), "strides", None)
    if strides is None:
        return list(shape)
    steps = [stride if isinstance(stride, list | tuple) else [stride] * (len(shape) - 2) for stride in strides]
    coarse = [int(np.prod([step[i] for step in steps])) for i in range(len(shape) - 2)]
    return [*shape[:2], *(min(_TRACED_CELLS * c, n) for c, n in zip(coarse, shape[2:], strict=True))]


def _fingerprint(network: torch.nn.Module, shape: Sequence[int], version: str) -> str:
    """Hash what a converted network depends on."""
    digest = hashlib.sha256(f"{shape} {version} {torch.__version__} {platform.machine()} {network}".encode())
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _keep(openvino: Any, model: Any, path: Path) -> None:
    """Write a converted network: whole or not at all, whoever else writes it. What cannot be kept is made again next time."""
    with contextlib.suppress(OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            openvino.save_model(model, Path(folder) / path.name, compress_to_fp16=False)
            weights = path.with_suffix(".bin")
            (Path(folder) / weights.name).replace(weights)
            (Path(folder) / path.name).replace(path)


class Torch:
    """A network in torch: on a GPU, or on a processor where OpenVINO is not to be had.

    Parameters
    ----------
    network : Module
        With its weights.
    device : torch.device
        Where.
    channels : int
        Of its input.
    patch : (z, y, x)
        Of its input.
    flat : bool
        Whether it is 2-D.
    dtype : torch.dtype
        In which it multiplies; float32 is float32, also on GPUs that would rather take TF32.
    compiled : bool
        Let inductor compile it, now. Where that fails, it goes on as it is.
    batch : int
        How many patches are computed together; fewer are filled up, so that one shape is compiled and tuned.
    tensors : bool
        Take and give tensors on the device, else arrays.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        device: torch.device,
        channels: int,
        patch: Sequence[int],
        *,
        flat: bool,
        dtype: torch.dtype,
        compiled: bool,
        batch: int = 1,
        tensors: bool = False,
    ) -> None:
        self._device, self._flat, self._dtype, self._tensors = device, flat, dtype, tensors
        self.batch = batch
        # Channels last is what tensor cores and AMX read; a copy of the weights, which on processors were shared till now.
        self._layout: Any = torch.channels_last if flat else torch.channels_last_3d
        moved: Any = network.to(device)
        moved = moved.to(memory_format=self._layout)
        self._network: Any = torch.compile(moved, dynamic=False) if compiled else moved
        if compiled:
            try:
                self._compute(torch.zeros((batch, channels, *patch), device=device))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # what dynamo and inductor raise: the compiler is there and cannot
                self._network, compiled = moved, False
        self.name = f"torch {str(dtype).removeprefix('torch.')} on {device.type}{', compiled' if compiled else ''}"

    def __call__(self, patches: Sequence[Any], poll: Poll) -> Sequence[Any]:
        """Compute up to `batch` patches, tensors or arrays; inside of it nothing can be stopped."""
        poll()
        given = [torch.as_tensor(patch, device=self._device) for patch in patches]
        given += given[-1:] * (self.batch - len(given))
        result = self._compute(torch.stack(given))[: len(patches)]
        return list(result) if self._tensors else [np.ascontiguousarray(one.float().numpy()) for one in result]

    @torch.inference_mode()
    def _compute(self, given: torch.Tensor) -> torch.Tensor:
        """Compute (batch, channels, z, y, x) to (batch, z, y, x, channels)."""
        if self._flat:
            given = given[:, :, 0]
        given = given.contiguous(memory_format=self._layout)
        reduced = self._dtype != torch.float32
        with (
            torch.autocast(self._device.type, dtype=self._dtype, enabled=reduced),
            torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=reduced),
        ):
            result: torch.Tensor = self._network(given)
        return (result[:, :, None] if self._flat else result).movedim(1, -1)
