"""Which states of Serve's deployments mean that the service can take work."""

from __future__ import annotations

import pytest
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
from ray.serve.schema import DeploymentStatusOverview

from deployments.gateway.deployment import why_not_ready


def state(status: str, message: str = "", **replicas: int) -> DeploymentStatusOverview:
    """A deployment as Serve describes it."""
    return DeploymentStatusOverview(DeploymentStatus(status), DeploymentStatusTrigger.UNSPECIFIED, dict(replicas), message)  # type: ignore[arg-type]


@pytest.mark.parametrize("status", ["UPDATING", "UPSCALING", "DOWNSCALING", "UNHEALTHY", "DEPLOY_FAILED", "HEALTHY"])
def test_what_runs_takes_work_whatever_else_is_going_on(status: str) -> None:
    """More replicas start as the load grows, or an update's first one: a probe that heard "not ready" would end the service."""
    assert why_not_ready({"nnunet": state(status, RUNNING=1, STARTING=1)}) == {}


def test_what_nothing_asks_for_has_no_replica_and_is_ready() -> None:
    assert why_not_ready({"nnunet": state("HEALTHY")}) == {}


@pytest.mark.parametrize("status", ["UPDATING", "UPSCALING", "UNHEALTHY", "DEPLOY_FAILED"])
def test_what_has_no_replica_is_named_with_the_cause(status: str) -> None:
    message = "Traceback (most recent call last):\n  File '/somewhere/secret.py'\nImportError: no torch\n"
    states = {"nnunet": state(status, message, STARTING=1), "imageio": state("HEALTHY", RUNNING=1)}
    assert why_not_ready(states) == {"nnunet": f"{status}: ImportError: no torch"}


def test_what_is_starting_says_so() -> None:
    assert why_not_ready({"gateway": state("UPDATING", STARTING=1)}) == {"gateway": "UPDATING: starting"}
