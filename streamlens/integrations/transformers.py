"""`StreamlensCallback` for the Trainer of Hugging Face transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, Unpack

import torch
from torch import nn

from streamlens.errors import StreamlensError
from streamlens.integrations._observation import Chains, Observation, ObserveOptions
from streamlens.lens import Lens
from streamlens.runtime import log

try:
    from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments
except ImportError as error:
    raise ImportError(
        "streamlens.integrations.transformers needs the Trainer of Hugging Face: "
        'pip install "streamlens[transformers]"'
    ) from error

__all__ = ["StreamlensCallback"]

_TRAINER_STATE: Final = "trainer_state.json"


class StreamlensCallback(TrainerCallback):
    """Observes the model while `trainer.train` runs.

    The lens opens when training starts and closes when it ends. The Trainer tells callbacks nothing of
    an exception: then `close()` writes what is left, and so does the next `train()` or the end of the
    process. Layers are named as in the model given to the Trainer. Evaluation emits nothing.

    `loss` is the `.loss` of the model's output (with `labels` among its inputs), as the model returned
    it. Under gradient accumulation the Trainer has most models divide by the number of items in the
    whole accumulated batch: there the losses of a step's micro-steps add up to the one it logs.

    Every checkpoint folder gets a file `streamlens.pt` with the state of the lens, and
    `trainer.train(resume_from_checkpoint=...)` goes on from it: the clock, averages and windows are
    those of a run that was never interrupted. The Trainer does not tell its callbacks which folder it
    resumes from: it is looked for in `output_dir`; one that is elsewhere is named here.

    Args:
        chains: Called with the lens when training starts; subscribes whatever is wanted.
        resume_from_checkpoint: The folder that training resumes from, if it is not in `output_dir`.
        timeout: Seconds that sinks may take to write what is left at the end; no limit if None.
        **options: For `streamlens.observe`: `loss`, `count`, `name`, `start`, `emits`, `metadata`,
            `on_error`.

    Raises:
        TypeError: `chains` cannot be called.
        StreamlensError: When training starts: `resume_from_checkpoint` has no state of a lens.

    Example:
        >>> def chains(lens):
        ...     lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(sl.sinks.TensorBoard("runs/mine"))
        >>> trainer = Trainer(model, arguments, callbacks=[StreamlensCallback(chains)])  # doctest: +SKIP
    """

    def __init__(
        self,
        chains: Chains,
        *,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
        timeout: float | None = 30.0,
        **options: Unpack[ObserveOptions],
    ) -> None:
        super().__init__()
        self._resume_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self._file = f"streamlens-{options['name']}.pt" if options.get("name") else "streamlens.pt"
        self._observation = Observation(chains, options, timeout)

    @property
    def lens(self) -> Lens:
        """The lens of the run under way, or of the last one, which is closed.

        Raises:
            StreamlensError: `trainer.train` has not been called.
        """
        return self._observation.lens

    def close(self) -> None:
        """Close the lens of a training that was left by an exception; after others it is closed."""
        self._observation.close()

    # -- the run -----------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model is complete and on its device, and what a checkpoint had is restored."""
        model = kwargs["model"]
        assert isinstance(model, nn.Module)
        if state.global_step > 0:
            self._load(args, state)
        self._observation.open(model)
        self._observation.locate(int(state.epoch or 0))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch begins, or goes on after a resume."""
        self._observation.begin_epoch(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step is over, and perhaps training: `lens.should_stop` ends it."""
        self._pass_on_stop(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch is over, and perhaps training."""
        self._observation.end_epoch()
        self._pass_on_stop(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation is over, and perhaps training."""
        self._pass_on_stop(control)

    def _pass_on_stop(self, control: TrainerControl) -> None:
        lens = self._observation.running
        if lens is not None and lens.should_stop:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training has ended."""
        self._observation.close()

    # -- checkpoints -------------------------------------------------------------------------

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint has been written: put the state of the lens beside it."""
        lens = self._observation.running
        if lens is not None and state.is_world_process_zero:
            path = self._folder(args, state) / self._file
            lens.engine.attempt("the lens's part of a checkpoint", self._save, path)

    def _save(self, path: Path) -> None:
        # Whoever looks finds the whole file or none.
        draft = path.with_suffix(".tmp")
        torch.save(self._observation.state_dict(), draft)
        draft.replace(path)

    def _load(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = self._resume_from or self._found(args, state)
        path = None if folder is None else folder / self._file
        if path is not None and path.is_file():
            self._observation.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif self._resume_from is not None:
            raise StreamlensError(
                f"StreamlensCallback(resume_from_checkpoint={str(self._resume_from)!r}): there is no "
                f"{self._file} in that folder; name a checkpoint that was written with this callback, "
                "or leave the option out"
            )
        else:
            log.warning(
                "training resumes at step %d, but no %s of that checkpoint was found in %s: the lens counts "
                "from where the model is. Pass StreamlensCallback(resume_from_checkpoint=folder) if it is "
                "elsewhere",
                state.global_step,
                self._file,
                args.output_dir,
            )

    def _found(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """The checkpoint in `output_dir` with the history that the Trainer has just restored."""
        folder = self._folder(args, state)
        known = folder / _TRAINER_STATE
        if not known.is_file():
            return None
        return folder if TrainerState.load_from_json(str(known)).log_history == state.log_history else None

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
