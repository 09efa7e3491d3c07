"""Whether a Ray cluster can be joined: its address, token and versions. A refusal is a sentence within ten seconds."""

import json
import os
import platform
import socket
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from metadist.core.errors import InputError
from metadist.core.files import reason

REACH_S, HELLO_S = 3.0, 5.0


def use_token() -> None:
    """Authenticate by token where the user has one and has not decided otherwise: Ray itself would not, except for a
    cluster on this machine."""
    has_one = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if "RAY_AUTH_MODE" not in os.environ and (has_one or (Path.home() / ".ray" / "auth_token").exists()):
        os.environ["RAY_AUTH_MODE"] = "token"
        read_environment()


def check_head(address: str) -> None:
    """Raises InputError, within ten seconds, where no head of a Ray cluster answers at host:port, does not accept our
    token, or runs another Ray or Python; Ray itself takes two minutes to find out."""
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdigit():
        raise InputError(
            f"{address} is no address of a Ray cluster's head: give host:port, such as ray-head:6379 "
            "(`metadist submit` takes the job server's http://...)"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise InputError(
            f"nothing answers at {address} ({reason(error)}): start Ray there, open the port, or correct the address"
        ) from None
    request: Any = gcs_service_pb2.InternalKVGetRequest  # pyright: ignore[reportAttributeAccessIssue]
    try:
        head = gcs_service_pb2_grpc.InternalKVGcsServiceStub(init_grpc_channel(address))
        # a GcsClient would try for 40 s, and abort the process on some answers
        answer = head.InternalKVGet(request(key=b"CLUSTER_METADATA", namespace=b"cluster"), timeout=HELLO_S)
    except (AuthenticationError, grpc.RpcError) as error:
        if isinstance(error, AuthenticationError) or error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise InputError(no_token(address)) from None
        problem = f"what answers at {address} is no head of a Ray cluster, or hangs ({error.code().name})"
        raise InputError(f"{problem}: correct the address") from None
    _check_versions(address, json.loads(answer.value or b"{}"))


def no_token(address: str) -> str:
    """The sentence for a cluster that wants a token, or another one."""
    asked = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    problem = f"{address} does not accept the token here" if asked else f"no token for {address}"
    if "RAY_AUTH_TOKEN" not in os.environ and (place := os.environ.get("RAY_AUTH_TOKEN_PATH")):
        try:
            Path(place).read_bytes()
        except OSError as error:
            there = f"there is no file {place}" if isinstance(error, FileNotFoundError) else f"{place}: {reason(error)}"
            problem = f"{address} wants a token, and RAY_AUTH_TOKEN_PATH names none ({there})"
    return (
        f"{problem}: copy the cluster's ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH; where cluster/local.sh started "
        'it, eval "$(cluster/local.sh env)"'
    )


def _check_versions(address: str, there: dict[str, str]) -> None:
    here = {"ray": ray.__version__, "python": platform.python_version()}
    other = {name: there.get(f"{name}_version", version) for name, version in here.items()}
    if other != here:
        theirs, ours = (f"ray {each['ray']}, python {each['python']}" for each in (other, here))
        raise InputError(f"{address} runs {theirs}; here {ours}: install equal versions")


def read_environment() -> None:
    """Have Ray, which remembers what it has read, read again how to authenticate."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
