"""What of a tensor this process holds: shards of DTensors, and the parameters of FSDP2 modules."""

from __future__ import annotations

import itertools
import math
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from streamlens.errors import StreamlensError

__all__ = [
    "WHOLE",
    "Part",
    "as_owned",
    "data_part",
    "fsdp_parameters",
    "is_dtensor",
    "known_part_of",
    "like_owned",
    "local",
    "part_of",
]

_T = TypeVar("_T", bound=Tensor)


class Part(NamedTuple):
    """Which part of a whole this process holds.

    Attributes:
        place: Where it lies in the whole: processes with the same place hold the same.
        parts: How many parts make up the whole.
    """

    place: tuple[int, ...] = ()
    parts: int = 1

    def within(self, outer: Part) -> Part:
        """A part of a part."""
        return Part((*outer.place, *self.place), outer.parts * self.parts)


WHOLE = Part()
"""A tensor that is in one piece, or the same on every process."""


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, detached; no collective runs for it."""
    if type(tensor) is Tensor or not hasattr(tensor, "to_local"):
        return tensor.detach()
    with torch.no_grad():
        shard: Tensor = tensor.to_local()
    return shard.detach()


def like_owned(held: Tensor, whole: Tensor) -> Tensor:
    """What this process holds of a tensor, as one that is spread as another one of its shape is.

    Args:
        held: The part that this process holds.
        whole: The tensor that is spread, or lies whole on every process.
    """
    if not is_dtensor(whole):
        return held
    from torch.distributed.tensor import DTensor

    spread: Any = whole
    return DTensor.from_local(
        held,
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=spread.shape,
        stride=spread.stride(),
    )


def part_of(tensor: Tensor) -> Part:
    """Which part of a tensor this process holds, by the placements of a DTensor.

    A dimension of the mesh over which it is replicated makes no difference.

    Raises:
        StreamlensError: What processes hold are terms of a sum that was not taken yet.
    """
    if not is_dtensor(tensor):
        return WHOLE
    spread: Any = tensor
    mesh, coordinate = spread.device_mesh, spread.device_mesh.get_coordinate()
    place: list[int] = []
    parts = 1
    for dimension, placement in enumerate(spread.placements):
        if placement.is_partial():
            raise StreamlensError(
                f"a DTensor with the placement {placement} holds terms of a sum that was not taken yet, and "
                "what is computed of these says nothing of their sum: redistribute it first"
            )
        if not placement.is_replicate() and mesh.size(dimension) > 1:
            place.append(coordinate[dimension] if coordinate is not None else 0)
            parts *= mesh.size(dimension)
    return Part(tuple(place), parts) if parts > 1 else WHOLE


def known_part_of(tensor: Tensor) -> Part | None:
    """The same, and None where what is held cannot be called a part."""
    try:
        return part_of(tensor)
    except StreamlensError:
        return None


# -- FSDP2 -----------------------------------------------------------------------------------------


def _groups(model: nn.Module) -> Iterator[Any]:
    """What FSDP2 keeps of each group of parameters."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)
            yield from several if several is not None else [state._fsdp_param_group]


def fsdp_parameters(model: nn.Module) -> dict[tuple[int, str], weakref.ref[Any]]:
    """What FSDP2 keeps of each parameter, held weakly, by the module's id and the name within it.

    Between a forward and its backward a module's attribute is the whole parameter, gathered for the
    computation; what the optimizer owns is the `sharded_param` of what is returned here.
    """
    found: dict[tuple[int, str], weakref.ref[Any]] = {}
    for group in _groups(model):
        for kept in group.fsdp_params if group is not None else ():
            info = kept._module_info
            for module, name in itertools.chain(
                [(info.module, info.param_name)],
                zip(info.shared_modules, info.shared_param_names, strict=True),
            ):
                found[id(module), name] = weakref.ref(kept)
    return found


def as_owned(
    gathered: dict[tuple[int, str], weakref.ref[Any]], module: nn.Module, role: str, parameter: _T
) -> _T:
    """What the optimizer owns of a parameter, of which the module may hold what was gathered to compute.

    Args:
        gathered: What `fsdp_parameters` gave.
        module: The module.
        role: The parameter's name in it.
        parameter: What the module holds.
    """
    kept = gathered.get((id(module), role))
    owned: _T = parameter if kept is None else getattr(kept(), "sharded_param", parameter)
    return owned


# -- data parallelism ------------------------------------------------------------------------------


def data_part(model: nn.Module, parameters: Iterable[Tensor], rank: int, ranks: int) -> tuple[Part, bool]:
    """Which part of the global batch this process computes.

    FSDP2 tells the mesh dimensions over which it spreads the batch. Processes that only hold shards of
    the parameters (tensor parallelism) have the same batch; all others have their own.

    Args:
        model: The model.
        parameters: Its parameters, as the optimizer owns them.
        rank: This process.
        ranks: How many there are.

    Returns:
        The part, and whether the model's computation itself is split over processes, so that an output
        that is no DTensor may be a part of the layer's.
    """
    spread: list[Any] = [p for p in parameters if is_dtensor(p)]
    for group in _groups(model):
        if group is None:
            continue
        info = group.mesh_info
        dimensions = [d for d in (info.replicate_mesh_dim, info.shard_mesh_dim) if d is not None]
        coordinate = info.mesh.get_coordinate()
        sizes = [info.mesh.size(d) for d in dimensions]
        part = Part(tuple(coordinate[d] for d in dimensions), math.prod(sizes))
        return part, any(math.prod(p.device_mesh.shape) > part.parts for p in spread)
    if not spread:
        return Part((rank,), ranks), False
    # Each instance of the mesh that the parameters are spread over has a batch of its own.
    meshes = [p.device_mesh.mesh for p in spread]
    largest = max(meshes, key=lambda mesh: mesh.numel())
    parts = max(1, ranks // int(largest.numel()))
    return (Part((int(largest.min()),), parts) if parts > 1 else WHOLE), True
