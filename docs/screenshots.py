r"""The screenshots in docs/web.md and the README, made anew: real pictures, real training, a real browser.

    GRAFT_WEIGHTS_DIR=FOLDER .venv/bin/graft up
    .venv/bin/python docs/screenshots.py --data hymenoptera.zip [--url http://127.0.0.1:8000]

The data set gets flaws first, as people's data sets have them: mirrored and brightened copies of training pictures in
validation, a copy in the wrong class, a torn file. Needs playwright and a Chromium, as the tests do.
"""

import argparse
import io
import random
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageEnhance, ImageOps
from playwright.sync_api import Page, expect, sync_playwright

PICTURES = Path(__file__).parent / "pictures"
COLOURS = 256  # of a file: enough for photographs this small, and a third of the bytes
WAIT_MILLISECONDS = 1_800_000  # eight epochs on a busy machine


def main() -> None:
    arguments = _arguments()
    PICTURES.mkdir(exist_ok=True)
    expect.set_options(timeout=WAIT_MILLISECONDS)
    with httpx.Client(base_url=arguments.url, timeout=120) as client, sync_playwright() as playwright:
        archive = arguments.data.read_bytes()
        dataset = client.put("/v1/datasets?name=garden+insects", content=_with_flaws(archive)).json()
        _ended(client, f"/v1/datasets/{dataset['id']}")
        job = _submitted(client, dataset["id"], method="auto")
        chromium = shutil.which("chromium") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        desktop = {"viewport": {"width": 1200, "height": 860}}
        page = browser.new_page(base_url=arguments.url, **desktop)
        _keep(page, "/", "start")
        _keep(page, f"/datasets/{dataset['id']}", "data-set")
        job = _ended(client, f"/v1/jobs/{job['id']}")
        page.goto(f"/models/{job['model']}")
        page.get_by_role("button", name=re.compile("^bees taken for ants")).click()
        expect(page.locator("#cell img").first).to_be_visible()
        _keep(page, None, "model", height=1000)
        _try(page, archive, job["model"])
        _keep(page, None, "try")
        running = _submitted(client, dataset["id"], method="fine_tuning", hyperparameters={"epochs": 20})
        page.goto(f"/jobs/{running['id']}")
        expect(page.get_by_role("region", name="Epochs").locator("tbody tr").nth(7)).to_be_visible()
        _keep(page, None, "job")
        client.post(f"/v1/jobs/{running['id']}/cancel")
        phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
        _keep(browser.new_page(base_url=arguments.url, **phone), f"/jobs/{job['id']}", "phone")
        browser.close()


def _submitted(client: httpx.Client, dataset: str, **more: Any) -> dict[str, Any]:
    job: dict[str, Any] = client.post("/v1/jobs", json={"dataset": dataset, **more}).raise_for_status().json()
    return job


def _ended(client: httpx.Client, path: str) -> dict[str, Any]:
    """What is there once it is in a final state, however long a busy machine takes."""
    while True:
        found: dict[str, Any] = client.get(f"{path}?wait=60").raise_for_status().json()
        if found["status"] not in ("processing", "queued", "running"):
            return found


def _try(page: Page, archive: bytes, model: str) -> None:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        name = [name for name in opened.namelist() if name.startswith("val/bees") and name.endswith(".jpg")][5]
        picture = {"name": "garden.jpg", "mimeType": "image/jpeg", "buffer": opened.read(name)}
    page.goto(f"/try?model={model}")
    page.locator("[data-pictures]").set_input_files(picture)
    expect(page.locator(".answer .strip img")).to_have_count(5)
    page.locator(".answer").scroll_into_view_if_needed()


def _keep(page: Page, address: str | None, name: str, *, height: int | None = None) -> None:
    """What the window shows, as a file of few colours. address: None where the page is open already."""
    if address is not None:
        page.goto(address)
    size = page.viewport_size
    assert size is not None
    if height is not None:
        page.set_viewport_size({"width": size["width"], "height": height})
    page.wait_for_timeout(1500)  # pictures that were not in sight are loaded when they are
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        few = shot.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        few.save(PICTURES / f"{name}.png", optimize=True)
    page.set_viewport_size(size)


def _with_flaws(archive: bytes) -> bytes:
    chance = random.Random(1)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(packed, "w") as flawed:
        names = [name for name in source.namelist() if name.endswith(".jpg")]
        for name in names:
            flawed.writestr(name, source.read(name))
        training = [name for name in names if name.startswith("train/")]
        for place, name in enumerate(chance.sample(training, 4)):
            picture = Image.open(io.BytesIO(source.read(name)))
            changed = ImageOps.mirror(picture) if place % 2 else ImageEnhance.Brightness(picture).enhance(1.06)
            flawed.writestr(name.replace("train/", "val/").replace(".jpg", "_again.jpg"), _jpeg(changed))
        stray = next(name for name in training if "/bees/" in name)
        flawed.writestr("train/ants/stray.jpg", _jpeg(Image.open(io.BytesIO(source.read(stray)))))
        flawed.writestr("train/ants/torn.jpg", source.read(training[0])[:5000])
    return packed.getvalue()


def _jpeg(picture: Image.Image) -> bytes:
    encoded = io.BytesIO()
    picture.convert("RGB").save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="hymenoptera.zip: ants and bees")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    return parser.parse_args()


if __name__ == "__main__":
    main()
