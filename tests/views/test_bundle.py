"""The bundle that draws charts without a network fits the specifications that Altair makes."""

from __future__ import annotations

import re
from importlib.resources import files

import altair as alt

VEGA = files("streamlens.views") / "vega"


def versions() -> dict[str, str]:
    return dict(re.findall(r"^\| (vega[\w-]*) \| ([\d.]+) \|$", (VEGA / "README.md").read_text(), re.M))


def test_the_bundled_vega_lite_is_the_version_altair_writes_for() -> None:
    written_for = alt.SCHEMA_VERSION.lstrip("v").split(".")[:2]
    assert versions()["vega-lite"].split(".")[:2] == written_for


def test_the_readme_names_the_versions_that_are_in_the_bundle() -> None:
    bundle = (VEGA / "vega.min.js").read_text()
    assert set(versions()) == {"vega", "vega-lite", "vega-embed"}
    for version in versions().values():
        assert f'"{version}"' in bundle


def test_every_package_in_the_bundle_has_its_licence_beside_it() -> None:
    licences = (VEGA / "LICENSES.txt").read_text()
    for name in ("vega", "vega-lite", "vega-embed", "vega-tooltip", "d3-array", "d3-delaunay", "delaunator"):
        assert re.search(rf"^{name} [\d.]+ \(", licences, re.M), name


def test_the_bundle_can_stand_inside_a_script_element() -> None:
    bundle = (VEGA / "vega.min.js").read_text().lower()
    assert "</script" not in bundle
    assert "<!--" not in bundle
