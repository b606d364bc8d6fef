"""The page in a real browser, against the real service with the demonstration models."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import FilePayload, Page, Request, expect

from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.contracts import LabelMap
from tests.servers import proxied
from tests.ui.browser import BUILT, PATIENCE_MS, ROOT, Visit, colours, differ, lit, pixels, until

Begin = Callable[..., Visit]
LIVER, AORTA = 5, 52
expect.set_options(timeout=PATIENCE_MS)


def give(page: Page, path: str | Path, data: bytes | None = None) -> None:
    """Choose a file, as the drop zone does."""
    if data is None:
        page.locator("#pick").set_input_files(path)
    else:
        page.locator("#pick").set_input_files(FilePayload(name=str(path), mimeType="application/octet-stream", buffer=data))


def started(page: Page) -> str:
    """Start what was chosen, and return the execution's id."""
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/executions/*")
    return urlsplit(page.url).path.rsplit("/", 1)[1]


def finished(page: Page, status: str = "completed") -> None:
    """Wait until a run has ended and everything of it is on the screen."""
    page.wait_for_selector(f"main[data-shown={status}]")


@pytest.fixture(scope="module")
def done(client: httpx.Client, sample_ct: Path) -> str:
    """An execution of `organs` on the sample CT that has ended."""
    with sample_ct.open("rb") as file:
        uploaded = client.post("/v1/files", files={"file": ("ct.nii.gz", file)}).json()["id"]
    body = {"pipeline_id": "organs", "inputs": {"image": uploaded}}
    execution = client.post("/v1/executions", json=body, headers={"Prefer": "wait=240"}).json()
    assert execution["status"] == "completed", execution
    return str(execution["execution_id"])


# --- signing in --------------------------------------------------------------------------------------------------------------


def test_tokens_are_out_of_reach_for_scripts(visit: Begin) -> None:
    made = visit()
    kept = made.page.evaluate("JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])")
    assert "eyJ" not in kept
    assert "token" not in kept
    cookies = [cookie for cookie in made.context.cookies() if cookie["name"].startswith("scangraph")]
    assert cookies
    assert all(cookie["httpOnly"] and cookie["sameSite"] == "Strict" for cookie in cookies)


def test_a_wrong_password_is_told_and_the_right_one_lets_in_and_out(visit: Begin) -> None:
    made = visit(sign_in=False)
    page = made.page
    page.goto(made.url)
    page.get_by_label("Name").fill("surgeon")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert").filter(has_text="no such name")).to_be_visible()
    made.forgive("401")
    made.sign_in("surgeon", "correct horse battery")
    page.reload()
    made.ready("start")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Password")).to_be_visible()


def test_the_policy_lets_nothing_in_and_nothing_inline(client: httpx.Client) -> None:
    for path in ("/", "/executions/whatever"):
        answer = httpx.get(str(client.base_url).rstrip("/") + path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", answer.text)


def test_everything_that_is_loaded_stays_small() -> None:
    total = sum(
        len(gzip.compress(path.read_bytes(), 9)) for path in BUILT.rglob("*") if path.suffix in {".js", ".css", ".html"}
    )
    assert total <= 400_000


# --- from a scan to a scene --------------------------------------------------------------------------------------------------


def test_from_a_scan_to_a_scene(visit: Begin, client: httpx.Client, sample_ct: Path) -> None:
    page = visit().page
    give(page, sample_ct)
    card = page.locator(".file.ready")
    expect(card).to_contain_text("122 × 101 × 112")
    expect(card).to_contain_text("3 × 3 × 3 mm")
    expect(card).to_contain_text(re.compile(r"-\d+ to \d+ HU"))
    until(page, "document.querySelector('.file.ready img')?.naturalWidth > 50")

    page.locator("[data-pipeline=organs]").click()
    assert page.get_by_label("Image", exact=True).input_value(), "the scan was not given to the only input"
    # Other options than any other run's, so that nothing is known beforehand; and small steps: a browser without a GPU is
    # busy with its first pictures for seconds, in which it shows no news.
    page.locator("details[data-step=organs] summary").click()
    page.locator("#option-organs-step_size").fill("0.26")
    page.locator("details[data-step=scene] summary").click()
    page.locator("#option-scene-smoothing").fill("0.8")
    execution = started(page)
    canvas = page.locator(".slices-box .canvas")
    seen: set[tuple[str, float]] = set()
    while (status := page.evaluate("document.querySelector('.badge')?.dataset.status")) != "completed":
        seen.add((status, page.evaluate("document.querySelector('.summary progress')?.value ?? 0")))
        page.wait_for_timeout(20)
    assert "running" in {status for status, _ in seen}, seen
    assert len({value for _, value in seen}) > 1, f"the bar did not move: {seen}"
    finished(page)

    record = client.get(f"/v1/executions/{execution}").json()
    assert record["parameters"]["steps"]["scene"]["smoothing"] == 0.8
    names = [step["component"] for step in record["steps"]]
    assert page.locator(".step.completed").count() == len(names) == 2
    assert colours(pixels(canvas)) > 60
    assert lit(pixels(canvas)) > 0.15
    surfaces = page.locator(".scene-box .canvas")
    assert colours(pixels(surfaces)) > 100
    assert page.locator(".structure").count() == record["steps"][1]["facts"]["structures"]


def test_structures_are_found_shown_hidden_and_gone_to(visit: Begin, done: str) -> None:
    page = visit().page
    page.goto(f"{urlsplit(page.url).scheme}://{urlsplit(page.url).netloc}/executions/{done}")
    finished(page)
    slices, surfaces = page.locator(".slices-box .canvas"), page.locator(".scene-box .canvas")
    everything, sliced = pixels(surfaces), pixels(slices)

    liver = page.locator(".structure", has_text="Liver")
    liver.hover()
    liver.get_by_role("button", name="Show Liver", exact=True).click()
    page.wait_for_timeout(300)
    assert lit(pixels(surfaces)) < 0.97 * lit(everything), "the liver is still there"
    assert differ(pixels(slices), sliced), "the liver is still in the slices"
    liver.get_by_role("button", name="Show only Liver").click()
    page.wait_for_timeout(300)
    alone = lit(pixels(surfaces))
    assert 0.01 < alone < lit(everything)
    liver.get_by_role("button", name="Show only Liver").click()  # again: everything

    page.keyboard.press("Escape")
    page.locator("h2", has_text="Structures").click()
    page.keyboard.press("/")
    page.keyboard.type("kidney")
    expect(page.locator(".structure:visible")).to_have_count(2)
    left = page.get_by_role("button", name="Kidney left", exact=True)
    left.click()
    first = page.locator(".readout").inner_text()
    page.get_by_role("button", name="Kidney right", exact=True).click()
    assert page.locator(".readout").inner_text() != first
    assert first.startswith("L "), f"the left kidney is on the patient's left: {first}"

    before = pixels(slices)
    page.get_by_role("button", name="Bone", exact=True).click()
    page.wait_for_timeout(200)
    assert differ(pixels(slices), before)
    page.get_by_label("Cut away from").select_option("front")
    page.wait_for_timeout(300)
    assert differ(pixels(surfaces), everything)


def test_repaired_gaps_lead_to_their_places_and_reports_are_tables(visit: Begin, client: httpx.Client) -> None:
    """A vessel along the patient's axis with a gap at 40 mm left, 30 mm behind, 100 mm up."""
    z, y, x = np.mgrid[:120, :40, :40]
    tube = ((y - 20) ** 2 + (x - 20) ** 2 <= 16) & (abs(z - 60) > 3)
    mask = LabelMap(np.where(tube, AORTA, 0).astype(np.uint8), (1, 1, 1), (20, 10, 40), labels=(AORTA,))
    spec = {
        "name": "repaired",
        "title": "A vessel repaired",
        "inputs": {"mask": {"kind": "mask"}},
        "steps": [
            {"id": "repair", "component": "postprocess/vessel", "inputs": {"mask": "input.mask"}},
            {"id": "centreline", "component": "postprocess/skeleton", "inputs": {"mask": "repair.mask"}},
        ],
        "outputs": {"mask": "repair.mask", "graph": "centreline.graph", "lines": "centreline.lines"},
    }
    client.post("/v1/pipelines", json=spec).raise_for_status()
    uploaded = client.post("/v1/files", files={"file": ("cut.nii.gz", write_nifti(mask))}).json()["id"]
    parameters = {"steps": {"repair": {"structures": [AORTA]}, "centreline": {"structures": [AORTA]}}}
    body = {"pipeline_id": "repaired", "inputs": {"mask": uploaded}, "parameters": parameters}
    execution = client.post("/v1/executions", json=body, headers={"Prefer": "wait=240"}).json()
    assert execution["status"] == "completed", execution
    page = visit().page
    page.goto(page.url + f"executions/{execution['execution_id']}")
    finished(page)
    gaps = page.locator(".bridges li")
    expect(gaps).to_have_count(1)
    expect(gaps).to_contain_text("gap 7")
    gaps.get_by_role("button").click()
    place = re.fullmatch(r"L ([0-9.]+) +P ([0-9.]+) +S ([0-9.]+) mm.*", page.locator(".readout").inner_text(), re.DOTALL)
    assert place, page.locator(".readout").inner_text()
    assert np.allclose([float(part) for part in place.groups()], [40, 30, 100], atol=1.5)
    report = page.locator(".papers table")
    expect(report).to_be_visible()
    assert report.locator("tbody tr").count() >= 1
    expect(page.locator(".structure", has_text="Aorta").first).to_be_visible()


def test_right_is_left_as_radiologists_look(visit: Begin, done: str) -> None:
    page = visit().page
    page.goto(page.url + f"executions/{done}")
    finished(page)
    # On a radiological axial slice a click on the left side of the picture is on the patient's right.
    page.get_by_role("button", name="Axial", exact=True).click()
    page.wait_for_timeout(300)
    box = page.locator(".slices-box canvas").bounding_box()
    assert box is not None
    where = {"x": box["width"] * 0.25, "y": box["height"] * 0.5}
    page.locator(".slices-box canvas").click(position=where)  # type: ignore[arg-type]
    expect(page.locator(".readout")).to_have_text(re.compile("^R "))
    page.get_by_role("button", name="radiological convention").click()
    page.locator(".slices-box canvas").click(position=where)  # type: ignore[arg-type]
    expect(page.locator(".readout")).to_have_text(re.compile("^L "))


def test_results_can_be_taken_home(visit: Begin, client: httpx.Client, done: str) -> None:
    page = visit().page
    page.goto(page.url + f"executions/{done}")
    finished(page)
    record = client.get(f"/v1/executions/{done}").json()
    scene = next(file for file in record["output_files"] if file["filename"] == "scene.obj")
    link = page.locator(".download", has_text="scene.obj")
    expect(link).to_contain_text("mm · LPS")
    with page.expect_download() as downloading:
        link.click()
    assert hashlib.sha256(Path(downloading.value.path()).read_bytes()).hexdigest() == scene["sha256"]
    with page.expect_download() as downloading:
        page.get_by_role("link", name="All as a zip").click()
    with zipfile.ZipFile(Path(downloading.value.path())) as archive:
        assert archive.testzip() is None
        assert any(name.endswith(".obj") for name in archive.namelist())

    page.locator("summary", has_text="The same run again").click()
    command = page.get_by_label("curl", exact=True).inner_text()
    body = json.loads(re.search(r"-d '(.*)'$", command, re.DOTALL).group(1))  # type: ignore[union-attr]
    again = client.post("/v1/executions", json=body, headers={"Prefer": "wait=100"}).json()
    assert again["status"] == "completed", again
    assert all(step["cached"] for step in again["steps"]), "not the same run"
    compile(page.get_by_label("Python", exact=True).inner_text(), "snippet", "exec")
    page.locator("summary", has_text="Provenance").click()
    expect(page.locator(".lineage").first).to_contain_text("totalseg-demo")


# --- while it runs -----------------------------------------------------------------------------------------------------------


def test_a_reload_a_second_tab_and_a_broken_line_lose_nothing(visit: Begin, client: httpx.Client, slow_scan: bytes) -> None:
    uploaded = client.post("/v1/files", files={"file": ("slow.nii.gz", slow_scan)}).json()["id"]
    parameters = {"steps": {"organs": {"precision": "exact", "skip_air": False, "step_size": 0.25}}}
    body = {"pipeline_id": "organs", "inputs": {"image": uploaded}, "parameters": parameters}
    with proxied(client.base_url.port or 0) as proxy:
        made = visit(proxy.url)
        execution = made.page.request.post(f"{proxy.url}/v1/executions", data=body, headers={"X-Scangraph-Page": "1"}).json()[
            "execution_id"
        ]
        address = f"{proxy.url}/executions/{execution}"
        page = made.page
        page.goto(address)
        bar = page.locator(".step.running progress")
        expect(bar).to_be_visible()
        expect(page.locator("#line")).to_have_text("Live")
        until(page, "document.querySelector('.step.running progress')?.value > 0")
        first = float(bar.evaluate("bar => bar.value"))

        page.reload()
        expect(bar).to_be_visible()
        until(page, f"document.querySelector('.step.running progress')?.value >= {first}")
        other = made.tab()
        other.goto(address)
        expect(other.locator(".step.running progress")).to_be_visible()
        other.close()

        expect(page.locator("#line")).to_have_text("Live")
        proxy.refusing = True
        proxy.cut()
        expect(page.locator("#line")).to_have_text(re.compile("Reconnecting|Offline"))
        made.forgive("ERR_", "WebSocket", "Failed to load")
        proxy.refusing = False
        expect(page.locator("#line")).to_have_text("Live")
        made.forgive("ERR_", "WebSocket", "Failed to load")

        page.get_by_role("button", name="Cancel").click()
        expect(page.locator(".badge")).to_have_attribute("data-status", "cancelled")
        made.forgive("ERR_", "WebSocket")
        page.goto(proxy.url)
        made.ready("start")
        row = page.locator(f"[data-execution='{execution}']")
        expect(row.get_by_role("button", name="Retry")).to_be_visible()
        page.get_by_label("State").select_option("completed")
        expect(row).to_have_count(0)
        page.get_by_label("State").select_option("cancelled")
        row.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(row).to_have_count(0)
    assert client.get(f"/v1/executions/{execution}").status_code == 404


def test_a_mask_is_shown_while_the_rest_is_at_work(visit: Begin, client: httpx.Client, slow_scan: bytes) -> None:
    scan = read_nifti(slow_scan, "slow.nii.gz")
    box = np.zeros(scan.array.shape, np.uint8)
    box[100:160, 100:160, 100:160] = LIVER
    mask = LabelMap(box, scan.spacing_mm, scan.origin_mm, scan.direction, (LIVER,))
    spec = {
        "name": "early-and-late",
        "title": "An early mask and a late one",
        "inputs": {"image": {"kind": "image"}, "mask": {"kind": "mask"}},
        "steps": [
            {"id": "early", "component": "postprocess/clean", "inputs": {"mask": "input.mask"}},
            {"id": "late", "component": "inference/totalseg", "inputs": {"image": "input.image"}},
        ],
        "outputs": {"early": "early.mask", "late": "late.mask"},
    }
    client.post("/v1/pipelines", json=spec).raise_for_status()
    ids = {
        name: client.post("/v1/files", files={"file": (f"{name}.nii.gz", data)}).json()["id"]
        for name, data in (("image", slow_scan), ("mask", write_nifti(mask)))
    }
    parameters = {"steps": {"late": {"precision": "exact", "skip_air": False, "step_size": 0.25}}}
    body = {"pipeline_id": "early-and-late", "inputs": ids, "parameters": parameters}
    execution = client.post("/v1/executions", json=body).json()["execution_id"]
    page = visit().page
    page.goto(page.url + f"executions/{execution}")
    expect(page.locator(".step[data-step=late]")).to_have_class(re.compile("running"))
    page.wait_for_selector(".patient[data-mask]:not([data-mask=''])", state="attached", timeout=3 * PATIENCE_MS)
    slices = page.locator(".slices-box .canvas")
    shown = pixels(slices)
    liver = page.locator(".structure", has_text="Liver")
    liver.hover()
    liver.get_by_role("button", name="Show Liver", exact=True).click()
    page.wait_for_timeout(300)
    assert differ(pixels(slices), shown)
    assert client.get(f"/v1/executions/{execution}").json()["status"] == "running"
    client.post(f"/v1/executions/{execution}/cancel").raise_for_status()
    expect(page.locator(".badge")).to_have_attribute("data-status", "cancelled")
    page.wait_for_selector("main[data-shown=cancelled]")


def test_an_upload_goes_on_after_a_broken_line_and_after_a_reload(visit: Begin, client: httpx.Client, sample_ct: Path) -> None:
    with proxied(client.base_url.port or 0) as proxy:
        made = visit(proxy.url)
        page = made.page
        sent: list[int] = []

        def count(request: Request) -> None:
            if request.method == "PATCH":
                sent.append(int(request.headers["upload-offset"]))

        page.on("request", count)
        # What sits in the service's own buffers when a line is reset is lost to it: so the line is not faster than it reads.
        proxy.rate = 1_000_000
        proxy.cuts = [("up", 900_000)]
        give(page, sample_ct)
        while not sent or sent[-1] == 0:
            page.wait_for_timeout(20)
        assert sent[-1] > 700_000
        proxy.rate = 200_000  # it must not be done before the page is left
        page.wait_for_timeout(2000)
        page.once("dialog", lambda dialog: dialog.accept())  # it asks before it is left
        page.reload()
        made.ready("start")
        expect(page.locator(".file.waiting")).to_contain_text("Interrupted")
        proxy.rate = None
        before = len(sent)
        give(page, sample_ct)
        expect(page.locator(".file.ready")).to_contain_text("HU")
        made.forgive("ERR_", "WebSocket", "Failed to load")
        assert sent[-1] > sent[before - 1]


def test_a_broken_file_is_refused_in_words(visit: Begin, sample_ct: Path) -> None:
    made = visit()
    give(made.page, "cut.nii.gz", sample_ct.read_bytes()[:200_000])
    expect(made.page.locator(".file.refused").get_by_role("alert")).to_contain_text(
        re.compile("truncated|cut|whole|ends", re.IGNORECASE)
    )
    give(made.page, "notes.txt", b"nothing of an image")
    expect(made.page.locator(".file")).to_have_count(2)
    made.forgive("422", "415")


# --- options -----------------------------------------------------------------------------------------------------------------


def test_options_come_from_the_declarations_and_faults_stand_at_their_fields(
    visit: Begin, client: httpx.Client, done: str
) -> None:
    made = visit()
    page = made.page
    page.locator("[data-pipeline=organs]").click()
    components = {component["id"]: component for component in client.get("/v1/components").json()["items"]}
    spec = client.get("/v1/pipelines/organs").json()["spec"]
    for step in spec["steps"]:
        declared = components[step["component"]]["parameters"]["properties"]
        shown = page.locator(f"details[data-step={step['id']}] [data-parameter]")
        assert shown.evaluate_all("nodes => nodes.map(node => node.dataset.parameter)") == list(declared)
    page.get_by_label("Image", exact=True).select_option(index=1)  # sent earlier
    page.locator("details[data-step=scene] summary").click()
    smoothing = page.locator("[data-parameter=smoothing]")
    smoothing.get_by_role("textbox").fill("9")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(smoothing.get_by_role("alert")).to_contain_text("0 to 2")
    smoothing.get_by_role("textbox").fill("")
    page.locator("#option-scene-formats-obj").uncheck()  # an empty list: only the service refuses it
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("[data-parameter=formats]").get_by_role("alert")).to_contain_text("at least 1 item")
    made.forgive("422")


def test_phases_find_their_ports(visit: Begin, sample_ct: Path) -> None:
    page = visit().page
    for name in ("scan_delayed.nii.gz", "scan_arterial.nii.gz", "scan_portal_venous.nii.gz"):
        give(page, name, sample_ct.read_bytes())
    expect(page.locator(".file.ready")).to_have_count(3)
    page.locator("[data-pipeline=renal-planning]").click()
    for phase in ("arterial", "portal", "delayed"):
        select = page.get_by_label(phase.capitalize(), exact=True)
        assert phase in select.evaluate("select => select.selectedOptions[0].textContent")
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_enabled()


def test_pictures_are_shown_as_pictures(visit: Begin) -> None:
    drawing = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(drawing).ellipse((60, 60, 200, 180), fill="steelblue")
    data = io.BytesIO()
    drawing.save(data, "png")
    page = visit().page
    give(page, "tray.png", data.getvalue())
    expect(page.locator(".file.ready")).to_be_visible()
    page.locator("[data-pipeline=resize-ai-detect]").click()
    started(page)
    finished(page)
    expect(page.locator(".pictures figure")).to_have_count(2)
    until(page, "[...document.querySelectorAll('.pictures img')].every(picture => picture.naturalWidth > 100)")
    expect(page.locator(".canvases")).to_be_hidden()


# --- for everybody -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_nothing_serious(visit: Begin, done: str, scheme: str) -> None:
    axe = ROOT / "ui" / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.exists():
        pytest.skip("axe-core is not there: run `npm ci` in ui/")
    # The policy forbids scripts of others, this one too: only in this context it is not enforced.
    made = visit(bypass_csp=True, color_scheme=scheme)
    page = made.page

    def check(where: str) -> None:
        page.add_script_tag(path=str(axe))
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        serious = [
            (fault["id"], [node["html"][:200] for node in fault["nodes"]])
            for fault in found
            if fault["impact"] in {"serious", "critical"}
        ]
        assert not serious, (where, serious)

    for details in page.locator("details.options").all():
        details.locator("summary").click()
    check("start")
    page.goto(page.url + f"executions/{done}")
    finished(page)
    for summary in page.locator(".papers > summary, .step-details > summary").all():
        summary.click()
    check("execution")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Password")).to_be_visible()
    check("sign in")


def test_the_keyboard_reaches_everything(visit: Begin, done: str) -> None:
    page = visit().page
    page.reload()
    page.wait_for_selector("html[data-ready=start]", state="attached")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.goto(page.url + f"executions/{done}")
    finished(page)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Window: bone")
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    expect(page.get_by_role("button", name="Bone", exact=True)).to_have_attribute("aria-pressed", "true")
    page.locator(".slices-box canvas").focus()
    before = page.locator(".readout").inner_text()
    page.keyboard.press("PageUp")
    page.wait_for_timeout(100)
    assert page.locator(".readout").inner_text() != before
    turned = pixels(page.locator(".scene-box .canvas"))
    page.locator(".scene-box canvas").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)
    assert differ(pixels(page.locator(".scene-box .canvas")), turned)


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (820, 1180)])
def test_it_fits_small_screens(visit: Begin, done: str, width: int, height: int) -> None:
    page = visit(viewport={"width": width, "height": height}).page
    wide = "document.documentElement.scrollWidth > window.innerWidth"
    assert not page.evaluate(wide)
    expect(page.get_by_text("Research use only.")).to_be_in_viewport()
    page.goto(page.url + f"executions/{done}")
    finished(page)
    assert not page.evaluate(wide)
    expect(page.get_by_text("Research use only.")).to_be_in_viewport()
    for box in (".slices-box canvas", ".scene-box canvas"):
        size = page.locator(box).bounding_box()
        assert size is not None
        assert min(size["width"], size["height"]) > 200
