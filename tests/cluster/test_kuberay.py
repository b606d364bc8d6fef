"""The overlays for Kubernetes, built by a real kustomize and looked at as closely as can be without a cluster."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import yaml

from cluster.kuberay.check import amount, build, builder, faults, start_option
from runtime_envs.build import SERVING
from tests.conftest import ROOT

FOLDER = ROOT / "cluster/kuberay"
OVERLAYS = sorted(path.parent.name for path in (FOLDER / "overlays").glob("*/kustomization.yaml"))
Documents = list[dict[str, Any]]

pytestmark = pytest.mark.skipif(builder() is None, reason="neither kustomize nor kubectl is on this machine")


@cache
def _built(overlay: str) -> Documents:
    return build(FOLDER / "overlays" / overlay)


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Documents:
    return copy.deepcopy(_built(request.param))


@pytest.fixture
def gpu() -> Documents:
    return copy.deepcopy(_built("gpu"))


def service(documents: Documents) -> dict[str, Any]:
    found: dict[str, Any] = next(d["spec"] for d in documents if d["kind"] == "RayService")
    return found


def group(documents: Documents, name: str) -> dict[str, Any]:
    groups = service(documents)["rayClusterConfig"]["workerGroupSpecs"]
    found: dict[str, Any] = next(g for g in groups if g["groupName"] == name)
    return found


def container(documents: Documents, name: str) -> dict[str, Any]:
    found: dict[str, Any] = group(documents, name)["template"]["spec"]["containers"][0]
    return found


def test_there_are_the_three() -> None:
    assert OVERLAYS == ["gpu", "on-premise", "small"]


def test_nothing_is_wrong_with_an_overlay(overlay: Documents) -> None:
    assert faults(overlay) == []


def test_every_stage_has_a_group_with_its_image(overlay: Documents) -> None:
    assert {g["groupName"] for g in service(overlay)["rayClusterConfig"]["workerGroupSpecs"]} == set(SERVING)
    for name in SERVING:
        assert re.fullmatch(rf"(\S+/)?scangraph-{name}:\d+\.\d+\.\d+\S*", container(overlay, name)["image"])


def test_every_secret_that_is_named_is_explained(overlay: Documents) -> None:
    text = json.dumps(overlay)
    named = set(re.findall(r'"(?:secretKeyRef|secretRef)": {[^}]*"name": "([^"]+)"', text))
    named |= set(re.findall(r'"secretName": "([^"]+)"', text))
    said = (FOLDER / "README.md").read_text()
    assert {"scangraph-secrets", "scangraph-keys"} <= named
    assert all(f"`{name}`" in said for name in named)
    assert not [d for d in overlay if d["kind"] == "Secret"]  # none stands here


def config(documents: Documents, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the Serve config, which is a text in a text."""
    told = yaml.safe_load(service(documents)["serveConfigV2"])
    change(told)
    service(documents)["serveConfigV2"] = yaml.safe_dump(told)


def without(documents: Documents, kind: str) -> None:
    documents[:] = [document for document in documents if document["kind"] != kind]


def _set(place: dict[str, Any], **values: Any) -> None:
    place.update(values)


def _policy(documents: Documents, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(d for d in documents if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == name)
    return found


def _args(told: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = told["applications"][0]["args"]
    return found


#: What can go wrong, one thing at a time, and a word of what must be said of it.
BREAKS: dict[str, tuple[Callable[[Documents], Any], str]] = {
    "a mistyped key of KubeRay": (lambda d: _set(service(d)["rayClusterConfig"], enableAutoscaling=True), "enableAutoscaling"),
    "a mistyped key of a pod": (lambda d: _set(container(d, "nnunet"), resorces={}), "resorces"),
    "a mistyped key of a service": (lambda d: _set(next(x for x in d if x["kind"] == "Service")["spec"], port=1), "port"),
    "a number for a text": (lambda d: _set(group(d, "nnunet")["rayStartParams"], resources=1), "resources"),
    "a password in the file": (
        lambda d: _set(service(d)["rayClusterConfig"]["gcsFaultToleranceOptions"], redisPassword={"value": "x"}),
        "redisPassword",
    ),
    "a mistyped key of Serve": (lambda d: config(d, lambda c: _set(c, proxylocation="HeadOnly")), "proxylocation"),
    "a mistyped key within Serve's": (lambda d: config(d, lambda c: _set(c["http_options"], prt=1)), "prt"),
    "a mistyped setting": (lambda d: config(d, lambda c: _set(_args(c), nnUnet={})), "nnUnet"),
    "a mistyped setting of a stage": (lambda d: config(d, lambda c: _set(_args(c)["nnunet"], models_hold=1)), "models_hold"),
    "options that drop an environment": (
        lambda d: config(
            d,
            lambda c: _set(c["applications"][0], deployments=[{"name": "nnunet", "ray_actor_options": {"num_gpus": 1.0}}]),
        ),
        "drop its environment",
    ),
    "proxies that nobody reaches": (lambda d: config(d, lambda c: _set(c["http_options"], host="127.0.0.1")), "0.0.0.0"),
    "environments of one machine": (lambda d: config(d, lambda c: _set(_args(c), environments="prebuilt")), "images"),
    "no such image": (lambda d: _set(container(d, "imaging"), image="scangraph-pictures:1"), "scangraph-pictures"),
    "another stage's image": (lambda d: _set(container(d, "imaging"), image="scangraph-base:0.1.0"), "does not have"),
    "a resource lost in the shell": (
        lambda d: _set(group(d, "imaging")["rayStartParams"], resources='{"scangraph-imaging": 1}'),
        "quote it twice",
    ),
    "a share larger than a node": (
        lambda d: config(d, lambda c: _set(_args(c)["smoothing"], num_cpus=9)),
        "smoothing: no group",
    ),
    "a GPU where there is none": (
        lambda d: container(d, "nnunet")["resources"]["limits"].pop("nvidia.com/gpu"),
        "nnunet: no group",
    ),
    "more replicas than room": (lambda d: config(d, lambda c: _set(_args(c)["nnunet"], max_replicas=99)), "99 replicas"),
    "a node killed too soon": (
        lambda d: _set(group(d, "nnunet")["template"]["spec"], terminationGracePeriodSeconds=30),
        "killed after 30 s",
    ),
    "a small /dev/shm": (
        lambda d: _set(group(d, "base")["template"]["spec"]["volumes"][1]["emptyDir"], sizeLimit="64Mi"),
        "/dev/shm must",
    ),
    "memory promised twice": (lambda d: _set(container(d, "base")["resources"]["requests"], memory="1Gi"), "promised"),
    "a control plane without a token": (
        lambda d: _set(service(d)["rayClusterConfig"]["authOptions"], mode="disabled"),
        "without a token",
    ),
    "a root that can be written": (
        lambda d: _set(container(d, "base")["securityContext"], readOnlyRootFilesystem=False),
        "readOnlyRootFilesystem",
    ),
    "root": (lambda d: group(d, "base")["template"]["spec"].pop("securityContext"), "runs as root"),
    "no probe": (lambda d: container(d, "base").pop("readinessProbe"), "wants wget"),
    "an open dashboard": (
        lambda d: _policy(d, "scangraph-requests")["spec"]["ingress"][0]["ports"].append({"protocol": "TCP", "port": 8265}),
        "Ray's dashboard",
    ),
    "everybody let in": (lambda d: _policy(d, "scangraph")["spec"]["ingress"].append({}), "lets everybody in"),
    "no policy": (lambda d: without(d, "NetworkPolicy"), "no NetworkPolicy"),
    "another Ray": (lambda d: _set(service(d)["rayClusterConfig"], rayVersion="2.59.0"), "the images' Ray"),
    "work on the head": (
        lambda d: service(d)["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
        "num-cpus",
    ),
    "calls by value": (
        lambda d: _set(container(d, "base"), env=[{"name": "RAY_SERVE_USE_GRPC_BY_DEFAULT", "value": "1"}]),
        "4 MiB",
    ),
    "a mistyped variable": (
        lambda d: _set(container(d, "base"), env=[{"name": "SCANGRAPH_FILES__LINK", "value": "1"}]),
        "SCANGRAPH_FILES__LINK",
    ),
    "another port": (lambda d: config(d, lambda c: _set(c["http_options"], port=8001)), "SCANGRAPH_PORT"),
    "no volume": (lambda d: without(d, "PersistentVolumeClaim"), "no volume claim"),
    "requests sent nowhere": (
        lambda d: _set(next(x for x in d if x["kind"] == "Service")["spec"], selector={"ray.io/group": "gateway"}),
        "no group gateway",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_fault_is_found_and_named(what: str, gpu: Documents) -> None:
    spoil, said = BREAKS[what]
    spoil(gpu)
    found = faults(gpu)
    assert any(said in fault for fault in found), found


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("2", 2), ("4Gi", 4 * 2**30), ("1.5G", 1.5e9), ("64Mi", 64 * 2**20)]
)
def test_quantities(text: str, value: float) -> None:
    assert amount(text) == value
    with pytest.raises(ValueError, match="no quantity"):
        amount(text + "?")


def test_an_option_goes_through_a_shell() -> None:
    assert start_option("'{\"a\": 1}'") == '{"a": 1}'
    assert start_option('{"a": 1}') != '{"a": 1}'


def test_a_broken_overlay_is_refused_in_words(tmp_path: Any) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nothing.yaml]\n")
    with pytest.raises(RuntimeError, match=r"nothing\.yaml"):
        build(tmp_path)
