"""Nothing in the package runs what a file says.

No pickle, no code from checkpoints, no shell, no archive unpacked to disk.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vlmcap"
HARMLESS = {"pickle.UnpicklingError"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# A sweep's jobs go from this program to processes of its own, by a pipe, or through submitit and Ray, which pickle what
# they carry.
BETWEEN_PROCESSES = Path("sweeping/child.py")
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}


def offences(source: str) -> Iterator[str]:
    """What a module does that it must not, each with its line."""
    nodes = list(ast.walk(ast.parse(source)))
    opens_archives = any(name.split(".")[0] in ("zipfile", "tarfile") for node in nodes for name in _used(node))
    for node in nodes:
        for name in _used(node):
            if name.split(".")[0] in UNPICKLERS and name not in HARMLESS:
                yield f"{node.lineno}: uses {name}"
        if opens_archives and isinstance(node, ast.Attribute) and node.attr == "extract":
            yield f"{node.lineno}: uses {ast.unparse(node)}: archives are read in place"
        if isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {what}" for what in _called(node))


def _used(node: ast.AST) -> Iterator[str]:
    """Dotted names that a node imports from, or looks up in, modules.

    A bare `import pickle` only gives access to its exceptions.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.asname or alias.name != "pickle")
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute):
        yield ast.unparse(node)


def _called(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in BUILTINS or name in SHELLS:
        yield f"calls {name}"
    if name == "torch.load" and not _is(given.get("weights_only"), True):
        yield "calls torch.load without weights_only=True"
    if (
        last in ("load", "open_memmap")
        and name.split(".")[0] in ("np", "numpy")
        and not _is(given.get("allow_pickle", _FALSE), False)
    ):
        yield f"calls {name} with pickles allowed"
    if name.startswith("yaml.") and last in UNSAFE_YAML:
        yield f"calls {name}: use yaml.safe_load"
    if last in ("extractall", "unpack_archive", "_extract_member"):
        yield f"calls {name}: archives are read in place"
    for keyword in ("shell", "trust_remote_code"):
        if keyword in given and not _is(given[keyword], False):
            yield f"passes {keyword}={ast.unparse(given[keyword])}"
    if None in given and isinstance(given[None], ast.Dict):
        for key in given[None].keys:
            if isinstance(key, ast.Constant) and key.value in ("shell", "trust_remote_code"):
                yield f"passes {key.value}"


_FALSE = ast.Constant(value=False)


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_the_package_runs_nothing_that_a_file_says() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 50
    found = {
        f"{module.relative_to(PACKAGE)}:{offence}"
        for module in modules
        for offence in offences(module.read_text(encoding="utf-8"))
        if not (module == PACKAGE / BETWEEN_PROCESSES and "uses cloudpickle" in offence)
    }
    assert not found


def test_what_is_unpickled_between_processes_is_never_read_from_a_file() -> None:
    source = (PACKAGE / BETWEEN_PROCESSES).read_text(encoding="utf-8")
    names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(source))}
    assert not {"open", "read_bytes", "read_text"} & names
    assert "stdin" in names


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as p",
        "import pickle\npickle.loads(data)",
        "import pickle\nclass Mine(pickle.Unpickler): ...",
        "from pickle import loads",
        "def f():\n    import joblib.externals",
        "eval(text)",
        "exec(code)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=is_safe)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=given)",
        "yaml.load(file, Loader=yaml.Loader)",
        "os.system('ls')",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=given)",
        "f(**{'trust_remote_code': True})",
        "tarfile.open(path).extractall(folder)",
        "import zipfile\nzipfile.ZipFile(path).extract(member)",
        "shutil.unpack_archive(path)",
    ],
)
def test_offences_are_recognised(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, mmap_mode='r')",
        "np.load(path, allow_pickle=False)",
        "json.load(file)",
        "yaml.safe_load(file)",
        "model.eval()",
        "re.compile(x)",
        "f(trust_remote_code=False)",
        "subprocess.run([a, b], shell=False)",
    ],
)
def test_what_is_safe_is_let_through(source: str) -> None:
    assert not list(offences(source))
