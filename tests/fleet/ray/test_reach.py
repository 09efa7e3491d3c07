"""A cluster that cannot be joined is told in a sentence, within seconds. Its head is played by a server of gRPC."""

import json
import platform
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from metadist.core.errors import InputError
from metadist.fleet.ray import reach
from metadist.fleet.ray.reach import check_head

HERE = {"ray_version": ray.__version__, "python_version": platform.python_version()}


@contextmanager
def served(metadata: dict[str, str] | None) -> Iterator[str]:
    """Something that answers as a head does, to the question for its versions; None: only to those with a token."""

    class Head(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):
        def InternalKVGet(self, request, context):
            if metadata is None:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            assert (request.key, request.namespace) == (b"CLUSTER_METADATA", b"cluster")
            return gcs_service_pb2.InternalKVGetReply(value=json.dumps(metadata).encode())

    server = grpc.server(ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_a_head_of_the_same_versions_can_be_joined():
    with served(HERE) as address:
        check_head(address)


@pytest.mark.parametrize("name", HERE)
def test_other_versions_are_told_with_ours(name):
    with served({**HERE, name: "1.2.3"}) as address, pytest.raises(InputError) as raised:
        check_head(address)
    text = str(raised.value)
    assert address in text and "1.2.3" in text and HERE[name] in text and text.count(name.partition("_")[0]) >= 2


def test_a_head_that_wants_a_token_names_where_ours_is_looked_for():
    with served(None) as address, pytest.raises(InputError, match="RAY_AUTH_TOKEN_PATH"):
        check_head(address)


def test_of_a_cluster_that_wants_a_token_it_is_told_what_is_wrong_with_ours(tmp_path, monkeypatch):
    place = tmp_path / "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert reach.no_token("h:1").startswith("no token for h:1: ")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(place))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    missing = reach.no_token("h:1")
    assert f"(there is no file {place})" in missing and missing.endswith('eval "$(cluster/local.sh env)"')
    place.mkdir()
    assert f"({place}: Is a directory)" in reach.no_token("h:1")
    place.rmdir()
    place.write_text("another")
    assert reach.no_token("h:1").startswith("h:1 does not accept the token here: ")


def test_nothing_or_something_else_that_listens_is_told_soon(monkeypatch):
    monkeypatch.setattr(reach, "HELLO_S", 0.5)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(InputError, match=address):  # bound, and no connection is taken
            check_head(address)
        server.listen()
        with pytest.raises(InputError, match=address):  # taken, and never answered
            check_head(address)
        assert time.monotonic() - began < 5
    with pytest.raises(InputError, match="no-such-host.invalid"):
        check_head("no-such-host.invalid:6379")


@pytest.mark.parametrize(
    "address", ["http://localhost:8265", "ray://localhost:10001", "ray-head", ":6379", "head:port"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match="host:port"):
        check_head(address)


def test_a_token_that_is_there_is_used_unless_the_user_decided_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for mode, file, expected in ((None, False, None), (None, True, "token"), ("disabled", True, "disabled")):
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        if mode:
            monkeypatch.setenv("RAY_AUTH_MODE", mode)
        if file:
            (tmp_path / ".ray").mkdir(exist_ok=True)
            (tmp_path / ".ray" / "auth_token").write_text("secret")
        reach.use_token()
        assert reach.os.environ.get("RAY_AUTH_MODE") == expected
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    reach.read_environment()
