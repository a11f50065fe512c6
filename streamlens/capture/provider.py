"""`Provider`: what a lens asks its source about before anything runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ParamSpec, TypeVar

from torch import nn

from streamlens.capture.clock import Clock
from streamlens.capture.view import View
from streamlens.errors import ClosedLensError, LayerNotFoundError, StreamlensError
from streamlens.frame import Kind
from streamlens.layers import LayerSelector
from streamlens.reductions import Reduction
from streamlens.runtime import Runtime
from streamlens.topics import TopicSpec, topic_spec

__all__ = ["Provider"]

P = ParamSpec("P")
R = TypeVar("R")


class Provider(Runtime):
    """A runtime that knows which topics and layers it can give, and how.

    Attributes:
        clock: Where the run is.
    """

    of_model = False
    """Whether this is a PyTorch model that is observed."""
    taken_by = ""
    """Where everything comes from, for plans, if it does not depend on the topic."""
    remedy = ""
    """What to do about what it lacks, where that is no matter of the model."""
    closed_message = "this lens is closed: call streamlens.observe(model) again for a new one"

    def __init__(self, name: str = "", on_error: str = "report") -> None:
        super().__init__(name, on_error)
        self.clock = Clock()

    @property
    def title(self) -> str:
        """How a plan begins: where the frames come from."""
        return f"observe({self.name!r})" if self.name else "observe()"

    def summary(self) -> Iterable[str]:
        """What `explain()` says of the source: its first line, then what it holds."""
        return (f"{self.title}, step {self.clock.step}",)

    @abstractmethod
    def resolve(self, view: View) -> dict[str, frozenset[str] | None]:
        """The layers that a view selects in each of its topics."""

    def refresh(self) -> None:
        """Look again at which layers there are, before some are selected."""

    @abstractmethod
    def check_selector(self, selector: LayerSelector) -> None:
        """Raise where no layer at all can match."""

    @property
    def model(self) -> nn.Module | None:
        """The model, if there is one and it exists."""
        return None

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The model's modules by layer name.

        Raises:
            LayerNotFoundError: There is no model, so that only names are known.
        """
        raise LayerNotFoundError(
            f"{self.title} has no model to tell module classes and depths by: give globs over the layers' "
            "names, such as layers('features.*')"
        )

    def spec(self, topic: str) -> TopicSpec | None:
        """What is known of a topic's frames; None for one of the user's own, or derived."""
        return topic_spec(topic)

    def kind_of(self, view: View) -> Kind | None:
        """How often a view's frames come, if all its topics agree."""
        kinds = {spec.kind if (spec := self.spec(t)) is not None else None for t in view.topics}
        return kinds.pop() if len(kinds) == 1 else None

    def gives_raw(self, topics: Iterable[str]) -> bool:
        """Whether frames of one of these topics hold the run's own tensors."""
        return any((spec := self.spec(t)) is not None and spec.raw for t in topics)

    def can_reduce(self, topics: Iterable[str]) -> bool:
        """Whether a reduction of all these topics can be pushed down."""
        return all((spec := self.spec(t)) is not None and spec.raw for t in topics)

    def reduced(self, view: View, reduction: Reduction) -> View:
        """The view of what a reduction makes of another one.

        Raises:
            UnknownTopicError: It cannot be had.
        """
        return replace(view, reduction=reduction, whole="")

    def check_view(self, view: View) -> None:
        """Raise where a view cannot be answered as it is."""

    def check_whole(self, topics: Sequence[str], operator: str) -> None:
        """Raise where there are no whole tensors of some topics, which an operator needs.

        Raises:
            UnmergeableError: Each of several ranks holds a part of them.
        """

    # -- what only some sources take ---------------------------------------------------------

    def end_update(self) -> None:
        """The parameters were updated, in a loop without a `torch.optim` optimizer."""
        raise StreamlensError(f"{self.title} observes no model: its steps are told by its own frames")

    @abstractmethod
    def end_epoch(self) -> None:
        """The epoch is over."""

    def watch_loss(self, loss: Callable[P, R]) -> Callable[P, R]:
        """Watch a loss."""
        raise StreamlensError(f"{self.title} observes no model: give the loss itself, as topic 'loss'")

    def check_open(self) -> None:
        """Raise if it is closed.

        Raises:
            ClosedLensError: It is.
        """
        if self.closed:
            raise ClosedLensError(self.closed_message)
