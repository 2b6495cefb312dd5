"""The calculator: exact, and harmless whatever a policy writes."""

import ast
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.envs.text.calculation import CalculationError, constants, evaluate, written

NUMBERS = st.integers(0, 99).map(str)
CALCULATIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(lambda x: f"({x[0]} {x[1]} {x[2]})"),
        inner.map(lambda x: f"-{x}"),
    ),
    max_leaves=8,
)


class Exact(ast.NodeTransformer):
    """Every number as a Fraction, so that Python itself computes exactly."""

    def visit_Constant(self, node):
        return ast.Call(ast.Name("Fraction", ast.Load()), [node], [])


@given(CALCULATIONS)
def test_it_computes_what_python_computes(text):
    tree = ast.fix_missing_locations(Exact().visit(ast.parse(text, mode="eval")))
    try:
        expected = eval(compile(tree, "", "eval"), {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(CalculationError, match="division by zero"):
            evaluate(text)
        return
    assert evaluate(text) == expected


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("12*(3+4)", "84"), (" 1/3 ", "0.333333"), ("2/3", "0.666667"), ("-7//2", "-4"), ("7 % 4", "3"), ("0.1+0.2", "0.3"), ("-1/2", "-0.5"),
        ("2**10", "1024"), ("2**-2", "0.25"), ("1**999999999999", "1"), ("(-1)**999999999999", "-1"), ("(-1)**1000000000000", "1"), ("0**5", "0"), ("0**0", "1"), ("5**0", "1"),
    ],
)  # fmt: skip
def test_it_writes_results_plainly(text, result):
    assert written(evaluate(text)) == result


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a calculation"), ("2 +", "not a calculation"), ("2; 3", "not a calculation"), ("\0", "not a calculation"), ("(" * 99, "not a calculation"),
        ("__import__('os').system('true')", "only numbers"), ("abs(1)", "only numbers"), ("x", "only numbers"), ("True", "only numbers"), ("1j", "only numbers"),
        ("'a' * 9", "only numbers"), ("[1]", "only numbers"), ("1 < 2", "only numbers"), ("1 << 99", "only numbers"), ("1 if 1 else 2", "only numbers"), ("(x := 1)", "only numbers"),
        ("1/0", "division by zero"), ("1%0", "division by zero"), ("1//(2-2)", "division by zero"), ("0**-1", "division by zero"),
        ("9**9**9**9", "number too large"), ("9" * 100, "number too large"), ("1e999", "number too large"), ("1e300", "number too large"), ("2**257", "number too large"), ("(1/3)**200", "number too large"),
        ("2**0.5", "exponents must be whole"), ("1+" * 100 + "1", "longer than 200"),
    ],
)  # fmt: skip
def test_whatever_else_is_refused_at_once(text, reason):
    begun = time.monotonic()
    with pytest.raises(CalculationError, match=reason):
        evaluate(text)
    assert time.monotonic() - begun < 0.5


@given(st.text(alphabet="0123456789+-*/%(). e_xj=<>[]{}'\"", max_size=40))
def test_no_text_does_anything_but_come_to_a_number_or_be_refused(text):
    try:
        assert isinstance(evaluate(text), Fraction)
    except CalculationError as error:
        assert str(error)


def test_the_numbers_of_a_calculation_are_told_in_order():
    assert constants("(3 + 20) * 3 - 1.5") == [3, 20, 3, Fraction(3, 2)]
