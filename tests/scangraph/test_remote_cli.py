"""The commands against a server: the real application, records and executor."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deployments.imageio.nifti import write_nifti
from scangraph import cli
from scangraph.client import Client
from scangraph.client.batch import Journal, Record, find_cases
from scangraph.client.logins import LoginFile
from scangraph.contracts.errors import UsageError
from scangraph.contracts.pipelines import PipelineSpec
from scangraph.settings import load_settings
from tests.conftest import ROOT, constant_volume
from tests.scangraph.test_client import SPEC
from tests.servers import Server, serving

TWO = {
    "name": "two",
    "inputs": {"mask": {"kind": "mask"}, "other": {"kind": "mask"}},
    "steps": [{"id": "run", "component": "test/box", "inputs": {"mask": "input.mask", "other": "input.other"}}],
    "outputs": {"scene": "run.scene"},
}


class Done(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = load_settings(
        data=tmp_path_factory.mktemp("data"),
        gateway={"poll_seconds": 0.05},
        executor={"lease_seconds": 5, "max_running": 3, "keep_from_seconds": 0},
    )
    with serving(settings) as running:
        password = running.account("ann", "editor")
        with Client(running.url) as client:
            client.login("ann", password)
            client.create_pipeline(SPEC)
            client.create_pipeline(TWO)
        yield running


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's folders, with nothing in them."""
    for name in [name for name in os.environ if name.startswith("SCANGRAPH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SCANGRAPH_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("SCANGRAPH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(environment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Call the command in this process."""

    def call(*arguments: str | Path, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["scangraph", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Done(int(caught.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture
def logged_in(command: Command, server: Server) -> Command:
    assert command("login", "--server", server.url, "--user", "ann", "--password-stdin", stdin="correct horse ann\n").code == 0
    return command


_made = iter(range(1, 1000))


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write_nifti(constant_volume(next(_made))))  # no result is known from before
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- who and where ------------------------------------------------------------------------------------------------------------


def test_login_and_logout(command: Command, server: Server, environment: Path) -> None:
    assert "no server is known" in command("status").err
    assert "not logged in" in command("status", "--server", server.url).err
    wrong = command("login", "--server", server.url, "--user", "ann", "--password-stdin", stdin="wrong\n")
    assert wrong.code == 1
    assert not (environment / "config").exists()
    done = command("login", "--server", server.url + "/", "--user", "ann", "--password-stdin", stdin="correct horse ann\n")
    assert (done.code, done.out) == (0, "")
    assert "editor" in done.err
    kept = environment / "config" / "logins.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert "correct horse" not in kept.read_text()
    assert command("status").code == 0
    assert command("logout").code == 0
    assert LoginFile(kept).servers() == []
    assert "not logged in" in command("status", "--server", server.url).err
    assert "no login" in command("logout", "--server", server.url).err


def test_a_login_is_renewed_in_its_file(logged_in: Command, environment: Path) -> None:
    path = environment / "config" / "logins.json"
    kept = json.loads(path.read_text())
    (old,) = kept["logins"].values()
    old["renew_at"] = 0
    path.write_text(json.dumps(kept))
    assert logged_in("status").code == 0
    (new,) = json.loads(path.read_text())["logins"].values()
    assert new["refresh_token"] != old["refresh_token"]
    path.write_text("{")
    assert "log in again" in logged_in("status").err


def test_the_service_of_this_machine_needs_no_login(command: Command, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANGRAPH_DATA", str(server.settings.data))
    run = server.settings.data / "run"
    run.mkdir(exist_ok=True)
    service = {"ray_address": "none", "url": server.url, "pid": os.getpid()}
    (run / "service.json").write_text(json.dumps(service))
    try:
        time.sleep(1.1)  # a replica knows its accounts for a second
        done = command("pipelines")
        assert "chain" in done.out, done.err
        (run / "service.json").write_text(json.dumps({**service, "pid": 2**22 + 1}))  # killed: it left its file
        assert "no server is known" in command("pipelines").err
    finally:
        (run / "service.json").unlink()


def test_a_token_from_the_environment(logged_in: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANGRAPH_TOKEN", "nonsense")
    assert "Who are you?" in logged_in("status").err


# --- one run ------------------------------------------------------------------------------------------------------------------


def test_run_status_watch_and_files(logged_in: Command, environment: Path) -> None:
    ct = image(environment / "ct.nii.gz")
    done = logged_in("run", "chain", ct, "-o", "out", "--set", "mask.label=63", "--priority", "high")
    assert done.code == 0, done.err
    assert (environment / "out/mask.nii.gz").is_file()
    assert sorted(done.out.split()) == sorted(str(p.relative_to(environment)) for p in (environment / "out").iterdir())
    assert "made by a test" in done.err
    assert "mask: completed" in done.err
    listed = logged_in("status", "--pipeline", "chain", "--status", "completed", "--json")
    view = json.loads(listed.out)[0]
    assert (view["priority"], view["parameters"]["steps"]["mask"]["label"]) == ("high", 63)
    assert view["execution_id"] in logged_in("status").out
    shown = logged_in("status", view["execution_id"]).out
    assert "scene.obj" in shown
    assert logged_in("watch", view["execution_id"]).code == 0
    by_name = logged_in("run", "chain", f"image={ct}", "-o", "out2", "--set", "mask.label=63")
    assert by_name.code == 0
    assert "mask: known from before" in by_name.err
    listed = logged_in("files", "list", "--kind", "nifti", "--json")
    names = {entry["filename"]: entry["id"] for entry in json.loads(listed.out)}
    assert logged_in("files", "download", names["mask.nii.gz"], "-o", "again.nii.gz").out.strip() == "again.nii.gz"
    assert (environment / "again.nii.gz").read_bytes() == (environment / "out/mask.nii.gz").read_bytes()
    sent = logged_in("files", "upload", ct, ct).out.split()
    assert len(sent) == 2
    assert json.loads(logged_in("files", "show", sent[0]).out)["metadata"]["shape_zyx"] == [8, 9, 10]
    assert logged_in("files", "delete", *sent).code == 0
    assert "There is no file" in logged_in("files", "show", sent[0]).err
    assert "ct.nii.gz" in logged_in("files").out


def test_a_component_is_its_pipeline_over_there(logged_in: Command, server: Server, environment: Path) -> None:
    ct = image(environment / "ct.nii.gz")
    done = logged_in("run", "test/threshold", ct, "--server", server.url, "-o", "out")
    assert done.code == 0, done.err
    mask = environment / "out" / "mask.nii.gz"
    kits = logged_in("run", "test/box", f"mask={mask}", "--server", server.url, "-o", "out3", "--scheme", "kits")
    assert kits.code == 1  # 5 is no number of that scheme
    assert "label" in kits.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("chain", "nothing.nii.gz"), "no file of this machine"),
        (("chain", "a", "b"), "too many: b"),
        (("two", "other=a"), "missing: mask"),
        (("nothing", "a"), "There is no pipeline 'nothing'"),
        (("chain", "a", "--priority", "urgent"), "high, normal, low"),
        (("chain", "a", "--set", "oops"), "NAME=VALUE"),
        (("chain", "ct.nii.gz", "--set", "oops=1"), "oops"),
        (("chain", "text.nii.gz"), "text.nii.gz"),
        (("..", "a"), "no id and no name"),
        (("chain", "ct.nii.gz", "-o", "text.nii.gz/out"), "text.nii.gz"),
    ],
)
def test_errors_are_plain(logged_in: Command, environment: Path, arguments: tuple[str, ...], said: str) -> None:
    image(environment / "ct.nii.gz")
    (environment / "text.nii.gz").write_text("text" * 99)
    done = logged_in("run", *arguments)
    assert done.code == 1
    assert said in done.err


def test_what_fails_and_what_is_cancelled(logged_in: Command, environment: Path) -> None:
    ct = image(environment / "ct.nii.gz")
    failed = logged_in("run", "chain", ct, "--set", "mask.fail=true")
    assert failed.code == 1
    assert "ZeroDivisionError" in failed.err
    assert "Execution " in failed.err
    execution = failed.err.split("Execution ")[1].split()[0]
    assert logged_in("watch", execution).code == 1
    again = logged_in("retry", execution).out.strip()
    assert logged_in("watch", again).code == 1
    assert "already-ended" not in logged_in("cancel", again).err
    assert logged_in("cancel", again).code == 1


def spawn(environment: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "scangraph.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, cwd=environment, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def test_ctrl_c_leaves_it_running(logged_in: Command, environment: Path) -> None:
    ct = image(environment / "ct.nii.gz")
    process = spawn(environment, "run", "chain", ct, "--set", "mask.seconds=60")
    assert process.stderr is not None
    assert "mask" in process.stderr.readline()
    (running,) = json.loads(logged_in("status", "--status", "running", "--json").out)
    execution = running["execution_id"]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"scangraph watch {execution}" in said
    process = spawn(environment, "watch", execution)
    assert process.stderr is not None
    assert "mask" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"scangraph cancel {execution}" in said
    assert json.loads(logged_in("status", execution, "--json").out)["status"] == "running"
    assert logged_in("cancel", execution).code == 0
    assert logged_in("watch", execution).code == 1


# --- pipelines ----------------------------------------------------------------------------------------------------------------


def test_pipelines(logged_in: Command, environment: Path) -> None:
    (environment / "mine.yaml").write_text(json.dumps({**SPEC, "name": "mine"}))  # JSON is YAML
    (environment / "mine.json").write_text(json.dumps({**SPEC, "name": "mine", "title": "Changed"}))
    (environment / "wrong.json").write_text(json.dumps({**SPEC, "outputs": {"mask": "mask.nothing"}}))
    assert "built in" in logged_in("pipelines").out
    assert logged_in("pipelines", "validate", "mine.yaml").code == 0
    wrong = logged_in("pipelines", "validate", "wrong.json")
    assert wrong.code == 1
    assert "/outputs/mask" in wrong.out
    assert logged_in("pipelines", "create", "mine.yaml").code == 0
    assert "revision 2" in logged_in("pipelines", "update", "mine.json").err
    assert "was changed since" in logged_in("pipelines", "update", "mine.json", "--etag", '"x.1"').err
    assert json.loads(logged_in("pipelines", "show", "mine").out)["title"] == "Changed"
    assert "title" not in json.loads(logged_in("pipelines", "show", "mine@1").out)
    assert "mine" in {view["name"] for view in json.loads(logged_in("pipelines", "--json").out)}
    assert logged_in("pipelines", "delete", "mine").code == 0
    assert "There is no pipeline" in logged_in("pipelines", "show", "mine").err
    assert "built in" in logged_in("pipelines", "delete", "test-box").err
    (environment / "broken.yaml").write_text("a: [")
    assert "broken.yaml" in logged_in("pipelines", "create", "broken.yaml").err


# --- batches ------------------------------------------------------------------------------------------------------------------


def executions(server: Server) -> int:
    with Client(server.url) as client:
        client.login("ann", "correct horse ann")
        return sum(1 for _ in client.executions())


def test_a_batch_does_each_once_and_goes_on(logged_in: Command, server: Server, environment: Path) -> None:
    for name in ("a", "b", "c", "d"):
        image(environment / "scans" / f"{name}.nii.gz")
    (environment / "scans" / "e.nii").write_text("no image")
    (environment / "scans" / "notes.txt").write_text("not looked at")
    before = executions(server)
    done = logged_in("run", "chain", "scans", "-o", "out", "--in-flight", "2")
    assert done.code == 1
    assert "4 completed, 1 failed" in done.err
    table = {row["file"]: row for row in rows(environment / "out")}
    assert [row["status"] for row in table.values()] == ["completed"] * 4 + ["failed"]
    assert table["scans/e.nii"]["error"]
    assert table["scans/a.nii.gz"]["outputs"].startswith("a/mask.nii.gz;")
    assert float(table["scans/a.nii.gz"]["seconds"]) > 0
    assert executions(server) == before + 4
    assert (environment / "out/d/scene.obj").is_file()
    # Again: what is whole is left alone, what is damaged is fetched, what failed is tried, what is new is run.
    whole = (environment / "out/a/mask.nii.gz").stat()
    (environment / "out/b/mask.nii.gz").write_bytes(b"damaged")
    (environment / "out/c/scene.obj").unlink()
    image(environment / "scans" / "e.nii")
    done = logged_in("run", "chain", "scans", "-o", "out")
    assert (done.code, executions(server)) == (0, before + 5), done.out
    assert (environment / "out/a/mask.nii.gz").stat().st_mtime_ns == whole.st_mtime_ns
    assert (environment / "out/b/mask.nii.gz").stat().st_size > 100
    assert (environment / "out/c/scene.obj").is_file()
    # Other parameters are another request.
    done = logged_in("run", "chain", environment / "scans/a.nii.gz", "--batch", "-o", "out", "--set", "mask.label=2")
    assert (done.code, executions(server)) == (0, before + 6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_batch_neither_loses_nor_doubles(
    logged_in: Command, server: Server, environment: Path, number: signal.Signals
) -> None:
    for n in range(7):
        image(environment / "scans" / f"{n}.nii.gz")
    before = executions(server)
    line = ("run", "chain", "scans", "-o", "out", "--in-flight", "3", "--set", "mask.seconds=1.5")
    process = spawn(environment, *line)
    deadline = time.monotonic() + 30
    while executions(server) < before + 4:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert "Traceback" not in said
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "goes on from here" in said
        assert len(rows(environment / "out")) == 7
    with (environment / "out/batch.jsonl").open("a") as journal:
        journal.write('{"case": "cut of')
    done = logged_in(*line)
    assert done.code == 0, done.err + done.out
    assert executions(server) == before + 7
    assert len({row["execution_id"] for row in rows(environment / "out")}) == 7
    assert logged_in(*line).code == 0
    assert executions(server) == before + 7


def test_a_batch_of_several_inputs(logged_in: Command, environment: Path) -> None:
    box = image(environment / "x.nii.gz")
    for name in ("p1", "p2"):
        for port in ("mask", "other"):
            (environment / "patients" / name).mkdir(parents=True, exist_ok=True)
            (environment / "patients" / name / f"{port}.nii.gz").write_bytes(box.read_bytes())
    (environment / "patients" / "p2" / "other.nii.gz").unlink()
    done = logged_in("run", "two", "patients", "-o", "out")
    found = {row["file"].partition(";")[0]: row for row in rows(environment / "out")}
    assert done.code == 1
    assert "no file for other" in found["patients/p2/mask.nii.gz"]["error"]
    assert found["patients/p1/mask.nii.gz"]["execution_id"]


def test_a_batch_without_a_server_stops_and_says_so(
    logged_in: Command, environment: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scangraph import remote_cli

    monkeypatch.setattr(remote_cli, "_LONG_PATIENCE", 1.0)
    for n in range(3):
        image(environment / "scans" / f"{n}.nii.gz")
    assert logged_in("pipelines").code == 0

    def gone(*arguments: Any) -> Any:
        import threading

        threading.Thread(target=server.down).start()
        time.sleep(2)
        return find_cases(*arguments)

    monkeypatch.setattr(remote_cli, "find_cases", gone)
    try:
        done = logged_in("run", "chain", "scans", "-o", "out")
    finally:
        server.up()
    assert done.code == 1
    assert "goes on from here" in done.err
    assert {row["status"] for row in rows(environment / "out")} == {"not run"}
    monkeypatch.setattr(remote_cli, "find_cases", find_cases)
    assert logged_in("run", "chain", "scans", "-o", "out").code == 0


def test_cases(tmp_path: Path) -> None:
    one, two = PipelineSpec.model_validate(SPEC), PipelineSpec.model_validate(TWO)
    for name in ("a.nii", "a.nii.gz", "b.nii.gz", ".hidden.nii.gz", "c.txt"):
        (tmp_path / name).touch()
    assert [case.name for case in find_cases(one, [tmp_path])] == ["a.nii", "a.nii.gz", "b"]
    assert [case.name for case in find_cases(one, [tmp_path / "c.txt"])] == ["c.txt"]
    with pytest.raises(UsageError, match="two cases are called 'b.nii.gz'"):
        find_cases(one, [tmp_path / "b.nii.gz", tmp_path / "b.nii.gz"])
    with pytest.raises(UsageError, match="no case"):
        find_cases(two, [tmp_path])
    with pytest.raises(UsageError, match="give a folder"):
        find_cases(two, [tmp_path / "a.nii"])
    with pytest.raises(UsageError, match="not there"):
        find_cases(one, [tmp_path / "nothing"])
    (tmp_path / "p").mkdir()
    for name in ("mask", "other"):
        (tmp_path / "p" / f"{name}.nii.gz").touch()
    for given in (tmp_path, tmp_path / "p"):
        (case,) = find_cases(two, [given])
        assert (case.name, set(case.files), case.fault) == ("p", {"mask", "other"}, "")


def test_the_journal_is_one_processs(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.note(Record(case="a", request="r", key="k"))
        journal.note(Record(case="a", request="r", key="k", execution_id="e"))
        with pytest.raises(UsageError, match="another batch"):
            Journal(tmp_path)
    with (tmp_path / "batch.jsonl").open("a") as file:
        file.write('{"case": "a", "requ')
    with Journal(tmp_path) as journal:
        found = journal.get("a")
        assert found is not None
        assert found.execution_id == "e"
        journal.note(Record(case="b", request="r", key="k"))
    with Journal(tmp_path) as journal:
        assert journal.get("b") is not None
