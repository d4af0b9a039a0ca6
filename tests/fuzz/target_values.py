"""Values that become Arrow: JSON of `/__call__` and of the command line, and Python values of callers."""

from __future__ import annotations

import datetime
import decimal
import json
import random
from typing import Any

import pyarrow as pa

from tests.fuzz.child import Box, Finding
from tests.fuzz.judge import core
from tests.fuzz.messages import random_type

TEXTS = ("", "a", "ä\0", "1", "-1", "1e9", "1e-999999999", "1e999999999", "NaN", "inf", "2020-01-01", "25:00:00", "P1D")
TEXTS += ("2020-01-01T00:00:00", "0001-01-01", "9999-12-31T23:59:59.999999+23:59", "PT1.5S", "PT99999999999999S", "=")
TEXTS += ("AAAA", "A", "\ud800", "9" * 400, "1_000", "0x1", "00:00:00", "12:30", "1" * 5000)
NUMBERS = (0, 1, -1, 127, 128, 255, 256, -129, 1 << 31, 1 << 63, -(1 << 63) - 1, 1 << 64, 10**400, 0.5, 1e308, 1e-320)
NUMBERS += (float("nan"), float("inf"), -0.0, 10**38, -(10**76))
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [None],
    [[]],
    [[None]],
    {"": None},
    [[1, 2]],
    [[1, 2, 3]],
    [1],
    {"a": 1},
)
ODD += (["a"], [["a"]], [["a", None]], [[None, 1]], {"key": "a", "value": 1}, [{"key": "a", "value": 1}], [("a",)])
PYTHON: tuple[Any, ...] = (
    b"x",
    bytearray(b"y"),
    (1, 2),
    {1, 2},
    decimal.Decimal("1e-999999999"),
    decimal.Decimal("1e9999"),
    decimal.Decimal("1.5"),
    decimal.Decimal("NaN"),
    decimal.Decimal("-0"),
    datetime.date(1, 1, 1),
    datetime.datetime(9999, 12, 31, 23, 59, 59, 999999),
    datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    datetime.time(23, 59, 59),
    datetime.timedelta.max,
    datetime.timedelta.min,
    object(),
    1j,
    range(3),
    pa.scalar(1),
    pa.array([1]),
    pa.MonthDayNano([1, 2, 3]),
    pa.MonthDayNano([2**31 - 1, -(2**31), 2**63 - 1]),
)
CALLED = (
    TypeError,
    ValueError,
    KeyError,
    ArithmeticError,
    AttributeError,
    pa.ArrowException,
)  # bad arguments, to callers


def good_value(rng: random.Random, dtype: pa.DataType, depth: int = 3) -> Any:
    """JSON that fits a type, as far as it has any."""
    of = pa.types
    if isinstance(dtype, pa.BaseExtensionType):
        return good_value(rng, dtype.storage_type, depth)
    if of.is_dictionary(dtype) or of.is_run_end_encoded(dtype):
        return good_value(rng, dtype.value_type, depth)
    if of.is_null(dtype) or of.is_union(dtype):
        return None
    if of.is_boolean(dtype):
        return rng.random() < 0.5
    if of.is_integer(dtype):
        return rng.randrange(100)
    if of.is_floating(dtype):
        return rng.choice((0.5, 1.0, 3))
    if of.is_decimal(dtype):
        return rng.choice(("0", "1", 1))
    if of.is_fixed_size_binary(dtype):
        import base64

        return base64.b64encode(bytes(dtype.byte_width)).decode()
    name = str(dtype)
    if "binary" in name.split("<")[0]:
        return rng.choice(("", "AAAA"))
    if "string" in name.split("<")[0]:
        return rng.choice(("", "a", "häß"))
    if of.is_timestamp(dtype):
        return "2020-01-01T00:00:00" + ("+00:00" if dtype.tz else "")
    if of.is_date(dtype):
        return "2020-01-01"
    if of.is_time(dtype):
        return "12:30:00"
    if of.is_duration(dtype):
        return "P1DT2S"
    if of.is_map(dtype):
        return {str(i): good_value(rng, dtype.item_type, depth - 1) for i in range(rng.randrange(3))}
    if of.is_struct(dtype):
        return {field.name: good_value(rng, field.type, depth - 1) for field in dtype}
    if dtype.num_fields and hasattr(dtype, "value_type"):
        count = dtype.list_size if of.is_fixed_size_list(dtype) else rng.randrange(4)
        return [good_value(rng, dtype.value_type, depth - 1) for _ in range(count)]
    return None


def spoiled(rng: random.Random, value: Any, python: bool) -> Any:
    """A value with something odd in one place."""
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [spoiled(rng, each, python) if i == at else each for i, each in enumerate(value)]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        at = rng.choice(list(value))
        return {key: spoiled(rng, each, python) if key == at else each for key, each in value.items()}
    if isinstance(value, list) and rng.random() < 0.1:
        return [value] * rng.choice((2, 5000))
    kinds: list[tuple[Any, ...]] = [TEXTS, NUMBERS, ODD]
    return rng.choice(rng.choice([*kinds, PYTHON] if python else kinds))


class Target:
    """One value a case, through `batch_from_json` or the converter of arguments."""

    def __init__(self, seed: str, box: Box) -> None:
        self.box = box
        rng = random.Random(f"values {seed}")
        self.types = [random_type(rng) for _ in range(300)]
        self.types += [
            pa.map_(pa.utf8(), pa.int64()),
            pa.list_(pa.map_(pa.utf8(), pa.utf8())),
            pa.decimal128(38, 2),
        ] * 5

    def case(self, rng: random.Random) -> str:
        """A value that fits, or nearly does."""
        dtype = rng.choice(self.types)
        python = rng.random() < 0.4
        good = rng.random() < 0.3
        value = good_value(rng, dtype)
        if not good:
            value = spoiled(rng, value, python)
        about = f"{'cell' if python else 'json'} {dtype} {value!r}".encode(errors="replace")
        return self.cell(dtype, value, about) if python else self.json(dtype, value, about, good)

    def json(self, dtype: pa.DataType, value: Any, about: bytes, good: bool) -> str:
        """What fits comes back the same."""
        schema = pa.schema([("v", dtype)])
        try:
            value = json.loads(json.dumps(value))
        except ValueError:
            return "refused"
        with self.box.ours(about):
            try:
                batch = core.batch_from_json({"v": value}, schema)
            except ValueError:
                return "good refused" if good else "refused"
        self.valid(batch.column(0), dtype)
        if not batch.schema.equals(schema):
            raise Finding(f"{batch.schema} for {schema}")
        rows = core.batch_to_json(batch)
        json.dumps(rows)
        return "accepted"

    def cell(self, dtype: pa.DataType, value: Any, about: bytes) -> str:
        """What a caller passes where only the Arrow type is known."""
        with self.box.ours(about):
            try:
                array = core._types_cell(value, None, dtype)
            except CALLED:
                return "refused"
        self.valid(array, dtype)
        return "accepted"

    def valid(self, array: Any, dtype: pa.DataType) -> None:
        """One value of the type."""
        array.validate(full=True)
        if len(array) != 1 or not array.type.equals(dtype):
            raise Finding(f"{len(array)} values of {array.type} for {dtype}")
