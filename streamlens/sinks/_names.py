"""`NameRule`: how a topic, a layer and a component become one name that a backend allows, and back.

Every sink whose backend has a say in names uses this rule, with the alphabet of its backend:

- The three are joined by the separator, empty ones at the end left out: `norm/fc`, `loss`. An empty one
  before another is `_`: `loss/_/a` is the component `a` of the model itself.
- A slash inside one of them (`G/loss` of a named model, `val/loss`) is a colon: `G:loss/G.fc`.
- Any other character that the alphabet lacks is its code in hexadecimal digits, `_x2e_` for a full stop, as
  ISO/IEC 9075-14 writes SQL's names in XML. What would read as such a code, or as one of the signs above, is
  written with codes itself. The usual names hold nothing of the kind and stay as they are.

So different names stay different, and `split` gives back what `join` was given.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

__all__ = ["ANY_TEXT", "NameRule"]

_EMPTY: Final = "_"
_SLASH: Final = ":"
_CODE: Final = re.compile(r"_x([0-9a-f]{2,6})_")


@dataclass(frozen=True)
class NameRule:
    """The rule for one backend's alphabet.

    Attributes:
        allowed: The characters that its names may have, as between the brackets of a regular expression.
            Letters of lower case, digits and the underscore must be among them.
        first: Those that may begin a name, where these are fewer; the underscore must be among them.
        separator: What stands between topic, layer and component; one character. It needs not be allowed
            where each of them is a name of its own and `encode` is all that is used.

    Example:
        >>> rule = NameRule("A-Za-z0-9_./:")
        >>> rule.join("norm", "features.0")
        'norm/features.0'
        >>> rule.split(rule.join("quantiles", "act@1", "5%"))
        ('quantiles', 'act@1', '5%')
    """

    allowed: str
    first: str | None = None
    separator: str = "/"

    def encode(self, part: str) -> str:
        """A topic, a layer or a component in the backend's alphabet.

        Args:
            part: Any text.

        Returns:
            The text itself, if it has nothing that must be written otherwise. Empty for an empty one.
        """
        return _encoded(self, part)

    def decode(self, name: str) -> str:
        """What `encode` was given.

        Args:
            name: What it returned. Other text is read as far as it follows the rule.
        """
        if self._slashes:
            name = name.replace(_SLASH, "/")
        return _CODE.sub(_character, name)

    def join(self, topic: str, layer: str = "", component: str = "") -> str:
        """One name of the three, as the rule says.

        Args:
            topic: A frame's topic.
            layer: A layer of it; empty for the model itself.
            component: A named component of it, if it has such.
        """
        parts = [self.encode(part) for part in (topic, layer, component)]
        while len(parts) > 1 and not parts[-1]:
            parts.pop()
        return self.separator.join(part or _EMPTY for part in parts)

    def split(self, name: str) -> tuple[str, str, str]:
        """The topic, layer and component that `join` was given.

        Args:
            name: What it returned.

        Raises:
            ValueError: The name has more than three parts: it was not made by `join`.
        """
        parts = name.split(self.separator)
        if len(parts) > 3:
            raise ValueError(
                f"{name!r} is no name of a topic, layer and component: it has {len(parts)} parts, not 1 to 3"
            )
        topic, layer, component = (*parts, "", "")[:3]
        return self._part(topic), self._part(layer), self._part(component)

    def _part(self, name: str) -> str:
        return "" if name == _EMPTY else self.decode(name)

    @cached_property
    def _slashes(self) -> bool:
        """Whether there is a sign for a slash within a part."""
        return self.separator != _SLASH and re.fullmatch(f"[{self.allowed}]", _SLASH) is not None

    @cached_property
    def _forbidden(self) -> re.Pattern[str]:
        """The characters of a part that are written as codes."""
        taken = f"{re.escape(self.separator)}{_SLASH if self._slashes else ''}"
        outside = f"(?:[^{self.allowed}]|[{taken}]|[\ud800-\udfff])"
        patterns = [outside, f"_(?=x[0-9a-f]{{2,6}}(?:_|{outside}))", r"^_\Z", r"^\.(?=\.?\Z)"]
        if self.first is not None:
            patterns.append(f"^[^{self.first}]")
        return re.compile("|".join(patterns))


ANY_TEXT: Final = NameRule(r"\x20-\x7e\xa0-\U0010ffff")
"""For backends that take any text, such as TensorBoard: all but control characters is allowed."""


@lru_cache(maxsize=65536)
def _encoded(rule: NameRule, part: str) -> str:
    if not rule._slashes:
        return rule._forbidden.sub(_code, part)
    return "/".join(rule._forbidden.sub(_code, piece) for piece in part.split("/")).replace("/", _SLASH)


def _code(found: re.Match[str]) -> str:
    return f"_x{ord(found[0]):02x}_"


def _character(found: re.Match[str]) -> str:
    number = int(found[1], 16)
    return chr(number) if number <= sys.maxunicode else found[0]
