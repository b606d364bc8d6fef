"""The web page: its size, its first view, and the sample's 61 structures beside a bare NiiVue page with the same files.

    python -m benchmarks.page [--rounds 5]

One service, Debian's Chromium without a GPU (SwiftShader), the two pages in turn, each in a fresh context without a cache.
A page is *interactive* when it has drawn everything and has answered a click: the script's thread is free again.
Needs `../shared/data`, the built page, and Node for the bare one.
"""

from __future__ import annotations

import argparse
import gzip
import mimetypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, Route, sync_playwright

from benchmarks.service import ROOT, ServiceProcess
from tests.ui.browser import BUILT, PATIENCE_MS, chromium

DATA = ROOT.parent / "shared" / "data"
NAME, PASSWORD = "reader", "correct horse battery"
_SIZE = {"width": 1440, "height": 900}


def build_bare(folder: Path) -> None:
    """Bundle the bare page with the page's own packages, as small as the page."""
    command = [
        shutil.which("npx") or "npx",
        "vite",
        "build",
        "bare",
        "--outDir",
        str(folder),
        "--emptyOutDir",
        "--logLevel",
        "warn",
    ]
    subprocess.run([*command, "--config", "bare/vite.config.js"], cwd=ROOT / "ui", check=True)


def sizes() -> dict[str, int]:
    """Return the gzipped bytes of what each page loads."""
    found = {
        path.name: len(gzip.compress(path.read_bytes(), 9))
        for path in BUILT.rglob("*")
        if path.suffix in {".js", ".css", ".html"}
    }
    viewer = sum(size for name, size in found.items() if name.startswith("viewer"))
    return {"everything": sum(found.values()), "of it the viewer (NiiVue), only where something is viewed": viewer}


def prepare(service: ServiceProcess) -> tuple[str, dict[str, str]]:
    """Run a pipeline that shows CT, mask and the scene of 61 structures; returns its id, and the ids of the files."""
    environment = {**os.environ, "SCANGRAPH_DATA": str(service.data)}
    line = [sys.executable, "-m", "scangraph.cli", "accounts", "add", NAME, "--role", "editor", "--password-stdin"]
    subprocess.run(line, input=PASSWORD, env=environment, cwd=ROOT, text=True, check=True, capture_output=True)
    time.sleep(1.5)
    with httpx.Client(base_url=service.url, timeout=300) as client:
        token = client.post("/v1/auth/login", json={"username": NAME, "password": PASSWORD}).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        ids = {}
        for name in ("ct", "ct_total_seg"):
            with (DATA / f"{name}.nii.gz").open("rb") as file:
                ids[name] = client.post("/v1/files", files={"file": (f"{name}.nii.gz", file)}).json()["id"]
        spec = {
            "name": "show",
            "inputs": {"image": {"kind": "image"}, "mask": {"kind": "mask"}},
            "steps": [{"id": "scene", "component": "smoothing/base", "inputs": {"mask": "input.mask"}}],
            "outputs": {"scene": "scene.scene"},
        }
        client.post("/v1/pipelines", json=spec).raise_for_status()
        body = {"pipeline_id": "show", "inputs": {"image": ids["ct"], "mask": ids["ct_total_seg"]}}
        done = client.post("/v1/executions", json=body, headers={"Prefer": "wait=280"}).json()
        assert done["status"] == "completed", done
        scene = next(file["file_id"] for file in done["output_files"] if file["kind"] == "scene")
        shown = client.get(f"/v1/files/{scene}/display").json()["structures"]  # the copies are made once, here
        for file in (ids["ct"], ids["ct_total_seg"]):
            client.get(f"/v1/files/{file}/display").raise_for_status()
        print(f"{len(shown)} structures, {sum(one['faces'] for one in shown)} triangles in their copies")
        return done["execution_id"], {"image": ids["ct"], "mask": ids["ct_total_seg"], "scene": scene}


def visit(browser: Browser, service: ServiceProcess, bare: Path) -> Page:
    """Open a signed-in page in a fresh context, in which `/bare/…` is the bare page."""
    page = browser.new_context(viewport=_SIZE).new_page()  # type: ignore[arg-type]
    page.set_default_timeout(3 * PATIENCE_MS)

    def serve(route: Route) -> None:
        name = route.request.url.partition("/bare/")[2].partition("?")[0] or "index.html"
        path = bare / name
        route.fulfill(path=path, content_type=mimetypes.guess_type(path.name)[0] or "text/plain")

    page.route("**/bare/**", serve)
    answer = page.request.post(
        f"{service.url}/v1/auth/session", data={"username": NAME, "password": PASSWORD}, headers={"X-Scangraph-Page": "1"}
    )
    assert answer.ok, answer.text()
    return page


def first_views(browser: Browser, service: ServiceProcess, bare: Path) -> tuple[float, float]:
    """Return the seconds until something is painted at `/`, and until it can be used."""
    page = visit(browser, service, bare)
    start = time.perf_counter()
    page.goto(service.url)
    page.wait_for_selector("html[data-ready=start]", state="attached")
    ready = time.perf_counter() - start
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    page.context.close()
    return painted, ready


def interactive(browser: Browser, service: ServiceProcess, bare: Path, address: str, shown: str) -> float:
    """Return the seconds until a page has drawn everything and answered a click."""
    page = visit(browser, service, bare)
    start = time.perf_counter()
    page.goto(service.url + address)
    page.wait_for_selector(shown, state="attached")
    page.locator("canvas").first.click(position={"x": 150, "y": 150})
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    seconds = time.perf_counter() - start
    page.context.close()
    return seconds


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for what, size in sizes().items():
        print(f"gzip kB, {what}: {size / 1000:.0f}")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        bare = Path(folder) / "bare"
        build_bare(bare)
        data = Path(folder) / "data"
        data.mkdir()
        service = ServiceProcess(data)
        service.start(240)
        browser = chromium(playwright)
        try:
            execution, files = prepare(service)
            query = "&".join(f"{name}={value}" for name, value in files.items())
            views = [first_views(browser, service, bare) for _ in range(rounds)]
            print(
                "first view s, median: painted {:.2f}, usable {:.2f}".format(*map(statistics.median, zip(*views, strict=True)))
            )
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(interactive(browser, service, bare, f"/executions/{execution}", "main[data-shown=completed]"))
                theirs.append(interactive(browser, service, bare, f"/bare/index.html?{query}", "html[data-ready=bare]"))
            mine, bares = statistics.median(ours), statistics.median(theirs)
            print(f"61 structures interactive, s: page {[round(t, 2) for t in ours]}, bare {[round(t, 2) for t in theirs]}")
            print(f"medians: page {mine:.2f}, bare {bares:.2f}, ratio {mine / bares:.2f}")
        finally:
            browser.close()
            service.stop()


if __name__ == "__main__":
    main()
