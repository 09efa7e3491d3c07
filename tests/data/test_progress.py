from metadist.data.progress import RowProgress


def test_a_log_gets_a_line_at_the_end_and_few_before(capsys):
    progress = RowProgress("letters")
    for done in range(1, 101):
        progress(done, 100)
    assert capsys.readouterr().err == "letters: 100 of 100 rows\n"


def test_what_is_soon_done_is_not_shown(capsys):
    progress = RowProgress("letters", after_s=60)
    progress(100, 100)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("metadist.data.progress.REDRAW_S", 0)
    progress = RowProgress("letters")
    progress(50, 100)
    progress(100, 100)
    half, whole = capsys.readouterr().err.removeprefix("\r").split("\r")
    assert half == f"[{'#' * 10}{'.' * 10}] letters: 50 of 100 rows\x1b[K"  # to its end
    assert whole == f"[{'#' * 20}] letters: 100 of 100 rows\x1b[K\n"


def test_of_less_than_a_unit_the_bar_is_empty(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    RowProgress("omniglot")(0, 0, "MB of omniglot.zip")
    assert capsys.readouterr().err == f"\r[{'.' * 20}] omniglot: 0 of 0 MB of omniglot.zip\x1b[K\n"
