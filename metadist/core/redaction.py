"""Passwords, keys and tokens taken out of whatever is written, sent or said: `s3://***@bucket/runs?token=***`."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "***"
_WORDS = (
    r"pass(?:word|wd|phrase)?|pwd|secret|token|(?:api|access|secret|private|account)[_\-]?key|credentials?|"
    r"sig(?:nature)?|sas|auth"
)
_NAME = re.compile(rf"-*(?:.*[_\-.])?(?:{_WORDS})(?:_id)?", re.IGNORECASE)
_OF_PERSONS = re.compile(
    r"-*(?:.*[_\-.])?(?:pass(?:word|wd|phrase)|pwd|secret|(?:api|access|secret|private|account)[_\-]?key|credentials?|"
    r"(?:api|access|auth)[_\-]token)(?:_id)?",
    re.IGNORECASE,
)
_USERINFO = re.compile(
    r"(?P<scheme>\b[A-Za-z][\w+.\-]*:/{2,})"
    r"(?:(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)[^\s/?#'\"]*@"  # up to the last @ of the host's part
    r"|[^\s/@:'\"]*:(?!\d+[/?#\s])[^\s@'\"]*@)"  # or of a password that has a slash in it, which is no port
)
_IN_QUERY = re.compile(  # of an address: any name with such a word in it
    r"([?&;][\w.\-%]*(?:pass|pwd|secret|token|key|cred|sig|sas|auth)[\w.\-%]*=)[^\s&;'\"]+", re.IGNORECASE
)
_OPTION = re.compile(rf"((?<![\w.\-%?&;])-*(?:[\w.\-%]*[_\-.])?(?:{_WORDS})(?:_id)?=)[^\s&;'\"]+", re.IGNORECASE)
_IN_MAPPING = re.compile(rf"(\b(?:\w*_)?(?:{_WORDS})['\"]?\s*:\s*)[^,}}]+", re.IGNORECASE)


def redact(text: str) -> str:
    """The text without the user's part of addresses, and without values whose name says that they are secret."""
    if "=" in text:
        text = _OPTION.sub(rf"\1{MARK}", _IN_QUERY.sub(rf"\1{MARK}", text))
    return _USERINFO.sub(rf"\g<scheme>{MARK}@", text) if ":/" in text else text


def to_stderr(text: str) -> None:
    """Prints a line of progress, a note or an error, without the secrets in it; stdout is for results."""
    print(redact(text), file=sys.stderr)


def redacted(tree: Any) -> Any:
    """Plain values likewise; a text under a key such as `password` is one whole secret."""
    if isinstance(tree, Mapping):
        return {
            key: MARK if isinstance(value, str) and is_secret(str(key)) and value else redacted(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def redacted_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's sections likewise; in `model` and `learner` a `pad_token` or `signature` is no secret, but an
    option that the mathematics depends on."""
    return {
        section: _options(value) if section in ("model", "learner") else redacted({section: value})[section]
        for section, value in settings.items()
    }


def _options(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {
            key: MARK if isinstance(value, str) and value and _OF_PERSONS.fullmatch(str(key)) else _options(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [_options(value) for value in tree]
    return redact(tree) if isinstance(tree, str) and ":/" in tree else tree


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: `password`, `api_key`, `s3.secret_key`."""
    return _NAME.fullmatch(name) is not None


def is_redacted(text: str) -> bool:
    """Whether a secret was taken out of it, so that it cannot be used."""
    return text == MARK or f"{MARK}@" in text or f"={MARK}" in text


def command_line(arguments: Sequence[str]) -> str:
    """A command as a person would type it, quoted for a shell, without the secrets in it."""
    shown, before = [], ""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and is_secret(key):
            argument = f"{key}={MARK}"
        elif before.startswith("--") and "=" not in before and is_secret(before):
            argument = MARK
        elif value.startswith("{"):
            argument = f"{key}=" + _IN_MAPPING.sub(rf"\1{MARK}", value)
        before = argument
        shown.append(redact(argument))
    return shlex.join(shown)
