"""What is told of an execution at work, in log lines and spans, from the claim to the end."""

from __future__ import annotations

import logging
import time

from scangraph import logs
from scangraph.store.executions import Claim
from scangraph.tracing import ExecutionTrace

log = logging.getLogger("scangraph")


class Watch(ExecutionTrace):
    """An execution's trace and log.

    Parameters
    ----------
    claim : Claim
        Whose.
    """

    def __init__(self, claim: Claim) -> None:
        told: dict[str, str | float | bool] = {"scangraph.pipeline": claim.kind, "scangraph.attempt": claim.fence}
        super().__init__(claim.execution_id, claim.traceparent, **told)
        self._claim, self._began = claim, time.monotonic()

    def enter(self) -> None:
        """Begin, in the execution's own task."""
        super().enter()
        logs.enter(self._claim.execution_id)
        log.info("execution begun", extra={"pipeline": self._claim.kind, "attempt": self._claim.fence})

    def end(self, state: str, code: str | None = None, failed_step: str | None = None) -> None:
        """Tell how it ended, once that is in the records."""
        super().end(state, code, failed_step)
        seconds = round(time.monotonic() - self._began, 3)
        level = logging.WARNING if state == "failed" else logging.INFO
        log.log(level, "execution ended", extra={"state": state, "code": code, "seconds": seconds})
