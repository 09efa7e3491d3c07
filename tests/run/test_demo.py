"""The demo: what it makes of a drawing, what it shows, and the page in a real browser."""

import base64
import importlib.util
import io
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

import metadist
from metadist.config import load_config
from metadist.run import demo
from metadist.run.api import train
from metadist.run.demo import Taught

NEEDED = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CIRCLE = [(0.5 + 0.2 * math.cos(k * math.pi / 8), 0.5 + 0.3 * math.sin(k * math.pi / 8)) for k in range(17)]
LINE = [(0.5, 0.2), (0.5, 0.8)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on the digits."""
    place = tmp_path_factory.mktemp("demo") / "digits"
    settings = ["data.family=digits", "task.ways=3", "task.shots=5", "task.queries=5", "model.name=mlp",
                "meta_steps=60", "learner.inner_lr=0.1", "evaluation.every=0", "evaluation.test_tasks=4",
                "evaluation.baselines=[]", "evaluation.inner_steps=3", "fleet.backend=local", "tracking.mlflow=false",
                f"run_dir={place}"]  # fmt: skip
    train(load_config([], settings), quiet=True)
    return place


def drawing(points, shift=0.0):
    """A drawing as the page sends it: black strokes on a transparent PNG."""
    image = Image.new("RGBA", (demo.CANVAS, demo.CANVAS))
    line = [((x + shift) * demo.CANVAS, (y + shift) * demo.CANVAS) for x, y in points]
    if line:
        ImageDraw.Draw(image).line(line, fill="black", width=demo.STROKE, joint="curve")
    image.save(png := io.BytesIO(), "PNG")
    return demo.DRAWN + base64.b64encode(png.getvalue()).decode()


def test_a_drawing_is_centred_and_fills_the_paper_wherever_and_however_large_it_was_drawn():
    for points, shift in ((CIRCLE, 0.0), (CIRCLE, 0.15), ([(x / 2, y / 2) for x, y in CIRCLE], 0.0)):
        paper = demo.on_paper(drawing(points, shift))
        ink = np.argwhere(np.asarray(paper.convert("L")) < 128)
        assert paper.width == paper.height
        low, high = ink.min(axis=0), ink.max(axis=0)
        assert np.abs((low + high) / 2 - paper.width / 2).max() <= 2  # centred, both ways
        part = (high - low).max() / paper.width
        assert abs(part - 1 / (1 + 2 * demo.MARGIN)) < 0.03


@pytest.mark.parametrize("nothing", [None, "", "data:text/plain;base64,AAAA", drawing([])])
def test_nothing_drawn_is_nothing(nothing):
    assert demo.on_paper(nothing) is None


def test_the_course_ends_with_what_the_adapted_learner_says_and_begins_before_it_adapts(run):
    learner = metadist.load(run)
    taught = [Taught(demo.on_paper(drawing(points)), name) for points, name in ((CIRCLE, "zero"), (LINE, "one"))]
    asked = demo.on_paper(drawing(CIRCLE, 0.1))
    classes, shares = demo.course(learner, taught, asked)
    adapted = learner.adapt([each.example for each in taught], ["zero", "one"])
    assert classes == ["one", "zero"] and shares.shape == (4, 2)
    assert np.array_equal(shares[-1], adapted.predict_proba(asked))
    assert np.allclose(shares.sum(axis=1), 1)
    assert shares[-1, 1] > shares[0, 1]


def test_what_is_taught_is_shown_as_the_model_sees_it_and_names_are_no_code(run):
    learner = metadist.load(run)
    shown = demo._figures(learner, [Taught(demo.on_paper(drawing(CIRCLE)), "<b>zero</b>")])
    assert "&lt;b&gt;zero&lt;/b&gt;" in shown and "<b>" not in shown
    (content,) = re.findall(r'src="data:image/png;base64,([^"]*)"', shown)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    assert pixels.shape == (8, 8)
    assert pixels[0, 0] > 240 and pixels[4, 4] > 240  # paper outside the ring and within it
    assert pixels[4, 2] < 200 and pixels[4, 5] < 200  # the ring itself, thin among eight pixels


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed (the extra demo)")
def test_a_run_of_curves_is_refused(tmp_path):
    settings = ["data.family=sinusoid", "meta_steps=1", "evaluation.every=0", "evaluation.test_tasks=2",
                "evaluation.baselines=[]", "fleet.backend=local", "tracking.mlflow=false"]  # fmt: skip
    train(load_config([], [*settings, f"run_dir={tmp_path / 'curves'}"]), quiet=True)
    with pytest.raises(metadist.InputError, match="the demo is for classes of pictures and texts"):
        demo.page(metadist.load(tmp_path / "curves"), "curves")


@pytest.mark.wide
@pytest.mark.skipif(bool(NEEDED), reason=f"not installed: {', '.join(NEEDED)}")
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: chromium)")
def test_in_a_browser_it_is_taught_two_drawings_and_tells_a_third(run):
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "metadist", "demo", str(run), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "NO_PROXY": "*"}) as server:
        try:
            assert server.stdout is not None
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                page, hosts = browser.new_page(), set()
                page.on("request", lambda request: hosts.add(request.url))
                page.goto(address)
                for name, points in (("zero", CIRCLE), ("one", LINE)):
                    page.get_by_label("Class").fill(name)
                    stroke(page, "#teach", points)
                    page.get_by_text("Add this example").click()
                    page.locator(f"#taught figcaption:has-text('{name}')").wait_for()
                stroke(page, "#ask", [(0.1 + 0.8 * x, 0.1 + 0.8 * y) for x, y in CIRCLE])
                page.locator("#answer h2:has-text('zero')").wait_for(timeout=20_000)
                assert page.locator("#steps tr").count() == 5  # names of classes, then 0 to 3 inner steps
                outside = [url for url in hosts if url.startswith("http") and not url.startswith(address)]
                assert outside == []
                browser.close()
        finally:
            server.terminate()


def stroke(page, canvas, points):
    """Draw with the mouse, in parts of the canvas."""
    box = page.locator(f"{canvas} canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=3)
    page.mouse.up()
