"""Metrics as they are written on the command line: `norm(weights)`, `norm(weights, order=1) | ema(0.9)`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from reactivex import Observable
from reactivex.operators import share

import streamlens as sl
from streamlens.frame import Frame
from streamlens.operators.alerts import Rule

__all__ = ["Metric", "parse_metric"]

_SYNTAX: Final = "write it like norm, norm(weights), norm(weights, order=1) or norm(weights) | ema(0.9)"
_LONGEST: Final = 1000


@dataclass(frozen=True)
class Metric:
    """A chain of operators.

    Attributes:
        text: As it was written.
        operators: The operators, in order.
        evaluates: Whether it takes the loss on a batch by itself, which is due once an epoch.
        whole: Whether it chooses its layers and steps by itself, as alert rules do.
    """

    text: str
    operators: tuple[sl.Operator, ...]
    evaluates: bool = False
    whole: bool = False

    def of(self, lens: sl.Lens, watched: sl.Lens, epoch: int = 1) -> Observable[Frame]:
        """The metric as a stream.

        Args:
            lens: The run.
            watched: The layers and steps of it that are watched.
            epoch: The steps of an epoch.

        Raises:
            ValueError: It cannot be had of this run.
        """
        source = lens.pipe(sl.every(epoch)) if self.evaluates else lens if self.whole else watched
        try:
            stream = source.pipe(*self.operators)
        # A plug-in's operator may raise anything.
        except Exception as error:
            raise ValueError(f"{self.text!r}: {error}") from error
        if isinstance(stream, sl.Lens) and not stream.topics:
            raise ValueError(f"{self.text!r} names no topic: write {self.text.partition('(')[0]}(weights)")
        # Several sinks: what is computed by an operator is computed for all of them at once.
        return stream if isinstance(stream, sl.Lens) else stream.pipe(share())


def parse_metric(text: str, provided: Mapping[str, object] | None = None) -> Metric:
    """Read a metric: operators by name, each with arguments in parentheses, chained by `|`.

    Arguments are Python's literals; a name without quotes is a string, so that topics are written
    plainly. Nothing is evaluated: there are no other expressions.

    Args:
        text: What was written.
        provided: Arguments that cannot be written, such as `loss` and `batch`, for operators that
            require them.

    Returns:
        The metric.

    Raises:
        ValueError: It cannot be read, an operator does not exist or refuses its arguments.
    """
    operators: list[sl.Operator] = []
    evaluates = False
    for name, args, kwargs in _calls(text):
        try:
            make = sl.operators.load(name)
            filled = _required(make, args, kwargs, provided or {})
            operator = make(*args, **kwargs, **filled)
        except Exception as error:  # a plug-in's function may raise anything
            raise ValueError(f"{text!r}: {error}") from error
        if not callable(operator):
            raise ValueError(f"{text!r}: {name} is no operator: it gave {operator!r}")
        evaluates = evaluates or bool(filled)
        operators.append(operator)
    whole = text.strip().partition("(")[0].strip() == "health" or isinstance(operators[0], Rule)
    return Metric(text.strip(), tuple(operators), evaluates, whole)


def _calls(text: str) -> Iterator[tuple[str, Sequence[object], dict[str, object]]]:
    if len(text) > _LONGEST:
        raise ValueError(f"a metric of {len(text)} characters: {_SYNTAX}")
    try:
        tree: ast.expr = ast.parse(text.strip(), mode="eval").body
        nodes: list[ast.expr] = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
            nodes.append(tree.right)
            tree = tree.left
        calls = [_call(node) for node in reversed([*nodes, tree])]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is no metric: {_SYNTAX}") from None
    yield from calls


def _call(node: ast.expr) -> tuple[str, Sequence[object], dict[str, object]]:
    if isinstance(node, ast.Name):
        return node.id, (), {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("not a call of a name")
    kwargs: dict[str, object] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("no ** here")
        kwargs[keyword.arg] = _literal(keyword.value)
    return node.func.id, [_literal(value) for value in node.args], kwargs


def _literal(node: ast.expr) -> object:
    """The value of a literal; a name stands for itself, also one with dots or slashes in it."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_literal(node.value)}.{node.attr}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        parts = _literal(node.left), _literal(node.right)
        if all(isinstance(part, str) for part in parts):  # what a named lens stored: G/loss
            return "/".join(map(str, parts))
    if isinstance(node, ast.List | ast.Tuple):
        values = [_literal(value) for value in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    return ast.literal_eval(node)


def _required(
    make: Callable[..., Any],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    provided: Mapping[str, object],
) -> dict[str, object]:
    """Those of the arguments provided that the operator requires and was not given."""
    try:
        known = inspect.signature(make).parameters
        given = inspect.signature(make).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself will say what is wrong
        return {}
    missing = [name for name in provided if name in known and name not in given]
    found = {name: provided[name] for name in missing if known[name].default is inspect.Parameter.empty}
    # A loss is taken on a batch, which is optional only because there may be several.
    if "loss" in found and "batch" in missing:
        found["batch"] = provided["batch"]
    return found
