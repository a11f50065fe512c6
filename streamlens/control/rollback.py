"""`Rollback`: puts the last good model back where training goes wrong."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from reactivex.abc import DisposableBase
from reactivex.disposable import Disposable
from torch.optim import Optimizer

from streamlens.capture.view import View
from streamlens.control._causes import TriggeredController, alert_cause, alert_state, nonfinite
from streamlens.control._kept import Shelf, keep, keep_optimizer, put_back
from streamlens.control._rates import rated_groups, set_rates
from streamlens.control.bounds import Bounds
from streamlens.control.decision import Decision
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.operators._base import is_number, is_whole

if TYPE_CHECKING:
    from streamlens.capture.model import ParameterEntry

__all__ = ["Rollback"]

_TOPIC: Final = "rollback.action"
_PLACES: Final = ("good", "candidate")


class Rollback(TriggeredController):
    """Keeps the last good model and optimizer state, and puts them back where training goes wrong.

    It ends a chain that says so: of alerts, `lens.pipe(sl.diverging()).subscribe(Rollback())`, where one
    that starts is a reason, or of any numbers, such as `sl.loss()`, where a NaN or infinite value is.

    A copy is made before the first forward, and at the end of every step that `every` divides (when the next
    one begins), while no alert is on. It becomes the last good one when `confirm` steps have gone by
    without a reason: what is wrong shows later than it begins. After the update of the step that brings a
    reason (with several optimizers, at the end of that step), on every rank if any sees it:

    - parameters, buffers and optimizer state (also copies of parameters that the optimizer owns) are those
      of the last good step again, written into the tensors that are there;
    - the rate of every parameter group is multiplied by `factor`, from what it is now; groups are left
      alone otherwise;
    - the clock goes on, and so do data, random generators, schedulers and metrics: what follows is new
      steps with other batches and a lower rate, no repetition.

    Frames of the step put back and of earlier ones, which may still arrive, are no reason any more. An
    alert that has not ended after `patience` steps is one again. After `limit` times it stands back: end
    the same alerts in `Stop` too if training should then end.

    A scheduler is not put back. One that multiplies the present rate (`StepLR`, `ExponentialLR`) keeps the
    lower rate; one that computes it anew from its base (`LambdaLR`, `OneCycleLR`) undoes it: where a
    rate is found raised, that is reported, and the rates are left to it from then on. A GradScaler is not
    put back either: an update that it skips is no step, so a loss that overflowed in half precision
    counts at the next update; with one, watch `sl.norm("weights")`, which is finite as long as the model
    is, but on CUDA with a fused optimizer, where overflows mask it, the loss. Gradients are not touched.

    Nothing waits for a GPU with copies in memory, which take that of the model and its optimizer state
    twice, on its device; in files each copy waits for the device and the disk.

    Args:
        every: Steps between copies.
        confirm: Steps without a reason that make a copy a good one; at most `every`.
        patience: Steps after which an alert that is still on is a reason again.
        factor: What the rates are multiplied by, in (0, 1]; 1 leaves them to others, such as `RatioLR`.
        min_lr: What the rates are not lowered below.
        limit: How many times it acts.
        folder: Where to keep the copies, in files of a name for each rank, of one run; in memory if None.
        dry_run: Only say what would be done; nothing is copied.

    Attributes:
        rollbacks: How many times it has acted.

    Raises:
        TypeError: `folder` is no path.
        ValueError: A number is out of its range.

    Example:
        `lens.pipe(sl.health(without=["loss_spike"])).subscribe(Rollback(every=500, limit=2))`
    """

    __slots__ = ("_bounds", "_confirm", "_every", "_factor", "_first", "_limit", "_patience", "_shelf")

    whole_steps = True

    def __init__(
        self,
        *,
        every: int = 100,
        confirm: int = 20,
        patience: int = 50,
        factor: float = 0.5,
        min_lr: float = 0.0,
        limit: int = 3,
        folder: str | Path | None = None,
        dry_run: bool = False,
    ) -> None:
        super().__init__(dry_run=dry_run)
        for name, value in (("every", every), ("confirm", confirm), ("patience", patience), ("limit", limit)):
            if not is_whole(value) or value < 1:
                raise ValueError(f"Rollback({name}={value!r}): a whole number from 1 on")
        if confirm > every:
            raise ValueError(
                f"Rollback(confirm={confirm}): a copy is confirmed before the next, {every} steps later"
            )
        if not is_number(factor) or not 0 < factor <= 1:
            raise ValueError(f"Rollback(factor={factor!r}): what rates are multiplied by, in (0, 1]")
        if folder is not None and not isinstance(folder, str | Path):
            raise TypeError(f"Rollback(folder={folder!r}): the path of a folder, or None for memory")
        self._every, self._confirm, self._patience, self._limit = every, confirm, patience, limit
        self._factor, self._bounds = factor, Bounds(min_lr)
        self._shelf = Shelf(None if folder is None else Path(folder))
        self._first: DisposableBase = Disposable()
        self.rollbacks = 0
        self._last = -1
        self._kept: dict[str, dict[str, Any]] = {}
        self._open: list[list[str]] = []
        self._calm = True
        self._lowered: list[float] | None = None
        self._rates_are_anothers = False

    @property
    def action_topics(self) -> tuple[str, ...]:
        """The topic of its actions."""
        return (_TOPIC,)

    @property
    def good_step(self) -> int | None:
        """The step whose model would be put back, -1 for that before the first; None before there is one."""
        good = self._kept.get("good")
        return None if good is None else int(good["step"])

    def attached(self) -> None:
        """See `Controller.attached`.

        Raises:
            StreamlensError: The stream comes from no observed model, or another controller does the same.
        """
        engine = self.engine
        if engine is None:
            raise StreamlensError(
                "Rollback puts a model back, and a stream without one has none: end a chain of the lens that "
                "observe(model) returned in it"
            )
        self.claim("model's weights", None)
        if self._factor < 1:
            self.claim("learning rate", None, "leave it to that one with Rollback(factor=1)")
        super().attached()
        self._shelf.label = "".join(
            "-" + re.sub(r"\W", "", part) for part in (engine.name, engine.place) if part
        )
        self._first = engine.subscribe_view(View(topics=("batch_started",)), self._begin)
        self.hold(self._first)
        acting = engine.updates.interventions.acting
        # In front of whatever may fail there.
        acting.insert(0, self._before)

        def remove() -> None:
            with contextlib.suppress(ValueError):
                acting.remove(self._before)

        self.hold(Disposable(remove))

    # -- why ---------------------------------------------------------------------------------

    def cause_of(self, frame: Frame) -> str | None:
        """See `TriggeredController.cause_of`."""
        state = alert_state(frame)
        if state is not None:
            alerts = [
                [str(frame.meta["rule"]), str(frame.meta.get("of", "")), layer] for layer in frame.layers
            ]
            self._open = [alert for alert in self._open if alert not in alerts]
            self._open += alerts if state == "start" else []
        if frame.step <= self._last:
            return None
        return nonfinite(frame) if state is None else alert_cause(frame)

    def act_on(self, cause: str | None, step: int) -> Decision | None:
        """See `TriggeredController.act_on`."""
        if cause is None and self._open and self._last >= 0 and step - self._last >= self._patience:
            rules = ", ".join(sorted({rule for rule, _, _ in self._open}))
            cause = f"alert {rules} has not ended in {step - self._last} steps"
        if cause is None:
            return None
        if self.rollbacks >= self._limit:
            times = "once" if self._limit == 1 else f"{self._limit} times"
            self.stand_back(f"it has put the model back {times}, its limit, and again {cause}")
            return None
        if self.good_step is None:
            self.runtime.report(StreamlensError(f"there is no model to put back yet: {cause}"), self.name)
            return None
        target = "before its first update" if self.good_step < 0 else f"after step {self.good_step}"
        deed = f"put back the model as it was {target}"
        old, new = self._rates()
        if old != new:
            deed += f" and lowered the learning rate from {_listed(old)} to {_listed(new)}"
        return Decision(_TOPIC, (float(step),), (float(self.good_step),), cause, deed=deed)

    def decided(self, decision: Decision) -> None:
        """See `Controller.decided`."""
        self.rollbacks += 1
        self._last = int(decision.old[0])
        self._cause = None
        self._kept.pop("candidate", None)

    # -- what --------------------------------------------------------------------------------

    def apply(self, decision: Decision) -> None:
        """Put the model back, and lower the rates.

        Raises:
            StreamlensError: That model is not there, as on a rank that began later.
        """
        model, good = self.model, self._kept.get("good")
        if model is None or good is None or good["step"] != decision.new[0]:
            raise StreamlensError(
                f"the model of step {decision.new[0]:g} is not there, and was to be put back"
            )
        put_back(self._shelf.take("good", good["kept"]), model, self._optimizers())
        _, rates = self._rates()
        if not self._rates_are_anothers and self._factor < 1:
            set_rates(rated_groups(self.engine), rates)
            self._lowered = rates

    @property
    def uneasy(self) -> bool:
        """Whether an alert is on."""
        return bool(self._open)

    def after(self, step: int, *, calm: bool) -> None:
        """See `TriggeredController.after`: what was kept may have shown to be good."""
        if self.standing_back:
            return
        self._first.dispose()
        self._look_at_rates()
        if not calm:
            self._kept.pop("candidate", None)
        self._calm = calm
        candidate = self._kept.get("candidate")
        if candidate is not None and step - candidate["step"] >= self._confirm:
            if not self.dry_run:
                self._shelf.move("candidate", "good")
            self._kept = {"good": candidate}

    def closed(self, step: int) -> None:
        """See `TriggeredController.closed`: all optimizers have stepped, and nobody reads the model."""
        if not self.standing_back and self._calm and step % self._every == 0 and step != self._last:
            self._keep("candidate", step)

    def _keep(self, place: str, step: int) -> None:
        """Copy the model and the optimizers' state; a dry run only remembers when."""
        kept: dict[str, Any] | None = None
        optimizers = self._optimizers()
        if not self.dry_run and self.model is not None:
            kept = self._shelf.lay(place, keep(self.model, optimizers))
        self._kept[place] = {"step": step, "kept": kept, "optimizers": list(optimizers)}

    def _begin(self, frame: Frame) -> None:
        """A forward is about to begin: before the first one there is nothing wrong yet."""
        if self.good_step is None and self.engine is not None:
            self._keep("good", self.engine.clock.step - 1)

    def _before(self, optimizer: Optimizer, entries: Sequence[ParameterEntry]) -> None:
        """An update is about to begin: of what has never been kept, this is the last good state."""
        engine = self.engine
        info = None if engine is None else engine.updates.owners.get(optimizer)
        if engine is None or info is None:
            return
        if self.good_step is None:
            self._keep("good", engine.clock.step - 1)
        for place, entry in self._kept.items():
            if info.serial in entry["optimizers"]:
                continue
            entry["optimizers"].append(info.serial)
            if not self.dry_run:
                kept = self._shelf.take(place, entry["kept"])
                others = {id(e.parameter) for e in engine.index.entries}
                kept["optimizers"][info.serial] = keep_optimizer(optimizer, others)
                entry["kept"] = self._shelf.lay(place, kept)

    def _optimizers(self) -> dict[int, Optimizer]:
        assert self.engine is not None
        known = self.engine.updates.owners.known
        return {info.serial: o for info in known if (o := info.optimizer) is not None}

    # -- rates -------------------------------------------------------------------------------

    def _rates(self) -> tuple[list[float], list[float]]:
        """The rates of all groups, and what they are lowered to."""
        old = [float(group["lr"]) for group in rated_groups(self.engine)]
        if self._rates_are_anothers:
            return old, old
        # A rate that is below its bound already is left there: nothing is raised here.
        return old, [min(rate, self._bounds.limit(rate, rate * self._factor)) for rate in old]

    def _look_at_rates(self) -> None:
        """Whether somebody has raised what was lowered."""
        if self._lowered is None or self._rates_are_anothers:
            return
        for was, now in zip(self._lowered, self._rates()[0], strict=False):
            if now > was * (1 + 1e-9):
                self._rates_are_anothers = True
                self.runtime.report(
                    StreamlensError(
                        f"it had lowered the learning rate to {was:.6g} and found {now:.6g}: a scheduler, or "
                        "the training loop, sets it too, and has it to itself from now on; the model will "
                        "still be put back. Rollback(factor=1) says so from the start"
                    ),
                    self.name,
                )
                return

    # -- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Its state, with what is kept, also in files: these go on to change."""
        state = super().state_dict()
        for place, entry in state["_kept"].items():
            if not self.dry_run:
                entry["kept"] = self._shelf.take(place, entry["kept"])
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        super().load_state_dict(state)
        if self.dry_run:
            return
        # What a dry run would have kept is not there.
        self._kept = {place: entry for place, entry in self._kept.items() if entry["kept"] is not None}
        for place, entry in self._kept.items():
            entry["kept"] = self._shelf.lay(place, entry["kept"])


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.4g}" for rate in dict.fromkeys(rates))
