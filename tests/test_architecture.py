"""The house rules that a reader relies on: imports run one way, files and functions stay small."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "streamlens"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a module imports from its own floor and from those below it.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "frame"}),
    frozenset(
        {
            "chain",
            "failure",
            "layers",
            "nodes",
            "notebook",
            "reductions",
            "runtime",
            "sink",
            "stream",
            "topics",
        }
    ),
    frozenset({"capture", "delivery", "runs"}),
    frozenset({"distributed", "explain", "lens", "observing", "session"}),
    frozenset({"operators"}),
    frozenset({"control", "plugins", "sinks", "sources"}),
    frozenset({"integrations", "views"}),
    frozenset({"lab"}),
    frozenset({"cli"}),
)
# Neighbours on one floor that do not know each other.
STRANGERS = {
    ("capture", "delivery"),
    ("capture", "runs"),
    ("delivery", "capture"),
    ("delivery", "runs"),
    ("runs", "capture"),
    ("runs", "delivery"),
    ("sinks", "control"),
    ("sinks", "sources"),
    ("sources", "sinks"),
}


def part(module: str) -> str:
    """`operators` of `streamlens.operators.window`; empty for the package itself."""
    return [*module.split("."), ""][1]


def parts_imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Which parts of the package are imported, at which line, when the module itself is imported.

    Imports inside functions are how a part reaches one above it when it is asked to, and imports for
    type checkers bind nothing: neither makes a module need another one.
    """
    for node in top_level(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "streamlens":
                    yield part(alias.name), node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "streamlens":
            if node.module == "streamlens":
                for alias in node.names:
                    yield alias.name, node.lineno
            else:
                yield part(node.module or ""), node.lineno


def top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement that runs on import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from top_level(other)
            continue
        yield node
        yield from top_level(node)


def floor(name: str) -> int | None:
    return next((height for height, names in enumerate(FLOORS) if name in names), None)


def test_every_part_of_the_package_has_its_floor() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert {name for name in parts if floor(name) is None} == set()


def test_imports_run_one_way() -> None:
    wrong = []
    for path in FILES:
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for imported, line in parts_imported(ast.parse(path.read_text())):
            above = imported and (floor(imported) or 0) > (floor(own) or 0)
            whole = not imported and (floor(own) or 0) < (floor("integrations") or 0)
            if above or whole or (own, imported) in STRANGERS:
                wrong.append(f"{relative}:{line}: {own} imports {imported or 'the whole package'}")
    assert wrong == []


def test_the_check_of_imports_sees_a_wrong_one() -> None:
    source = """
if TYPE_CHECKING:
    from streamlens.cli import main
class A:
    from streamlens.sinks.table import Table
def f():
    import streamlens.views
try:
    import streamlens.operators.ema
finally:
    from streamlens import lens
"""
    assert sorted(name for name, _ in parts_imported(ast.parse(source))) == ["lens", "operators", "sinks"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_under_400_lines_and_functions_under_60(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 400
    long = [
        f"{node.name}: {code_lines(node)} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) >= 60
    ]
    assert long == []


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body without its docstring; a long signature or explanation is no long function."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_every_public_name_exists_and_is_documented() -> None:
    undocumented = []
    for path in FILES:
        module = importlib.import_module(module_name(path))
        for name in getattr(module, "__all__", ()):
            entry = getattr(module, name)
            documentable = inspect.isclass(entry) or inspect.isroutine(entry)  # an alias is not
            if documentable and not inspect.getdoc(entry):
                undocumented.append(f"{module.__name__}.{name}")
    assert undocumented == []


def module_name(path: Path) -> str:
    parts = ["streamlens", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_importing_streamlens_needs_no_optional_package() -> None:
    optional = (
        "tensorboard",
        "rich",
        "typer",
        "sklearn",
        "joblib",
        "vl_convert",
        "matplotlib",
        "pyarrow",
        "pytorch_lightning",
        "transformers",
        "accelerate",
        "starlette",
        "uvicorn",
    )
    code = f"""
import sys
for name in {optional}:
    sys.modules[name] = None  # importing it fails, as if it were not installed
import streamlens, streamlens.sinks, streamlens.operators
"""
    subprocess.run([sys.executable, "-c", code], check=True)
