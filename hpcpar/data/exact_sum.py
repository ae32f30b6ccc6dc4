"""Sums of numbers without rounding, so that neither order nor partition can be seen in them.

A float64 is a whole number of 53 bits times a power of two. Cut into digits of 27 bits, such numbers can be
multiplied and added in integers: digits that have the same exponent are added up by numpy, and the few sums
become one Python integer, in units of the smallest product of two float64, 2 to the power of -2252::

    value    m1 * 2^(e+27)  +  m0 * 2^e         weight    n1 * 2^(f+27)  +  n0 * 2^f
    product  m1*n1 * 2^(e+f+54)  +  (m1*n0 + m0*n1) * 2^(e+f+27)  +  m0*n0 * 2^(e+f)

Integers add exactly and in any order; the quotient of two of them is rounded once, at the end. Infinities and
NaN, which no integer holds, are kept aside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["UNITS_OF_ONE", "ExactSum", "quotient"]

IntArray = npt.NDArray[np.int64]
Digits = list[tuple[IntArray, IntArray]]  # digits of at most 27 bits and a sign, and their exponents

_BITS = 27
_MASK = (1 << _BITS) - 1
_UNIT = 2252  # frexp of the smallest float64 gives exponent -1073, of 53 bits more: twice 1126
UNITS_OF_ONE = 1 << _UNIT
_FEW = 16  # such as one loss for each step: numpy would take longer
_AT_ONCE = 1 << 22  # sums of so many digits are exact in the float64 that numpy.bincount adds in


@dataclass
class ExactSum:
    """A sum of products: ``units`` times 2 to the power of -2252, and ``beside`` for what is not finite."""

    units: int = 0
    beside: float = 0.0

    def add(self, values: npt.NDArray[Any], weights: npt.NDArray[Any]) -> None:
        """Add the sum of ``values * weights``: flat arrays of integers, booleans or floats. Local."""
        for start in range(0, values.size, _AT_ONCE):
            self._add_some(values[start : start + _AT_ONCE], weights[start : start + _AT_ONCE])

    def merge(self, other: ExactSum) -> None:
        """Add another sum. Local."""
        self.units += other.units
        self.beside += other.beside

    def _add_some(self, values: npt.NDArray[Any], weights: npt.NDArray[Any]) -> None:
        finite = np.isfinite(values) & np.isfinite(weights)
        if not finite.all():
            with np.errstate(invalid="ignore", over="ignore"):
                odd = values[~finite].astype(np.float64) * weights[~finite].astype(np.float64)
                self.beside += float(np.add.reduce(odd))
            values, weights = values[finite], weights[finite]
        if values.size <= _FEW:
            for pair in zip(values.tolist(), weights.tolist(), strict=True):
                self.units += _product(*pair)
            return
        for digits, exponents in _digits(values):
            for others, other_exponents in _digits(weights):
                self._add_products(digits * others, exponents + other_exponents)

    def _add_products(self, products: IntArray, exponents: IntArray) -> None:
        """Products of at most 54 bits."""
        if not products.size:
            return
        lowest = int(exponents.min())
        places = exponents - lowest
        for part, shift in ((products >> _BITS, _BITS), (products & _MASK, 0)):
            sums = np.bincount(places, part)
            for place in np.flatnonzero(sums):
                self.units += int(sums[place]) << (lowest + int(place) + shift + _UNIT)


def quotient(numerator: ExactSum, denominator: ExactSum) -> float:
    """One sum by another, rounded once. The denominator must not be zero. Local."""
    if numerator.beside or denominator.beside:  # infinite, or not a number
        top = numerator.beside or _sign(numerator.units)
        bottom = denominator.beside or _sign(denominator.units)
        return top / bottom
    try:
        return numerator.units / denominator.units  # Python divides whole numbers with one rounding
    except OverflowError:
        return math.inf * _sign(numerator.units) * _sign(denominator.units)


def _product(value: float, weight: float) -> int:
    """The exact product of two finite numbers, in units. It is what numpy does for many."""
    top, bottom = value.as_integer_ratio()
    other_top, other_bottom = weight.as_integer_ratio()  # the bottoms are powers of two
    return top * other_top << (_UNIT + 2 - bottom.bit_length() - other_bottom.bit_length())


def _sign(units: int) -> float:
    return -1.0 if units < 0 else 1.0


def _digits(numbers: npt.NDArray[Any]) -> Digits:
    """Digits of numbers, the most significant ones with the sign, so that their sum is the number."""
    if numbers.dtype.kind == "f":
        fractions, exponents = np.frexp(numbers.astype(np.float64))
        whole = np.ldexp(fractions, 53).astype(np.int64)
        low = exponents.astype(np.int64) - 53
        return [(whole >> _BITS, low + _BITS), (whole & _MASK, low)]
    nothing = np.zeros(len(numbers), np.int64)
    if numbers.dtype.kind == "b" or numbers.dtype.itemsize <= 2:
        return [(numbers.astype(np.int64), nothing)]
    wide = numbers if numbers.dtype == np.uint64 else numbers.astype(np.int64)
    kind = wide.dtype.type  # numpy would turn uint64 and int64 into floats
    parts = [wide >> kind(2 * _BITS), (wide >> kind(_BITS)) & kind(_MASK), wide & kind(_MASK)]
    shifts = (2 * _BITS, _BITS, 0)
    return [(part.astype(np.int64), nothing + shift) for part, shift in zip(parts, shifts, strict=True)]
