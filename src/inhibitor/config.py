"""Typed configurations: frozen, strict about keys, read from YAML as data and never as code."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from inhibitor.errors import ConfigError, suggestion

MAX_BYTES = 1 << 20


class Config(BaseModel):
    """Base of every recipe: immutable, with no key that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, source: str = "configuration") -> Self:
        """Validate ``values``; raise ``ConfigError`` naming the key, its fault and the nearest known key.

        Args:
            values: Nested plain data, as YAML or JSON gives it.
            source: Where the values came from, for the message.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _config_error(error, cls, source) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply ``key=value`` overrides (dots reach nested keys, numbers reach list items).

        Args:
            path: A YAML file of at most 1 MiB.
            overrides: For example ``["seed=1", "stages.0.learning_rate=1e-4"]``.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(str(path), expected="a YAML file", got="no file", remedy="Check the path.")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                str(path), expected="at most 1 MiB", got=f"{path.stat().st_size} bytes", remedy="A recipe is small."
            )
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            first_line = " ".join(str(error).split())[:200]
            raise ConfigError(str(path), expected="plain YAML", got=first_line, remedy="Correct that place.") from None
        if not isinstance(values, dict):
            raise ConfigError(
                str(path), expected="keys and values", got=type(values).__name__, remedy="Start from a shipped recipe."
            )
        for override in overrides:
            _apply_override(values, override)
        return cls.parse(values, source=str(path))

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that ``load`` reads back."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"override {override!r}", expected="key=value", got=repr(override), remedy="For example seed=1."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"override {key}", expected="a plain value", got=repr(text), remedy="Quote it as YAML would."
        ) from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text; users mean the number
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, last = key.split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, dict):
            place = place.setdefault(part, {})
        elif isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        else:
            raise ConfigError(
                f"override {key}",
                expected="a key that exists",
                got=f"no {part!r}",
                remedy="Compare it with the recipe.",
            )
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ConfigError(
            f"override {key}", expected="a key that exists", got=f"no {last!r}", remedy="Compare it with the recipe."
        )


def _config_error(error: ValidationError, cls: type[BaseModel], source: str) -> ConfigError:
    first = error.errors()[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, ConfigError):  # a validator's own, complete as it is
        return own
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        return ConfigError(
            f"{source}: {location}",
            expected="a known key",
            got=f"the unknown key {unknown!r}",
            remedy=suggestion(unknown, _known_keys(cls)),
        )
    return ConfigError(
        f"{source}: {location}",
        expected=first["msg"],
        got=repr(first["input"])[:80],
        remedy="Correct that value.",
    )


def _known_keys(cls: type[BaseModel]) -> list[str]:
    """Every field name of a configuration and of those nested in it."""
    schema = cls.model_json_schema()
    places = [schema, *schema.get("$defs", {}).values()]
    return sorted({key for place in places for key in place.get("properties", {})})
