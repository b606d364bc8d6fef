"""Typed access to the running deployments by handle: `scangraph.connect()`.

Values go in, references travel, values come out: what a call returns stays in the object store until it is asked for, and a
call given to the next call passes on a reference, not an array.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
import uuid
import warnings
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

import pydantic
import ray
from ray import serve
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.exceptions import OutOfMemoryError as RayOutOfMemory
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from scangraph import metrics, tracing
from scangraph.contracts import WAITING, Component, Image2D, LabelMap, Progress, Scene, StepSummary, Volume
from scangraph.contracts.errors import (
    InvalidParameters,
    NotRunning,
    OutOfMemory,
    ScanGraphError,
    StageLost,
    StageUnavailable,
    UnknownComponent,
)

APPLICATION = "scangraph"
#: Where a local service says how to reach it, inside its data folder.
SERVICE_FILE = "run/service.json"
TOKEN_FILE = "run/ray-token"  # noqa: S105 - a file's name

#: A process that dies again and again before it takes up anything.
_LOSSES_WHILE_WAITING = 10
#: The same for calls that were not answered at all: it may not have arrived, or it kills its process at once.
_LOSSES_UNHEARD = 3

T = TypeVar("T")
OnProgress = Callable[[Progress], None]
#: Called with the number of the next attempt and the error, when a process died that had a step.
OnLost = Callable[[int, BaseException], None]
#: What is raised when the process that works for us is gone; asking another one may help.
LOST = (RayActorError, ActorUnavailableError, WorkerCrashedError)


def new_execution_id() -> str:
    """Return a random id."""
    return str(uuid.uuid4())


def own_error(error: BaseException) -> BaseException:
    """Unpack what a stage raised: Ray hands over an error whose text is a remote traceback, with ours as its cause."""
    if isinstance(error, RayTaskError):
        return own_error(error.cause) if isinstance(error.cause, BaseException) else error
    return error


@dataclass(frozen=True)
class StepResult:
    """References to a step's outputs, by port, and what the stage said about it."""

    outputs: dict[str, ray.ObjectRef[Any]]
    summary: StepSummary
    attempts: int


async def run_step(
    handle: DeploymentHandle[Any],
    component: Component,
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    *,
    execution_id: str,
    on_progress: OnProgress | None = None,
    on_lost: OnLost | None = None,
    attempts: int = 3,
) -> StepResult:
    """Run a component on its deployment and keep its outputs as references.

    The caller owns the outputs: they live as long as this process and the references do.

    Parameters
    ----------
    handle : DeploymentHandle
        Of the component's deployment.
    inputs : mapping
        ObjectRef, or list of them, by port.
    attempts : int
        How often it is tried when the process that runs it dies.

    Raises
    ------
    ScanGraphError
        What the stage raised; `StageLost` when every attempt died, `StageUnavailable` when there is no process to ask.
    """
    check_parameters(component, parameters)
    streaming = handle.options(method_name="run", stream=True)
    attempt, losses, unheard = 1, 0, 0
    while True:
        began = answered = False

        def heard(progress: Progress) -> None:
            nonlocal began, answered
            began, answered = began or progress.message != WAITING, True
            if on_progress:
                on_progress(progress)

        try:
            return await _run_once(streaming, component, inputs, parameters, execution_id, heard, attempt)
        except LOST as error:
            # Who only waited in the queue of a process that died has not caused its death, and loses no attempt.
            losses += 1
            metrics.LOST.add(deployment=component.deployment)
            if on_lost:
                on_lost(attempt + began, error)
            unheard += not answered
            enough = losses >= attempts + _LOSSES_WHILE_WAITING or unheard >= attempts + _LOSSES_UNHEARD
            if (began and attempt == attempts) or enough:
                hint = "the image may need more memory than there is"
                raise StageLost(deployment=component.deployment, component=component.id, attempts=attempt, hint=hint) from error
            attempt += began
            if on_progress:
                on_progress(Progress(0, 0, f"its process died, attempt {attempt} of {attempts}"))
            await asyncio.sleep(min(2**losses, 10))  # Serve needs a moment to see the loss and start another
        except RayOutOfMemory as error:  # Ray's memory monitor ended the process: trying again would end the next one
            raise OutOfMemory(component=component.id, device="main", shape="this many") from error
        except DeploymentUnavailableError as error:
            raise StageUnavailable(deployment=component.deployment, reason="it could not be started; see /readyz") from error
        except RayTaskError as error:
            raise own_error(error) from None


async def _run_once(
    streaming: DeploymentHandle[Any],
    component: Component,
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    execution_id: str,
    on_progress: OnProgress | None,
    attempt: int,
) -> StepResult:
    # Inside a dict references stay references; as a top-level argument Serve would resolve them here.
    response: Any = streaming.remote(component.id, dict(inputs), dict(parameters), execution_id, tracing.here())
    summary: StepSummary | None = None
    outputs: list[ray.ObjectRef[Any]] = []
    try:
        async for ref in await response._to_object_ref_gen():
            if summary is not None:
                outputs.append(ref)
                continue
            item = await ref
            if isinstance(item, StepSummary):
                summary = item
            elif on_progress and isinstance(item, Progress):
                on_progress(item)
    except asyncio.CancelledError:
        response.cancel()
        raise
    if summary is None or len(outputs) != len(component.outputs):
        raise StageUnavailable(deployment=component.deployment, reason=f"{component.id} ended without its outputs")
    for ref in outputs:  # an output that failed to arrive is an error now, not at the next step
        await ref
    return StepResult(dict(zip((p.name for p in component.outputs), outputs, strict=True)), summary, attempt)


def check_parameters(component: Component, parameters: Mapping[str, Any]) -> None:
    """Raise `InvalidParameters`, naming every field that does not fit."""
    try:
        component.parameters.model_validate(dict(parameters))
    except pydantic.ValidationError as error:
        errors = [{"pointer": "/parameters/" + "/".join(map(str, e["loc"])), "detail": e["msg"]} for e in error.errors()]
        detail = "; ".join(f"{e['pointer'].removeprefix('/parameters/')}: {e['detail']}" for e in errors)
        raise InvalidParameters(component=component.id, detail=detail, errors=errors) from None


class Call(Generic[T]):
    """A running step. Await it, or ask for its `result()`; give it to another call to pass its result on by reference."""

    def __init__(
        self, step: Future[StepResult], port: str, fetch: Callable[[Any], Awaitable[Any]], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._step, self._port, self._fetch, self._loop = step, port, fetch, loop

    async def _value(self) -> T:
        step = await asyncio.wrap_future(self._step)
        return cast("T", await self._fetch(step.outputs[self._port]))

    def output(self, port: str) -> Call[Any]:
        """Return another output of the same step, of those that have several."""
        return Call(self._step, port, self._fetch, self._loop)

    def result(self, timeout: float | None = None) -> T:
        """Wait and return the value; raises what the stage raised, or `TimeoutError`."""
        return asyncio.run_coroutine_threadsafe(self._value(), self._loop).result(timeout)

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._value(), self._loop)).__await__()

    async def ref(self) -> Any:
        """Return the reference to the value, without fetching it."""
        return (await asyncio.wrap_future(self._step)).outputs[self._port]

    def step(self, timeout: float | None = None) -> StepResult:
        """Wait for the end and return what the stage said, without fetching the value."""
        return self._step.result(timeout)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What must be known about the result; waits for it."""
        return self._step.result().summary.warnings

    def cancel(self) -> None:
        """Stop the step."""
        self._step.cancel()


class Connection:
    """Handles to the deployments of a running scangraph, from a script, a notebook or another deployment.

    Made by `connect()`. Images may be given as values, calls or ObjectRefs.

    Examples
    --------
    >>> with scangraph.connect() as graph:                        # doctest: +SKIP
    ...     ct = graph.read("ct.nii.gz")
    ...     organs = graph.totalseg(ct)
    ...     scene = graph.smooth(organs)
    ...     print(organs.result().volumes_ml(), len(scene.result().surfaces))
    """

    def __init__(self, application: str = APPLICATION, *, owns_ray: bool = False) -> None:
        self._owns_ray = owns_ray
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scangraph-connection", daemon=True)
        self._thread.start()
        self._application = application
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._components: dict[str, Component] = {}
        self._refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave; the service runs on."""
        for handle in self._handles.values():
            handle.shutdown()  # its router would go on in a thread of Serve's
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._owns_ray:
            ray.shutdown()

    def _handle(self, deployment: str) -> DeploymentHandle[Any]:
        if deployment not in self._handles:
            self._handles[deployment] = serve.get_deployment_handle(deployment, self._application)
        return self._handles[deployment]

    def _ask(self, deployment: str, method: str, *arguments: Any) -> Future[Any]:
        """Call a plain method and fetch its answer."""

        async def ask() -> Any:
            try:
                return await self._handle(deployment).options(method_name=method).remote(*arguments)
            except RayTaskError as error:
                raise own_error(error) from None

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)

    # --- generic --------------------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Component]:
        """Declarations of everything that can be run now, by id."""
        return dict(self._refresh())

    def _refresh(self) -> dict[str, Component]:
        self._components = {component.id: component for component in self._ask("executor", "components").result()}
        return self._components

    def run(
        self, component_id: str, inputs: Mapping[str, Any], *, on_progress: OnProgress | None = None, **parameters: Any
    ) -> Call[Any]:
        """Start any component; returns at once.

        Parameters
        ----------
        component_id : str
            As in `components`.
        inputs : mapping
            Volume, LabelMap, Scene, Call or ObjectRef (a list for ports that take many) by port.
        on_progress : callable
            Called with `Progress`, from another thread.

        Returns
        -------
        Call
            Of the component's first output.
        """
        component = self._component(component_id)
        missing = [p.name for p in component.inputs if not p.optional and inputs.get(p.name) is None]
        unknown = sorted(set(inputs) - {p.name for p in component.inputs})
        if missing or unknown:
            detail = "; ".join(
                [f"input {name!r} is missing" for name in missing] + [f"there is no input {name!r}" for name in unknown]
            )
            raise InvalidParameters(component=component_id, detail=detail)
        check_parameters(component, parameters)
        step = asyncio.run_coroutine_threadsafe(self._start(component, inputs, parameters, on_progress), self._loop)
        return Call(step, component.outputs[0].name, _await, self._loop)

    async def _start(
        self, component: Component, inputs: Mapping[str, Any], parameters: Mapping[str, Any], on_progress: OnProgress | None
    ) -> StepResult:
        refs = {name: await _as_ref(value) for name, value in inputs.items() if value is not None}
        return await run_step(
            self._handle(component.deployment),
            component,
            refs,
            parameters,
            execution_id=new_execution_id(),
            on_progress=on_progress,
        )

    def _component(self, component_id: str) -> Component:
        if component_id not in self._components and component_id not in self._refresh():
            raise UnknownComponent(component=component_id, known=", ".join(self._components))
        return self._components[component_id]

    # --- files -------------------------------------------------------------------------------------------------------------

    def read(self, path: str | Path) -> Volume:
        """Read a local image file through the graph's gate; see `imageio`."""
        path = Path(path)
        return cast("Volume", self._ask("imageio", "decode", path.read_bytes(), path.name, False).result())

    def read_mask(self, path: str | Path, scheme: str | None = None) -> LabelMap:
        """Read a local mask file; its numbers must be in the label table, or in the named scheme."""
        path = Path(path)
        return cast("LabelMap", self._ask("imageio", "decode", path.read_bytes(), path.name, True, scheme).result())

    def read_picture(self, path: str | Path) -> Image2D:
        """Read a local 2-D image file: JPEG, PNG, TIFF or WebP."""
        path = Path(path)
        return cast("Image2D", self._ask("imageio", "decode_picture", path.read_bytes(), path.name).result())

    def put(self, value: Volume | Scene | Image2D) -> Any:
        """Put a value into the object store once and return its reference, to be given to several calls."""
        return ray.put(value)

    def encode(self, image: Volume | Image2D | Call[Any]) -> bytes:
        """Return the bytes of a file: of an image or mask a `.nii.gz`, of a 2-D image what its `file` says."""

        async def encode() -> bytes:
            ref = await _as_ref(image)
            return cast("bytes", await self._handle("imageio").options(method_name="encode").remote(ref))

        return asyncio.run_coroutine_threadsafe(encode(), self._loop).result()

    # --- the components, typed ------------------------------------------------------------------------------------------------

    def totalseg(self, image: Image, *, on_progress: OnProgress | None = None, **parameters: Any) -> Call[LabelMap]:
        """Segment the organs of a CT (`inference/totalseg`)."""
        return self.run("inference/totalseg", {"image": image}, on_progress=on_progress, **parameters)

    def vessel(
        self, image_A: Image, image_P: Image, *, on_progress: OnProgress | None = None, **parameters: Any
    ) -> Call[LabelMap]:
        """Segment arteries and veins from the arterial and the portal phase (`inference/vessel`), on the arterial grid."""
        return self.run("inference/vessel", {"image_A": image_A, "image_P": image_P}, on_progress=on_progress, **parameters)

    def ureter(self, image_D: Image, *, on_progress: OnProgress | None = None, **parameters: Any) -> Call[LabelMap]:
        """Segment the ureters from the delayed phase (`inference/ureter`)."""
        return self.run("inference/ureter", {"image_D": image_D}, on_progress=on_progress, **parameters)

    def tumor(self, image: Image, *, on_progress: OnProgress | None = None, **parameters: Any) -> Call[LabelMap]:
        """Segment kidney tumors and cysts (`inference/tumor`)."""
        return self.run("inference/tumor", {"image": image}, on_progress=on_progress, **parameters)

    def merge(self, masks: Sequence[Mask], *, on_progress: OnProgress | None = None, **parameters: Any) -> Call[LabelMap]:
        """Paint masks over each other (`postprocess/merge`); the last one wins."""
        return self.run("postprocess/merge", {"masks": list(masks)}, on_progress=on_progress, **parameters)

    def repair_vessels(
        self, mask: Mask, image: Image | None = None, *, on_progress: OnProgress | None = None, **parameters: Any
    ) -> Call[LabelMap]:
        """Reconnect broken arteries and veins (`postprocess/vessel`)."""
        return self.run("postprocess/vessel", {"mask": mask, "image": image}, on_progress=on_progress, **parameters)

    def repair_ureters(
        self, mask: Mask, image: Image | None = None, *, on_progress: OnProgress | None = None, **parameters: Any
    ) -> Call[LabelMap]:
        """Reconnect broken ureters (`postprocess/ureter`)."""
        return self.run("postprocess/ureter", {"mask": mask, "image": image}, on_progress=on_progress, **parameters)

    def fat(
        self, masks: Sequence[Mask], image: Image | None = None, *, on_progress: OnProgress | None = None, **parameters: Any
    ) -> Call[LabelMap]:
        """Mark the fat around the kidneys (`postprocess/fat`); estimated from masks where there is no CT."""
        return self.run("postprocess/fat", {"masks": list(masks), "image": image}, on_progress=on_progress, **parameters)

    def skeleton(self, mask: Mask, *, on_progress: OnProgress | None = None, **parameters: Any) -> Call[bytes]:
        """Trace centrelines (`postprocess/skeleton`): JSON; the lines are its `output("lines")`."""
        return self.run("postprocess/skeleton", {"mask": mask}, on_progress=on_progress, **parameters)

    def sample(
        self, mask: Mask, template: Mask | None = None, *, on_progress: OnProgress | None = None, **parameters: Any
    ) -> Call[LabelMap]:
        """Fill a mask with a template's structures (`postprocess/sample`)."""
        return self.run("postprocess/sample", {"mask": mask, "template": template}, on_progress=on_progress, **parameters)

    def clean(self, mask: Mask, *, on_progress: OnProgress | None = None, **parameters: Any) -> Call[LabelMap]:
        """Remove small pieces, fill holes, split sides (`postprocess/clean`)."""
        return self.run("postprocess/clean", {"mask": mask}, on_progress=on_progress, **parameters)

    def smooth(self, mask: Mask, *, on_progress: OnProgress | None = None, **parameters: Any) -> Call[Scene]:
        """Turn a mask into a scene of smoothed surfaces (`smoothing/base`)."""
        return self.run("smoothing/base", {"mask": mask}, on_progress=on_progress, **parameters)

    def preview(
        self,
        scene: Scene | Call[Scene],
        image: Image | None = None,
        mask: Mask | None = None,
        *,
        on_progress: OnProgress | None = None,
        **parameters: Any,
    ) -> Call[Image2D]:
        """Draw a scene, and slices of an image and a mask beside it (`smoothing/preview`)."""
        return self.run(
            "smoothing/preview", {"image": image, "mask": mask, "scene": scene}, on_progress=on_progress, **parameters
        )

    def resize(self, image: Picture, *, on_progress: OnProgress | None = None, **parameters: Any) -> Call[Image2D]:
        """Give a 2-D image another size (`image/resize`)."""
        return self.run("image/resize", {"image": image}, on_progress=on_progress, **parameters)

    def detect(self, image: Picture, *, on_progress: OnProgress | None = None, **parameters: Any) -> Call[Image2D]:
        """Find objects in a 2-D image (`image/detect`) and draw them; the boxes, as JSON, are its `output("boxes")`."""
        return self.run("image/detect", {"image": image}, on_progress=on_progress, **parameters)


Image = Volume | Call[Any] | Any
Picture = Image2D | Call[Image2D] | Any
Mask = LabelMap | Call[LabelMap] | Any


async def _await(ref: Any) -> Any:
    try:
        return await ref
    except RayTaskError as error:
        raise own_error(error) from None


async def _as_ref(value: Any) -> Any:
    """Return a reference to any value: a call's result where it is, anything else put into the store once."""
    if isinstance(value, list | tuple):
        return [await _as_ref(item) for item in value]
    if isinstance(value, Call):
        return await value.ref()
    if isinstance(value, ray.ObjectRef):
        return value
    return await asyncio.get_running_loop().run_in_executor(None, ray.put, value)


def connect(data: str | Path | None = None, *, address: str | None = None) -> Connection:
    """Connect to a running scangraph.

    Parameters
    ----------
    data : path
        Data folder of a service on this machine; default `$SCANGRAPH_DATA`, else `./.scangraph`.
    address : str
        Address of a Ray cluster that serves scangraph, instead of `data`.

    Raises
    ------
    NotRunning
        If there is none.
    """
    if ray.is_initialized():  # inside the cluster, or a driver that is connected already
        return _connected("in the connected Ray cluster", owns_ray=False)
    where = f"at {address}"
    if address is None:
        folder = Path(data or os.environ.get("SCANGRAPH_DATA", ".scangraph")).expanduser().resolve()
        where = f"in {folder}"
        try:
            address = str(json.loads((folder / SERVICE_FILE).read_text())["ray_address"])
        except (OSError, ValueError, KeyError):
            raise NotRunning(where=where) from None
        use_token(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own, about its own future
            ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NotRunning(where=where) from error
    return _connected(where, owns_ray=True)


def use_token(data: Path) -> None:
    """Let Ray take its token from a data folder, and require it.

    Ray by itself would make one that every user of the machine may read. It reads the mode when it is imported, so a mode that
    is set later must be read again, as Ray does where it switches the token on itself.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(data / TOKEN_FILE)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _connected(where: str, *, owns_ray: bool) -> Connection:
    try:
        return Connection(owns_ray=owns_ray)
    except ScanGraphError:
        raise
    except Exception as error:
        if owns_ray:
            with contextlib.suppress(Exception):
                ray.shutdown()
        raise NotRunning(where=where) from error


__all__ = ["Call", "Connection", "StepResult", "connect", "run_step"]


class RemoteGate:
    """imageio, as a door asks it what a file is."""

    def __init__(self, imageio: DeploymentHandle[Any]) -> None:
        self._imageio = imageio

    async def inspect(self, name: str) -> dict[str, Any]:
        """Look into a stored file."""
        found: dict[str, Any] = await self._ask("inspect", name)
        return found

    async def sha256(self, name: str) -> str:
        """Hash a stored file."""
        return str(await self._ask("sha256", name))

    async def derive(self, name: str, target: str, what: str, most: int = 0) -> dict[str, Any]:
        """Make a copy of a stored file for screens."""
        made: dict[str, Any] = await self._ask("derive", name, target, what, most)
        return made

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return await self._imageio.options(method_name=method).remote(*arguments, trace=tracing.here())
        except RayError as error:
            cause = own_error(error)
            if isinstance(cause, ScanGraphError):
                raise cause from None
            raise StageUnavailable(deployment="imageio", reason="its process died; send the request again") from error


def waker(executor: DeploymentHandle[Any]) -> Callable[[], Awaitable[None]]:
    """Return what a door calls to tell the executor that there is work."""
    wake = executor.options(method_name="wake")

    async def call() -> None:
        wake.remote()  # not awaited: it finds the work by itself within a second

    return call
