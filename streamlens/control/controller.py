"""`Controller`: ends a chain and acts on the run."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from reactivex.abc import DisposableBase, ObserverBase
from reactivex.disposable import CompositeDisposable
from reactivex.subject import Subject
from torch import nn

from streamlens.capture.engine import Engine
from streamlens.capture.source import Source
from streamlens.chain import Chain, Ending
from streamlens.control._agreement import Vote, agreed, agreement_of, check_alike
from streamlens.control._attachment import ControllerAttachment
from streamlens.control._claims import claim, release
from streamlens.control.decision import Decision
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.layers import LayerSelector
from streamlens.runtime import Runtime, default_runtime

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.distributed import Agreement

__all__ = ["Controller"]

T = TypeVar("T")


class _Links:
    """What ties a controller to the process, and is no part of its state."""

    def __init__(self, *, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.actions: Subject[Frame] = Subject()
        self.runtime: Runtime | None = None
        self.attachment: ControllerAttachment | None = None
        self.agreement: Agreement | None = None
        self.resources: CompositeDisposable = CompositeDisposable()
        self.selectors: tuple[LayerSelector, ...] = ()


class Controller(Ending, ObserverBase[Frame]):
    """The end of a chain that acts on the run.

    It is called on the training thread, once the frames of a burst have all been delivered, with
    values on the host: those of the frame itself on the CPU, those of the frame before on CUDA, whose
    copy has had a step's time (it waits for that one event). The same seed therefore gives the same
    actions at the same steps.

    Subclasses write `propose`, which looks at a frame and says what to do, and `apply`, which does it.
    Between them stand what all controllers have in common: a frame with a NaN or infinite value, or
    without a layer that was there before, is no input, and nothing happens; across the ranks of
    `torch.distributed` rank 0's decision is everybody's, and none is made where some rank had no input, so
    every rank must subscribe the controller to the same chain; every action is a frame on `actions` and,
    on a lens, a topic; with `dry_run=True` there are only these frames.

    Ranks agree in a process group of their own, on the host. One that does not come within
    `observe(distributed_timeout=)`, or looks at something else, makes the controller stand back.

    What stands in a controller's `__dict__` is its state: plain containers, numbers and tensors, saved
    and restored with the chain's by `lens.state_dict()`. Everything else goes into slots.

    Args:
        dry_run: Only say what would be done.

    Attributes:
        held: Frames that were no input: not finite, or without a layer.
        standing_back: Whether it has stopped acting because somebody else steers the same thing.
    """

    __slots__ = ("_links",)

    needs_finite: ClassVar[bool] = True
    """Whether a frame that is not finite, or lacks a layer, is no input."""
    any_rank: ClassVar[bool] = False
    """Whether what any rank would do is done by all, the first one's; else it is rank 0's alone."""
    takes_frames: ClassVar[bool] = True
    """Whether the frames of its chain are its input."""

    def __init__(self, *, dry_run: bool = False) -> None:
        self._links = _Links(dry_run=dry_run)
        self.held = 0
        self.standing_back = False
        self._seen: list[list[str]] = []

    # -- what subclasses write ---------------------------------------------------------------

    @abstractmethod
    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        """Look at a frame whose values are on the host, and say what to do, if anything.

        Args:
            frame: The frame.
            noted: What `note` gave when the frame came.
        """

    @abstractmethod
    def apply(self, decision: Decision) -> None:
        """Do it. What is raised is reported, and training goes on."""

    def decided(self, decision: Decision) -> None:
        """All ranks do this now, or would (`dry_run`): remember what the next decision depends on."""

    def concerns(self, frame: Frame) -> bool:
        """Whether a frame is for this controller at all; the same on every rank."""
        return True

    def note(self) -> Any:
        """What is to be remembered of the moment a frame came, for `propose`; plain data."""
        return None

    def attached(self) -> None:
        """A chain has been ended in this; raise here what must fail at `subscribe`."""

    def moment(self, frame: Frame) -> tuple[int, int]:
        """The step and the epoch of an action.

        Args:
            frame: What it was decided on.
        """
        runtime = self._links.runtime
        clock = runtime.clock if isinstance(runtime, Source) else frame
        return clock.step, clock.epoch

    # -- what they may use -------------------------------------------------------------------

    @property
    def actions(self) -> Subject[Frame]:
        """What it has done, a frame an action, as an Observable."""
        return self._links.actions

    @property
    def dry_run(self) -> bool:
        """Whether it only says what it would do."""
        return self._links.dry_run

    @property
    def runtime(self) -> Runtime:
        """The run that it acts on.

        Raises:
            StreamlensError: It ends no chain.
        """
        if self._links.runtime is None:
            raise StreamlensError(f"{self.name} ends no chain: stream.subscribe(controller) first")
        return self._links.runtime

    @property
    def engine(self) -> Engine | None:
        """The engine of the observed model, if the chain comes from a lens."""
        runtime = self._links.runtime
        return runtime if isinstance(runtime, Engine) else None

    @property
    def model(self) -> nn.Module | None:
        """The observed model."""
        return None if self.engine is None else self.engine.model

    @property
    def action_topics(self) -> tuple[str, ...]:
        """The topics of its actions; selectable on the lens once it is subscribed."""
        return ()

    @property
    def name(self) -> str:
        """What it is called in plans, reports and actions."""
        return type(self).__name__

    def claim(self, what: str, optimizer: Optimizer | None, remedy: str = "") -> None:
        """Steer something of an optimizer (of all of the run's, without one) alone from now on.

        Args:
            what: What is steered, such as `"learning rate"`.
            optimizer: Whose.
            remedy: How else it can do with another controller that steers it.

        Raises:
            StreamlensError: Another controller steers it.
        """
        if not self.dry_run:
            claim(self, what, self.runtime, optimizer, remedy)

    def hold(self, resource: DisposableBase) -> None:
        """Dispose something with the subscription."""
        self._links.resources.add(resource)

    def stand_back(self, why: str) -> None:
        """Act no more, and report why, once."""
        if not self.standing_back:
            self.standing_back = True
            self.runtime.report(StreamlensError(f"{self.name} stands back: {why}"), self.name)

    # -- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Its state as plain containers and tensors."""
        return copy.deepcopy(self.__dict__)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.__dict__.update(copy.deepcopy(dict(state)))

    # -- a chain comes and goes --------------------------------------------------------------

    def attach(self, runtime: Runtime, chain: Chain) -> ControllerAttachment:
        """Called by `subscribe`.

        Raises:
            StreamlensError: It ends a chain already, or cannot act on this run.
        """
        links = self._links
        if links.runtime is not None:
            raise StreamlensError(
                f"this {self.name} ends a chain already: make another one, or merge the chains into one"
            )
        if isinstance(runtime, Source) and runtime.recorded and not self.dry_run:
            raise StreamlensError(
                f"{self.name} cannot act on a recorded run, which is over: pass "
                f"{self.name}(..., dry_run=True) to see what it would have done"
            )
        chain.ends_in = self.name
        links.runtime, links.resources = runtime, CompositeDisposable()
        links.selectors = chain.selectors
        timeout = runtime.exchange.timeout if isinstance(runtime, Engine) else None
        links.agreement = agreement_of(runtime, timeout)
        try:
            self.attached()
        except BaseException:
            self.detach()
            raise
        if isinstance(runtime, Source):
            for topic in self.action_topics:
                runtime.check_own_topic(topic)
        attachment = links.attachment = ControllerAttachment(self, runtime)
        chain.cells.append(attachment)
        return attachment

    def detach(self) -> None:
        """Called when its chain has ended."""
        links = self._links
        release(self)
        links.runtime = links.attachment = links.agreement = None
        links.resources.dispose()

    # -- as the observer of an Observable that is no stream of ours ---------------------------

    def on_next(self, frame: Frame) -> None:
        """Receive a frame from an Observable that was given the controller itself."""
        if self._links.attachment is None:
            self.attach(default_runtime(), Chain("an Observable", "an Observable"))
        attachment = self._links.attachment
        assert attachment is not None
        attachment.on_next(frame)

    def on_error(self, error: Exception) -> None:
        """The Observable has ended with an error."""
        self.detach()

    def on_completed(self) -> None:
        """The Observable has ended."""
        self.detach()

    # -- acting ------------------------------------------------------------------------------

    def take(self, frame: Frame, noted: Any) -> None:
        """Decide and act; called by the attachment, with values on the host."""
        runtime = self._links.runtime
        if runtime is None or not self.concerns(frame):
            return
        mine: Decision | None = None
        held = self.needs_finite and not self.standing_back and self._unfit(frame)
        if not self.standing_back and not held:
            mine = runtime.attempt(f"{self.name}.propose", self.propose, frame, noted)
        self.conclude(frame, mine, held=held)

    def conclude(self, frame: Frame, mine: Decision | None, *, held: bool = False) -> bool:
        """Do what all ranks agree on, also where nothing is proposed: every rank has to be there.

        Args:
            frame: What was looked at.
            mine: What this rank would do.
            held: Whether the frame was no input.

        Returns:
            Whether it was none on any rank.
        """
        votes = self._votes(Vote((self.name, frame.topic, frame.step), held, mine))
        decision = agreed(votes, any_rank=self.any_rank)
        if decision is not None and decision.old != decision.new:
            self._carry_out(decision, frame)
        return any(vote.held for vote in votes)

    def _votes(self, vote: Vote) -> list[Vote]:
        votes = self.gathered(vote)
        try:
            check_alike(votes)
        except StreamlensError as error:
            self.stand_back(str(error))
            return []
        return votes

    def _carry_out(self, decision: Decision, frame: Frame) -> None:
        runtime = self.runtime
        self.decided(decision)
        if self.dry_run or runtime.attempt(f"{self.name}.apply", self._applied, decision):
            action = decision.frame(self.name, *self.moment(frame), frame.source, dry_run=self.dry_run)
            self.announce(action)

    def _applied(self, decision: Decision) -> bool:
        self.apply(decision)
        return True

    @property
    def several_ranks(self) -> bool:
        """Whether there is anybody to agree with."""
        return self._links.agreement is not None and self._links.agreement.needed

    def gathered(self, answer: T) -> list[T]:
        """What each rank says, by rank: a collective, which every rank must come to; empty without them."""
        agreement = self._links.agreement
        assert agreement is not None
        try:
            return agreement.gather(answer)
        except StreamlensError as error:
            self.stand_back(str(error))
            return []

    def announce(self, action: Frame) -> None:
        """Deliver the frame of an action, on `actions` and to whoever selected its topic."""
        runtime = self.runtime
        runtime.attempt(f"a subscriber of the actions of {self.name}", self.actions.on_next, action)
        if isinstance(runtime, Source):
            runtime.emit_frame(action)

    def _unfit(self, frame: Frame) -> bool:
        """Whether a frame is no input; counted."""
        if self.lacks(frame.layers) or not all(bool(v.isfinite().all()) for _, v in frame.items()):
            self.held += 1
            return True
        self.remember(frame.layers)
        return False

    def lacks(self, layers: Iterable[str]) -> bool:
        """Whether there is no layer, or one is missing that came with these before and is still trained."""
        present = set(layers)
        if not present:
            return True
        missing = [set(known) - present for known in self._seen if present < set(known)]
        withheld = set() if self.engine is None else self.engine.updates.interventions.withheld
        if not missing or not withheld:
            return bool(missing)
        assert self.engine is not None
        trained = [entry for entry in self.engine.index.entries if entry.name not in withheld]
        return any(entry.layer in gone or entry.name in gone for gone in missing for entry in trained)

    def frozen_by_others(self, layer: str) -> bool:
        """Whether a `Freeze` keeps updates from a layer, so that its numbers say nothing of the training."""
        return self.engine is not None and self.engine.updates.interventions.withholds(layer)

    def remember(self, layers: Sequence[str]) -> None:
        """Note the layers that came together."""
        if not any(set(layers) == set(known) for known in self._seen):
            self._seen.append(list(layers))
