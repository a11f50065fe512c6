"""Operators and sinks by name, shipped or brought by installed packages; broken ones harm nobody."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import streamlens as sl
from streamlens.lab.commands import app
from streamlens.plugins import Plugin, plugins

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin"


def install(folder: Path, package: str, operators: str = "", sinks: str = "", code: str = "") -> None:
    """Put a package on disk as an installer leaves it."""
    (folder / f"{package}_module.py").write_text(code)
    info = folder / f"{package}-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.5\n")
    groups = {"streamlens.operators": operators, "streamlens.sinks": sinks}
    (info / "entry_points.txt").write_text("".join(f"[{name}]\n{text}\n" for name, text in groups.items()))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which packages can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.endswith("_module"):
            del sys.modules[name]


def found(name: str, package: str | None = None) -> Plugin:
    (one,) = [p for p in plugins() if p.name == name and package in (None, p.package)]
    return one


GOOD = '''
import streamlens as sl

def spread(topic="weights"):
    """Largest minus smallest.

    And more."""
    return sl.reduce(span, topic, name="spread")

def span(x):
    return x.max() - x.min()

class Counter(sl.sinks.Table):
    """Counts."""

number = 3
'''


def test_an_installed_operator_is_loaded_by_its_name_and_works(site: Path) -> None:
    install(site, "good", "spread = good_module:spread", code=GOOD)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[sl.Frame] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.operators.load("spread")()).subscribe(seen.append)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    expected = (model.weight.detach().numpy().max() - model.weight.detach().numpy().min()).item()
    assert seen[0].topic == "weights.spread"
    assert seen[0].to_dict() == {"": pytest.approx(expected)}


def test_an_installed_sink_is_loaded_by_its_name(site: Path) -> None:
    install(site, "good", sinks="Counter = good_module:Counter", code=GOOD)
    assert isinstance(sl.sinks.load("Counter")(), sl.sinks.Table)


def test_a_plugin_is_listed_with_its_package_version_and_first_line(site: Path) -> None:
    install(site, "good", "spread = good_module:spread", "Counter = good_module:Counter", GOOD)
    assert found("spread") == Plugin("spread", "operator", "good", "2.5", "Largest minus smallest.")
    assert found("Counter") == Plugin("Counter", "sink", "good", "2.5", "Counts.")


def test_the_shipped_ones_are_listed_the_same_way_and_loaded_by_the_same_names() -> None:
    shipped = {(p.kind, p.name): p for p in plugins() if p.package == "streamlens"}
    functions = {name for name in sl.operators.__all__ if inspect.isfunction(getattr(sl, name))}
    assert {name for kind, name in shipped if kind == "operator"} == functions
    assert {name for kind, name in shipped if kind == "sink"} == set(sl.sinks.__all__)
    assert all(p.version == sl.__version__ and p.summary and not p.error for p in shipped.values())
    assert sl.operators.load("uw_ratio") is sl.uw_ratio
    assert sl.sinks.load("RunStore") is sl.sinks.RunStore


@pytest.mark.parametrize(
    ("code", "entry", "reason"),
    [
        ("raise RuntimeError('no luck')", "bad_module:f", "cannot be imported: RuntimeError: no luck"),
        ("import sys; sys.exit('bye')", "bad_module:f", "cannot be imported: SystemExit: bye"),
        ("syntax error", "bad_module:f", "cannot be imported: SyntaxError"),
        ("", "bad_module:f", "cannot be imported: AttributeError"),
        ("", "missing_module:f", "cannot be imported: ModuleNotFoundError"),
        ("f = 3", "bad_module:f", "is not callable but of type int"),
    ],
)
def test_a_broken_plugin_is_listed_with_its_error_and_harms_no_other(
    site: Path, code: str, entry: str, reason: str
) -> None:
    install(site, "bad", f"broken = {entry}", code=code)
    install(site, "good", "spread = good_module:spread", code=GOOD)
    assert reason in found("broken").error
    assert "'broken' of bad" in found("broken").error
    assert found("spread").error == ""
    assert sl.operators.load("norm") is sl.norm
    with pytest.raises(sl.PluginError, match="'broken' of bad"):
        sl.operators.load("broken")


def test_loading_one_imports_no_other(site: Path) -> None:
    install(site, "bad", "broken = bad_module:f", code="raise RuntimeError")
    install(site, "good", "spread = good_module:spread", code=GOOD)
    sl.operators.load("spread")
    assert "bad_module" not in sys.modules


def test_no_package_can_take_the_name_of_a_shipped_operator(site: Path) -> None:
    install(site, "good", "norm = good_module:spread", code=GOOD)
    assert found("norm", "good").error == "the name 'norm' is taken by streamlens"
    assert sl.operators.load("norm") is sl.norm
    assert found("norm", "streamlens").error == ""


def test_of_two_packages_with_one_name_the_first_by_alphabet_has_it(site: Path) -> None:
    install(site, "zz", "spread = zz_module:f", code="def f(): pass")
    install(site, "aa", "spread = aa_module:f", code="def f(): pass")
    assert found("spread", "zz").error == "the name 'spread' is taken by aa"
    assert found("spread", "aa").error == ""
    assert sl.operators.load("spread").__module__ == "aa_module"


def test_a_broken_package_does_not_keep_a_name_from_another(site: Path) -> None:
    install(site, "aa", "spread = aa_module:f", code="raise RuntimeError('aa')")
    install(site, "good", "spread = good_module:spread", code=GOOD)
    assert found("spread", "good").error == ""
    assert sl.operators.load("spread").__module__ == "good_module"


def test_a_name_that_cannot_be_typed_is_an_error(site: Path) -> None:
    install(site, "good", "max-min = good_module:spread", code=GOOD)
    assert "must be one of Python's" in found("max-min").error
    with pytest.raises(sl.PluginError, match="must be one of Python's"):
        sl.operators.load("max-min")


def test_a_name_that_nobody_has_says_what_was_meant() -> None:
    with pytest.raises(sl.PluginError, match="no operator 'uw_ration' is installed: did you mean 'uw_ratio'"):
        sl.operators.load("uw_ration")
    with pytest.raises(sl.PluginError, match="no sink 'zzz' is installed; `streamlens plugins` lists all"):
        sl.sinks.load("zzz")


def test_the_names_are_of_no_use_to_who_imports_all_of_streamlens() -> None:
    assert not hasattr(sl, "load")


@pytest.fixture(scope="module")
def installed_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", target, EXAMPLE]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return target


def test_the_example_package_installs_and_is_found(
    installed_example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed_example)
    operator, sink = found("crest_factor"), found("CsvFile")
    assert (operator.package, operator.version, operator.error) == ("streamlens-example", "1.0.0", "")
    assert operator.summary.startswith("The largest magnitude over the root mean square")
    assert (sink.kind, sink.error) == ("sink", "")
    assert sl.operators.load("crest_factor").__module__ == "streamlens_example"


def test_the_example_package_passes_its_own_tests(installed_example: Path, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(installed_example), str(EXAMPLE.parents[1])])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout


def test_the_command_lists_all_and_what_is_wrong_with_which(
    site: Path, installed_example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed_example)
    monkeypatch.setenv("COLUMNS", "200")
    install(site, "bad", "broken = bad_module:f", code="raise RuntimeError('[no] luck')")
    result = CliRunner().invoke(app, ["plugins"])
    assert result.exit_code == 0, result.output
    lines = {words[0]: " ".join(words) for words in map(str.split, result.stdout.splitlines()) if words}
    assert lines["crest_factor"].startswith("crest_factor operator streamlens-example 1.0.0 The largest")
    assert lines["CsvFile"].startswith("CsvFile sink streamlens-example 1.0.0 Writes numbers")
    assert lines["norm"].startswith(f"norm operator streamlens {sl.__version__} The p-norm")
    assert lines["broken"].startswith("broken operator bad 2.5 error: the operator 'broken' of bad")
    assert "RuntimeError: [no] luck" in result.stdout
