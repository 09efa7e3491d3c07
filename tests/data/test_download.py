"""The official files of data sets, from a server on this machine that is cut off, slow of memory, or wrong."""

import hashlib
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from metadist.core.errors import InputError
from metadist.data import download, open_dataset
from metadist.data.download import Archive, fetched
from tests.cli.command import run
from tests.data.importers import test_omniglot

small = test_omniglot.small

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Server(ThreadingHTTPServer):
    """Gives `files` by name; `cut` is after how many bytes each of the next answers breaks off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"birds.zip": CONTENT}
        self.cut: list[int] = []
        self.ranges = True
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content, begin = self.server.files[self.path[1:]], 0
        asked = self.headers.get("Range", "")
        self.server.asked.append(asked)
        if asked and self.server.ranges:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        end = begin + self.server.cut.pop(0) if self.server.cut else len(content)
        self.wfile.write(content[begin:end])

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "WAIT_S", 0.0)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,)).start()
        yield running
        running.shutdown()


def birds(server: Server, content: bytes = CONTENT) -> Archive:
    return Archive(f"{server.url}/birds.zip", len(content), hashlib.sha256(content).hexdigest())


def test_an_archive_is_fetched_once(server: Server, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    for _ in range(2):
        fetched([birds(server)], tmp_path / "new", lambda done, total, what="rows": told.append((done, total, what)))
    assert (tmp_path / "new" / "birds.zip").read_bytes() == CONTENT
    assert (
        server.asked == [""]
        and told[-1] == (3, 3, "MB of birds.zip")
        and [*(tmp_path / "new").iterdir()] == [tmp_path / "new" / "birds.zip"]
    )


@pytest.mark.parametrize("ranges", [True, False])
def test_what_breaks_off_goes_on_or_begins_again(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.cut, server.ranges = [1_500_000, 100], ranges
    fetched([birds(server)], tmp_path)
    assert (tmp_path / "birds.zip").read_bytes() == CONTENT
    assert server.asked[:2] == ["", "bytes=1500000-"] and len(server.asked) == 3


def test_what_stays_short_is_kept_for_the_next_time(server: Server, tmp_path: Path) -> None:
    server.cut = [2_000_000] + [0] * 50
    with pytest.raises(InputError, match="ended after 2,000,000 of 3,000,000 bytes .* type the command again"):
        fetched([birds(server)], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".birds.zip.part"]
    server.cut, server.asked = [], []
    fetched([birds(server)], tmp_path)
    assert server.asked == ["bytes=2000000-"] and (tmp_path / "birds.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"?", CONTENT + b"more"], ids=["changed", "longer"])
def test_another_file_is_refused_and_not_left(server: Server, tmp_path: Path, content: bytes) -> None:
    server.files["birds.zip"] = content
    with pytest.raises(InputError, match="another file than the official one"):
        fetched([birds(server)], tmp_path)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "birds.zip").write_bytes(content)
    with pytest.raises(InputError, match="is not the official birds.zip; move it away"):
        fetched([birds(server)], tmp_path)
    assert (tmp_path / "birds.zip").read_bytes() == content


def test_no_network_and_no_such_file_are_one_sentence(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:1/birds.zip", "https://nowhere.invalid/birds.zip"):
        with pytest.raises(InputError, match="there is no way from here to .* give the folder .* as --source"):
            fetched([Archive(url, 3, "0" * 64)], tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        fetched([Archive("http://127.0.0.1:1/birds.zip", 3, "0" * 64)], tmp_path / "file")


def test_omniglot_is_downloaded_and_imported(
    server: Server,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.make_archive(str(tmp_path / "images_evaluation"), "zip", small, "images_evaluation")
    server.files = {
        "images_background.zip": (small / "images_background.zip").read_bytes(),
        "images_evaluation.zip": (tmp_path / "images_evaluation.zip").read_bytes(),
    }
    archives = [Archive(f"{server.url}/{n}", len(c), hashlib.sha256(c).hexdigest()) for n, c in server.files.items()]
    monkeypatch.setattr(sys.modules["metadist.data.importers.omniglot"], "ARCHIVES", archives)
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    done = run("data", "omniglot", "--download", "--out", "set", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(len(table.group_names) for table in open_dataset(tmp_path / "set").splits.values()) == 1623
    assert len([*(tmp_path / "cache" / "downloads" / "omniglot").iterdir()]) == 2
    again = run("data", "omniglot", "--download", "--out", "set", "--overwrite", cwd=tmp_path)
    assert again.returncode == 0 and len(server.asked) == 2
    neither = run("data", "omniglot", "--out", "other", cwd=tmp_path)
    assert neither.returncode == 2 and "--source" in neither.stderr and "--download" in neither.stderr
