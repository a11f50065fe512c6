"""Which dimension of a module's outputs counts its units, as far as its class says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor, nn

from streamlens.errors import LayerNotFoundError
from streamlens.stream import Stream

__all__ = ["UnitDimensions", "unit_dimensions"]

_CHANNELS_FIRST: Final = (
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.BatchNorm1d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.GroupNorm,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.LPPool1d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveAvgPool1d,
)
_FEATURES_LAST: Final = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_ELEMENTWISE: Final = frozenset(("torch.nn.modules.activation", "torch.nn.modules.dropout"))
_OF_OUTPUTS: Final = ("activations", "layer_gradients")


def unit_dimensions(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """The dimension of units by layer, of those whose class says it.

    Channels come first where a convolution over sequences made them, features last where a matrix did. What
    works on each element by itself says nothing of that: in an `nn.Sequential`, whose order is that of the
    computation, it has the dimension of what comes before it.

    Args:
        modules: Modules by layer name, in model order, those that contain others among them.
    """
    found: dict[int, int | None] = {}

    def visit(module: nn.Module, before: int | None) -> int | None:
        dim = _by_class(module)
        if isinstance(module, nn.Sequential):
            dim = before
            for child in module:
                dim = visit(child, dim)
        elif dim is None and _is_elementwise(module):
            dim = before
        else:
            for child in module.children():
                visit(child, None)
        # A module that is used in two places with different ones has none.
        known = found.setdefault(id(module), dim)
        found[id(module)] = dim if known == dim else None
        return dim

    for module in modules.values():
        if id(module) not in found:
            visit(module, None)
    dims = {name: found[id(module)] for name, module in modules.items()}
    return {name: dim for name, dim in dims.items() if dim is not None}


def _by_class(module: nn.Module) -> int | None:
    if isinstance(module, _CHANNELS_FIRST):
        return 1
    if isinstance(module, _FEATURES_LAST):
        return -1
    of_one = isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1
    return -1 if of_one else None


def _is_elementwise(module: nn.Module) -> bool:
    kinds = {kind.__module__ for kind in type(module).__mro__}
    return isinstance(module, nn.Identity) or not kinds.isdisjoint(_ELEMENTWISE)


class UnitDimensions:
    """The dimension that counts a layer's units: the one given, else by its module, else by its shape.

    Args:
        given: What the user said, for all layers.
        modules: The model's modules by layer name, where there is a model.
    """

    def __init__(self, given: int | None, modules: Mapping[str, nn.Module] | None = None) -> None:
        self._given = given
        self._by_layer = unit_dimensions(modules) if given is None and modules else {}

    def of_topics(self, topics: Sequence[str]) -> Mapping[str, int]:
        """What the modules say of topics, by layer; nothing where the user has said it, or they do not."""
        return self._by_layer if topics and set(topics).issubset(_OF_OUTPUTS) else {}

    @classmethod
    def of_stream(cls, stream: Stream, given: int | None) -> UnitDimensions:
        """Those of the model that a stream comes from, if it comes from one."""
        try:
            return cls(given, stream.lens.module_classes() if stream.lens is not None else None)
        except LayerNotFoundError:
            return cls(given)

    def of(self, layer: str, outputs: Tensor, topic: str = "activations") -> int | None:
        """The dimension; None where only the shape can tell.

        Args:
            layer: The layer, with the number of its call if it has one.
            outputs: Its outputs.
            topic: What they are: classes of modules tell of their outputs only.
        """
        if self._given is not None or outputs.ndim < 3 or topic not in _OF_OUTPUTS:
            return self._given
        return self._by_layer.get(layer.partition("@")[0])
