"""`Frame`: one topic at one step, with all its layers.

A frame is what flows through every stream of streamlens. It is columnar: one object carries the
values of every layer, so that an operator runs once a step and not once a layer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self, cast

import numpy as np
import torch
from torch import Tensor

from streamlens.errors import ExpiredFrameError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Frame", "Kind", "Lease", "to_numpy"]

_NO_META: Final[Mapping[str, Any]] = MappingProxyType({})


class Kind(enum.Enum):
    """How often a topic yields a frame."""

    STEP = "step"
    """Once an optimizer update: parameter topics and what derives from them."""
    MICRO_STEP = "micro_step"
    """Once a forward/backward pass: activations, losses and what derives from them."""
    EVENT = "event"
    """Whenever it happens: epoch marks, what the user emits, alerts."""


class Lease:
    """The time for which a group of raw frames may be read.

    Raw frames hold the model's own tensors, which the run overwrites or frees; ending the lease
    lets go of all of them at once, also where somebody kept the frame.
    """

    __slots__ = ("_cells", "expired")

    def __init__(self) -> None:
        self.expired = False
        self._cells: list[list[tuple[Tensor, ...] | None]] = []

    def hold(self, values: tuple[Tensor, ...]) -> list[tuple[Tensor, ...] | None]:
        """Return a cell holding `values` until the lease ends."""
        cell: list[tuple[Tensor, ...] | None] = [None if self.expired else values]
        if not self.expired:
            self._cells.append(cell)
        return cell

    def end(self) -> None:
        """Expire every frame of this lease and drop its tensors."""
        self.expired = True
        for cell in self._cells:
            cell[0] = None
        self._cells.clear()


class _Fields:
    """What a frame consists of, while it is being made."""

    __slots__ = (
        "_cell",
        "_lease",
        "_values",
        "components",
        "epoch",
        "kind",
        "layers",
        "meta",
        "micro_step",
        "source",
        "step",
        "topic",
    )

    topic: str
    step: int
    epoch: int
    micro_step: int
    layers: tuple[str, ...]
    components: tuple[str, ...]
    meta: Mapping[str, Any]
    kind: Kind
    source: str
    _values: Tensor | tuple[Tensor, ...] | None
    _cell: list[tuple[Tensor, ...] | None] | None
    _lease: Lease | None


class Frame(_Fields):
    """One topic at one step, with all its layers. Immutable.

    Attributes:
        topic: What the values are, such as `"weights"` or `"uw_ratio.ema"`.
        step: The optimizer update, counted from 0, that the values belong to.
        layers: The qualified module (or parameter) names, in model order; `("",)` is the model.
        values: A tuple of tensors, one a layer, of any shapes (raw artifacts), or one tensor
            whose first dimension is the layer (reduced values).
        epoch: The epoch the step lies in, counted from 0.
        micro_step: The forward/backward pass within the step, counted from 0.
        components: Names of the second dimension of stacked values (losses, quantiles, bins).
        meta: A small mapping of whatever goes with the frame, such as an alert's sentence.
        kind: How often this topic yields a frame.
        source: The name given to `observe(model, name=...)`, or `""`.

    Stacked values own their memory and may be kept. Raw values are the model's own tensors: they
    may be read during delivery only, and reading them later raises `ExpiredFrameError`. To keep
    one, clone it in the callback, or keep `frame.clone()`.
    """

    __slots__ = ()

    def __new__(
        cls,
        topic: str,
        step: int,
        layers: Sequence[str],
        values: Tensor | Sequence[Tensor],
        *,
        epoch: int = 0,
        micro_step: int = 0,
        components: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        kind: Kind = Kind.STEP,
        source: str = "",
        lease: Lease | None = None,
    ) -> Self:
        """Make a frame; what is no tuple yet becomes one.

        Raises:
            ValueError: There are not as many values as layers.
        """
        layers = layers if type(layers) is tuple else tuple(layers)
        if isinstance(values, Tensor):
            length = values.shape[0] if values.ndim else -1
        else:
            values = values if type(values) is tuple else tuple(values)
            length = len(values)
        if length != len(layers):
            shape = tuple(values.shape) if isinstance(values, Tensor) else f"{length} tensors"
            raise ValueError(
                f"frame of {topic!r}: {len(layers)} layers but values of {shape}; "
                "pass one tensor a layer, or a tensor whose first dimension is the layer"
            )
        made = object.__new__(_Fields)
        made.topic = topic
        made.step = step
        made.layers = layers
        made.epoch = epoch
        made.micro_step = micro_step
        made.components = components if type(components) is tuple else tuple(components)
        made.meta = MappingProxyType(dict(meta)) if meta else _NO_META
        made.kind = kind
        made.source = source
        made._lease = lease
        if lease is None:
            made._values = values
            made._cell = None
        else:
            made._values = None
            made._cell = lease.hold(cast("tuple[Tensor, ...]", values))
        # From here on immutable. Getting past `__setattr__` twelve times instead doubles a frame's cost.
        made.__class__ = cls
        return cast("Self", made)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Frame is immutable: cannot set {name!r}; use frame.replace({name}=...)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Frame is immutable: cannot delete {name!r}")

    @property
    def values(self) -> Tensor | tuple[Tensor, ...]:
        """The values: a tuple of tensors (raw) or one tensor, first dimension the layer.

        Raises:
            ExpiredFrameError: The frame is raw and its delivery has ended.
        """
        if self._cell is None:
            return cast("Tensor | tuple[Tensor, ...]", self._values)
        held = self._cell[0]
        if held is None:
            raise ExpiredFrameError(
                f"the raw frame of {self.topic!r} at step {self.step} was read after its delivery: its "
                "tensors belong to the model. Clone what you need in the callback: frame.clone()"
            )
        return held

    @property
    def stacked(self) -> bool:
        """Whether the values are one tensor whose first dimension is the layer."""
        return isinstance(self._values, Tensor)

    @property
    def expired(self) -> bool:
        """Whether the values of a raw frame are gone."""
        return self._cell is not None and self._cell[0] is None

    @property
    def borrowed(self) -> bool:
        """Whether the values are the model's own tensors, valid during delivery only."""
        return self._cell is not None

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __getitem__(self, layer: str) -> Tensor:
        """The value of one layer, by its qualified name.

        Raises:
            KeyError: The frame has no such layer.
        """
        try:
            index = self.layers.index(layer)
        except ValueError:
            hint = did_you_mean(layer, self.layers)
            raise KeyError(
                f"no layer {layer!r} in the frame of {self.topic!r} at step {self.step}"
                + (f": {hint}" if hint else f"; it has {', '.join(map(repr, self.layers[:8]))}")
            ) from None
        return self.values[index]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of (layer, value), in model order."""
        return zip(self.layers, self.values, strict=True)

    def replace(self, **changes: Any) -> Frame:
        """A frame with some fields changed; raw values stay under the same lease.

        Args:
            **changes: Any of the constructor's arguments. New `values` own their memory unless
                `lease=` is passed with them.
        """
        fields: dict[str, Any] = {
            "topic": self.topic,
            "step": self.step,
            "layers": self.layers,
            "epoch": self.epoch,
            "micro_step": self.micro_step,
            "components": self.components,
            "meta": self.meta,
            "kind": self.kind,
            "source": self.source,
        }
        if "values" not in changes:
            fields["values"] = self.values
            fields["lease"] = self._lease
        return Frame(**{**fields, **changes})

    def select(self, layers: Sequence[str]) -> Frame:
        """The frame with only these layers, in the order given; unknown names are left out."""
        wanted = tuple(layers)
        if wanted == self.layers:
            return self
        place = {name: i for i, name in enumerate(self.layers)}
        index = [place[name] for name in wanted if name in place]
        names = tuple(self.layers[i] for i in index)
        if self.stacked:
            values = cast("Tensor", self.values)
            where = torch.tensor(index, dtype=torch.long, pin_memory=values.is_cuda)
            picked = values[where.to(values.device, non_blocking=True)]
            return self.replace(layers=names, values=picked)
        held = cast("tuple[Tensor, ...]", self.values)
        return self.replace(layers=names, values=tuple(held[i] for i in index), lease=self._lease)

    def map(
        self,
        fn: Callable[[Tensor], Tensor | float],
        *,
        on_error: Callable[[str, Exception], None] | None = None,
    ) -> Frame:
        """Apply `fn` to each layer's value.

        A layer whose `fn` raises is left out and passed to `on_error(layer, exception)`; without
        `on_error`, the first exception is raised after the other layers were computed.

        Args:
            fn: A function of one layer's value to a tensor or a number.
            on_error: Receives the layers that failed.
        """
        names: list[str] = []
        results: list[Tensor] = []
        failure: Exception | None = None
        for layer, value in self.items():
            try:
                result = fn(value)
                tensor = (
                    result if isinstance(result, Tensor) else torch.as_tensor(result, dtype=torch.float32)
                )
            except Exception as error:
                if on_error is None:
                    failure = failure or error
                else:
                    on_error(layer, error)
                continue
            names.append(layer)
            results.append(tensor.detach())
        if failure is not None:
            raise failure
        if results and all(r.shape == results[0].shape and r.dtype == results[0].dtype for r in results):
            values: Tensor | tuple[Tensor, ...] = torch.stack(results)
        else:
            values = tuple(r.clone() if self.borrowed else r for r in results)
        same_width = (
            isinstance(values, Tensor)
            and self.stacked
            and values.shape[1:] == cast("Tensor", self.values).shape[1:]
        )
        return self.replace(
            layers=tuple(names), values=values, components=self.components if same_width else ()
        )

    def clone(self) -> Frame:
        """A copy that owns its memory and may be kept."""
        if self._cell is None:
            return self
        return self.replace(values=tuple(v.clone() for v in cast("tuple[Tensor, ...]", self.values)))

    def to_dict(self) -> dict[str, Any]:
        """Host values by layer: a float for a scalar, a NumPy array for anything larger."""
        out: dict[str, Any] = {}
        for layer, value in self.items():
            array = to_numpy(value)
            out[layer] = array.item() if array.ndim == 0 else array
        return out

    def to_pandas(self) -> pd.DataFrame:
        """Tidy rows: topic, layer, step, epoch, micro_step, value.

        Where the frame names components, `component` is a column of its own, one row a component;
        each entry of `meta` is a column too. A value that is itself a tensor stays an array.
        """
        import pandas as pd

        layers: list[str] = []
        components: list[str] = []
        values: list[Any] = []
        for layer, value in self.to_dict().items():
            if self.components:
                flat = np.atleast_1d(np.asarray(value))
                layers += [layer] * len(self.components)
                components += self.components
                values += list(flat) if flat.ndim > 1 else flat.tolist()
            else:
                layers.append(layer)
                values.append(value)
        columns: dict[str, Any] = {
            "topic": self.topic,
            "layer": layers,
            "step": self.step,
            "epoch": self.epoch,
            "micro_step": self.micro_step,
        }
        if self.components:
            columns["component"] = components
        frame = pd.DataFrame({**columns, "value": values}, index=range(len(layers)))
        for key, entry in self.meta.items():
            frame[key] = [entry] * len(frame)
        return frame

    def __repr__(self) -> str:
        where = f"step={self.step}" + (f", micro_step={self.micro_step}" if self.micro_step else "")
        if self.expired:
            what = "expired"
        elif self.stacked:
            what = f"values={tuple(cast('Tensor', self.values).shape)}"
        else:
            what = "raw"
        names = ", ".join(self.layers[:4]) + (", ..." if len(self.layers) > 4 else "")
        return f"Frame({self.topic!r}, {where}, layers=[{names}], {what})"


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A host array of a tensor; bf16 and other types that NumPy lacks become float32."""
    if type(tensor) is Tensor and tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous():
        return cast("np.ndarray[Any, Any]", tensor.detach().resolve_neg().numpy())
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.dtype in (torch.bfloat16,) or str(tensor.dtype).startswith("torch.float8"):
        tensor = tensor.float()
    return cast("np.ndarray[Any, Any]", tensor.cpu().resolve_conj().resolve_neg().numpy())
