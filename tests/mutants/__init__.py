"""Catalogues of defects that the code could have, each found by its tests; and what the catalogues share."""

import inspect
from types import ModuleType


def mutated(module: ModuleType, old: str, new: str) -> str:
    """The source of a module with one text replaced; a text that does not stand there just once is an error."""
    return replaced(inspect.getsource(module), module.__name__, old, new)


def replaced(source: str, place: str, old: str, new: str) -> str:
    """The same of a source that lies at this place."""
    if source.count(old) != 1:
        raise LookupError(f"{old!r} stands {source.count(old)} times in {place}, not once")
    return source.replace(old, new)
