"""Places that a job names as a local path or a URI (`file://`, `s3://`, `gs://`, ... through pyarrow.fs)."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs, quote

from pyarrow import ArrowException, fs

from metadist.core.errors import InputError
from metadist.core.files import is_uri, reason

BLOCK_BYTES = 1 << 23
_AS_IT_IS = ":/@%+,;=&$!'()*~[]"  # in a URI; what else is no letter, digit, "-", "." or "_" is percent-encoded
_QUICK_S, _QUICK_TRIES = 3.0, 2  # of a first look
_PATIENT_S, _PATIENT_TRIES = 20.0, 4
_REMEDIES = {
    r"NO_SUCH_BUCKET|Bucket '.*' not found|bucket.*NOT_FOUND": "make the bucket, or correct its name",
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|EXPIRED|TOKEN|PERMISSION_DENIED|UNAUTHENTICATED|OAuth|status 40[13]":
    "give credentials that may use it (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS, "
    "in the environment of every node)",
    r"NETWORK_CONNECTION|UNAVAILABLE|curl|HTTP status 5": "check that the server runs and answers from here, and "
    "endpoint_override, scheme and region in the URI",
    r"No space left|[Qq]uota": "make room there, or in the cache (METADIST_CACHE)",
    r"No such file|does not exist": "correct the path",
}  # fmt: skip


def open_location(location: str, *, quick: bool = False) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or URI, and the path in it. Raises InputError where it is no such place.

    `quick`: for a first look; a server that does not answer is given up after a few seconds rather than a minute.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), os.path.abspath(location)
    base, mark, options = location.partition("?")
    try:
        return _opened(f"{quote(base, safe=_AS_IT_IS)}{mark}{options}", quick)
    except ValueError as error:
        raise InputError(f"{location} is no path or URI of files ({reason(error)}): correct it") from error


@lru_cache(maxsize=256)
def _opened(uri: str, quick: bool) -> tuple[fs.FileSystem, str]:
    base, _, options = uri.partition("?")
    scheme, _, path = base.partition("://")
    known, added = parse_qs(options).keys(), []
    if scheme == "s3" and not known & {"region", "endpoint_override"}:
        added = [f"region={_region(path.rpartition('@')[2].partition('/')[0])}"]
    elif scheme in ("gs", "gcs") and "retry_limit_seconds" not in known:
        added = [f"retry_limit_seconds={_QUICK_S if quick else 3 * _PATIENT_S:g}"]
    options = "&".join([*filter(None, [options]), *added])
    found, root = fs.FileSystem.from_uri(f"{base}?{options}" if options else base)
    if isinstance(found, fs.S3FileSystem):
        limit, tries = (_QUICK_S, _QUICK_TRIES) if quick else (_PATIENT_S, _PATIENT_TRIES)
        _, (settings,) = found.__reduce__()  # a URI cannot say how long to wait
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=tries)
        limits = {"connect_timeout": _QUICK_S, "request_timeout": limit, "retry_strategy": retries}
        found = fs.S3FileSystem(**{**settings, **limits, "region": found.region})
    return found, root.rstrip("/")


@lru_cache
def _region(bucket: str) -> str:
    """As the environment says, else as the object store does, which takes a request."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or fs.resolve_s3_region(bucket)


def local_folder(location: str) -> Path | None:
    """The folder on this machine's file systems that a location is, or None."""
    if is_uri(location) and not location.startswith("file:"):
        return None
    return Path(open_location(location)[1])


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Turns what a file system says meanwhile into an InputError that begins with `what`, such as
    `data.path=s3://bucket/digits`, and ends with the remedy."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ArrowException) as error:
        said = reason(error)
        remedy = next((text for kind, text in _REMEDIES.items() if re.search(kind, said)), "correct it")
        raise InputError(f"{what} cannot be used ({said}): {remedy}") from error


def listed(what: str, location: str) -> list[fs.FileInfo]:
    """What lies directly in a place, which need not be there; so that it is known within seconds whether it can be
    reached. Raises InputError that begins with `what` where it cannot, or its bucket is not there."""
    with reaching(what):
        found, root = open_location(location, quick=True)
        try:
            return found.get_file_info(fs.FileSelector(root))
        except FileNotFoundError:
            return []


def make_folder(files: fs.FileSystem, path: str) -> None:
    """Where a file system has folders; a bucket must be there."""
    if files.type_name not in ("s3", "gcs"):
        files.create_dir(path, recursive=True)


def read(files: fs.FileSystem, path: str) -> bytes:
    with files.open_input_stream(path) as stream:
        return stream.read()


def write(files: fs.FileSystem, path: str, content: bytes) -> None:
    with files.open_output_stream(path) as stream:
        stream.write(content)


def put(files: fs.FileSystem, path: str, source: Path, num_bytes: int) -> None:
    """Writes the first bytes of a local file to a place, where it appears whole."""
    local = isinstance(files, fs.LocalFileSystem)
    aside = f"{path}.{os.getpid()}.tmp" if local else path  # elsewhere a file appears when it is closed
    make_folder(files, os.path.dirname(path))
    with source.open("rb") as file, files.open_output_stream(aside) as stream:
        while num_bytes > 0 and (block := file.read(min(BLOCK_BYTES, num_bytes))):
            stream.write(block)
            num_bytes -= len(block)
    if local:
        files.move(aside, path)
