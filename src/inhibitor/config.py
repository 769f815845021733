"""Typed configurations: frozen, strict about keys, read from YAML as data and never as code."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from inhibitor.errors import ConfigError, InhibitorError, suggestion

MAX_BYTES = 1 << 20


def user_path(path: Path) -> Path:
    """A path whose first ``~``, where a shell has left it there, is the user's home."""
    return Path(os.path.expanduser(path))


UserPath = Annotated[Path, AfterValidator(user_path)]
"""A path that may begin with ``~``."""

ModelName = Annotated[str, AfterValidator(os.path.expanduser)]
"""A hub id, or the path of a folder, which may begin with ``~``."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every generator of random numbers takes, NumPy's too."""

_EXPONENT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+")

_UNKNOWN = "unknown_key"
_EXPECTED = {  # by pydantic's name of a fault
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "keys and values"),
    **dict.fromkeys(("string_type", "path_type"), "text"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "finite_number": "a finite number",
    "greater_than": "a number greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "a number less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "at least {min_length} of them",
}


class _Loader(yaml.SafeLoader):
    """Plain YAML, in which a mapping names each key once and a date is a text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.tag, str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)


class Config(BaseModel):
    """Base of every recipe: immutable, with no key that nobody reads."""

    model_config = ConfigDict(frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_alone(cls, values: Any) -> Any:
        for key in values if isinstance(values, Mapping) else ():
            if key not in cls.model_fields:
                context = {"key": str(key), "remedy": suggestion(str(key), sorted(cls.model_fields))}
                raise PydanticCustomError(_UNKNOWN, "Unknown key '{key}'. {remedy}", context)
        return values

    @classmethod
    def parse(cls, values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "configuration") -> Self:
        """Apply ``key=value`` overrides (dots reach nested keys, numbers reach list items) and validate.

        Args:
            values: Nested plain data, as YAML or JSON gives it.
            overrides: For example ``["seed=1", "stages.0.learning_rate=1e-4"]``.
            source: Where the values came from, for the message.

        Raises:
            ConfigError: With the key, its fault and the nearest known key.
            DataError: A task is unknown.
        """
        if overrides:
            values = changed = copy.deepcopy(dict(values))
            for override in overrides:
                _apply_override(changed, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _config_error(error, source) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """``parse`` what a YAML file of at most 1 MiB says."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(str(path), expected="a YAML file", got="no file", remedy="Check the path.")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                str(path), expected="at most 1 MiB", got=f"{path.stat().st_size} bytes", remedy="A recipe is small."
            )
        try:
            values = _read(path.read_text(encoding="utf-8"), str(path))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            first_line = " ".join(str(error).split())[:200]
            raise ConfigError(
                str(path), expected="plain YAML, each key once", got=first_line, remedy="Correct that place."
            ) from None
        if not isinstance(values, dict):
            raise ConfigError(
                str(path), expected="keys and values", got=type(values).__name__, remedy="Start from a shipped recipe."
            )
        return cls.parse(values, overrides, source=str(path))

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that ``load`` reads back."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read(text: str, name: str) -> Any:
    """What a YAML text says; ``name`` is its place in messages."""
    loader = _Loader(text)
    loader.name = name
    return loader.get_single_data()


def _override_value(text: str) -> Any:
    """YAML in brackets or quotes, or one plain value: a ``#`` begins no comment, and a colon no mapping."""
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        return _read(text, "override")
    if _EXPONENT.fullmatch(text):  # YAML 1.1 reads 1e-4 as text; users mean the number
        return float(text)
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return loader.construct_object(yaml.ScalarNode(tag, text))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"override {override!r}", expected="key=value", got=repr(override), remedy="For example seed=1."
        )
    try:
        value = _override_value(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"override {key}", expected="a plain value", got=repr(text), remedy="Quote it as YAML would."
        ) from None
    *parents, last = key.split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, dict):
            if place.get(part) is None:  # an empty ``key:`` too
                place[part] = {}
            place = place[part]
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


def _config_error(error: ValidationError, source: str) -> InhibitorError:
    """The first fault that pydantic found, in our words."""
    first, *others = error.errors()
    context, kind, got = first.get("ctx", {}), first["type"], first["input"]
    own = context.get("error")
    if isinstance(own, InhibitorError):  # a validator's own, complete as it is
        return own
    place, remedy = _place(first), "Correct that value."
    if kind == _UNKNOWN:
        expected, got, remedy = "a known key", context["key"], context["remedy"]
    elif kind == "literal_error":
        same = [fault for fault in others if _place(fault) == place and fault["type"] == kind]
        expected = _names([context["expected"], *(fault["ctx"]["expected"] for fault in same)])
    elif kind == "union_tag_invalid":
        expected, got = _names([context["expected_tags"]]), context["tag"]
    elif kind in ("missing", "union_tag_not_found"):
        expected, got, remedy = "a value", None, "Add that key."
    else:
        expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else first["msg"]
        if expected == "a list" and isinstance(got, str | int | float):
            remedy = f"Write it in brackets: [{got}]."
        elif expected == "text" and isinstance(got, int | float):
            remedy = "Write it in quotes."
    said = "nothing" if got is None else repr(got)[:80]
    what = f"the unknown key {said}" if kind == _UNKNOWN else said
    return ConfigError(f"{source}: {place}", expected=expected, got=what, remedy=remedy)


def _place(fault: ErrorDetails) -> str:
    """The keys that lead to a fault."""
    keys = [str(part) for part in fault["loc"]]
    if "[key]" in keys:  # of a mapping; behind it pydantic says what it tried
        keys = keys[: keys.index("[key]")]
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        keys.append(fault["ctx"]["discriminator"].strip("'"))
    if fault["type"] == _UNKNOWN:
        keys.append(fault["ctx"]["key"])
    return ".".join(keys)


def _names(lists: Sequence[str]) -> str:
    """Names that pydantic lists, in one list without quotes."""
    *names, last = [name.strip("'") for names in lists for name in re.split(", | or ", names)]
    return f"{', '.join(names)} or {last}" if names else last
