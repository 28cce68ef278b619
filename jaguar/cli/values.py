"""Types of words on the command line: each function turns text into a value, or says what would be right."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaguar.trainer.literals import keyword_arguments

_MOST = 2**31 - 1
_TRUE, _FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")


def filled(text: str) -> str:
    """A name or a path; an empty one is a variable of the shell that was never set."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; leave the flag out for its default")
    return text


def unescaped(text: str) -> str:
    r"""The text, with a new line for every \n."""
    return filled(text).replace("\\n", "\n")


def boolean(text: str) -> bool:
    """True or false, in any of the usual words."""
    if (word := text.casefold()) not in _TRUE + _FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return word in _TRUE


def whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """A type: whole numbers in a range."""

    def convert(text: str) -> int:
        digits = text.removeprefix("-")
        value = int(text) if digits.isdecimal() and digits.isascii() and len(digits) < 20 else None
        if value is None or not least <= value <= most:
            small = most == _MOST and (value is None or value < least)
            bounds = f"of at least {least}" if small else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return value

    return convert


natural, positive = whole(0), whole(1)
seed = whole(0, 2**32 - 1)  # what numpy takes


def number_or_auto(text: str) -> float | str:
    """A type: a finite number, or "auto"."""
    if text == "auto":
        return text
    try:
        return finite(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a finite number nor 'auto'") from None


def number(least: float = -math.inf, below: float = math.inf, *, above: float = -math.inf) -> Callable[[str], float]:
    """A type: finite numbers of at least `least`, above `above` and below `below`."""
    bounds = [f"of at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    bounds += [f"below {below:g}"] * (below < math.inf)

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= least and above < value < below):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {' and '.join(bounds)}".rstrip())
        return value

    return convert


finite = number()


def coordinates(text: str) -> int | float:
    """A number of coordinates, or a fraction of them."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value):
                return value
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of coordinates (100) nor a fraction (0.01)")


def warm_up(text: str) -> int | float:
    """A number of steps, or a share of the run."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        return natural(text)
    with contextlib.suppress(argparse.ArgumentTypeError):
        return number(0.0, 1.0)(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0 (steps), nor a share below 1")


def dtype(text: str) -> str:
    """The name of a dtype, with or without torch in front."""
    return text.removeprefix("torch.")


def json_object(text: str) -> dict[str, Any]:
    """Keyword arguments, as JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, as in '{{\"num_cycles\": 2}}'")
    return value


def keywords(text: str) -> dict[str, Any]:
    """Keyword arguments, as key=value or JSON."""
    try:
        return keyword_arguments(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def json_or_file(text: str) -> str:
    """A JSON object, or the path of a file that holds one."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        json_object(text)
        return text
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a JSON object nor a file")
    return text
