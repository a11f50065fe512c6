"""Names for backends: one rule, which loses nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamlens.sinks._names import ANY_TEXT, NameRule

WIDE = NameRule("A-Za-z0-9_./: -")
NARROW = NameRule("a-zA-Z0-9_", first="a-zA-Z_", separator=".")
RULES = [ANY_TEXT, WIDE, NARROW]

# Texts that are near to what the rule itself writes, beside any others.
tricky = st.lists(
    st.sampled_from(["_", "x", "2e", "5f", "_x2e_", "_x5f", "/", ":", ".", "a", "G", " ", "é", "\n", "9"]),
    max_size=8,
).map("".join)
texts = st.one_of(tricky, st.text(st.characters(exclude_categories=()), max_size=8))


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("loss",), "loss"),
        (("weights.norm2", "encoder.layers.0.self_attn"), "weights.norm2/encoder.layers.0.self_attn"),
        (("quantiles", "act@1", "5%"), "quantiles/act@1/5%"),
        (("loss", "", "a"), "loss/_/a"),
        (("G/norm", "G.fc"), "G:norm/G.fc"),
        (("val/loss",), "val:loss"),
        (("init_xavier", "max_x2"), "init_xavier/max_x2"),
        (("a:b", "_", ".."), "a_x3a_b/_x5f_/_x2e_."),
        (("_x2e_", "two\nlines"), "_x5f_x2e_/two_x0a_lines"),
    ],
)
def test_usual_names_stay_readable_and_unusual_ones_apart(parts: tuple[str, ...], name: str) -> None:
    assert ANY_TEXT.join(*parts) == name


def test_what_an_alphabet_lacks_is_written_as_its_code() -> None:
    assert NARROW.encode("weights.norm2") == "weights_x2e_norm2"
    assert NARROW.encode("G/uw_ratio") == "G_x2f_uw_ratio"
    assert NARROW.encode("0.weight") == "_x30__x2e_weight"
    assert WIDE.join("q", "fc", "5%") == "q/fc/5_x25_"


@pytest.mark.parametrize("rule", RULES, ids=["any text", "wide", "narrow"])
@given(topic=texts, layer=texts, component=texts)
@example(topic="_x2e", layer="_x2e_", component="_")
@example(topic="_x2f.", layer="", component=".")
def test_a_name_gives_back_its_parts(rule: NameRule, topic: str, layer: str, component: str) -> None:
    assert rule.split(rule.join(topic, layer, component)) == (topic, layer, component)
    assert rule.decode(rule.encode(topic)) == topic


@pytest.mark.parametrize("rule", [WIDE, NARROW], ids=["wide", "narrow"])
@given(part=texts)
def test_names_have_allowed_characters_only(rule: NameRule, part: str) -> None:
    name = rule.encode(part)
    assert re.fullmatch(f"[{rule.allowed}]*", name)
    assert rule.first is None or not name or re.match(f"[{rule.first}]", name)
    assert rule.separator not in name
    name.encode()


@given(part=texts)
def test_any_text_can_be_encoded_and_fills_one_line(part: str) -> None:
    assert len(ANY_TEXT.join(part, part, part).encode().splitlines()) <= 1


def test_names_by_others_are_read_as_far_as_they_go() -> None:
    assert ANY_TEXT.split("train/_x41_/_xffffff_") == ("train", "A", "_xffffff_")
    with pytest.raises(ValueError, match=r"'a/b/c/d' is no name .* it has 4 parts"):
        ANY_TEXT.split("a/b/c/d")
