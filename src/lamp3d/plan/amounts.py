"""Amounts as people write and read them."""

from __future__ import annotations

import math
import re

from lamp3d.errors import ConfigError

_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    f"{letter}{i}B": (1024 if i else 1000) ** (power + 1) for power, letter in enumerate("KMGT") for i in ("", "I")
}


def parse_bytes(text: str | int) -> int:
    """Bytes from a number or a text such as ``"16GB"`` or ``"15.5 GiB"``.

    Raises:
        ConfigError: the text is not an amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or (unit := match[2].upper()) not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{text!r} is not an amount of memory; write it like 16GB or 15.5GiB.")
    return round(float(match[1]) * _UNITS[unit])


def counted(number: int, of: str) -> str:
    """So many of something: "1 device", "2 micro-batches"."""
    return f"{number} {of}" + ("" if number == 1 else "es" if of.endswith("ch") else "s")


def format_bytes(count: float, *, up: bool = False) -> str:
    """A number of bytes for people: three digits, in powers of ten; with ``up`` never less than ``count``."""
    for power, unit in enumerate(("B", "kB", "MB", "GB", "TB")):
        size = 1000**power
        digits = 0 if unit == "B" or count >= 99.95 * size else 1 if count >= 9.995 * size else 2
        exact = math.ceil(count) * 10**digits  # a whole number, which does not round
        shown = -(-exact // size) / 10**digits if up else round(count / size, digits)
        if shown < 1000 or unit == "TB":
            break
    return f"{shown:g} {unit}"
