"""`ModelIndex`: the names under which a model's modules and parameters are known."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from streamlens.capture.copies import Copy
from streamlens.capture.sharded import WHOLE, Part, as_owned, fsdp_parameters, known_part_of, local
from streamlens.errors import LayerNotFoundError, did_you_mean
from streamlens.layers import LayerSelector, taken_by_default
from streamlens.topics import Phase, TopicSpec

__all__ = ["ModelIndex", "ParameterEntry", "clean_name"]


def clean_name(name: str, wrappers: frozenset[str] = frozenset()) -> str:
    """A qualified name without what wrappers (DDP, compile, FSDP, checkpointing) put into it.

    Args:
        name: The name in `named_modules()` or `named_parameters()`.
        wrappers: Dotted paths that really are wrappers; only those are taken out.
    """
    parts: list[str] = []
    path = ""
    for part in name.split(".") if name else []:
        path = f"{path}.{part}" if path else part
        if path not in wrappers:
            parts.append(part)
    return ".".join(parts)


def _wrapper_paths(model: nn.Module) -> frozenset[str]:
    """Paths of children that stand for their parent, because that is a wrapper around them."""
    found: set[str] = set()
    inner = {
        "module": ("DataParallel", "DistributedDataParallel", "AveragedModel", "FullyShardedDataParallel"),
        "_orig_mod": ("OptimizedModule",),
        "_fsdp_wrapped_module": ("FullyShardedDataParallel",),
        "_checkpoint_wrapped_module": ("CheckpointWrapper", "OffloadWrapper", "ActivationWrapper"),
    }
    for path, module in model.named_modules():
        kinds = {c.__name__ for c in type(module).__mro__}
        for child, wrappers in inner.items():
            if kinds.intersection(wrappers) and child in module._modules:
                found.add(f"{path}.{child}" if path else child)
    return frozenset(found)


@dataclass(frozen=True, eq=False)
class ParameterEntry:
    """One parameter and what it is called.

    Attributes:
        name: Its full name (`features.0.weight`).
        layer: The name of the module that owns it (`features.0`).
        role: Its name in that module (`weight`).
        parameter: The parameter.
        owner: A weak reference to the module that owns it.
        order: Its place in the model.
        copy: What the optimizer holds in its place, if it does.
        tensor: What an update changes, and is read around it: the parameter, or its copy; of a DTensor, the
            part that this process holds.
        part: Which part that is; None if it is none.
    """

    name: str
    layer: str
    role: str
    parameter: nn.Parameter
    owner: weakref.ref[nn.Module]
    order: int
    copy: Copy | None
    tensor: Tensor
    part: Part | None = WHOLE

    @property
    def gradient(self) -> Tensor | None:
        """The gradient that an update consumes."""
        return self.parameter.grad if self.copy is None else self.copy.gradient


class ModelIndex:
    """Modules and parameters by clean name, in model order; built anew when the model changes.

    Tied parameters are listed once, under their first name. Modules are held weakly: who keeps a lens
    does not keep the model.

    Args:
        model: The model.
        copies: What an optimizer holds in place of a parameter, by the parameter's name.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, Copy] | None = None) -> None:
        wrappers = _wrapper_paths(model)
        self.modules: MutableMapping[str, nn.Module] = weakref.WeakValueDictionary()
        self.entries: list[ParameterEntry] = []
        self._lazy: list[UninitializedParameter] = []
        self._gathered = fsdp_parameters(model)
        seen: set[int] = set()
        for path, module in model.named_modules():
            layer = clean_name(path, wrappers)
            # A wrapper and what it wraps have one name: hooks go to the inner one.
            self.modules[layer] = module if layer else self.modules.get(layer, module)
            for role, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if isinstance(parameter, UninitializedParameter):
                    self._lazy.append(parameter)
                    continue
                parameter = as_owned(self._gathered, module, role, parameter)
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                name = f"{layer}.{role}" if layer else role
                copy = copies.get(name) if copies else None
                tensor = copy.tensor if copy is not None else parameter
                part = known_part_of(tensor)
                held = local(tensor) if hasattr(tensor, "to_local") else tensor
                place, holder = len(self.entries), weakref.ref(module)
                self.entries.append(
                    ParameterEntry(name, layer, role, parameter, holder, place, copy, held, part)
                )
        # The modules' own tables: that a parameter was replaced is seen there.
        self._slots = [
            (owner._parameters, entry.role, entry.parameter)
            for entry in self.entries
            if (owner := entry.owner()) is not None and (id(owner), entry.role) not in self._gathered
        ]
        self._shards = [
            (entry.parameter, entry.tensor.data_ptr(), entry.tensor.shape)
            for entry in self.entries
            if entry.copy is None and hasattr(entry.parameter, "to_local")
        ]
        self.by_id = {id(entry.parameter): entry for entry in self.entries}
        self._by_copy: dict[int, list[ParameterEntry]] = {}
        for entry in self.entries:
            if entry.copy is not None:
                self._by_copy.setdefault(id(entry.copy.base), []).append(entry)
        bases = {id(e.copy.base): e.copy.base for e in self.entries if e.copy is not None}
        self._bases = [(base, base.data_ptr()) for base in bases.values()]
        self.order = {name: i for i, name in enumerate(self.modules)}

    @property
    def uninitialized(self) -> bool:
        """Whether there were lazy parameters that had no shape yet."""
        return bool(self._lazy)

    @property
    def ripe(self) -> bool:
        """Whether some of these have one now."""
        return any(not isinstance(parameter, UninitializedParameter) for parameter in self._lazy)

    def stale(self) -> bool:
        """Whether some parameter was replaced since the index was built."""
        for held, role, parameter in self._slots:
            found = held.get(role)
            # `torch.func.functional_call` puts tensors there for one call.
            if found is not parameter and (found is None or isinstance(found, nn.Parameter)):
                return True
        if self._shards and self._moved():
            return True
        # A buffer that the optimizer's tensor has moved away from is no longer what our views are over.
        return any(base.data_ptr() != address for base, address in self._bases)

    def _moved(self) -> bool:
        """Whether parameters that lie in parts were replaced, or their parts lie elsewhere now."""
        for kept in self._gathered.values():
            if id(getattr(kept(), "sharded_param", None)) not in self.by_id:
                return True
        with torch.no_grad():
            for parameter, address, shape in self._shards:
                held = parameter.to_local()
                if held.data_ptr() != address or held.shape != shape:
                    return True
        return False

    def owned_through(self, tensor: Tensor) -> Sequence[ParameterEntry]:
        """The parameters that an optimizer updates by updating a tensor that it holds."""
        entry = self.by_id.get(id(tensor))
        if entry is not None and entry.copy is None:
            return (entry,)
        return self._by_copy.get(id(tensor), ())

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the model's parameters, or known to stand for some."""
        return id(tensor) in self.by_id or id(tensor) in self._by_copy

    def key(self, spec: TopicSpec, entry: ParameterEntry) -> str:
        """The layer key of a parameter in a topic."""
        return entry.layer if spec.role else entry.name

    def parameters(self, spec: TopicSpec) -> list[ParameterEntry]:
        """The parameters that a topic covers, in model order."""
        if not spec.role:
            return self.entries
        return [entry for entry in self.entries if entry.role == spec.role]

    def default_modules(self) -> list[str]:
        """The modules whose activations are taken by default: leaves, and owners of parameters."""
        return [name for name, module in self.modules.items() if taken_by_default(module)]

    def resolve(self, spec: TopicSpec, selectors: Iterable[LayerSelector]) -> frozenset[str] | None:
        """The layer keys that selectors select in a topic; None for all.

        Raises:
            LayerNotFoundError: They select nothing.
        """
        selectors = tuple(selectors)
        if not selectors or spec.phase not in (Phase.PARAMETER, Phase.MODULE):
            return None
        if spec.phase is Phase.MODULE:
            candidates = {name: (name, module) for name, module in self.modules.items()}
        else:
            candidates = {
                self.key(spec, entry): (entry.layer, owner)
                for entry in self.parameters(spec)
                if (owner := entry.owner()) is not None
            }
        chosen = set(candidates)
        for selector in selectors:
            if selector.globs and not selector.classes:
                selector.check_globs([*self.modules, *(e.name for e in self.entries)])
            chosen = {
                key
                for key in chosen
                if selector.matches_module(*candidates[key])
                or (selector.depth is None and selector.matches_name(key))
            }
        if not chosen and not self.uninitialized:
            wanted = "; ".join(f"layers({s.describe()})" for s in selectors)
            hint = did_you_mean(selectors[0].globs[0].strip("*.") if selectors[0].globs else "", candidates)
            raise LayerNotFoundError(
                f"{wanted} selects no layer of {spec.name!r}: "
                + (hint or f"it has {', '.join(map(repr, list(candidates)[:8])) or 'none'}")
            )
        return frozenset(chosen)
