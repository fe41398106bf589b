"""Instructions that compute registers of registers, each thread for itself.

Exact where PTX is: integers, comparisons, conversions, and float32 sums, products and fused
products rounded to nearest. Where PTX allows an error (`div.full`, `ex2.approx`, `sqrt.approx`, at
most 2 units in the last place) the result is the correctly rounded one, so a device may differ in
rounding. NaN that is computed is the canonical one. `.ftz` flushes subnormal operands and results.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: How a register's bits are seen. bfloat16 stays bits.
NUMPY: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    "f16": np.float16,
    "f32": np.float32,
    **{f"{k}{n}": getattr(np, f"uint{n}") for k in "bu" for n in (8, 16, 32, 64)},
    **{f"s{n}": getattr(np, f"int{n}") for n in (8, 16, 32, 64)},
}
_CANONICAL_NAN = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """sources, result : PTX types; compute : of arrays, one element a thread"""

    sources: tuple[str, ...]
    result: str
    compute: Callable[..., Array]


def operation(opcode: str) -> Operation | None:
    """What an opcode computes; None if it is not one of these instructions."""
    for pattern, build in _TABLE:
        match = re.fullmatch(pattern, opcode)
        if match:
            return build(*match.groups())
    return None


# ---- integers ------------------------------------------------------------------------------------

_INTEGERS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "rem": np.fmod,  # has the dividend's sign
}
_BITS: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _integer(name: str, kind: str) -> Operation:
    return Operation((kind, kind), kind, _INTEGERS[name])


def _bitwise(name: str, kind: str) -> Operation:
    return Operation((kind, kind), kind, _BITS[name])


def _wide(name: str, kind: str, bits: str) -> Operation:
    double = f"{kind}{2 * int(bits)}"

    def product(x: Array, y: Array) -> Array:
        return np.asarray(x.astype(NUMPY[double]) * y.astype(NUMPY[double]))

    single = kind + bits
    if name == "mul":
        return Operation((single, single), double, product)
    return Operation((single, single, double), double, lambda x, y, z: product(x, y) + z)


def _high(kind: str) -> Operation:
    """The upper half of the product."""
    width = int(kind[1:])
    exact: Any = NUMPY[f"{kind[0]}64"] if width == 32 else object  # integers of any length

    def product(x: Array, y: Array) -> Array:
        return np.asarray((x.astype(exact) * y.astype(exact)) >> width).astype(NUMPY[kind])

    return Operation((kind, kind), kind, product)


def _shift(name: str, kind: str) -> Operation:
    """Distances beyond the width leave nothing but the sign."""
    width = int(kind[1:])

    def shifted(x: Array, distance: Array) -> Array:
        by = np.minimum(distance, np.uint32(width - 1)).astype(x.dtype)
        if name == "shr" and kind[0] == "s":
            return np.asarray(x >> by)
        moved = x << by if name == "shl" else x >> by
        return np.asarray(np.where(distance >= width, x.dtype.type(0), moved))

    return Operation((kind, "u32"), kind, shifted)


def _field(kind: str) -> Operation:
    """Bits start to start + length, of which the last is the sign of a signed field."""

    def extracted(x: Array, start: Array, length: Array) -> Array:
        if (start + length > 32).any() or (length == 0).any():
            raise NotImplementedError("a bit field beyond its register, or an empty one")
        up = np.uint32(32) - start - length
        moved = (x.view(np.uint32) << up).view(x.dtype)
        return np.asarray(moved >> (np.uint32(32) - length).astype(x.dtype))

    return Operation((kind, "u32", "u32"), kind, extracted)


# ---- float32 -------------------------------------------------------------------------------------


def _canonical(x: Array) -> Array:
    nan = np.isnan(x)
    if nan.any():
        x = np.where(nan, _CANONICAL_NAN.view(np.float32), x)
    return x


def _flushed(x: Array) -> Array:
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, (x.view(np.uint32) & _SIGN).view(np.float32), x)


def _fused(x: Array, y: Array, z: Array) -> Array:
    """x * y + z rounded once: the float64 sum is rounded to odd, so that float32 sees its rest."""
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + addend
    back = total - product
    rest = (product - (total - back)) + (addend - back)
    even = (total.view(np.int64) & 1) == 0
    odd = np.isfinite(total) & (rest != 0) & even
    toward = np.where(rest > 0, np.inf, -np.inf)
    return np.where(odd, np.nextafter(total, toward), total).astype(np.float32)


def _largest(x: Array, y: Array) -> Array:
    """The other of a NaN; 0.0 of both zeros."""
    both = (x.view(np.uint32) & y.view(np.uint32)).view(np.float32)
    return np.where(x == y, both, np.fmax(x, y))


def _smallest(x: Array, y: Array) -> Array:
    both = (x.view(np.uint32) | y.view(np.uint32)).view(np.float32)
    return np.where(x == y, both, np.fmin(x, y))


def _exp2(x: Array) -> Array:
    return np.exp2(x.astype(np.float64)).astype(np.float32)


_FLOATS: dict[str, tuple[int, Callable[..., Array]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "div.full": (2, np.divide),
    "max": (2, _largest),
    "max.NaN": (2, lambda x, y: np.where(np.isnan(x) | np.isnan(y), x + y, _largest(x, y))),
    "min": (2, _smallest),
    "fma.rn": (3, _fused),
    "ex2.approx": (1, _exp2),
    "sqrt.approx": (1, np.sqrt),
}


def _float(name: str, flush: str | None) -> Operation:
    count, function = _FLOATS[name]
    if flush is None:
        return Operation(("f32",) * count, "f32", lambda *x: _canonical(function(*x)))
    return Operation(
        ("f32",) * count, "f32", lambda *x: _canonical(_flushed(function(*map(_flushed, x))))
    )


# ---- comparisons and choices ---------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": lambda x, y: (x < y) | (x > y),  # false of NaN
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "neu": np.not_equal,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
}


def _compared(name: str, kind: str) -> Operation:
    compare = _COMPARISONS[name]
    if kind == "bf16":
        return Operation(
            ("b16", "b16"), "pred", lambda x, y: compare(from_bfloat16(x), from_bfloat16(y))
        )
    return Operation((kind, kind), "pred", compare)


def _chosen(kind: str) -> Operation:
    def chosen(x: Array, y: Array, first: Array) -> Array:
        return np.where(first, x, y)

    return Operation((kind, kind, "pred"), kind, chosen)


# ---- conversions ---------------------------------------------------------------------------------


def from_bfloat16(bits: Array) -> Array:
    return np.asarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: Array) -> Array:
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded >> np.uint32(16)).astype(np.uint16)


def _pair(low: Array, high: Array) -> Array:
    return np.asarray(low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16)))


def _of_e5m2(byte: Array) -> Array:
    return np.asarray(byte << np.uint16(8))


def _of_e4m3(byte: Array) -> Array:
    """Bits of the float16 that a finite e4m3 is exactly; its one NaN is 0x7FFF."""
    sign, rest = (byte & np.uint16(0x80)) << np.uint16(8), byte & np.uint16(0x7F)
    # Exponents are 8 apart: a product with 2**8 of the bits in float16's places.
    half = ((rest << np.uint16(7)).view(np.float16) * np.float16(256)).view(np.uint16)
    return np.asarray(np.where(rest == 0x7F, np.uint16(0x7FFF), half) | sign)


def _of_two(convert: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: _pair(convert(x & np.uint16(0xFF)), convert(x >> np.uint16(8)))


def _to_int32(x: Array) -> Array:
    """Toward zero, out of range to the nearest there is, NaN to 0."""
    whole = np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=2e9 * 2, neginf=-4e9))
    return np.clip(whole, -(2**31), 2**31 - 1).astype(np.int32)


def _to_tf32(x: Array) -> Array:
    """The 10 leading bits of the mantissa, ties away from zero."""
    rounded = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, x.view(np.uint32))


def _resized(target: str, source: str) -> Operation:
    return Operation((source,), target, lambda x: x.astype(NUMPY[target]))


_CONVERSIONS = {
    "cvt.rzi.s32.f32": Operation(("f32",), "s32", _to_int32),
    "cvt.rmi.f32.f32": Operation(("f32",), "f32", np.floor),
    "cvt.rmi.ftz.f32.f32": Operation(("f32",), "f32", lambda x: np.floor(_flushed(x))),
    "cvt.f32.f16": Operation(("f16",), "f32", lambda x: x.astype(np.float32)),
    "cvt.rn.f16.f32": Operation(("f32",), "f16", lambda x: x.astype(np.float16)),
    "cvt.f32.bf16": Operation(("b16",), "f32", from_bfloat16),
    "cvt.rn.bf16.f32": Operation(("f32",), "b16", to_bfloat16),
    "cvt.bf16.f16": Operation(("f16",), "b16", lambda x: to_bfloat16(x.astype(np.float32))),
    "cvt.rn.bf16x2.f32": Operation(
        ("f32", "f32"), "b32", lambda high, low: _pair(to_bfloat16(low), to_bfloat16(high))
    ),
    "cvt.rn.f16x2.e5m2x2": Operation(("b16",), "b32", _of_two(_of_e5m2)),
    "cvt.rn.f16x2.e4m3x2": Operation(("b16",), "b32", _of_two(_of_e4m3)),
    "cvt.rna.tf32.f32": Operation(("f32",), "b32", _to_tf32),
}

_INT = r"[su](?:16|32|64)"
_TABLE: tuple[tuple[str, Callable[..., Operation]], ...] = (
    (rf"(add|sub|mul\.lo|max|min|rem)\.({_INT})", _integer),
    (r"(and|or|xor)\.(b16|b32|b64|pred)", _bitwise),
    (r"not\.(b16|b32|b64|pred)", lambda kind: Operation((kind,), kind, np.invert)),
    (r"neg\.(s32|s64)", lambda kind: Operation((kind,), kind, np.negative)),
    (r"(mul|mad)\.wide\.([su])(16|32)", _wide),
    (
        r"mad\.lo\.([su](?:32|64))",
        lambda kind: Operation((kind,) * 3, kind, lambda x, y, z: x * y + z),
    ),
    (r"mul\.hi\.([su](?:32|64))", _high),
    (r"(shl)\.(b16|b32|b64)", _shift),
    (rf"(shr)\.({_INT})", _shift),
    (r"bfe\.([su]32)", _field),
    (
        r"popc\.b32",
        lambda: Operation(("b32",), "u32", lambda x: np.bitwise_count(x).astype(np.uint32)),
    ),
    (
        r"(add|sub|mul|max(?:\.NaN)?|min|div\.full|fma\.rn|ex2\.approx|sqrt\.approx)(\.ftz)?\.f32",
        _float,
    ),
    (r"neg\.f32", lambda: Operation(("b32",), "b32", lambda x: x ^ _SIGN)),
    (r"abs\.f32", lambda: Operation(("b32",), "b32", lambda x: x & ~_SIGN)),
    (
        rf"setp\.(eq|ne|lt|le|gt|ge)\.({_INT}|b16|b32|b64|f16|bf16|f32)",
        _compared,
    ),
    (r"setp\.(neu|ltu|leu|gtu|geu|nan|num)\.(f16|bf16|f32)", _compared),
    (r"selp\.(b16|b32|b64|f32)", _chosen),
    (
        r"mov\.(pred|b16|b32|b64|u16|u32|u64|f32)",
        lambda kind: Operation((kind,), kind, lambda x: x),
    ),
    (r"cvt\.rn\.(f32)\.([su]32)", _resized),
    (rf"cvt\.({_INT})\.({_INT})", _resized),
    *((re.escape(name), lambda found=found: found) for name, found in _CONVERSIONS.items()),
)
