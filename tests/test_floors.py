"""The house: who may import whom, and the sizes that keep it readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "meshserve"
STEPS = [
    {"errors", "config", "telemetry"},
    {"wire", "kv"},
    {"routing", "engines"},
    {"mesh"},
    {"handoff"},
    {"observe"},
    {"roles"},
    {"app"},
    {"cli"},
]
OWNERS: dict[str, tuple[str, ...]] = {
    "zmq": ("meshserve/mesh/transport/",),
    "zeroconf": ("meshserve/mesh/discovery.py",),
    "msgpack": ("meshserve/wire/",),
    "msgspec": ("meshserve/wire/", "meshserve/roles/frontend/models/"),  # the other place that reads strangers' bytes
}
MODULES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def floor_of(module: str) -> int:
    """Which step a module of meshserve stands on; the package itself, and what starts it, are free."""
    name = module.split(".")[1] if "." in module else ""
    return next((step for step, names in enumerate(STEPS) if name in names), -1)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the floor"
            yield node.module or ""


def room_of(module: str) -> str:
    """A role is a room of its own: roles never import each other."""
    parts = module.split(".")
    return ".".join(parts[1:3]) if parts[1:2] == ["roles"] else parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_only_from_the_floors_below_it(path: Path) -> None:
    own = module_name(path)
    if path.parent == PACKAGE and path.stem in ("__init__", "__main__"):
        return
    for imported in imports_of(MODULES[path]):
        if not imported.startswith("meshserve.") or room_of(imported) == room_of(own):
            continue
        is_allowed = floor_of(imported) < floor_of(own) or (own, imported) == ("meshserve.config", "meshserve.errors")
        assert is_allowed, f"{own} must not import {imported}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_wire_library_has_its_rooms_that_import_it(library: str) -> None:
    for path, tree in MODULES.items():
        if any(imported.split(".")[0] == library for imported in imports_of(tree)):
            assert path.relative_to(PACKAGE.parent).as_posix().startswith(OWNERS[library]), f"{path} imports {library}"


def test_no_module_is_part_of_a_cycle() -> None:
    names = {module_name(path) for path in MODULES}
    graph = {module_name(path): {found for found in imports_of(tree) if found in names} for path, tree in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_files_and_functions_stay_small_and_public_things_have_a_docstring(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    tree = MODULES[path]
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    for found in ast.walk(tree):
        if isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (found.end_lineno or 0) - found.lineno < 40, f"{found.name} is too long"
