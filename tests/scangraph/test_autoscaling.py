"""How many replicas a stage wants, as a plain function and inside Serve's own rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from scangraph import autoscaling
from scangraph.autoscaling import Queued, Told, added_up, reported, wanted_replicas


@pytest.mark.parametrize(
    ("seconds", "steps", "requests", "wanted"),
    [
        (0, 0, 0, 0),  # nothing to do: down to what the settings keep
        (0, 0, 1, 1),  # somebody calls without an executor
        (10, 1, 1, 1),
        (600, 1, 1, 1),  # one step cannot be divided
        (600, 3, 3, 3),
        (600, 40, 8, 10),
        (12, 40, 40, 1),  # many, but quick: requests would have wanted twenty
        (61, 40, 40, 2),
        (0, 2, 2, 1),  # longer at work than expected
    ],
)
def test_replicas_follow_the_work(seconds: float, steps: int, requests: float, wanted: int) -> None:
    assert wanted_replicas(seconds, steps, 60, requests) == wanted


def test_what_executors_report_is_added_up() -> None:
    first = reported({"nnunet": (100.5, 3), "smoothing": (0.0, 0)})
    second = reported({"nnunet": (20.0, 1), "smoothing": (4.0, 2)})
    assert added_up({name: [first[name], second[name]] for name in first}) == {"nnunet": (120.5, 4), "smoothing": (4.0, 2)}
    assert added_up({"ongoing": [3.0]}) == {}  # Serve's own numbers are in the same report


@pytest.fixture
def board() -> Iterator[dict[str, dict[str, tuple[float, int]]]]:
    autoscaling.BOARD.clear()
    yield autoscaling.BOARD
    autoscaling.BOARD.clear()


def context(name: str, *, now: int, at: float = 0.0, series: Any = None, requests: float = 0, state: Any = None) -> Any:
    found = DeploymentID(name=name, app_name="scangraph")
    config = AutoscalingConfig(min_replicas=0, max_replicas=8, upscale_delay_s=0, downscale_delay_s=60)
    return AutoscalingContext(
        deployment_id=found,
        deployment_name=name,
        app_name="scangraph",
        current_num_replicas=now,
        target_num_replicas=now,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0,
        aggregated_metrics={},
        raw_metrics=series,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=at,
        config=config,
    )


def by_value(name: str, **arguments: Any) -> Any:
    """Make a policy as Serve's controller does: from what was pickled with its whole module."""
    made = AutoscalingPolicy(policy_function=f"scangraph.autoscaling:{name}", policy_kwargs=arguments).get_policy()
    return _apply_autoscaling_config(made(**arguments))


def test_the_stages_hear_what_the_executors_told(board: dict[str, dict[str, tuple[float, int]]]) -> None:
    told, queued = by_value("Told"), by_value("Queued", work_seconds=60)
    assert queued(context("nnunet", now=3))[0] == 3  # nobody has told anything yet

    replica = ReplicaID("a", DeploymentID(name="executor", app_name="scangraph"))
    older, newest = reported({"nnunet": (10.0, 1)}), reported({"nnunet": (500.0, 20)})
    series = {name: {replica: [TimeStampedValue(1, older[name]), TimeStampedValue(2, newest[name])]} for name in newest}
    assert told(context("executor", now=1, series=series))[0] == 1  # the executors' number stays
    assert board == {"scangraph": {"nnunet": (500.0, 20)}}
    assert queued(context("nnunet", now=1))[0] == 9  # the bounds come after the policy
    assert queued(context("nnunet", now=0, requests=1))[0] == 1  # Serve's own rule for the first replica
    assert queued(context("smoothing", now=2))[0] == 2  # wants none, but not before the delay


def test_without_work_the_last_replica_goes(board: dict[str, dict[str, tuple[float, int]]]) -> None:
    board["scangraph"] = {"nnunet": (0.0, 0)}
    assert Queued(60)(context("nnunet", now=1))[0] == 0
    assert Queued(60)(context("nnunet", now=1, requests=0.5))[0] == 1
    assert Told()(context("executor", now=1, series={}))[0] == 1
    assert board["scangraph"] == {"nnunet": (0.0, 0)}  # an executor that says nothing has not said "nothing"
