"""What the keys of a checkpoint cannot tell: settings by name, asked of the user, each with a default.

A format declares the ones it knows. ``Settings`` hands them out while a file is read, and remembers what had to be
assumed, so that the user can be told.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from idm_fast.errors import IdmFastError

Kind = Literal["yes or no", "whole number", "number", "list of whole numbers", "word", "anything"]


@dataclass(frozen=True)
class Setting:
    """One setting: its name in the family's own words, what it may be, and what it decides.

    ``choices``: the allowed words. ``default``: the one of the family's public files, for the listing; a format may
    choose another by what it sees. ``inferred``: the keys tell; what is given is only compared with them.
    """

    name: str
    kind: Kind
    text: str
    default: Any = None
    choices: tuple[str, ...] = ()
    inferred: bool = False

    @property
    def allowed(self) -> str:
        """In words, what it may be."""
        if self.choices:
            return " | ".join(self.choices)
        return {"yes or no": "true | false"}.get(self.kind, self.kind)

    def typed(self, where: str, value: Any) -> Any:
        """``value``, maybe the text of a command line, as the kind asks; ``IdmFastError`` where it is of another."""
        given = _from_text(value) if isinstance(value, str) and self.kind != "word" else value
        made = _as_kind(self.kind, given)
        if made is None or (self.choices and made not in self.choices):
            raise IdmFastError(f"{where}: setting {self.name} must be {self.allowed}, got {value!r:.60}")
        return made


class Settings:
    """The settings given for one file. Raises ``IdmFastError`` naming an unknown one, or one of another kind.

    ``lenient``: the file is only looked at, so a setting without a sound default is listed and not insisted on.
    """

    def __init__(
        self, where: str, known: Sequence[Setting], given: Mapping[str, Any] | None = None, lenient: bool = False
    ) -> None:
        self.where, self.lenient = where, lenient
        self._known = {setting.name: setting for setting in known}
        self.assumed: dict[str, Any] = {}
        for name in given or {}:
            if name not in self._known:
                near = difflib.get_close_matches(str(name), self._known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise IdmFastError(f"{where}: unknown setting {name!r}{hint}; known are {', '.join(self._known)}")
        self.given = {name: self._known[name].typed(where, value) for name, value in (given or {}).items()}

    def ask(self, name: str, default: Any) -> Any:
        """What was given, else ``default``, which is then remembered as assumed."""
        if name in self.given:
            return self.given[name]
        self._known[name]  # a format asks only for what it declares
        self.assumed[name] = default
        return default

    def require(self, name: str, why: str) -> None:
        """Says that ``name`` must be given, since no default would do."""
        if not self.lenient:
            raise IdmFastError(
                f"{self.where}: setting {name} must be given = {self._known[name].allowed}, got none: {why}"
            )
        self.assumed[name] = None

    def agree(self, name: str, found: Any) -> None:
        """What was given must be ``found``, which the tensors tell."""
        if name in self.given and self.given[name] != found:
            raise IdmFastError(
                f"{self.where}: setting {name} must be what the tensors say = {_shown(found)}, "
                f"got {_shown(self.given[name])}"
            )

    def missing(self) -> list[dict[str, Any]]:
        """What was assumed, for a listing: name, value, allowed, text."""
        return [
            {"name": name, "assumed": value, "allowed": self._known[name].allowed, "decides": self._known[name].text}
            for name, value in self.assumed.items()
        ]


def from_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """``["key=value", ...]`` of a command line as a table."""
    table = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise IdmFastError(f"--set must be KEY=VALUE, got {pair!r}")
        table[name.strip()] = value.strip()
    return table


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return [int(part) for part in text.split(",")] if "," in text else text
    except ValueError:
        return text


def _as_kind(kind: Kind, value: Any) -> Any:
    """``value`` as that kind, or None where it is another."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "yes or no":
        if isinstance(value, str) and value.lower() in ("true", "yes", "false", "no"):
            return value.lower() in ("true", "yes")
        return value if isinstance(value, bool) else None
    if kind == "whole number":
        return value if whole else None
    if kind == "number":
        return float(value) if whole or isinstance(value, float) else None
    if kind == "list of whole numbers":
        items = list(value) if isinstance(value, list | tuple) else [value]
        good = items and all(isinstance(item, int) and not isinstance(item, bool) for item in items)
        return items if good else None
    if kind == "word":
        return value if isinstance(value, str) else None
    return value


def _shown(value: Any) -> str:
    return json.dumps(value)
