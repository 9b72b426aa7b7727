"""What pydantic finds wrong with settings, in words for those who have written them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Place = tuple[str | int, ...]
"""Keys and positions, from the outermost."""

_WORDS = {
    "Value error, ": "",
    "Input should": "should",
    "Tuple should": "should",
    "a valid tuple": "a list",
    " after validation": "",
}


def explained(error: ValidationError, model: type[BaseModel], content: Any) -> str:
    """Everything that is wrong: where it is, what should be there, and what is.

    What only follows from something else is left out: that a key is missing which is there under a name that is nearly
    its own, and that a list is empty whose entries are wrong.

    Args:
        error: what was raised.
        model: of what `content` should be.
        content: what was validated.
    """
    found: dict[Place, list[ErrorDetails]] = {}
    for problem in error.errors():
        found.setdefault(_place(problem, content), []).append(problem)
    unknown = [place for place, (first, *_) in found.items() if first["type"] == "extra_forbidden"]
    known = {place: _keys_beside(place, model) for place in unknown}
    meant = {place: difflib.get_close_matches(str(place[-1]), known[place], 1) for place in unknown}
    misspelt = {(*place[:-1], *close) for place, close in meant.items()}
    told = []
    for place, problems in found.items():
        where = ".".join(map(str, place))
        if place in known:
            hint = f"did you mean {meant[place][0]!r}?" if meant[place] else f"known there: {', '.join(known[place])}"
            told.append(f"unknown key {where!r}; {hint}")
        elif problems[0]["type"] == "missing":
            told += [] if place in misspelt else [f"{where} is missing"]
        elif not any(other[: len(place)] == place for other in found if other != place):
            told.append(f"{where}: {_what(problems)}".removeprefix(": "))
    return "; ".join(told)


def _place(problem: ErrorDetails, content: Any) -> Place:
    """Where a problem is, without what pydantic says of the types that it has tried there."""
    place: list[str | int] = []
    names = problem["loc"]
    missing = names[-1:] if problem["type"] == "missing" else ()
    for name in names:
        if isinstance(content, dict) and (name in content or name in missing):
            content = content.get(name)
        elif isinstance(content, list | tuple) and isinstance(name, int):
            content = content[name] if name < len(content) else None
        else:
            continue
        place.append(name)
    return tuple(place)


def _what(problems: Sequence[ErrorDetails]) -> str:
    """What is wrong in one place, where a value may be of several types, and is of none."""
    what = ", or ".join(dict.fromkeys(map(_text, problems)))
    kind, given = problems[0]["type"], problems[0]["input"]
    told = isinstance(given, str) and repr(given) in what
    return what if told or (kind == "value_error" and isinstance(given, dict)) else f"{what} (got {given!r})"


def _text(problem: ErrorDetails) -> str:
    if problem["type"] == "model_type":
        return "should be a mapping of settings"
    text = problem["msg"].rstrip(".")
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    return text


def _keys_beside(place: Place, model: Any) -> list[str]:
    """The keys that are known where an unknown one was given."""
    for key in place[:-1]:
        if isinstance(key, str) and key in model.model_fields:
            annotation = model.model_fields[key].annotation
            inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
            model = inner[0] if inner else annotation
    return list(getattr(model, "model_fields", {}))
