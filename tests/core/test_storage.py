"""Names of places, and what is said where one cannot be used."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow import fs

from metadist.core.errors import InputError
from metadist.core.files import bare, is_uri, join
from metadist.core.storage import listed, local_folder, open_location, put, read

S3 = "region=us-east-1&scheme=http&endpoint_override=localhost:9"


@pytest.mark.parametrize(("place", "child", "name"), [
    ("s3://bucket/runs/?region=x&scheme=http", "s3://bucket/runs/a?region=x&scheme=http", "s3://bucket/runs"),
    ("s3://bucket?region=x", "s3://bucket/a?region=x", "s3://bucket"),
    ("s3://key:se%2Fcret@bucket/runs", "s3://key:se%2Fcret@bucket/runs/a", "s3://bucket/runs"),
    ("s3://key:se/cret@bucket/runs", "s3://key:se/cret@bucket/runs/a", "s3://bucket/runs"),
    ("gs://anonymous@bucket/x", "gs://anonymous@bucket/x/a", "gs://bucket/x"),
    ("abfs://box@account/x", "abfs://box@account/x/a", "abfs://box@account/x"),
    ("file:///runs/one two/", "file:///runs/one two/a", "file:///runs/one two"),
    ("/runs/one", "/runs/one/a", "/runs/one"),
])  # fmt: skip
def test_the_options_of_a_uri_survive_joining_and_its_secrets_do_not_reach_its_name(place, child, name):
    assert join(place, "a") == child
    assert bare(place) == name
    assert is_uri(place) == ("://" in place)


@pytest.mark.parametrize(("uri", "root"), [
    (f"s3://bucket/a b/é#1/?{S3}", "bucket/a b/é#1"), (f"s3://bucket/a%20b/%C3%A9?{S3}", "bucket/a b/é"),
    (f"s3://bucket?{S3}", "bucket"), (f"s3://bucket/?{S3}", "bucket"), ("file:///tmp/a b/", "/tmp/a b"),
    ("gs://anonymous@bucket/x/", "bucket/x"),
])  # fmt: skip
def test_keys_may_hold_spaces_and_any_letters(uri, root):
    assert open_location(uri)[1] == root


def test_keys_and_options_of_a_uri_are_used():
    found = open_location(f"s3://ke%2Fy:se%2Fcret@bucket/x?{S3}")[0]
    settings = found.__reduce__()[1][0]
    assert (settings["access_key"], settings["secret_key"]) == ("ke/y", "se/cret")
    assert (settings["endpoint_override"], settings["scheme"], settings["region"]) == (
        "localhost:9", "http", "us-east-1",
    )  # fmt: skip


def test_a_file_uri_is_a_folder_of_this_machine(tmp_path):
    assert local_folder((tmp_path / "a b").as_uri()) == tmp_path / "a b"
    assert local_folder(str(tmp_path)) == tmp_path
    assert local_folder(f"s3://bucket/x?{S3}") is None


@pytest.mark.parametrize("uri", ["s4://bucket/x", "file://runs/x", "s3:///x", "s3://key:se/cret@bucket/x?region=x"])
def test_what_is_no_place_is_refused_without_its_secret(uri):
    with pytest.raises(InputError) as raised:
        open_location(uri)
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize("where", ["file", "s3"])
def test_a_part_of_a_file_appears_whole(tmp_path, request, where):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 40_000)  # more than a block
    place = (tmp_path / "there é").as_uri() if where == "file" else request.getfixturevalue("s3")("core/there é")
    files, root = open_location(place)
    put(files, f"{root}/deep/name", source, 9_000_001)
    assert read(files, f"{root}/deep/name") == source.read_bytes()[:9_000_001]
    assert [info.base_name for info in files.get_file_info(fs.FileSelector(f"{root}/deep"))] == ["name"]


@contextmanager
def server_saying(code: int, text: str) -> Iterator[str]:
    """Options of a server that answers every request so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"<Error><Code>{text}</Code><Message>no</Message></Error>".encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"endpoint_override=127.0.0.1:{server.server_address[1]}&scheme=http&region=us-east-1"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent_server() -> Iterator[str]:
    """Options of one that takes a connection, and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        yield f"endpoint_override=127.0.0.1:{listener.getsockname()[1]}&scheme=http&region=us-east-1"


@contextmanager
def no_server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@pytest.mark.parametrize(("server", "remedy"), [
    pytest.param(lambda: server_saying(403, "InvalidAccessKeyId"), "AWS_ACCESS_KEY_ID", id="wrong key"),
    pytest.param(lambda: server_saying(403, "SignatureDoesNotMatch"), "AWS_SECRET_ACCESS_KEY", id="wrong secret"),
    pytest.param(lambda: server_saying(404, "NoSuchBucket"), "bucket", id="no bucket"),
    pytest.param(no_server, "endpoint_override", id="nobody listens"),
    pytest.param(silent_server, "endpoint_override", id="no answer", marks=pytest.mark.wide),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence_within_ten_seconds(server, remedy):
    with server() as options:
        uri, began = f"s3://key:hunter2@bucket/digits?{options}", time.monotonic()
        with pytest.raises(InputError, match=remedy) as raised:
            listed(f"data.path={uri}", uri)
        assert time.monotonic() - began < 10
    assert str(raised.value).startswith("data.path=s3://***@bucket/digits") and "\n" not in str(raised.value)


def test_a_place_that_is_not_there_yet_has_no_files(tmp_path, s3):
    assert listed("x", (tmp_path / "none").as_uri()) == listed("x", s3("core/none")) == []
    assert Path(tmp_path, "none").exists() is False
