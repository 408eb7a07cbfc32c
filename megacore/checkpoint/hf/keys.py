"""How keys of a config.json and of our model say the same, in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megacore.checkpoint.hf.fields import Fields
from megacore.config.schema import ModelConfig


class Key(Protocol):
    """One fact about a model. ``theirs`` are the keys of config.json that state it."""

    @property
    def theirs(self) -> tuple[str, ...]: ...

    def read(self, config: Fields) -> dict[str, Any]:
        """Our keys with their values; 0 where they follow from others. Raises ValueError for what we cannot say."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Their keys with their values, of a resolved model."""


@dataclass(frozen=True)
class Number:
    """One number of theirs that is one of ours. ``default``: what its absence means (None: it must be there); ``null``:
    what null means, if not the same. With ``or_null`` our 0 is written as null."""

    name: str
    ours: str
    default: float | None = None
    null: float | None = None
    whole: bool = True
    or_null: bool = False

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, config: Fields) -> dict[str, Any]:
        default = self.default
        if self.name in config.values and not config.has(self.name) and self.null is not None:
            default = self.null
        if self.whole:
            return {self.ours: config.integer(self.name, None if default is None else int(default))}
        return {self.ours: config.number(self.name, default)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        value = getattr(model, self.ours)
        return {self.name: None if self.or_null and not value else value}


@dataclass(frozen=True)
class Flag:
    """One flag of theirs that is one or several of ours."""

    name: str
    ours: tuple[str, ...]
    default: bool

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, config: Fields) -> dict[str, Any]:
        return dict.fromkeys(self.ours, config.flag(self.name, self.default))

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.name: getattr(model, self.ours[0])}


@dataclass(frozen=True)
class Word:
    """Words of theirs that are words of ours; several of theirs may mean one of ours, of which the first is written.

    ``also``: other keys under which the word is written, too.
    """

    name: str
    ours: str
    words: Mapping[str, str]
    default: str
    also: tuple[str, ...] = ()

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.name, *self.also)

    def read(self, config: Fields) -> dict[str, Any]:
        config.only(self.name, self.words)
        return {self.ours: self.words[config.text(self.name, self.default)]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        word = next((theirs for theirs, ours in self.words.items() if ours == getattr(model, self.ours)), None)
        return dict.fromkeys(self.theirs, self.default if word is None else word)


@dataclass(frozen=True)
class Only:
    """A key of theirs that changes the maths, of which we know only some values, the first being usual."""

    name: str
    allowed: tuple[Any, ...]

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, config: Fields) -> dict[str, Any]:
        config.only(self.name, self.allowed)
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {}
