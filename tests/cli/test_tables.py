import re

from metadist.cli.tables import table

ROWS = [{"run": "a", "accuracy": "9.00 %"}, {"run": "longer", "accuracy": "10.00 %"}]


def test_columns_are_aligned_and_plain_where_stdout_is_no_terminal(monkeypatch):
    assert table(ROWS).splitlines() == ["run     accuracy", "a         9.00 %", "longer   10.00 %"]
    assert table(ROWS, left=0).splitlines()[1] == "     a    9.00 %"


def test_a_terminal_shows_the_same_cells_drawn(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    drawn = re.sub(r"\x1b\[[\d;]*m", "", table([*ROWS, {"run": "[red]x", "accuracy": ""}]))
    assert "────" in drawn
    assert [line.split() for line in drawn.splitlines() if "─" not in line and line.strip()] == [
        ["run", "accuracy"], ["a", "9.00", "%"], ["longer", "10.00", "%"], ["[red]x"],
    ]  # fmt: skip
