"""Import rules beside the contracts in pyproject.toml: those of single files, and of when a library is loaded."""

import ast
import tomllib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("cluster", "policies", "flowserve", "sim", "real", "traces", "experiments")
SOURCES = [path.relative_to(ROOT) for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]

# Slow to import and of use only when a run is over.
AFTER_THE_RUN = {"pandas", "pyarrow", "matplotlib", "plotly"}
RUN_AFTERWARDS = ("experiments/report*", "experiments/outputs.py")


def parse(source: Path) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"))


def module_name(source: Path) -> str:
    return ".".join(source.with_suffix("").parts).removesuffix(".__init__")


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Every module that these nodes may import, with the packages it lies in: `import a.b` gives a and a.b."""
    names: set[str] = set()
    for node in nodes:
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                names.update(f"{module}.{alias.name}" for alias in node.names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if "import" in ast.unparse(node.func):
                names.add(name)
    return {parent for name in names for parent in accumulate(name.split("."), "{}.{}".format)}


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: all but the bodies of its functions and what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def loaders(modules: dict[str, set[str]], libraries: set[str]) -> set[str]:
    """The modules whose import loads one of the libraries, by itself or through each other."""
    found: set[str] = set()
    while more := {name for name, imports in modules.items() if imports & (libraries | found)} - found:
        found |= more
    return found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b", {"a", "a.b"}),
        ("try:\n    from a import b\nexcept ImportError:\n    b = None", {"a", "a.b"}),
        ("class C:\n    import a", {"a"}),
        ("importlib.import_module('a')", {"a"}),
        ("def f():\n    import a", set()),
        ("if TYPE_CHECKING:\n    import a", set()),
    ],
)
def test_imports_are_read_as_python_runs_them(source: str, names: set[str]) -> None:
    """Only what runs at the import of a module counts as imported then."""
    assert imported(at_import(ast.parse(source))) == names


def test_loading_is_followed_through_modules() -> None:
    """A module that imports a module that imports pandas loads pandas."""
    assert loaders({"cli": {"report"}, "report": {"pandas"}, "run": {"numpy"}}, {"pandas"}) == {"cli", "report"}


def test_tables_and_plots_load_after_the_run() -> None:
    """Nothing but reports and outputs loads pandas, pyarrow, matplotlib or plotly when it is imported."""
    modules = {module_name(source): imported(at_import(parse(source))) for source in SOURCES}
    late = {module_name(source) for source in SOURCES if any(fnmatch(str(source), each) for each in RUN_AFTERWARDS)}
    early = sorted(loaders(modules, AFTER_THE_RUN) - late)
    assert not early, f"import these libraries, or the modules that load them, inside functions: {early}"


def test_torch_npu_stays_with_the_npu_operators() -> None:
    """Only flowserve/ops/npu* imports torch_npu, so that nothing else needs CANN."""
    users = [str(source) for source in SOURCES if "torch_npu" in imported(ast.walk(parse(source)))]
    assert [user for user in users if not fnmatch(user, "flowserve/ops/npu*")] == []


def test_every_package_is_listed() -> None:
    """Each folder with Python in it is in the list of packages in pyproject.toml, and is a package."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"]) - {"conf"}
    assert listed == {".".join(source.parent.parts) for source in SOURCES}
    assert [name for name in sorted(listed) if not (ROOT / name.replace(".", "/") / "__init__.py").exists()] == []
