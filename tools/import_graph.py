"""Reads the imports of the package and prints statistics.

    python -m tools.import_graph           count modules, edges, cycles, imports inside functions, lines
    python -m tools.import_graph --single  also list the modules with a single importer

There are three kinds of imports: *eager* (executed when the module is imported), *lazy* (inside a function) and
*typing* (under `if TYPE_CHECKING:`). tests/test_architecture.py checks their directions.
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
    """`module` imports `target`; for `from a import b`, the target is `a.b` if that is a native module, else `a`."""

    module: str
    target: str
    kind: Kind
    line: int


def is_type_checking(test: ast.expr) -> bool:
    """Returns whether the condition of an `if` is `TYPE_CHECKING`."""
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def statements(node: ast.AST, kind: Kind = "eager") -> Iterator[tuple[ast.AST, Kind]]:
    """Yields every node below `node` with the kind that an import there has."""
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
    """Returns the modules that a statement imports; relative imports start at `package`."""
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
    """Returns the imports of one file in the order of its lines.

    Args:
        module: Dotted name of the module.
        source: Source text of the module.
        modules: Names of the native modules, which show whether `b` in `from a import b` is a module.
        is_package: Whether the file is an `__init__.py`, whose relative imports start at the package itself.
    """
    package = module if is_package else module.rpartition(".")[0]
    imports = [
        Import(module, target, kind, getattr(node, "lineno", 0))
        for node, kind in statements(ast.parse(source))
        for target in targets(node, package, modules)
    ]
    return sorted(set(imports), key=lambda i: (i.line, i.target))


def graph_of(imports: Iterable[Import]) -> dict[str, set[str]]:
    """Returns the set of other modules that each module imports."""
    graph: dict[str, set[str]] = {}
    for i in imports:
        if i.target != i.module:
            graph.setdefault(i.module, set()).add(i.target)
    return graph


def find_cycle(imports: Iterable[Import]) -> list[str]:
    """Returns one cycle of imports of any kind as a path that ends where it begins, or an empty list."""
    graph = graph_of(imports)
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if cycle := walk(target, [*path, module]):
                return cycle
        done.add(module)
        return []

    for module in sorted(graph):
        if cycle := walk(module, []):
            return cycle
    return []


def native_files(root: Path = ROOT) -> dict[str, Path]:
    """Returns the file of each module of the package and of the two programs."""
    files = {}
    for path in sorted((root / "vlmcap").rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        files[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return files | {name: root / f"{name}.py" for name in ("train", "evaluate") if (root / f"{name}.py").exists()}


def all_imports(files: dict[str, Path]) -> list[Import]:
    """Returns all imports of the files, including those of other packages."""
    return [
        i
        for module, path in files.items()
        for i in read_imports(
            module, path.read_text(encoding="utf-8"), set(files), is_package=path.name == "__init__.py"
        )
    ]


def main() -> None:
    """Prints the statistics of a checkout."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_graph", description="Count the imports between the modules of the package."
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout, such as one of an earlier commit")
    parser.add_argument("--single", action="store_true", help="list the modules with a single importer")
    options = parser.parse_args()
    files = native_files(options.root)
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in files.items()}
    imports = all_imports(files)
    native = [i for i in imports if i.target in files]
    graph = graph_of(native)
    importers: dict[str, set[str]] = {}
    for module, imported in graph.items():
        for target in imported:
            importers.setdefault(target, set()).add(module)
    single = {module: next(iter(others)) for module, others in importers.items() if len(others) == 1}
    cycle = find_cycle(native)
    num_lazy, num_lazy_native = (sum(i.kind == "lazy" for i in some) for some in (imports, native))
    print(f"{len(files)} modules, {sum(lines.values())} lines, {sum(map(len, graph.values()))} edges")
    print(f"cycle: {' -> '.join(cycle)}" if cycle else "no cycle")
    print(f"{num_lazy} imports inside functions, {num_lazy_native} of them of modules of the package")
    num_small = sum(lines[module] < 80 for module in single)
    print(f"{len(single)} modules have a single importer, {num_small} of them under 80 lines")
    for module in sorted(single) if options.single else ():
        print(f"  {lines[module]:4} lines  {module} <- {single[module]}")


if __name__ == "__main__":
    main()
