"""The structure of a Python package in figures: floors, arrows, circles, sizes. `structure.py PACKAGE_FOLDER [...]`.

Rooms are the folders directly in the package, and a file there is a room of its own. A room stands one floor above the
highest that it imports from; rooms that import each other in a circle share a floor. An arrow is a pair of rooms (or
files) of which one imports the other, at any place in it, under TYPE_CHECKING too; `up` are arrows that break the order
in which rooms are written down here (--order core,data,...), where one is given.
"""

import argparse
import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median, quantiles

Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name within the package -> file, without those in folders named tests."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if "tests" not in parts and "test" not in parts:
            found[".".join(parts).removesuffix(".__init__").removesuffix("__init__")] = path
    return found


def imports(package: Path) -> Graph:
    """Of each module, the modules of the package that it imports."""
    known, graph = modules(package), {}
    for name, path in known.items():
        own = name.split(".") if name else []
        here = own if path.name == "__init__.py" else own[:-1]
        graph[name] = {
            found
            for node in ast.walk(ast.parse(path.read_text(errors="replace")))
            for wanted in _named(node, package.name, here)
            if (found := _nearest(wanted, known)) not in (None, name, "")
        }
    return graph


def _named(node: ast.AST, package: str, here: list[str]) -> Iterable[list[str]]:
    """Dotted names within the package that an import statement names."""
    if isinstance(node, ast.Import):
        dotted = [alias.name.split(".") for alias in node.names]
        return [parts[1:] for parts in dotted if parts[0] == package]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = (node.module or "").split(".") if node.module else []
    if node.level:
        base = here[: len(here) - node.level + 1] + base
    elif base[:1] == [package]:
        base = base[1:]
    else:
        return []
    return [[*base, alias.name] for alias in node.names]


def _nearest(parts: list[str], known: Mapping[str, Path]) -> str | None:
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in known:
            return ".".join(parts[:length])
    return None


def of_rooms(graph: Graph) -> Graph:
    """Arrows between rooms; the package's own `__init__` and `__main__` are none."""
    rooms: Graph = defaultdict(set)
    for name, others in graph.items():
        room = name.partition(".")[0]
        if room not in ("", "__main__"):
            rooms[room] |= {other.partition(".")[0] for other in others} - {room, "__main__"}
    return dict(rooms)


def circles(graph: Graph) -> list[set[str]]:
    """Groups of more than one node that import each other (strongly connected components)."""
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach.get(other, ())) for name in graph}
    return [set(group) for group in groups if len(group) > 1]


def _reachable(graph: Graph, start: str) -> set[str]:
    found, todo = set(), [start]
    while todo:
        for other in graph.get(todo.pop(), ()):
            if other not in found:
                found.add(other)
                todo.append(other)
    return found


def floors(graph: Graph) -> dict[str, int]:
    """The floor of each node, from 1."""
    group = {name: frozenset(own) for own in circles(graph) for name in own}
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        own = group.get(name, frozenset([name]))
        if name not in found:
            below = {other for each in own for other in graph.get(each, ())} - own
            height = 1 + max((floor(other) for other in below), default=0)
            found.update(dict.fromkeys(own, height))
        return found[name]

    for name in graph:
        floor(name)
    return found


def function_lengths(files: Iterable[Path]) -> list[int]:
    """Lines of every function and method, nested ones too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    trees = (ast.parse(path.read_text(errors="replace")) for path in files)
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds))
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes]


def report(package: Path, order: list[str]) -> list[tuple[str, str]]:
    """Rows of the table."""
    files, graph = modules(package), imports(package)
    rooms, sizes = of_rooms(graph), {name: len(path.read_text().splitlines()) for name, path in files.items()}
    lengths, wide = function_lengths(files.values()), sorted((len(others) for others in graph.values()), reverse=True)
    up = [(a, b) for a, others in rooms.items() for b in others if a in order and b in order
          and order.index(b) > order.index(a)]  # fmt: skip
    lines: dict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        lines[name.partition(".")[0] or "__init__"] += size
    busiest = sorted(lines.items(), key=lambda pair: -pair[1])
    return [
        ("files, lines", f"{len(files)}, {sum(sizes.values())}"),
        ("rooms, floors of rooms", f"{len(rooms)}, {max(floors(rooms).values())}"),
        ("arrows between rooms, up, circles", f"{sum(map(len, rooms.values()))}, {len(up)}, {len(circles(rooms))}"),
        ("floors of files, arrows, circles", f"{max(floors(graph).values())}, {sum(wide)}, {len(circles(graph))}"),
        ("lines of the largest rooms", ", ".join(f"{name} {size}" for name, size in busiest[:14])),
        ("longest file", str(max(sizes.values()))),
        ("functions: median, p90, longest", f"{median(lengths):g}, {quantiles(lengths, n=10)[8]:.0f}, {max(lengths)}"),
        ("most imports of a module; modules above 12", f"{wide[0]}; {sum(count > 12 for count in wide)}"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--order", default="", help="rooms from the ground up")
    given = parser.parse_args()
    for each in given.packages:
        print(each.resolve().name)
        for label, figures in report(each.resolve(), given.order.split(",")):
            print(f"  {label:45} {figures}")
