"""Numbers in text from a policy: a calculator (+ - * / // % ** and parentheses, exact, no `eval`), and the last one."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_BITS = 256
"""Of any numerator or denominator on the way."""


_NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?")
"""A number as models write it: 1,234 or -5 or 2.5; in "12-5" the minus belongs to what stands between."""


class CalculationError(ValueError):
    """The text is no calculation, or one that is too large; the message is short enough for a conversation."""


_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


def evaluate(text: str) -> Fraction:
    """The value of a calculation, as an exact fraction.

    Args:
        text: At most 200 characters, for example "12 * (3 + 4) / 5".

    Raises:
        CalculationError: Anything but numbers and + - * / // % ** ( ), a division by zero, or a number of more than 256
            bits on the way.
    """
    return _value(_parsed(text))


def constants(text: str) -> list[Fraction]:
    """The numbers that are written in a calculation, in order; raises like `evaluate`."""
    nodes = [n for n in ast.walk(_parsed(text)) if isinstance(n, ast.Constant)]
    return [_value(n) for n in sorted(nodes, key=lambda n: n.col_offset)]


def written(value: Fraction) -> str:
    """A value as text: whole numbers plainly, others rounded to six decimals."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**6)
    sign, (whole, part) = "-" if scaled < 0 else "", divmod(abs(scaled), 10**6)
    return f"{sign}{whole}.{part:06d}".rstrip("0").rstrip(".")


def last_number(text: str) -> str | None:
    """The last number in a text, without commas: "so 12 + 34 = 1,046." gives "1046"; None where there is none."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def _parsed(text: str) -> ast.expr:
    if len(text) > MAX_CHARACTERS:
        raise CalculationError(f"longer than {MAX_CHARACTERS} characters")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise CalculationError("not a calculation") from None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        if node.value != node.value or node.value in (float("inf"), float("-inf")):
            raise CalculationError("number too large")
        # The decimal that was written, not the nearest binary number.
        return _checked(Fraction(repr(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        a, b = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(a, b)
        if type(node.op) in _BINARY:
            if b == 0 and not isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
                raise CalculationError("division by zero")
            return _checked(_BINARY[type(node.op)](a, b))
    raise CalculationError("only numbers and + - * / // % ** ( ) are allowed")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise CalculationError("exponents must be whole numbers")
    n = exponent.numerator
    if base == 0 and n < 0:
        raise CalculationError("division by zero")
    # Known before it is computed: the power of 1, 0 and -1 stays small, and any other grows with the exponent.
    if abs(base) not in (0, 1) and abs(n) * (max(_bits(base), 2) - 1) > MAX_BITS:
        raise CalculationError("number too large")
    if abs(n) > 10**6:
        n = n % 2 or 2
    return _checked(base**n)


def _checked(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise CalculationError("number too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
