"""YAML from anyone: plain values only, no key twice, nothing that grows beyond measure when it is read."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

MOST_NODES, DEEPEST = 100_000, 50  # of values, with every alias counted as what it stands for


_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 that reads 1e-3 as the number everyone means, and no numbers of base sixty (1:59:59) or dates."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and _SIXTIES.fullmatch(value)
        return "tag:yaml.org,2002:str" if number or tag == "tag:yaml.org,2002:timestamp" else tag


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Yaml` would read as numbers."""


for _kind in (_Yaml, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def parse_yaml(text: str) -> Any:
    """The one document in `text`. Raises ValueError, in words, for whatever is no plain YAML of reasonable size."""
    loader = None
    try:
        loader = _Yaml(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}, 0) > MOST_NODES:
            raise ValueError(f"its aliases stand for more than {MOST_NODES} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(tree: Any) -> str:
    """YAML that `parse_yaml` reads back as the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def commented(tree: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """YAML of settings and of sections of them, a line each, with a comment behind those that `comments` has one for,
    by dotted key."""
    return "".join(_commented(tree, comments, ""))


def _commented(tree: Mapping[str, Any], comments: Mapping[str, str], section: str) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and not section:
            yield f"{key}:\n"
            yield from _commented(value, comments, f"{key}.")
            continue
        if isinstance(value, Mapping | list):
            text = f"{key}: {yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10**6)}"
        else:
            text = yaml.dump({key: value}, Dumper=_Dumper, width=10**6)
        comment = comments.get(section + key)
        if comment and text.count("\n") == 1:
            text = f"{text.rstrip()}  # {comment}\n"
        yield text if not section else "".join(f"  {line}" for line in text.splitlines(keepends=True))


def _size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for; a mapping may not have a key twice."""
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    if id(node) in known:
        return known[id(node)]
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise ValueError(f"it has the key {key!r} {count} times")
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[id(node)] = 1 + sum(_size(part, known, depth + 1) for part in inner)
    return known[id(node)]
