"""Reading JSON objects that people edit by hand: every error names the field and says what belongs there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from schedulers.errors import ScheduleError


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ScheduleError where it is none, holds NaN or a key twice."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except ScheduleError:
        raise
    except json.JSONDecodeError as error:
        raise ScheduleError(
            f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; the text may be cut off"
        ) from None
    except ValueError as error:
        raise ScheduleError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ScheduleError("not a schedule: the JSON is nested too deeply") from None


class Fields:
    """The fields of one JSON object, read one by one; `done` refuses those that nobody asked for.

    `where` is the object's place in the file ("stages[1]."), put before a field's name in errors.
    """

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, Mapping):
            place = where.rstrip(".") or "schedule"
            raise ScheduleError(f"{place}: expected an object in braces, found {describe(value)}")
        self._values: Mapping[str, Any] = value
        self._where = where
        self._read: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def path(self, name: str) -> str:
        return self._where + name

    def get(self, name: str) -> Any:
        """The value as it is. Raises ScheduleError when the field is missing."""
        self._read.append(name)
        if name not in self._values:
            raise ScheduleError(f"{self.path(name)}: this field is missing")
        return self._values[name]

    def number(self, name: str) -> float:
        return _number(self.get(name), self.path(name))

    def numbers(self, name: str) -> list[float]:
        return [_number(value, f"{self.path(name)}[{i}]") for i, value in enumerate(self.items(name))]

    def whole(self, name: str) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ScheduleError(f"{self.path(name)}: expected a whole number, found {describe(value)}")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise ScheduleError(f"{self.path(name)}: expected a text in quotes, found {describe(value)}")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            raise ScheduleError(f"{self.path(name)}: expected a list in brackets, found {describe(value)}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.get(name)
        if not isinstance(value, dict):
            raise ScheduleError(f"{self.path(name)}: expected an object in braces, found {describe(value)}")
        return value

    def given(self, name: str) -> bool:
        """Whether an optional field is there and not null; it counts as read either way."""
        self._read.append(name)
        return self._values.get(name) is not None

    def done(self) -> None:
        """Raises ScheduleError for a field that was not read."""
        for name in self._values:
            if name not in self._read:
                raise ScheduleError(
                    f"{self.path(name)}: unknown field; known here: {', '.join(dict.fromkeys(self._read))}"
                )


def describe(value: Any) -> str:
    """A short text of a JSON value for an error message."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ScheduleError(f"{path}: expected a number, found {describe(value)}")
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise ScheduleError(f"{path}: expected a finite number, found {describe(value)}")
    return number


def _refuse_constant(name: str) -> Any:
    raise ScheduleError(f"{name} is not allowed in a schedule; write null for a number that is not known")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ScheduleError(f"{name}: this field is given twice in one object")
        values[name] = value
    return values
