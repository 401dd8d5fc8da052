"""Reads the imports of the package, and prints what they amount to.

    python -m tools.import_graph           modules, arrows, circles, imports inside functions, lines
    python -m tools.import_graph --single  and the modules that one other module imports

Three kinds of import are told apart: *eager* (runs when the module is imported), *lazy* (inside a function) and
*typing* (under `if TYPE_CHECKING:`). tests/test_architecture.py holds the directions.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
Kind = Literal["eager", "lazy", "typing"]


@dataclass(frozen=True)
class Import:
    """`module` imports `target`; for `from a import b`, target is `a.b` where that is a module of ours, else `a`."""

    module: str
    target: str
    kind: Kind
    line: int


def is_type_checking(test: ast.expr) -> bool:
    """Whether the condition of an `if` is `TYPE_CHECKING`."""
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def statements(node: ast.AST, kind: Kind = "eager") -> Iterator[tuple[ast.AST, Kind]]:
    """Every node below `node`, with the kind that an import there would have."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for branch, inner in ((child.body, "typing"), (child.orelse, kind)):
                for statement in branch:
                    yield statement, inner
                    yield from statements(statement, inner)
            continue
        deeper: Kind = (
            "lazy"
            if kind == "eager" and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            else kind
        )
        yield child, deeper
        yield from statements(child, deeper)


def targets(node: ast.AST, package: str, modules: set[str]) -> list[str]:
    """The modules that one statement imports; `package` is where a relative import starts."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
        return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
    if (
        isinstance(node, ast.Call)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return [node.args[0].value] if called in {"import_module", "__import__"} else []
    return []


def read_imports(module: str, source: str, modules: set[str], *, is_package: bool = False) -> list[Import]:
    """The imports of one file, in the order of its lines.

    Args:
        module: Dotted name of the file.
        source: Its text.
        modules: Names of our modules, by which `from a import b` is told apart from `from a.b import c`.
        is_package: The file is an `__init__.py`, where a relative import starts at the package itself.
    """
    package = module if is_package else module.rpartition(".")[0]
    found = [
        Import(module, target, kind, getattr(node, "lineno", 0))
        for node, kind in statements(ast.parse(source))
        for target in targets(node, package, modules)
    ]
    return sorted(set(found), key=lambda i: (i.line, i.target))


def graph_of(imports: Iterable[Import]) -> dict[str, set[str]]:
    """Module -> the other modules that it imports."""
    graph: dict[str, set[str]] = {}
    for i in imports:
        if i.target != i.module:
            graph.setdefault(i.module, set()).add(i.target)
    return graph


def find_circle(imports: Iterable[Import]) -> list[str]:
    """One circle of imports of any kind as a path whose ends are equal, or an empty list."""
    graph = graph_of(imports)
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if circle := walk(target, [*path, module]):
                return circle
        done.add(module)
        return []

    for module in sorted(graph):
        if circle := walk(module, []):
            return circle
    return []


def our_files(root: Path = ROOT) -> dict[str, Path]:
    """Module name -> file, for the package and the two programs."""
    files = {}
    for path in sorted((root / "vlmcap").rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        files[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return files | {name: root / f"{name}.py" for name in ("train", "evaluate") if (root / f"{name}.py").exists()}


def all_imports(files: dict[str, Path]) -> list[Import]:
    """Every import of the files, those of other packages included."""
    return [
        i
        for module, path in files.items()
        for i in read_imports(
            module, path.read_text(encoding="utf-8"), set(files), is_package=path.name == "__init__.py"
        )
    ]


def main() -> None:
    """Prints the figures of a checkout."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_graph", description="Count the imports between our modules."
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout, such as one of an earlier commit")
    parser.add_argument("--single", action="store_true", help="list the modules that one other module imports")
    options = parser.parse_args()
    files = our_files(options.root)
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in files.items()}
    imports = all_imports(files)
    ours = [i for i in imports if i.target in files]
    graph = graph_of(ours)
    importers: dict[str, set[str]] = {}
    for module, targets_of in graph.items():
        for target in targets_of:
            importers.setdefault(target, set()).add(module)
    single = {module: next(iter(others)) for module, others in importers.items() if len(others) == 1}
    circle = find_circle(ours)
    print(f"{len(files)} modules, {sum(lines.values())} lines, {sum(map(len, graph.values()))} arrows")
    print(f"circle: {' -> '.join(circle)}" if circle else "no circle")
    print(
        f"{sum(i.kind == 'lazy' for i in imports)} imports inside functions, {sum(i.kind == 'lazy' for i in ours)} of "
        "them of our modules"
    )
    print(
        f"{len(single)} modules have one importer, {sum(lines[module] < 80 for module in single)} of them under 80 "
        "lines"
    )
    for module in sorted(single) if options.single else ():
        print(f"  {lines[module]:4} lines  {module} <- {single[module]}")


if __name__ == "__main__":
    main()
