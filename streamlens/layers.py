"""`LayerSelector`: which layers of a model somebody wants."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from streamlens.errors import LayerNotFoundError, did_you_mean

__all__ = ["LayerSelector", "module_depth", "taken_by_default"]


def module_depth(name: str) -> int:
    """Depth of a module in the tree: 0 for the model itself."""
    return 0 if not name else name.count(".") + 1


def taken_by_default(module: nn.Module) -> bool:
    """Whether a module's activations are taken by default: leaves, and owners of parameters."""
    return next(module.children(), None) is None or any(p is not None for p in module._parameters.values())


@dataclass(frozen=True)
class LayerSelector:
    """Layers by glob over their qualified names, by module class, or by depth.

    Attributes:
        globs: Shell patterns, any of which may match (`"features.*"`).
        classes: Module classes, any of which may match.
        depth: -1 for the leaves, 0 for the model itself, d for the modules at depth d and the
            leaves above it; None for any.
        without: Where given, the layers are those taken by default but for these classes.
    """

    globs: tuple[str, ...] = ()
    classes: tuple[type[nn.Module], ...] = ()
    depth: int | None = None
    without: tuple[type[nn.Module], ...] = ()

    @property
    def asks_modules(self) -> bool:
        """Whether names alone do not tell which layers are selected."""
        return bool(self.classes or self.without) or self.depth is not None

    def matches_name(self, name: str) -> bool:
        """Whether a name matches one of the globs."""
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.globs)

    def matches_module(self, name: str, module: nn.Module) -> bool:
        """Whether a module is selected."""
        if self.without and (isinstance(module, self.without) or not taken_by_default(module)):
            return False
        if self.depth is not None:
            deep = module_depth(name)
            leaf = next(module.children(), None) is None
            if not (leaf if self.depth < 0 else deep == self.depth or (leaf and deep < self.depth)):
                return False
        if not self.globs and not self.classes:
            return True
        return self.matches_name(name) or isinstance(module, self.classes)

    def check_globs(self, names: Iterable[str]) -> None:
        """Raise for the first glob that matches none of the names.

        Raises:
            LayerNotFoundError: It matches nothing; the message has near names.
        """
        known: Sequence[str] = list(dict.fromkeys(names))
        for glob in self.globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in known):
                hint = did_you_mean(glob.strip("*."), known)
                listing = ", ".join(repr(n) for n in known[:8]) + (", ..." if len(known) > 8 else "")
                raise LayerNotFoundError(f"no layer matches {glob!r}: {hint or 'layers: ' + listing}")

    def describe(self) -> str:
        """The selector's arguments as written."""
        parts = [repr(glob) for glob in self.globs] + [c.__name__ for c in self.classes]
        if self.without:
            parts.append(f"without {', '.join(c.__name__ for c in self.without)}")
        return ", ".join(parts + ([f"depth={self.depth}"] if self.depth is not None else []))
