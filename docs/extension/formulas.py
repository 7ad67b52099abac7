"""Formulas as docstrings write them, `y = x / sqrt(mean(x**2) + eps)`, in MathML, which browsers show by themselves."""

import ast
import html
import re

# Names, calls and fractions need no brackets: a fraction has lines of its own.
PRECEDENCE = {ast.Add: 1, ast.Sub: 1, ast.Mult: 2, ast.Div: 2, ast.USub: 3, ast.Pow: 4}
OPERATORS = {ast.Add: "+", ast.Sub: "\N{MINUS SIGN}", ast.Mult: "\N{DOT OPERATOR}"}
ATOM = 5


class NotAFormulaError(Exception):
    """Raised for Python that has no notation here."""


def mathml(code: str) -> str | None:
    """Returns `math` elements for an equation or an arithmetic expression, None for anything else.

    A line may break between the elements: behind an equals sign, and before the terms of a sum. Operators count with
    blanks around them alone: `module/name` is a path, and `axis=1` an argument.
    """
    if not re.search(r" (=|[-+*/]) |\*\*|\bsqrt\(", code):
        return None
    try:
        sides = [ast.parse(side, mode="eval").body for side in re.sub(r"\|([^|]+)\|", r"abs(\1)", code).split(" = ")]
        pieces = [piece for side in sides[:-1] for piece in _terms(side, end='<mo form="infix">=</mo>')]
        pieces += _terms(sides[-1])
        return "<wbr>".join(f'<math displaystyle="true"><mrow>{piece}</mrow></math>' for piece in pieces)
    except (SyntaxError, NotAFormulaError):
        return None


def _terms(node: ast.expr, end: str = "") -> list[str]:
    """Returns the terms of a sum, each with the operator before it; `end` is put behind the last."""
    match node:
        case ast.BinOp(left, (ast.Add() | ast.Sub()) as op, right):
            operand = _operand(right, type(op), tighter=isinstance(op, ast.Sub))
            return [*_terms(left), f'<mo form="infix">{OPERATORS[type(op)]}</mo>{operand}{end}']
    return [_row(node) + end]


def _expression(node: ast.expr) -> tuple[str, int]:
    """Returns MathML, and the precedence of its outermost operator."""
    match node:
        case ast.Name(name):
            return _name(name), ATOM
        case ast.Attribute():
            return f"<mi>{html.escape(ast.unparse(node))}</mi>", ATOM
        case ast.Constant(int() | float() as number) if not isinstance(number, bool):
            return f"<mn>{number}</mn>", ATOM
        case ast.UnaryOp(ast.USub(), operand):
            return f"<mo>{OPERATORS[ast.Sub]}</mo>{_operand(operand, ast.USub)}", PRECEDENCE[ast.USub]
        case ast.BinOp(left, ast.Div(), right):
            return f"<mfrac>{_row(left)}{_row(right)}</mfrac>", ATOM
        case ast.BinOp(left, ast.Pow(), right):
            # Of a fraction, not of its numerator.
            base = _operand(left, ast.Pow, brackets=isinstance(left, ast.BinOp))
            return f"<msup><mrow>{base}</mrow>{_row(right)}</msup>", PRECEDENCE[ast.Pow]
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            # a - (b + c), but not a * (b * c).
            tighter = isinstance(op, ast.Sub)
            operands = _operand(left, type(op)), _operand(right, type(op), tighter=tighter)
            return f"<mo>{OPERATORS[type(op)]}</mo>".join(operands), PRECEDENCE[type(op)]
        case ast.Call(ast.Name("sqrt"), [radicand], []):
            return f"<msqrt>{_row(radicand)}</msqrt>", ATOM
        case ast.Call(ast.Name("abs"), [value], []):
            return f"<mrow><mo>|</mo>{_row(value)}<mo>|</mo></mrow>", ATOM
        case ast.Call(ast.Name(name), arguments, []):
            inside = "<mo>,</mo>".join(_row(argument) for argument in arguments)
            return f"{_name(name)}<mo>&#x2061;</mo>{_bracketed(inside)}", ATOM
    raise NotAFormulaError


def _row(node: ast.expr) -> str:
    return f"<mrow>{_expression(node)[0]}</mrow>"


def _operand(node: ast.expr, operator: type, *, tighter: bool = False, brackets: bool = False) -> str:
    inside, precedence = _expression(node)
    if brackets or precedence < PRECEDENCE[operator] + tighter:
        return _bracketed(inside)
    return inside


def _bracketed(inside: str) -> str:
    return f"<mrow><mo>(</mo>{inside}<mo>)</mo></mrow>"


def _name(name: str) -> str:
    """A letter with an index has it below the line, as `m_b`, `d_max` and `mean_i`; other names are words."""
    letter, _, index = name.partition("_")
    if letter and index and "_" not in index and 1 in (len(letter), len(index)):
        return f"<msub><mi>{letter}</mi><mi>{index}</mi></msub>"
    return f"<mi>{name}</mi>"
