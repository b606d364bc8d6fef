"""Looks at an overlay as closely as one can without a cluster.

    python -m cluster.kuberay.check cluster/kuberay/overlays/gpu

Builds it (`kubectl kustomize`, or `kustomize build`). Then: is every key known, to Kubernetes, KubeRay, Serve and our settings?
Most of them silently ignore a mistyped one. Does every deployment find nodes whose image has its environment, and enough
processors, GPUs and memory? And is one of the known traps there? Needs the development environment.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.images.contents import IMAGES
from runtime_envs import pins
from scangraph.settings import Section, Settings, load_settings

#: The Kubernetes whose schemas are asked.
KUBERNETES = "1.32"
#: Ports that only Ray itself, and for the dashboard KubeRay's operator, may reach.
CLOSED = {6379: "Ray's control plane", 8265: "Ray's dashboard", 10001: "Ray's client"}
#: Stages whose steps take minutes.
_LONG = ("nnunet", "smoothing", "postprocess")
#: Settings of Ray that turn our calls into copies with a limit of 4 MiB.
FORBIDDEN = ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_USE_GRPC_BY_DEFAULT")
_CONFINED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
Document = Mapping[str, Any]


# --- KubeRay's part of the schema, as far as it is used here ---------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Metadata(_Strict):
    name: str
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Autoscaler(_Strict):
    version: Literal["v1", "v2"] = "v1"
    idleTimeoutSeconds: int = Field(60, ge=0)  # noqa: N815 - Kubernetes' names, here and below
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"  # noqa: N815
    resources: dict[str, dict[str, str]]
    securityContext: dict[str, Any]  # noqa: N815


class _Auth(_Strict):
    mode: Literal["disabled", "token"]
    secretName: str | None = None  # noqa: N815


class _Password(_Strict):
    # Never `value`: the password would stand here.
    valueFrom: dict[Literal["secretKeyRef"], dict[Literal["name", "key"], str]]  # noqa: N815


class _FaultTolerance(_Strict):
    redisAddress: str  # noqa: N815
    redisPassword: _Password | None = None  # noqa: N815
    externalStorageNamespace: str | None = None  # noqa: N815


class _Head(_Strict):
    serviceType: Literal["ClusterIP"] = "ClusterIP"  # noqa: N815 - anything else would open the control plane
    rayStartParams: dict[str, str]  # noqa: N815
    template: dict[str, Any]


class _Group(_Strict):
    groupName: str  # noqa: N815
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)  # noqa: N815
    maxReplicas: int = Field(ge=1)  # noqa: N815
    idleTimeoutSeconds: int | None = None  # noqa: N815
    rayStartParams: dict[str, str]  # noqa: N815
    template: dict[str, Any]


class _Cluster(_Strict):
    rayVersion: str  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: _Autoscaler  # noqa: N815
    authOptions: _Auth  # noqa: N815
    gcsFaultToleranceOptions: _FaultTolerance | None = None  # noqa: N815
    headGroupSpec: _Head  # noqa: N815
    workerGroupSpecs: list[_Group]  # noqa: N815


class _Upgrade(_Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class _Spec(_Strict):
    upgradeStrategy: _Upgrade  # noqa: N815
    rayClusterDeletionDelaySeconds: int = Field(60, ge=0)  # noqa: N815
    excludeHeadPodFromServeSvc: bool = False  # noqa: N815
    serveConfigV2: str  # noqa: N815
    rayClusterConfig: _Cluster  # noqa: N815


class RayService(_Strict):
    """A RayService as far as it is used here: KubeRay knows more, and what is not here is refused until it is added."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayService"]
    metadata: _Metadata
    spec: _Spec


# --- building and reading --------------------------------------------------------------------------------------------------


def builder() -> list[str] | None:
    """Return the command that builds an overlay, or None where there is no kustomize."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


def build(overlay: Path) -> list[dict[str, Any]]:
    """Return an overlay's documents.

    Raises
    ------
    RuntimeError
        If there is no kustomize, or if it refuses.
    """
    command = builder()
    if command is None:
        raise RuntimeError("neither kustomize nor kubectl is here")
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def amount(quantity: str) -> float:
    """Return a number of Kubernetes: `500m`, `2`, `4Gi`."""
    match = re.fullmatch(r"([0-9.]+)(m|Ki|Mi|Gi|Ti|k|M|G|T)?", str(quantity))
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity")
    units = {None: 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    units |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(match[1]) * units[match[2]]


def start_option(value: str) -> str:
    """Return what `ray start` gets of a value of rayStartParams, which KubeRay hands to a shell."""
    done = subprocess.run(["bash", "-c", f"printf %s {value}"], capture_output=True, text=True, check=False)
    return done.stdout


def own_resources(options: Mapping[str, str]) -> dict[str, float] | None:
    """Return the resources that a node says it has, or None where Ray could not read them."""
    try:
        found: dict[str, float] = json.loads(start_option(options.get("resources", "'{}'")))
    except ValueError:
        return None
    return found


def _pods(cluster: _Cluster) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    yield "head", cluster.headGroupSpec.rayStartParams, cluster.headGroupSpec.template
    for group in cluster.workerGroupSpecs:
        yield group.groupName, group.rayStartParams, group.template


def _ray_container(template: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = template["spec"]["containers"][0]
    return found


def unknown_keys(given: Any, schema: Any, where: str) -> Iterator[str]:
    """Yield keys that Serve would silently ignore: its own schemas take anything."""
    fields = getattr(schema, "model_fields", None)
    if not isinstance(given, dict) or fields is None:
        return
    for key, value in given.items():
        if key not in fields:
            yield f"{where}: Serve knows no {key!r}"
            continue
        inner = [kind for kind in _kinds(fields[key].annotation) if hasattr(kind, "model_fields")]
        for kind in inner[:1]:
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                yield from unknown_keys(item, kind, f"{where}.{key}" + (f"[{number}]" if isinstance(value, list) else ""))


def _kinds(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _kinds(inner)


# --- what is asked ---------------------------------------------------------------------------------------------------------


def schema_faults(documents: Sequence[Document]) -> Iterator[str]:
    """Yield keys that Kubernetes or KubeRay does not know, and values that are not of their kind."""
    import kubernetes_validate

    def ask(document: Document, name: str) -> Iterator[str]:
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"

    for document in documents:
        name = f"{document['kind']} {document['metadata']['name']}"
        if document["kind"] != "RayService":
            yield from ask(document, name)
            continue
        try:
            service = RayService.model_validate(document)
        except ValidationError as error:
            yield from (f"{name}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            continue
        for group, _, template in _pods(service.spec.rayClusterConfig):
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "pod"} | template["metadata"],
                "spec": template["spec"],
            }
            yield from ask(pod, f"{name}: {group}")


def serve_faults(service: RayService) -> Iterator[str]:
    """Yield keys of the Serve config that Serve or our settings do not know, and those that drop what the graph says."""
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(service.spec.serveConfigV2)
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        yield f"serveConfigV2: {error}"
        return
    yield from unknown_keys(config, ServeDeploySchema, "serveConfigV2")
    if config.get("http_options", {}).get("host") != "0.0.0.0":  # noqa: S104 - in a pod; the network policy says who may
        yield "serveConfigV2: http_options.host must be 0.0.0.0, or no other pod reaches the proxies"
    for application in config["applications"]:
        for deployment in application.get("deployments", []):
            if "ray_actor_options" in deployment:
                yield f"serveConfigV2: ray_actor_options of {deployment['name']} replace the graph's, and drop its environment"
        known = Settings.model_fields
        arguments: dict[str, Any] = application.get("args", {})
        for key, value in arguments.items():
            if key not in known:
                yield f"serveConfigV2: there is no setting {key!r}"
            elif isinstance(value, dict) and isinstance(known[key].default, Section):
                inner = type(known[key].default).model_fields
                yield from (f"serveConfigV2: there is no setting {key}.{name!r}" for name in value if name not in inner)
        if arguments.get("environments") != "images":
            yield "serveConfigV2: environments must be `images`: each image has its own stage's"


def environment_of(template: Mapping[str, Any], documents: Sequence[Document]) -> dict[str, str]:
    """Return the variables that a pod's first container gets from maps that are here, and by itself."""
    maps = {d["metadata"]["name"]: d.get("data", {}) for d in documents if d["kind"] == "ConfigMap"}
    found: dict[str, str] = {}
    container = _ray_container(template)
    for source in container.get("envFrom", []):
        found |= maps.get(source.get("configMapRef", {}).get("name"), {})
    return found | {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def placement_faults(service: RayService) -> Iterator[str]:
    """Yield deployments that find no nodes with their environment that are large enough."""
    from ray.serve._private.build_app import build_app as built

    from graph import build_app

    config = yaml.safe_load(service.spec.serveConfigV2)
    settings = load_settings(**config["applications"][0].get("args", {}))
    groups = {group.groupName: group for group in service.spec.rayClusterConfig.workerGroupSpecs}
    offers: dict[str, dict[str, float]] = {}
    for name, group in groups.items():
        limits = _ray_container(group.template)["resources"]["limits"]
        own = own_resources(group.rayStartParams) or {}
        has = {"num_cpus": amount(limits["cpu"]), "num_gpus": amount(limits.get("nvidia.com/gpu", "0"))}
        offers[name] = has | own
        image = _ray_container(group.template)["image"].rpartition("/")[2].partition(":")[0]
        known = {f"scangraph-{image.name}": {"base", *image.environments} for image in IMAGES}
        if image not in known:
            yield f"{name}: there is no image {image!r}"
            continue
        for resource in own:
            if resource.removeprefix("scangraph-") not in known[image]:
                yield f"{name}: says {resource}, which its image {image} does not have"
    for deployment in built(build_app(settings), name="scangraph").deployments:
        options = deployment.ray_actor_options or {}
        wants = {name: options.get(name) or 0 for name in ("num_cpus", "num_gpus")} | options.get("resources", {})
        place = [name for name, has in offers.items() if all(has.get(what, 0) >= much for what, much in wants.items())]
        if not place:
            wish = ", ".join(f"{much:g} {what}" for what, much in wants.items() if much)
            yield f"{deployment.name}: no group of nodes has {wish}"
            continue
        scaling = deployment._deployment_config.autoscaling_config
        most = scaling.max_replicas if scaling else deployment._deployment_config.num_replicas or 1
        needs = {what: much for what, much in wants.items() if much and not what.startswith("scangraph-")}
        room = sum(
            groups[name].maxReplicas * min((int(offers[name][what] / much) for what, much in needs.items()), default=most)
            for name in place
        )
        if room < most:
            yield f"{deployment.name}: {most} replicas, and the nodes of {', '.join(place)} hold {room} at most"
        grace = min(groups[name].template["spec"].get("terminationGracePeriodSeconds", 30) for name in place)
        works = getattr(getattr(settings, deployment.name), "shutdown_seconds", 0.0)
        if deployment.name in _LONG and grace < works:
            yield f"{deployment.name}: works on for {works:g} s, and its nodes are killed after {grace} s"


def memory_faults(service: RayService) -> Iterator[str]:
    """Yield nodes whose object store does not fit into /dev/shm, or that not into the container."""
    for name, options, template in _pods(service.spec.rayClusterConfig):
        container = _ray_container(template)
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        shm = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})  # noqa: S108
        store = amount(options.get("object-store-memory", "0"))
        limit = amount(container["resources"]["limits"]["memory"])
        if shm.get("medium") != "Memory" or amount(shm.get("sizeLimit", "0")) < store or not store:
            yield f"{name}: /dev/shm must be in memory and hold the object store ({store / 2**30:.1f} GiB)"
        if amount(shm.get("sizeLimit", "0")) > limit / 2:
            yield f"{name}: /dev/shm takes more than half of the container's memory, in which it counts"
        if container["resources"]["requests"]["memory"] != container["resources"]["limits"]["memory"]:
            yield f"{name}: memory that is promised to others: request what the limit is"


def security_faults(service: RayService, documents: Sequence[Document]) -> Iterator[str]:
    """Yield what lets others reach what only Ray should, and processes do more than they must."""
    cluster = service.spec.rayClusterConfig
    if cluster.authOptions.mode != "token":
        yield "authOptions: Ray's control plane takes commands from everybody without a token"
    contexts = {name: _ray_container(template).get("securityContext", {}) for name, _, template in _pods(cluster)}
    contexts["autoscaler"] = cluster.autoscalerOptions.securityContext
    for name, context in contexts.items():
        wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        yield from (
            f"{name}: securityContext.{key} must be {value}" for key, value in wanted.items() if context.get(key) != value
        )
    for name, _, template in _pods(cluster):
        spec = template["spec"]
        if not spec.get("securityContext", {}).get("runAsNonRoot"):
            yield f"{name}: runs as root"
        if name != "head" and spec.get("automountServiceAccountToken") is not False:
            yield f"{name}: has a token of Kubernetes, and needs none"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if "exec" not in _ray_container(template).get(probe, {}):
                yield f"{name}: no {probe}; KubeRay's own wants wget, which the images do not have"
    for document in documents:
        name = f"{document['kind']} {document['metadata']['name']}"
        if document["kind"] == "Service":
            for port in document["spec"]["ports"]:
                if port["port"] in CLOSED or port.get("targetPort") in CLOSED:
                    yield f"{name}: opens {port['port']}, {CLOSED.get(port['port'], 'which is closed')}"
        if document["kind"] == "NetworkPolicy":
            yield from _policy_faults(name, document["spec"])
    if not any(d["kind"] == "NetworkPolicy" and "Ingress" in d["spec"]["policyTypes"] for d in documents):
        yield "no NetworkPolicy: every pod of the cluster reaches Ray's control plane"


def _policy_faults(name: str, spec: Mapping[str, Any]) -> Iterator[str]:
    ours = {"app.kubernetes.io/name": "scangraph"}
    for rule in spec.get("ingress", []):
        peers = rule.get("from", [])
        if not peers:
            yield f"{name}: lets everybody in"
        inside = all(peer.get("podSelector", {}).get("matchLabels") == ours and len(peer) == 1 for peer in peers)
        operator = all("kuberay-operator" in str(peer.get("podSelector", {})) for peer in peers)
        opened = {port.get("port") for port in rule.get("ports", [])}
        if not inside and not opened:
            yield f"{name}: opens every port to others"
        if not inside and (shut := opened & (CLOSED.keys() - ({8265} if operator else set()))):
            yield f"{name}: opens {', '.join(f'{port}, {CLOSED[port]}' for port in sorted(shut))}"


def trap_faults(service: RayService, documents: Sequence[Document]) -> Iterator[str]:
    """Yield what is known to go wrong."""
    cluster = service.spec.rayClusterConfig
    version = next(pin.partition("==")[2] for pin in pins("base") if pin.startswith("ray=="))
    if cluster.rayVersion != version:
        yield f"rayVersion is {cluster.rayVersion}, and the images' Ray is {version}"
    if start_option(cluster.headGroupSpec.rayStartParams.get("num-cpus", "")) != "0":
        yield 'head: num-cpus must be "0", or work lands beside the control plane'
    config = yaml.safe_load(service.spec.serveConfigV2)
    variables = {name for name, _ in _setting_names()}
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    for name, options, template in _pods(cluster):
        if own_resources(options) is None:
            told = start_option(options["resources"])
            yield f"{name}: rayStartParams.resources reaches Ray as {told}; it goes through a shell, so quote it twice"
        environment = environment_of(template, documents)
        yield from (
            f"{name}: {variable} turns references into copies of at most 4 MiB"
            for variable in FORBIDDEN
            if variable in environment
        )
        for variable in environment:
            if variable.startswith("SCANGRAPH_") and variable not in variables:
                yield f"{name}: there is no setting {variable}"
        agreed = {"SCANGRAPH_PORT": config["http_options"]["port"], "SCANGRAPH_HOST": config["http_options"]["host"]}
        for variable, value in agreed.items():
            if environment.get(variable) != str(value):
                yield f"{name}: {variable} must be {value}, as serveConfigV2 says"
        for volume in template["spec"].get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and claim not in claims:
                yield f"{name}: there is no volume claim {claim}"
        maps = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
        for source in _ray_container(template).get("envFrom", []):
            wanted = source.get("configMapRef", {}).get("name")
            if wanted and wanted not in maps:
                yield f"{name}: there is no map {wanted}"
    groups = {group.groupName for group in cluster.workerGroupSpecs}
    for document in documents:
        selector = document["spec"].get("selector", {}) if document["kind"] in {"Service", "PodDisruptionBudget"} else {}
        group = selector.get("matchLabels", selector).get("ray.io/group")
        if group and group not in groups:
            yield f"{document['kind']} {document['metadata']['name']}: there is no group {group}"


def _setting_names() -> list[tuple[str, str]]:
    from scangraph.settings import describe_settings

    return [(name, value) for name, value, _ in describe_settings(load_settings())] + [("SCANGRAPH_SECRETS", "")]


def faults(documents: Sequence[Document]) -> list[str]:
    """Return everything that is wrong with an overlay's documents; an empty list says that nothing was found."""
    if found := list(schema_faults(documents)):
        return found
    service = RayService.model_validate(next(d for d in documents if d["kind"] == "RayService"))
    if found := list(serve_faults(service)):
        return found
    asked: tuple[Callable[[], Iterator[str]], ...] = (
        lambda: placement_faults(service),
        lambda: memory_faults(service),
        lambda: security_faults(service, documents),
        lambda: trap_faults(service, documents),
    )
    return [fault for ask in asked for fault in ask()]


def main() -> int:
    """Say what is wrong with overlays."""
    wrong = 0
    for overlay in sys.argv[1:]:
        found = faults(build(Path(overlay)))
        wrong += bool(found)
        print(f"{overlay}: {'nothing found' if not found else ''}", *found, sep="\n  " if found else "")
    return min(wrong, 1)


if __name__ == "__main__":
    raise SystemExit(main())
