"""Frozen dataclasses back out of JSON, checked against their own annotations.

Takes what :func:`json.loads` gave of :func:`dataclasses.asdict`; whatever does not fit is a ValueError that names the
place. Knows no report.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def rebuilt(wanted: type[T], value: object, place: str = "report") -> T:
    """``value`` as the dataclass ``wanted``: str, int, float, bool, None, tuples, string-keyed mappings, dataclasses.

    Raises ValueError.
    """
    found: T = _rebuilt(wanted, value, place)
    return found


def _rebuilt(wanted: Any, value: object, place: str) -> Any:
    if isinstance(wanted, type) and is_dataclass(wanted):
        return _dataclass(wanted, value, place)
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is types.UnionType:
        return _optional(arguments, value, place)
    if origin is tuple:
        return _tuple(arguments, value, place)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong(place, "a table", value)
        return {str(key): _rebuilt(arguments[1], one, f"{place}.{key}") for key, one in value.items()}
    return _plain(wanted, value, place)


def _dataclass(wanted: type, value: object, place: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(place, "a table", value)
    hints = get_type_hints(wanted)
    known = {field.name for field in fields(wanted)}
    if unknown := sorted(set(value) - known):
        raise ValueError(f"{place} has the unknown key {unknown[0]!r}")
    try:
        return wanted(**{key: _rebuilt(hints[key], one, f"{place}.{key}") for key, one in value.items()})
    except TypeError as error:
        raise ValueError(f"{place} lacks a key: {error}") from error


def _optional(arguments: tuple[Any, ...], value: object, place: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    return _rebuilt(next(one for one in arguments if one is not type(None)), value, place)


def _tuple(arguments: tuple[Any, ...], value: object, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(place, "a list", value)
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(arguments) != len(value):
        raise _wrong(place, f"a list of {len(arguments)}", value)
    return tuple(
        _rebuilt(one, item, f"{place}[{i}]") for i, (one, item) in enumerate(zip(arguments, value, strict=True))
    )


def _plain(wanted: Any, value: object, place: str) -> Any:
    # A bool is an int to Python, and a whole number is a fine float.
    if wanted is float and type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    if type(value) is not wanted or wanted is float:
        raise _wrong(
            place, {str: "a string", int: "an integer", float: "a number", bool: "a truth value"}[wanted], value
        )
    return value


def _wrong(place: str, what: str, value: object) -> ValueError:
    return ValueError(f"{place} must be {what}, not {value!r:.60}")
