import errno
import io
import itertools
import math
import re
import sys
from types import SimpleNamespace

import pytest

from metadist.tracking.console import ConsoleTracker


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    now = [100.0]
    monkeypatch.setattr("metadist.tracking.console.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_the_line_says_all_that_is_known(clock):
    stream = io.StringIO()
    console = ConsoleTracker(6000, stream)
    console.metrics({"validation/accuracy": 0.943}, step=1100)
    clock[0] += 10
    console.metrics(
        {"train/loss": 0.8123, "validation/accuracy": 0.941, "workers/tasks_per_s": 212.4, "workers/alive": 2.0},
        step=1200,
    )
    assert stream.getvalue().splitlines()[-1] == (
        "step 1200/6000 20.0% | loss 0.8123 | validation 94.1% (best 94.3% @1100) | 212 tasks/s | 2 workers | ETA 8m"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_the_figures_of_the_best_step_do_not_take_the_line_back_to_it(clock, terminal):
    stream = Terminal() if terminal else io.StringIO()
    console = ConsoleTracker(400, stream)
    for step in (375, 400):
        console.metrics({"train/loss": 1.0}, step)
        clock[0] += 10
    console.metrics({"test/accuracy": 0.9}, step=375)
    console.finish("FINISHED")
    assert screen(stream)[-2] == "step 400/400 100.0% | loss 1"
    assert stream.getvalue().count("375/400") == 1


def test_what_is_absent_is_left_out(clock):
    stream = io.StringIO()
    ConsoleTracker(10, stream).metrics({"other": 1.0}, step=1)
    assert stream.getvalue() == "step 1/10 10.0%\n"


def test_the_best_of_a_loss_is_the_smallest(clock):
    stream = io.StringIO()
    console = ConsoleTracker(10, stream, every_s=0)
    for step, loss in enumerate([0.5, 0.25, 0.75], start=1):
        console.metrics({"validation/loss": loss, "workers/alive": 1}, step)
    assert "validation loss 0.75 (best 0.25 @2) | 1 worker |" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(9, "9s"), (600, "10m"), (5400, "1h30m"), (90000, "1d01h"), (3599, "60m")]
)
def test_the_remaining_time_is_readable(clock, seconds, text):
    stream = io.StringIO()
    console = ConsoleTracker(2, stream, every_s=0)
    console.metrics({}, step=0)
    clock[0] += seconds
    console.metrics({}, step=1)
    assert stream.getvalue().endswith(f"ETA {text}\n")


def test_a_pipe_gets_a_plain_line_every_few_seconds(clock):
    stream = io.StringIO()
    console = ConsoleTracker(1000, stream, every_s=5)
    for step in range(101):
        console.metrics({"train/loss": 1.0}, step)
        clock[0] += 0.125
    console.finish("FINISHED")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0/1000", "40/1000", "80/1000", "100/1000"]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


BAR = re.compile("^[━╸╺ ]{6,20} ")


def screen(stream):
    """The lines that a terminal shows after what was written to it, without bars."""
    lines = [""]
    for part in re.findall(r"\x1b\[\??\d*[a-zA-Z]|[^\x1b]", stream.getvalue()):
        if part == "\n":
            lines.append("")
        elif part in ("\r", "\x1b[2K"):
            lines[-1] = ""
        elif not part.startswith("\x1b"):
            lines[-1] += part
    return [BAR.sub("", line).rstrip() for line in lines]


def test_a_terminal_gets_one_line_that_fits_and_is_covered(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    console = ConsoleTracker(1000, stream)
    console.metrics({"train/loss": 0.123456, "workers/tasks_per_s": 99.0}, step=1)
    (line,) = screen(stream)
    assert line.startswith("step 1/1000 0.1% | loss 0.12") and len(line) <= 30
    clock[0] += 1
    console.metrics({"train/loss": 0.2}, step=2)
    console.finish("FINISHED")
    line, end = screen(stream)
    assert line.startswith("step 2/1000 0.2% | loss 0.2 |") and len(line) <= 30 and not end
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is there again


def test_the_live_line_is_redrawn_at_most_ten_times_a_second(clock):
    stream = Terminal()
    console = ConsoleTracker(1000, stream)
    for step in range(100):
        console.metrics({}, step)
        clock[0] += 0.001
    assert stream.getvalue().count("step") == 1
    console.finish("FINISHED")


def test_what_is_said_or_printed_does_not_break_the_live_line(clock):
    stream = Terminal()
    console = ConsoleTracker(10, stream)
    console.say("before")
    console.metrics({}, step=1)
    long = ", ".join(["a [red] worker of http://***@h died"] * 5)
    console.say(long.replace("***", "u:p"))
    print("a warning of another library", file=sys.stderr)
    assert screen(stream) == ["before", long, "a warning of another library", "step 1/10 10.0%"]
    console.finish("FINISHED")
    console.say("after")
    assert screen(stream) == ["before", long, "a warning of another library", "step 1/10 10.0%", "after", ""]


def test_a_dumb_terminal_gets_plain_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    ConsoleTracker(10, stream).metrics({}, step=1)
    assert stream.getvalue() == "step 1/10 10.0%\n"


def test_quiet_leaves_the_sentences(clock):
    stream = io.StringIO()
    console = ConsoleTracker(10, stream, quiet=True)
    console.metrics({}, step=1)
    console.say("a worker died")
    console.finish("FINISHED")
    assert stream.getvalue() == "a worker died\n"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_terminal_that_is_gone_or_a_full_disk_does_not_end_the_run(kind, clock):
    class Gone(kind):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    tracker = ConsoleTracker(10, stream=Gone())
    tracker.say("nobody reads this")
    tracker.metrics({"train/loss": 1.0}, step=1)
    tracker.finish("FINISHED")


def test_a_validation_that_is_not_a_number_is_never_the_best(clock):
    stream = io.StringIO()
    console = ConsoleTracker(10, stream, every_s=0)
    for step, accuracy in enumerate([math.nan, 0.5, math.nan, 0.25]):
        console.metrics({"validation/accuracy": accuracy}, step + 1)
        clock[0] += 1
    shown = [line.split(" | ")[1] for line in stream.getvalue().splitlines()]
    assert shown[0] == "validation nan%" and shown[1] == "validation 50.0% (best 50.0% @2)"
    assert shown[3] == "validation 25.0% (best 50.0% @2)"


def test_an_earlier_best_is_remembered_after_a_resume(clock):
    stream = io.StringIO()
    console = ConsoleTracker(10, stream, every_s=0)
    for step, accuracy in ((2, math.nan), (4, 0.75), (6, 0.5)):
        console.remember({"validation/accuracy": accuracy, "step": step}, step)
    console.metrics({"validation/accuracy": 0.6}, 8)
    assert "validation 60.0% (best 75.0% @4)" in stream.getvalue()


def test_progress_is_shown_before_what_is_said_after_it_and_never_again(clock):
    stream = io.StringIO()
    console = ConsoleTracker(10, stream, every_s=5)
    for step in range(1, 11):
        console.metrics({"train/loss": 1.0}, step)
        clock[0] += 0.1
    console.say("evaluating 5 tasks")
    clock[0] += 60
    console.metrics({"test/accuracy": 0.5}, 10)
    console.say("done with http://u:hunter2@h")
    console.finish("FINISHED")
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["step", "step", "evaluating", "done"]
    assert lines[1].startswith("step 10/10") and lines[3] == "done with http://***@h"


def test_what_else_takes_long_is_shown_in_the_place_of_steps(clock):
    stream = io.StringIO()
    console = ConsoleTracker(10, stream, every_s=5)
    console.metrics({"train/loss": 1.0}, 10)
    console.say("evaluating 600 tasks")
    for done in (100, 200, 300, 600):
        console.doing("evaluated tasks", done, 600)
        clock[0] += 4
    console.doing("tasks trained from scratch", 50, 100)  # over within five seconds: nothing is shown
    clock[0] += 2
    console.doing("tasks trained from scratch", 100, 100)
    console.finish("FINISHED")
    assert stream.getvalue().splitlines()[2:] == ["300 of 600 evaluated tasks | ETA 8s"]


def test_a_phase_that_begins_again_is_timed_anew(clock):
    stream = Terminal()
    console = ConsoleTracker(10, stream)
    console.doing("validation tasks", 2, 4)
    clock[0] += 100
    console.doing("validation tasks", 1, 4)
    clock[0] += 2
    console.doing("validation tasks", 2, 4)
    assert screen(stream)[-1] == "2 of 4 validation tasks | ETA 2s"


def test_a_terminal_shows_a_bar_where_there_is_room_and_the_steps_again_at_the_end(clock, monkeypatch):
    stream = Terminal()
    console = ConsoleTracker(4, stream)
    console.metrics({}, step=2)
    console.doing("evaluated tasks", 30, 40)
    clock[0] += 1
    console.doing("evaluated tasks", 40, 40)
    console.finish("FINISHED")
    bars = re.findall(r"([━╸╺]*) *(step|30 of|40 of)", stream.getvalue())
    shown = [each for each, _ in itertools.groupby((len(bar), word) for bar, word in bars)]
    assert shown == [(10, "step"), (15, "30 of"), (20, "40 of"), (10, "step")]
    monkeypatch.setenv("COLUMNS", "20")
    narrow = Terminal()
    ConsoleTracker(4, narrow).metrics({}, step=2)
    assert "━" not in narrow.getvalue() and "step 2/4 50.0%" in narrow.getvalue()


def test_quiet_shows_nothing_of_what_takes_long(clock):
    stream = io.StringIO()
    console = ConsoleTracker(10, stream, every_s=0, quiet=True)
    for done in range(5):
        console.doing("evaluated tasks", done, 5)
    assert stream.getvalue() == ""
