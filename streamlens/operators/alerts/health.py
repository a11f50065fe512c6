"""`health`: the rules that are worth having on in any run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from reactivex import Observable

from streamlens.errors import did_you_mean
from streamlens.frame import Frame
from streamlens.operators.alerts._apply import alerts_of
from streamlens.operators.alerts._rule import Rule
from streamlens.operators.alerts.gradients import exploding_gradients, vanishing_gradients
from streamlens.operators.alerts.initialisation import poor_initialisation
from streamlens.operators.alerts.learning_rates import learning_rate_too_high, learning_rate_too_low
from streamlens.operators.alerts.loss_spike import loss_spike
from streamlens.operators.alerts.losses import diverging, loss_not_decreasing
from streamlens.operators.alerts.nonfinite import nonfinite_values
from streamlens.operators.alerts.overfitting import overfitting
from streamlens.operators.alerts.sizes import check_windows, layer_oversized, layer_undersized
from streamlens.operators.alerts.units import dead_units, saturated_units
from streamlens.operators.alerts.updates import ratio_out_of_band, unchanged_weights
from streamlens.stream import Operator

__all__ = ["RULES", "default_rules", "health"]

_LATER: Final = (100, 20)
"""What is made of updates is looked at every tenth step at first, from this step on at every twentieth."""

RULES: Final[Sequence[Callable[[], Rule]]] = (
    lambda: nonfinite_values(thorough=False),
    poor_initialisation,
    lambda: replace(exploding_gradients(), later=(10, 10)),
    vanishing_gradients,
    diverging,
    loss_spike,
    loss_not_decreasing,
    overfitting,
    dead_units,
    saturated_units,
    lambda: replace(ratio_out_of_band(), later=_LATER),
    lambda: replace(unchanged_weights(), later=_LATER),
    lambda: replace(learning_rate_too_high(), later=_LATER),
    lambda: replace(learning_rate_too_low(), later=_LATER),
    layer_oversized,
    layer_undersized,
)
"""The default set, in the order in which their alerts of one frame come.

What is dear (a pass over all gradients; a copy of all weights, and the update made of it) is looked at
as seldom as the delays of `docs/alerts.md` allow.
"""


def default_rules() -> tuple[str, ...]:
    """The names of the rules that `health()` has on wherever a run has what they look at."""
    return tuple(rule.name for rule in (make() for make in RULES) if rule.cheap)


def health(*rules: Rule, without: Sequence[str] = ()) -> Operator:
    """The default set of alert rules, in one operator: silent on ordinary training.

    `lens.pipe(sl.health()).subscribe(sl.sinks.Console())` says when something is wrong with a run,
    in which layers, and what to try. Topics are `alerts.<rule>`, one frame when an alert starts and one
    when it ends; values are what was compared with the threshold, one a layer concerned; `meta` has
    `rule`, `severity` (`"warning"` or `"critical"`), `state` (`"start"` or `"end"`), `threshold` (a
    number, or a lower and an upper one) and `text`, the sentence; at the end also `since`, the step at
    which it started.

    On a Lens each thing that several rules look at is captured once, at the cadence they need: losses, and
    a sample of outputs, at every step; units at every tenth; gradients too, and at each of the first ten;
    updates at every tenth up to step 100 and at every twentieth from there on. Rules that are given keep
    cadences of their own: `health(nonfinite_values(), exploding_gradients())` reads all outputs and
    gradients at every step. A rule for which a run has nothing (no loss is watched, no accuracy emitted, no
    ReLU there) is left out, and `lens.explain()` says which and why; so are `layer_oversized` and
    `layer_undersized`, which judge sizes and are dear, unless one is given (then both are judged, from the
    same saturation) or `activations.saturation` is a topic already. On a stream of frames, such as a stored
    run's, rules look at the topics that come. What they cost is in `benchmarks/README.md`, how well they work
    in `docs/alerts.md`. Values on a GPU are judged when their copy has arrived, without waiting.
    NaN is told by `nonfinite_values`; the other rules leave it out.

    Args:
        *rules: Rules with other thresholds, in place of the default ones of the same name, or beside
            them.
        without: Names of rules to leave out.

    Returns:
        The operator.

    Raises:
        TypeError: Something that is no rule.
        ValueError: Two rules of one name, a name to leave out that no rule has, or two rules on the size of
            layers with windows that differ.

    Example:
        `lens.pipe(health(dead_units(share=0.8), without=["loss_spike"]))`
    """
    chosen = {rule.name: rule for rule in (make() for make in RULES)}
    given: dict[str, Rule] = {}
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"health() takes rules such as dead_units(share=0.8), got {rule!r}")
        if rule.name in given:
            raise ValueError(f"health() was given two rules {rule.name}: one of them is enough")
        given[rule.name] = rule
    default = dict(chosen)
    chosen.update(given)
    if isinstance(without, str):
        raise TypeError(f"health(without={without!r}): a list of names, [{without!r}]")
    for name in without:
        if name not in chosen:
            hint = did_you_mean(str(name), chosen)
            raise ValueError(
                f"health(without=): no rule {name!r}{': ' + hint if hint else ''}; rules: {', '.join(chosen)}"
            )
        del chosen[name]
    if not chosen:
        raise ValueError("health(without=): no rule is left")
    check_windows([rule for name, rule in given.items() if name in chosen])
    shown = [rule.describe() for name, rule in chosen.items() if rule != default.get(name)]
    shown += [f"without={list(without)!r}"] if without else []
    plan = f"health({', '.join(shown)})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        return alerts_of(source, tuple(chosen.values()), plan, lenient=True, chosen=given)

    return apply
