"""The structure of the package, drawn as text: rooms by floor, their imports, and violations of the rule.

    python scripts/house.py            rooms, their lines, and the rooms that each one imports
    python scripts/house.py ROOM       the files of one room, and what each one imports

A room is a folder of ``src/policylab`` or a module beside them. It imports only from rooms on lower floors, so that
each can be read and tested without those above. Hydra's plugin, ``src/hydra_plugins``, stands above all rooms: none may
import it, and it imports only ``sweeps``. Inside a room no files import each other in a circle. The exit code is
1 if the rule is broken; ``tests/test_imports.py`` checks it too.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "policylab"
#: Rooms from the ground up; those of one floor do not import each other.
FLOORS = (
    ("errors", "functional"),
    ("data",),
    ("user_code",),
    ("contracts",),
    ("models", "algorithms"),
    ("distributed",),
    ("rollouts", "runs"),
    ("rewards",),
    ("tasks", "callbacks", "report"),
    ("training",),
    ("config",),
    ("cli",),
    ("planning", "sweeps"),
    ("launch",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}


def room_of(module: str) -> str:
    """``launch`` of ``launch.run``; ``errors`` of ``errors``."""
    return module.split(".")[0]


def imported(node: ast.AST, *, for_types: bool = True) -> Iterator[str]:
    """Full dotted names that code imports, also inside functions.

    ``from policylab import models`` gives ``policylab.models``: the names count as modules.

    Args:
        for_types: whether imports under ``if TYPE_CHECKING`` count, which run-time code never makes.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import; PolicyLab's are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif for_types or not (
            isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        ):
            yield from imported(child, for_types=for_types)


def files(package: Path = PACKAGE) -> dict[str, Path]:
    """Module name below the package -> its file. A folder's ``__init__`` has the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    modules = files(package)

    def module_of(name: str) -> str | None:
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in modules:
            parts.pop()
        return ".".join(parts) or None

    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = imported(ast.parse(path.read_text(encoding="utf-8")))
        targets = {module_of(name) for name in names if name.split(".")[0] == "policylab"}
        edges[module] = {target for target in targets if target and target != module}
    return edges


def upward(edges: Mapping[str, set[str]]) -> list[str]:
    """Imports of a room that is not on a lower floor."""
    return [
        f"{module} imports {target}"
        for module, targets in sorted(edges.items())
        for target in sorted(targets)
        if room_of(module) != room_of(target) and FLOOR[room_of(module)] <= FLOOR[room_of(target)]
    ]


def circles(edges: Mapping[str, set[str]]) -> list[str]:
    """Groups of files that import each other in a circle, each once (strongly connected components)."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        open_ = [start]
        while open_:
            for target in edges[open_.pop()] - seen:
                seen.add(target)
                open_.append(target)
        return seen

    reached = {module: reach(module) for module in edges}
    groups = {
        tuple(sorted(other for other in edges if other in reached[module] and module in reached[other]))
        for module in edges
        if module in reached[module]
    }
    return [" <-> ".join(group) for group in sorted(groups)]


def lines(path: Path) -> int:
    """Number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def draw(edges: Mapping[str, set[str]]) -> str:
    """Rooms from the top floor down."""
    counted: dict[str, int] = defaultdict(int)
    for module, path in files().items():
        counted[room_of(module)] += lines(path)
    rows = ["floor  room          lines  imports"]
    for number, rooms in reversed([*enumerate(FLOORS, 1)]):
        for room in rooms:
            targets = {room_of(t) for m, ts in edges.items() if room_of(m) == room for t in ts} - {room}
            below = ", ".join(sorted(targets, key=lambda target: (-FLOOR[target], target)))
            rows.append(f"{number:5}  {room:12} {counted[room]:6}  {below}".rstrip())
    rows.append(f"{'':5}  {'all':12} {sum(counted.values()):6}")
    return "\n".join(rows)


def draw_room(room: str, edges: Mapping[str, set[str]]) -> str:
    """The files of a room and what each imports, by room."""
    rows = []
    for module, path in files().items():
        if room_of(module) == room:
            rows.append(f"{module}  ({lines(path)} lines)")
            rows.extend(f"    {target}" for target in sorted(edges[module]))
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    """Draws, then prints violations of the rule."""
    edges = graph()
    if unknown := sorted({room_of(module) for module in files()} - {*FLOOR, "policylab"}):
        print(f"{', '.join(unknown)}: give each a floor in FLOORS of scripts/house.py", file=sys.stderr)
        return 2
    if arguments and arguments[0] not in FLOOR:
        print(f"{arguments[0]} is not a room; rooms are {', '.join(sorted(FLOOR))}", file=sys.stderr)
        return 2
    print(draw_room(arguments[0], edges) if arguments else draw(edges))
    wrong = upward(edges) + [f"circle: {circle}" for circle in circles(edges)]
    print("\n".join(wrong) if wrong else "no import runs upwards, and no files import each other in a circle")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
