"""What math-verify decides too kindly or too strictly, decided exactly. Runs in its process.

math-verify 0.9.0 compares differences with 15 digits and takes tiny ones for zero, so 2^-60 would
be 0. It does not know that 2x = 4 and x = 2 are one equation with two scales.
"""

from sympy import Eq, FiniteSet, Interval, MatrixBase, Number, Rational, Tuple, simplify

DIGITS = 130  # of the numbers that are compared
TOLERANCE = Rational(1, 10**110)  # relative; rounding at 130 digits is far below it


def certainly_different(one, other) -> bool:
    """Whether two sympy objects that look equal differ in a digit; False where nobody can tell."""
    if isinstance(one, MatrixBase) and isinstance(other, MatrixBase):
        return one.shape != other.shape or _any_different(one.flat(), other.flat())
    if isinstance(one, Tuple) and isinstance(other, Tuple):
        return len(one) != len(other) or _any_different(one.args, other.args)
    if isinstance(one, Interval) and isinstance(other, Interval):
        return _any_different((one.start, one.end), (other.start, other.end))
    if isinstance(one, FiniteSet) and isinstance(other, FiniteSet) and len(one) == len(other):
        values = [sorted(map(_value, members.args)) for members in (one, other)]
        return _any_different(*values)
    return _numbers_differ(one, other)


def _any_different(ones, others) -> bool:
    return any(certainly_different(*pair) for pair in zip(ones, others, strict=True))


def _value(expression) -> Number:
    value = expression.evalf(DIGITS)
    if not value.is_Number:
        raise TypeError(f"{expression} is no number")
    return value


def _numbers_differ(one, other) -> bool:
    """Compares values; those of expressions with variables at two points."""
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    for start in (3, 7):
        point = {
            symbol: Rational(start + 2 * place, 5 + place) for place, symbol in enumerate(symbols)
        }
        a, b = one.subs(point), other.subs(point)
        difference = a - b
        if difference.is_Rational:
            if difference != 0:
                return True
            continue
        difference = abs(difference.evalf(DIGITS, maxn=600))
        size = max(abs(a.evalf(DIGITS)), abs(b.evalf(DIGITS)))
        if not (difference.is_Number and size.is_Number):
            return False
        if difference > TOLERANCE * size:
            return True
    return False


def one_equation_scaled(one, other) -> bool:
    """Whether one equation is the other, multiplied by a number that is not zero."""
    if not (isinstance(one, Eq) and isinstance(other, Eq)):
        return False
    mine, theirs = one.lhs - one.rhs, other.lhs - other.rhs
    if simplify(theirs) == 0 or simplify(mine) == 0:
        return False
    ratio = simplify(mine / theirs)
    return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)


def near(one, other, tolerance: Rational) -> bool:
    """Whether two numbers differ by at most `tolerance`."""
    difference = abs((one - other).evalf(DIGITS))
    return bool(difference.is_Number and difference <= tolerance)
