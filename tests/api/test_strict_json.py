"""Strict JSON by itself: how long it takes over large bodies. What it refuses is in test_json_bodies.py."""

import json
import time

import pytest

from app.api.strict_json import strict_json
from app.errors import InvalidRequest

LINEAR_SECONDS = 5.0  # on a busy machine; the square of it would be minutes


def test_name_that_occurs_twice_among_very_many_is_found_in_linear_time() -> None:
    members = ", ".join(f'"{number}": 0' for number in range(200_000))
    began = time.perf_counter()

    with pytest.raises(InvalidRequest, match='"199999" occurs twice'):
        strict_json(f'{{{members}, "199999": 1}}'.encode())

    assert time.perf_counter() - began < LINEAR_SECONDS


def test_text_that_cannot_be_stored_is_found_among_very_many_numbers() -> None:
    content = {"data": [[0.5] * 200_000, {"name\x00": 1}]}
    began = time.perf_counter()

    with pytest.raises(InvalidRequest, match="NUL character") as refused:
        strict_json(json.dumps(content).encode())

    assert [error.pointer for error in refused.value.errors] == ["#/data/1"]
    assert time.perf_counter() - began < LINEAR_SECONDS


def test_a_whole_number_is_one_however_it_is_written() -> None:
    members = strict_json(b'{"a": 5.0, "b": 5e1, "c": -0.0, "d": 5.5, "e": 9007199254740992.0, "f": 1e300, "g": [1.0]}')

    assert {name: type(value) for name, value in members.items() if name != "g"} == {
        "a": int,
        "b": int,
        "c": int,
        "d": float,
        "e": int,
        "f": float,  # not every reader would keep it
    }
    assert members["a"] == 5
