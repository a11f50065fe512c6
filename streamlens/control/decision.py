"""`Decision`: what a controller is about to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamlens.frame import Frame, Kind

__all__ = ["Decision"]


@dataclass(frozen=True)
class Decision:
    """What a controller is about to do. Plain data: rank 0 sends its own to all.

    Attributes:
        topic: The topic of the action's frame, such as `"learning_rate.action"`.
        old: What is steered, as it is: a number for each layer, or for each component.
        new: What it is to become.
        cause: Why, as the end of a sentence: `"the loss has not fallen for 10 steps"`.
        layers: The layers it is about; the model itself by default.
        components: What the numbers are of where the layer is one and they are several.
        deed: What is done, such as `"stopped training"`, where "set it from old to new" does not say it.
    """

    topic: str
    old: tuple[float, ...]
    new: tuple[float, ...]
    cause: str
    layers: tuple[str, ...] = ("",)
    components: tuple[str, ...] = ()
    deed: str = ""

    def frame(self, controller: str, step: int, epoch: int, source: str, *, dry_run: bool) -> Frame:
        """The action as a frame: its values are the new ones, its `meta` says the rest."""
        values = torch.tensor(self.new, dtype=torch.float64)
        if self.components:
            values = values.view(len(self.layers), len(self.components))
        old, new = (numbers[0] if len(numbers) == 1 else numbers for numbers in (self.old, self.new))
        what = self.topic.removesuffix(".action")
        change = f"set {what} from {_shown(self.old)} to {_shown(self.new)}"
        did = f"would have {self.deed}" if dry_run and self.deed else self.deed
        text = f"{controller} {did or ('would ' + change if dry_run else change)}: {self.cause}"
        meta = {"text": text, "cause": self.cause, "old": old, "new": new, "dry_run": dry_run}
        return Frame(
            self.topic,
            step,
            self.layers,
            values,
            epoch=epoch,
            components=self.components,
            meta=meta,
            kind=Kind.EVENT,
            source=source,
        )


def _shown(numbers: tuple[float, ...]) -> str:
    if len(set(numbers)) == 1:
        return f"{numbers[0]:.4g}"
    return (
        f"{min(numbers):.4g}..{max(numbers):.4g}"
        if len(numbers) > 4
        else ", ".join(f"{number:.4g}" for number in numbers)
    )
