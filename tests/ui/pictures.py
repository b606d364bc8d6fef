"""Makes the README's pictures of the page: `python -m tests.ui.pictures`, on `../shared/data`, with a service of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, sync_playwright

from benchmarks.service import ServiceProcess
from tests.ui.browser import PATIENCE_MS, ROOT, chromium

DATA = ROOT.parent / "shared" / "data"
DOCS = ROOT / "docs"
NAME, PASSWORD = "ann", "correct horse battery"
MOST_BYTES = 150_000


def keep(page: Page, name: str) -> None:
    """Write what is on the screen, as small as it must be."""
    page.wait_for_timeout(600)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for quality in (88, 80, 70, 60):
        data = io.BytesIO()
        picture.save(data, "webp", quality=quality, method=6)
        if data.tell() <= MOST_BYTES:
            break
    (DOCS / f"page-{name}.webp").write_bytes(data.getvalue())
    print(name, data.tell(), flush=True)


def opened(browser: Browser, url: str, scheme: str = "dark") -> Page:
    """Sign in."""
    page = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme=scheme, locale="en-GB").new_page()  # type: ignore[arg-type]
    page.set_default_timeout(PATIENCE_MS)
    page.goto(url)
    page.get_by_label("Name").fill(NAME)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_selector("html[data-ready=start]", state="attached")
    return page


def draw(browser: Browser, url: str, client: httpx.Client) -> None:
    """Go through the page as somebody would, and keep pictures."""
    spec = {
        "name": "segmented-ct",
        "title": "Scene of a segmented CT",
        "description": "Surfaces of a mask that is there already, beside its CT.",
        "inputs": {"image": {"kind": "image"}, "mask": {"kind": "mask"}},
        "steps": [{"id": "scene", "component": "smoothing/base", "inputs": {"mask": "input.mask"}}],
        "outputs": {"scene": "scene.scene"},
    }
    client.post("/v1/pipelines", json=spec).raise_for_status()

    def sent(name: str) -> str:
        with (DATA / name).open("rb") as file:
            return str(client.post("/v1/files", files={"file": (name, file)}).json()["id"])

    ct, mask = sent("ct.nii.gz"), sent("ct_total_seg.nii.gz")

    def run(pipeline: str, wait: int, **inputs: str) -> str:
        body = {"pipeline_id": pipeline, "inputs": inputs}
        answer = client.post("/v1/executions", json=body, headers={"Prefer": f"wait={wait}"})
        return str(answer.json()["execution_id"])

    shown = run("segmented-ct", 280, image=ct, mask=mask)

    page = opened(browser, url)
    page.locator("#pick").set_input_files([DATA / "ct.nii.gz", DATA / "ct_total_seg.nii.gz"])
    page.locator(".file.ready").nth(1).wait_for()
    page.wait_for_timeout(1500)
    page.locator("[data-pipeline=organs]").click()
    keep(page, "start")
    page.goto(f"{url}/executions/{shown}")
    page.wait_for_selector("main[data-shown=completed]")
    page.get_by_role("button", name="Liver", exact=True).click()
    page.mouse.move(5, 5)
    keep(page, "run")
    page.context.close()

    page = opened(browser, url, "light")
    page.goto(f"{url}/executions/{shown}")
    page.wait_for_selector("main[data-shown=completed]")
    page.get_by_label("Cut away from").select_option("front")
    page.get_by_role("button", name="Front", exact=True).click()
    page.get_by_role("button", name="Aorta", exact=True).click()
    page.get_by_role("button", name="Bone", exact=True).click()
    page.mouse.move(5, 5)
    keep(page, "cut")
    page.goto(url)
    page.wait_for_selector("html[data-ready=start]", state="attached")
    whole = (DATA / "ct.nii.gz").read_bytes()
    page.locator("#pick").set_input_files(FilePayload(name="ct.nii.gz", mimeType="application/gzip", buffer=whole[:900_000]))
    page.locator(".file.refused").wait_for()
    page.locator("[data-pipeline=organs]").click()
    page.get_by_label("Image", exact=True).select_option(index=1)
    page.locator("details[data-step=scene] summary").click()
    page.locator("#option-scene-smoothing").fill("9")
    page.get_by_role("button", name="Start", exact=True).click()
    keep(page, "faults")
    page.context.close()

    page = opened(browser, url)
    body = {
        "pipeline_id": "organs",
        "inputs": {"image": ct},
        "parameters": {"steps": {"organs": {"precision": "exact", "step_size": 0.25, "skip_air": False}}},
    }
    running = client.post("/v1/executions", json=body).json()["execution_id"]
    page.goto(f"{url}/executions/{running}")
    page.wait_for_selector(".patient[data-image]:not([data-image=''])", state="attached")
    while not page.evaluate("document.querySelector('.step.running progress')?.value > 20"):
        page.wait_for_timeout(50)
    keep(page, "live")
    client.post(f"/v1/executions/{running}/cancel")
    page.context.close()


def main() -> None:
    """Make them."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        service = ServiceProcess(Path(folder))
        service.start(240)
        browser = chromium(playwright)
        try:
            command = [sys.executable, "-m", "scangraph.cli", "accounts", "add", NAME, "--role", "editor", "--password-stdin"]
            environment = {**os.environ, "SCANGRAPH_DATA": folder}
            subprocess.run(command, input=PASSWORD, env=environment, cwd=ROOT, text=True, check=True, capture_output=True)
            time.sleep(1.5)
            with httpx.Client(base_url=service.url, timeout=300) as client:
                answer = client.post("/v1/auth/login", json={"username": NAME, "password": PASSWORD})
                client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
                draw(browser, service.url, client)
        finally:
            browser.close()
            service.stop()


if __name__ == "__main__":
    main()
