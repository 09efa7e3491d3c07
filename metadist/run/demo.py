"""A page in the browser on which a trained run learns classes from a few examples: drawn, uploaded or typed."""

import base64
import html
import importlib
import io
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metadist.core.errors import Diverged, InputError
from metadist.run.few_shot import FewShotLearner

if TYPE_CHECKING:
    from PIL import Image

CANVAS, STROKE = 320, 14
"""Side of a drawing and width of its pen, in pixels."""
MARGIN = 0.15
"""Paper left beside a drawing, as a part of its longer side."""
DRAWN = "data:image/png;base64,"
DRAWING = """
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const at = event => {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
};
const wipe = () => pen.clearRect(0, 0, canvas.width, canvas.height);
const tell = value => { props.value = value; trigger("input"); };
let down = false;
canvas.onpointerdown = event => {
  down = true;
  canvas.setPointerCapture(event.pointerId);
  pen.lineWidth = STROKE; pen.lineCap = pen.lineJoin = "round";
  pen.beginPath(); pen.moveTo(...at(event)); pen.lineTo(...at(event)); pen.stroke();
};
canvas.onpointermove = event => { if (down) { pen.lineTo(...at(event)); pen.stroke(); } };
canvas.onpointerup = () => { down = false; tell(canvas.toDataURL("image/png")); };
element.querySelector("button").onclick = () => { wipe(); tell(""); };
watch("value", () => { if (!props.value) wipe(); });
""".replace("STROKE", str(STROKE))
"""What the page runs to let somebody draw; the drawing is its value, a PNG."""


FIGURES = """
figure {display: inline-block; margin: 4px; text-align: center; vertical-align: top}
img {width: 72px; image-rendering: pixelated; border: 1px solid #888}
figcaption {max-width: 72px; overflow-wrap: anywhere}
"""
STEPS = "td, th {padding: 2px 10px; text-align: right; border: 1px solid #ccc}"
CELL = '<td style="background: rgba(0, 114, 178, {:.2f})">{:.0%}</td>'


class Taught(NamedTuple):
    """An example that the learner was given: a picture or a text, and the name of its class."""

    example: Any
    label: str


def course(learner: FewShotLearner, taught: Sequence[Taught], asked: Any) -> tuple[list[str], np.ndarray]:
    """The classes taught, and how probable each is for `asked` before adaptation and after each inner step:
    float64 [inner_steps + 1, ways]; [1, ways] for a learner without inner steps."""
    examples, labels = [each.example for each in taught], [each.label for each in taught]
    steps = range(int(learner.settings.get("inner_steps", 0)) + 1)
    settings: list[dict[str, Any]] = [{"inner_steps": k} for k in steps] if len(steps) > 1 else [{}]
    adapted = [learner.adapt(examples, labels, **each) for each in settings]
    classes = adapted[-1].classes
    assert classes is not None
    return [str(name) for name in classes], np.stack([each.predict_proba(asked) for each in adapted])


def on_paper(drawing: str | None) -> "Image.Image | None":
    """A drawing (a transparent PNG as a data URL) on white paper, cut to its ink with a margin and square, as pictures
    of letters are; None where nothing is drawn."""
    from PIL import Image

    if not drawing or not drawing.startswith(DRAWN):
        return None
    with Image.open(io.BytesIO(base64.b64decode(drawing.removeprefix(DRAWN))), formats=["PNG"]) as file:
        image = file.convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        return None
    side = round(max(box[2] - box[0], box[3] - box[1]) * (1 + 2 * MARGIN))
    paper = Image.new("RGB", (side, side), "white")
    ink = image.crop(box)
    paper.paste(ink.convert("RGB"), ((side - ink.width) // 2, (side - ink.height) // 2), ink.getchannel("A"))
    return paper


def seen(learner: FewShotLearner, example: Any) -> "Image.Image":
    """A picture (of Pillow's, or the path of one) as the model sees it."""
    from PIL import Image

    (pixels,), _ = learner.inputs(example)
    form = learner.inputs.about.pictures
    grey = np.clip(np.asarray(pixels[0], np.float32).transpose(1, 2, 0) * 255, 0, 255).astype(np.uint8)
    shown = 255 - grey if form and form.inverted else grey
    return Image.fromarray(shown[..., 0] if shown.shape[-1] == 1 else shown)


def _figures(learner: FewShotLearner, taught: Sequence[Taught]) -> str:
    """The pictures taught as HTML, each with its class below."""
    figures = []
    for each in taught:
        seen(learner, each.example).save(png := io.BytesIO(), "PNG")
        source = DRAWN + base64.b64encode(png.getvalue()).decode()
        figures.append(f'<figure><img src="{source}"><figcaption>{html.escape(each.label)}</figcaption></figure>')
    return "".join(figures)


def page(learner: FewShotLearner, name: str) -> Any:
    """The page of a run called `name`, gradio's Blocks. Raises InputError where its examples can be neither drawn nor
    typed, or gradio is not installed."""
    gr = _gradio()
    about = learner.inputs.about
    if not learner.shapes.classification or not (about.pictures or about.texts):
        raise InputError(
            f"the demo is for classes of pictures and texts; this run takes {learner.takes}: see `metadist predict -h`"
        )
    return (_pictures if about.pictures else _texts)(gr, learner, name)


def _gradio() -> Any:
    """The module, which is an extra: types are checked without it too."""
    try:
        return importlib.import_module("gradio")
    except ImportError:
        raise InputError(
            "the demo needs gradio: pip install 'gradio>=6,<7' (or metadist with its extra, demo)"
        ) from None


def _pictures(gr: Any, learner: FewShotLearner, name: str) -> Any:
    def canvas(label: str, id: str) -> Any:
        paper = f"<div>{label}</div><canvas width={CANVAS} height={CANVAS}></canvas><br><button>Wipe it</button>"
        style = "canvas {background: white; border: 1px solid #888; touch-action: none; cursor: crosshair}"
        return gr.HTML("", html_template=paper, css_template=style, js_on_load=DRAWING, elem_id=id)

    def add(taught: list[Taught], label: str, drawing: str) -> tuple[Any, ...]:
        picture = on_paper(drawing)
        if picture is None:
            raise gr.Error("Draw an example first.")
        return (*_added(gr, learner, taught, [picture], label), "")

    def upload(taught: list[Taught], label: str, files: list[str]) -> tuple[Any, ...]:
        return _added(gr, learner, taught, files, label)

    def ask(taught: list[Taught], drawing: str) -> tuple[Any, ...]:
        return _answer(gr, learner, taught, on_paper(drawing))

    def ask_file(taught: list[Taught], file: str) -> tuple[Any, ...]:
        return _answer(gr, learner, taught, file)

    with gr.Blocks(title=f"metadist: {name}", analytics_enabled=False) as blocks:
        taught = gr.State([])
        gr.Markdown(
            _heading(learner, name, "Drawings are centred and scaled; what the model sees of them is shown below.")
        )
        with gr.Row():
            with gr.Column():
                label, drawing = gr.Textbox("A", label="Class", elem_id="class"), canvas("1. Draw an example", "teach")
                with gr.Row():
                    button = gr.Button("Add this example", variant="primary")
                    files = gr.UploadButton("Upload pictures of it", file_count="multiple", file_types=["image"])
                shown = "<div>Taught, as the model sees it</div><br>${value}"
                gallery = gr.HTML("", html_template=shown, css_template=FIGURES, elem_id="taught")
                forget = gr.Button("Forget all")
            with gr.Column():
                query = canvas("2. Draw one that it has not seen", "ask")
                file = gr.UploadButton("Upload a picture", file_types=["image"])
                answer, steps = _answers(gr)
        button.click(add, [taught, label, drawing], [taught, gallery, drawing])
        files.upload(upload, [taught, label, files], [taught, gallery])
        forget.click(lambda: ([], ""), None, [taught, gallery])
        gr.on([query.input, taught.change], ask, [taught, query], [answer, steps], trigger_mode="always_last")
        file.upload(ask_file, [taught, file], [answer, steps])
    return blocks


def _texts(gr: Any, learner: FewShotLearner, name: str) -> Any:
    def add(taught: list[Taught], label: str, text: str) -> tuple[Any, ...]:
        return (*_added(gr, learner, taught, [text], label), "")

    def ask(taught: list[Taught], text: str) -> tuple[Any, ...]:
        return _answer(gr, learner, taught, text.strip() or None)

    with gr.Blocks(title=f"metadist: {name}", analytics_enabled=False) as blocks:
        taught = gr.State([])
        gr.Markdown(_heading(learner, name, ""))
        with gr.Row():
            with gr.Column():
                label = gr.Textbox("A", label="Class", elem_id="class")
                text = gr.Textbox(label="1. Type an example", elem_id="teach")
                button = gr.Button("Add this example", variant="primary")
                table = gr.Dataframe(headers=["text", "class"], label="Taught", interactive=False, elem_id="taught")
                forget = gr.Button("Forget all")
            with gr.Column():
                query = gr.Textbox(label="2. Type one that it has not seen", elem_id="ask")
                answer, steps = _answers(gr)
        gr.on([button.click, text.submit], add, [taught, label, text], [taught, table, text])
        forget.click(lambda: ([], []), None, [taught, table])
        gr.on([query.change, taught.change], ask, [taught, query], [answer, steps], trigger_mode="always_last")
    return blocks


def _heading(learner: FewShotLearner, name: str, more: str) -> str:
    ways = "" if learner.engine.learner.any_ways else f" of at most {learner.shapes.outputs} classes"
    return (
        f"# {name}\nTeach it a few examples{ways}, then ask. It was not trained on these: it adapts ({learner.name}) "
        f"when you ask. {more}"
    )


def _answers(gr: Any) -> tuple[Any, Any]:
    label = gr.Label(label="It says", num_top_classes=5, elem_id="answer")
    shown = "<div>While it adapts, step by step</div><br>${value}"
    steps = gr.HTML("", html_template=shown, css_template=STEPS, elem_id="steps")
    return label, steps


def _added(
    gr: Any, learner: FewShotLearner, taught: list[Taught], examples: Sequence[Any], label: str
) -> tuple[Any, ...]:
    """The examples taught with these, and how they are shown."""
    if not label.strip():
        raise gr.Error("Name the class first.")
    more = [*taught, *(Taught(example, label.strip()) for example in examples)]
    try:
        learner.inputs([each.example for each in more])
        if len({each.label for each in more}) > 1:
            learner.adapt([each.example for each in more], [each.label for each in more])
        if learner.inputs.about.texts:
            return more, [list(each) for each in more]
        return more, _figures(learner, more)
    except (InputError, Diverged) as error:
        raise gr.Error(f"{error}") from None


def _answer(gr: Any, learner: FewShotLearner, taught: Sequence[Taught], asked: Any) -> tuple[Any, str]:
    """What the page shows for `asked`: {class: probability}, and a table of them after each inner step."""
    if asked is None or len({each.label for each in taught}) < 2:
        return None, ""
    try:
        classes, shares = course(learner, taught, asked)
    except (InputError, Diverged) as error:
        raise gr.Error(f"{error}") from None
    head = "".join(f"<th>{html.escape(name)}</th>" for name in classes)
    rows = [f"<tr><td>{k}</td>{''.join(map(CELL.format, row, row))}</tr>" for k, row in enumerate(shares)]
    table = f"<table><tr><th>inner steps</th>{head}</tr>{''.join(rows)}</table>"
    return dict(zip(classes, map(float, shares[-1]), strict=True)), table


def serve(learner: FewShotLearner, name: str, port: int | None, browser: bool, say: Callable[[str], None]) -> None:
    """Serve the page on this machine's loopback until interrupted, without a network. Raises InputError as `page`."""
    blocks = page(learner, name)
    fonts = _gradio().themes.Default(font="sans-serif", font_mono="monospace")  # others are fetched from elsewhere
    try:
        _, address, _ = blocks.launch(
            server_name="127.0.0.1", server_port=port, inbrowser=browser, share=False, footer_links=[],
            ssr_mode=False, theme=fonts, quiet=True, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError:
        raise InputError(f"port {port} of this machine is taken: choose another --port, or leave it out") from None
    say(f"{name} is at {address} (Ctrl-C ends it)")
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
