"""`StreamlensCallback` for the Trainer of PyTorch Lightning."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from streamlens.errors import StreamlensError, did_you_mean
from streamlens.failure import failed
from streamlens.integrations._observation import Chains, Observation, ObserveOptions
from streamlens.lens import Lens

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    try:
        # The same library goes by two names with classes of their own: the one in use is extended.
        Callback = importlib.import_module(
            "lightning.pytorch" if "lightning.pytorch" in sys.modules else "pytorch_lightning"
        ).Callback
    except ImportError as error:
        raise ImportError(
            "streamlens.integrations.lightning needs PyTorch Lightning: "
            'pip install "streamlens[lightning]" (or pip install lightning)'
        ) from error

__all__ = ["StreamlensCallback"]


def _loss(value: Tensor) -> Tensor:
    """The loss that goes into a backward: the function that the lens watches."""
    return value


class StreamlensCallback(Callback):
    """Observes the LightningModule while `trainer.fit` runs.

    The lens opens when fitting starts and closes when it ends, also by an exception. It counts
    optimizer updates from 0, in automatic and in manual optimization; with several optimizers a step is
    what `streamlens.observe` says. Layers are named as in the LightningModule (`encoder.0`), whatever
    the strategy wraps around it. Sanity checks and validation emit nothing.

    `loss` is what `training_step` returned (in manual optimization, what `manual_backward` was given):
    not divided by `accumulate_grad_batches`, not scaled by mixed precision. It is not taken if `chains`
    or `loss=` watch another.

    The state of the lens goes into every checkpoint, and `trainer.fit(..., ckpt_path=...)` goes on from
    it: the clock, averages and windows are those of a run that was never interrupted.

    The lens is paused during validation, and what is emitted there is dropped: emit what a validation gave in
    your module's `on_validation_end`, which comes after this callback's.

    Args:
        chains: Called with the lens when fitting starts; subscribes whatever is wanted.
        module: The name of the part to observe (`"network"`), which shortens the names of layers;
            everything if empty. `input_data` and `network_output` are those of this part.
        timeout: Seconds that sinks may take to write what is left at the end; no limit if None.
        **options: For `streamlens.observe`: `loss`, `count`, `name`, `start`, `emits`, `metadata`,
            `on_error`.

    Raises:
        TypeError: `chains` cannot be called.
        StreamlensError: When fitting starts: the LightningModule has no part named `module`.

    Example:
        >>> def chains(lens):
        ...     lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(sl.sinks.TensorBoard("runs/mine"))
        >>> trainer = Trainer(callbacks=[StreamlensCallback(chains)])  # doctest: +SKIP
    """

    def __init__(
        self,
        chains: Chains,
        *,
        module: str = "",
        timeout: float | None = 30.0,
        **options: Unpack[ObserveOptions],
    ) -> None:
        super().__init__()
        self._module = module
        self._label = options.get("name", "")
        self._observation = Observation(chains, options, timeout)
        self._report_loss: Callable[[Tensor], Tensor] | None = None
        self._pause = contextlib.ExitStack()

    @property
    def lens(self) -> Lens:
        """The lens of the run under way, or of the last one, which is closed.

        Raises:
            StreamlensError: `trainer.fit` has not been called.
        """
        return self._observation.lens

    # -- the run -----------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is complete and on its device: observe it."""
        try:
            model = pl_module.get_submodule(self._module)
        except AttributeError:
            names = [name for name, _ in pl_module.named_modules() if name]
            hint = did_you_mean(self._module, names) or f"it has {', '.join(names[:8])}"
            raise StreamlensError(
                f"StreamlensCallback(module={self._module!r}): {type(pl_module).__name__} has no part "
                f"of that name: {hint}"
            ) from None
        lens = self._observation.open(model)
        if model is pl_module:
            # `training_step` calls parts of the model, and rarely the model itself.
            lens.engine.passes.parts_needed = True
            lens.engine.install()
        self._report_loss = None if lens.engine.losses.watched else lens.watch_loss(_loss)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch begins, perhaps the first of an epoch.

        Not every epoch is announced: the one after a checkpoint written in an epoch's last batch is not.
        """
        self._observation.begin_epoch(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch is over, and perhaps training: `lens.should_stop` ends it, after `min_steps` at least."""
        self._pass_on_stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is over, with its validation, and perhaps training."""
        self._observation.end_epoch()
        self._pass_on_stop(trainer)

    def _pass_on_stop(self, trainer: Trainer) -> None:
        lens = self._observation.running
        if lens is not None and lens.should_stop:
            trainer.should_stop = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take the loss, free of what was multiplied into it for the backward."""
        lens = self._observation.running
        if lens is None or self._report_loss is None or not lens.engine.wanted(("loss",)):
            return
        if pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            loss = loss * trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            # As a tensor: `get_scale()` would wait for the device.
            loss = loss / scaler.scale(torch.ones((), device=loss.device))
        self._report_loss(loss)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation batches run before training."""
        self._silence()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training may begin."""
        self._pause.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is interrupted by validation."""
        self._silence()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on; a sanity check says so itself."""
        if not trainer.sanity_checking:
            self._pause.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Training has failed, or was interrupted: what was observed until now is written."""
        if self._observation.running is not None:
            failed(self._observation.running.engine, exception)
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fitting has ended."""
        self._close()

    def _silence(self) -> None:
        lens = self._observation.running
        if lens is not None:
            self._pause.close()
            self._pause.enter_context(lens.paused())

    def _close(self) -> None:
        self._pause.close()
        self._observation.close()

    # -- checkpoints -------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Under which a checkpoint keeps the state: callbacks for several parts are told apart."""
        return f"{type(self).__qualname__}{{'module': {self._module!r}, 'name': {self._label!r}}}"

    def state_dict(self) -> dict[str, Any]:
        """The state of the lens, for a checkpoint."""
        return self._observation.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state_dict: What `state_dict` gave.

        Raises:
            ValueError: It is not that.
        """
        self._observation.load_state_dict(state_dict)
