"""`Observation`: the lens of a framework's training run, from its start to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypedDict

from torch import nn

from streamlens.errors import StreamlensError
from streamlens.lens import Lens
from streamlens.observing import observe

__all__ = ["Chains", "Observation", "ObserveOptions"]

Chains: TypeAlias = Callable[[Lens], object]
"""What subscribes the chains of a run to its lens."""

_STATE: Final = frozenset({"lens", "first_epoch", "in_epoch"})


class ObserveOptions(TypedDict, total=False):
    """What `streamlens.observe` takes beside the model.

    Attributes:
        loss: The loss module.
        count: `"training"` or `"grad"`.
        name: A label in sinks.
        start: 0 begins the clock anew.
        emits: Topics that will come from `lens.emit()`.
        metadata: Whatever describes the run.
        on_error: `"report"` or `"raise"`.
    """

    loss: nn.Module | None
    count: str | None
    name: str
    start: int | None
    emits: Sequence[str]
    metadata: Mapping[str, Any] | None
    on_error: str


class Observation:
    """Opens a lens when a framework starts to train, tells it epochs, and closes it when that ends.

    Frameworks may announce the begin of an epoch again after a resume, or leave out the end of one
    that a checkpoint was written in: what was begun is part of the state, and each epoch begins and
    ends once.

    Args:
        chains: Subscribes chains to the lens.
        options: For `observe`.
        timeout: Seconds that sinks may take to write what is left when the lens closes.

    Raises:
        TypeError: `chains` cannot be called.
    """

    def __init__(self, chains: Chains, options: ObserveOptions, timeout: float | None) -> None:
        if not callable(chains):
            raise TypeError(
                f"StreamlensCallback() needs a function that subscribes chains to a lens, got "
                f"{type(chains).__name__}: write "
                "StreamlensCallback(lambda lens: lens.pipe(uw_ratio()).subscribe(sink))"
            )
        self._chains = chains
        self._options = options
        self._timeout = timeout
        self._lens: Lens | None = None
        self._loaded: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        # The framework's number of the lens's epoch 0; None until the run has told where it is.
        self._first_epoch: int | None = None
        self._in_epoch = False

    @property
    def running(self) -> Lens | None:
        """The lens, while it is open."""
        return self._lens if self._lens is not None and not self._lens.closed else None

    @property
    def lens(self) -> Lens:
        """The lens of the run under way, or of the last one.

        Raises:
            StreamlensError: Nothing was trained yet.
        """
        if self._lens is None:
            raise StreamlensError("there is no lens yet: it is opened when training starts")
        return self._lens

    def open(self, model: nn.Module) -> Lens:
        """Observe a model, go on from the state that was loaded, and subscribe the chains."""
        self.close()
        self._lens = lens = observe(model, **self._options)
        self._first_epoch, self._in_epoch = None, False
        try:
            if self._loaded is not None:
                self._resume(lens, self._loaded)
            self._chains(lens)
        except BaseException:
            lens.close(timeout=self._timeout)
            raise
        self._loaded = None
        return lens

    def close(self) -> None:
        """Keep the state as it is now, and close the lens; nothing happens where none is open."""
        lens = self.running
        if lens is not None:
            self._last = self.state_dict()
            lens.close(timeout=self._timeout)

    # -- epochs ------------------------------------------------------------------------------

    def locate(self, epoch: int) -> None:
        """Say which epoch the framework is in or begins next; a resumed run knows already."""
        lens = self.running
        if lens is not None and self._first_epoch is None:
            self._first_epoch = epoch - lens.epoch

    def begin_epoch(self, epoch: int) -> None:
        """The framework begins an epoch, or goes on with it after a resume."""
        lens = self.running
        if lens is None:
            return
        self.locate(epoch)
        assert self._first_epoch is not None
        while lens.epoch < epoch - self._first_epoch:
            self._in_epoch = False
            lens.epoch_finished()
        if not self._in_epoch:
            self._in_epoch = True
            lens.engine.emit_index("epoch_started", lens.epoch)

    def end_epoch(self) -> None:
        """The framework ends the epoch that has begun."""
        lens = self.running
        if lens is not None and self._in_epoch:
            self._in_epoch = False
            lens.epoch_finished()

    # -- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The lens's state and where in its epochs the run is; as it was at the end, if it is over."""
        lens = self.running
        if lens is None:
            return self._last if self._loaded is None else self._loaded
        return {
            "lens": lens.state_dict(),
            "first_epoch": self._first_epoch or 0,
            "in_epoch": self._in_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, now or when the lens opens.

        Raises:
            ValueError: The state is not what `state_dict` gave.
        """
        if not isinstance(state, Mapping) or not state.keys() >= _STATE:
            raise ValueError(
                "StreamlensCallback: this checkpoint holds no state of a lens; "
                "it must be what state_dict() of this callback gave"
            )
        lens = self.running
        if lens is None:
            self._loaded = dict(state)
        else:
            self._resume(lens, state)

    def _resume(self, lens: Lens, state: Mapping[str, Any]) -> None:
        lens.load_state_dict(state["lens"])
        self._first_epoch = int(state["first_epoch"])
        self._in_epoch = bool(state["in_epoch"])
