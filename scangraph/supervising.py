"""Keeps a service on this machine up: starts it, looks after it, starts it again, and leaves nothing behind.

Ray mends replicas, proxies and its controller by itself, but not its head: without its control store (`gcs_server`) a
cluster serves for a minute more and then dies, with whoever started it. So the service runs in a process of its own, and this
one, which knows nothing of Ray, watches it. What was accepted is in the records: the next service goes on with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

#: Processes of Ray without which there is no service, and which nothing else starts again.
VITAL = ("gcs_server", "raylet")
#: Says where Ray's temporary folder is, in the run folder.
LEFTOVER = "ray-folder"
#: Says whether the service is up, and where; the name is `scangraph.handles`', which would bring Ray along.
SERVICE_FILE = "run/service.json"
#: What tells it to stop. Not SIGTERM: over that Ray lays a handler of its own, which prints a stack and dies.
STOP = signal.SIGINT
_LOOK_SECONDS = 0.2
_ASK_SECONDS, _SILENCE = 5.0, 12
_LONG_SECONDS = 300
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # only Linux has it; without it orphans are init's
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def end_with_parent() -> None:
    """Be told to stop when the process that started this one dies, whatever it dies of."""
    _prctl(_PR_SET_PDEATHSIG, STOP)


def remove_leftovers(run_folder: Path) -> None:
    """Remove Ray's temporary folder, ours or the one of a service that was killed and could not."""
    with contextlib.suppress(OSError):
        left = Path((run_folder / LEFTOVER).read_text())
        if left.name.startswith("scangraph-") and left.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(left, ignore_errors=True)
        (run_folder / LEFTOVER).unlink()


def tell_systemd(state: str) -> None:
    """Say `READY=1` and the like to whoever wants to know (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.connect("\0" + address[1:] if address.startswith("@") else address)
            line.send(state.encode())


@dataclass
class Supervisor:
    """Runs a command, again and again, until it is told to stop.

    Parameters
    ----------
    command : sequence of str
        What serves. It writes `<data>/run/service.json` when it is up, and stops at SIGINT.
    data : Path
        The data folder.
    stop_seconds : float
        Time it has to stop by itself.
    say : callable
        Where to tell people what happens.
    longest_pause : float
        Between two starts; the first pause is a second, each later one twice as long, until it ran for five minutes.
    most_failures : int
        Starts in a row that did not come up, after which it is given up; at the first start one is enough.
    variables : mapping
        Environment for it.
    vital : sequence of str
        Names of processes that must live while it is up.
    """

    command: Sequence[str]
    data: Path
    stop_seconds: float
    say: Callable[[str], None]
    longest_pause: float = 30.0
    most_failures: int = 5
    variables: Mapping[str, str] = field(default_factory=dict)
    vital: Sequence[str] = VITAL
    _stop: int = field(default=0, init=False)

    def run(self) -> int:
        """Return an exit code when it was told to stop (0), or when it cannot be kept up (the last one's, or 1)."""
        with contextlib.ExitStack() as held:
            if not self._have_folder(held):
                self.say(f"A service runs on {self.data} already.")
                return 1
            return self._run()

    def _have_folder(self, held: contextlib.ExitStack) -> bool:
        """Make sure that nobody else serves from this data folder: each would take the other's files for leftovers."""
        (self.data / "run").mkdir(parents=True, exist_ok=True)
        file = held.enter_context((self.data / "run" / "lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _run(self) -> int:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a killed service leaves becomes ours, and is found
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._asked)
        failures, pause, been_up, ports = 0, 1.0, False, dict(self.variables)
        try:
            while True:
                began = time.monotonic()
                was_up, code = self._once(ports, first=not been_up)
                if self._told():
                    return 0
                been_up = been_up or was_up
                failures = 0 if was_up else failures + 1
                if not been_up or failures >= self.most_failures:  # it has said why
                    return code or 1
                if was_up and time.monotonic() - began > _LONG_SECONDS:
                    pause = 1.0
                self.say(f"It is started again in {pause:.0f} s; what was accepted goes on.")
                self._wait(pause)
                pause = min(2 * pause, self.longest_pause)
                if self._told():
                    return 0
        finally:
            tell_systemd("STOPPING=1")
            self._end_all()

    def _asked(self, _number: int, _frame: FrameType | None) -> None:
        self._stop += 1

    def _told(self) -> bool:
        """Whether it was told to stop."""
        return self._stop > 0

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._told():
            self._reap()
            time.sleep(min(_LOOK_SECONDS, seconds))

    def _reap(self) -> dict[int, int]:
        """Return what has ended, with exit codes: our child, and orphans that became ours."""
        ended = {}
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = os.waitstatus_to_exitcode(found[1])
        return ended

    def _once(self, ports: dict[str, str], *, first: bool) -> tuple[bool, int]:
        """Run it once, on the ports of the last time; return whether it was up, and its exit code."""
        state = self.data / SERVICE_FILE
        state.unlink(missing_ok=True)  # of one that was killed
        # A session of its own: Ctrl-C in a terminal is for us to hand on, not for all of Ray's processes at once.
        process = subprocess.Popen(self.command, env={**os.environ, **ports}, start_new_session=True)
        up, url, watched = False, "", list[psutil.Process]()
        silent, asked = 0, 0.0
        while True:
            time.sleep(_LOOK_SECONDS)
            ended = self._reap()
            if process.pid in ended:
                process.returncode = ended[process.pid]
                if not self._told() and up:
                    self.say(f"The service has ended by itself ({process.returncode}).")
                break
            if self._told():
                # What never was up has nothing to end well, and does not listen before it is: `_end_all` is for it. One that is
                # started again works before it says that it is up.
                process.returncode = -signal.SIGKILL if first and not up else self._stop_it(process.pid)
                return up, process.returncode
            if not up and state.exists():
                with contextlib.suppress(OSError, ValueError):
                    told = json.loads(state.read_text())
                    up, url = True, told.get("url") or ""
                    ports.update(_ports(told))
                    watched = [p for p in psutil.Process(process.pid).children(recursive=True) if _name(p) in self.vital]
                    tell_systemd("READY=1")
            if gone := [p for p in watched if not _lives(p)]:
                self.say(f"A process that the service cannot do without has ended (pid {gone[0].pid}).")
                break
            if up and url and time.monotonic() - asked > _ASK_SECONDS:
                asked = time.monotonic()
                silent = 0 if _answers(url) else silent + 1
                if silent >= _SILENCE:
                    self.say(f"The service has not answered for {_SILENCE * _ASK_SECONDS:.0f} s.")
                    break
        self._end_all()
        process.returncode = process.returncode if process.returncode is not None else -signal.SIGKILL
        return up, process.returncode

    def _stop_it(self, pid: int) -> int:
        """Let it stop; whoever asks twice, or the end of its time, kills it."""
        asked_before = self._stop
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STOP)
        end = time.monotonic() + self.stop_seconds
        while time.monotonic() < end and self._stop == asked_before:
            ended = self._reap()
            if pid in ended:
                return ended[pid]
            time.sleep(_LOOK_SECONDS / 2)
        self.say("It did not stop in time, and is killed; what was at work goes on at the next start.")
        return -signal.SIGKILL

    def _end_all(self) -> None:
        """Kill everything that was started and is still there, and remove what it left on the disk."""
        me = psutil.Process()
        while some := me.children(recursive=True):
            for process in some:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)
            self._reap()
        (self.data / SERVICE_FILE).unlink(missing_ok=True)
        remove_leftovers(self.data / "run")


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _answers(url: str) -> bool:
    """Whether Serve's proxy answers there, by itself; a refusal is an answer.

    A gateway with too much to do answers late; to end the service for that would end all that it works on. Serve minds it.
    """
    try:
        with urllib.request.urlopen(f"{url}/-/healthz", timeout=_ASK_SECONDS):  # noqa: S310 - our own address
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _ports(told: dict[str, str | None]) -> dict[str, str]:
    """Return settings by which the next service listens where this one did."""
    found = {}
    for variable, address in (("SCANGRAPH_PORT", told.get("url")), ("SCANGRAPH_GRPC__PORT", told.get("grpc"))):
        if address:
            found[variable] = address.rpartition(":")[2]
    return found
