"""Expressions and assignments of generic functions as CUDA text.

Types are the function's own. Numbers of 16 bits are computed in float32, and rounded where they are stored or
cast: fewer roundings than `ir.tir_reference` allows for. Indices are 32 bits wide as far as what is known of
the loops says that all parts of them are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mimo_compile.ir.ops.numerics import bf16_to_f32, f32_to_bf16

_WHOLE = {f"{u}int{b}": f"{u}int{b}_t" for u in ("", "u") for b in (8, 16, 32, 64)}
COMPUTED = {
    **_WHOLE, "bool": "bool", "float64": "double", "float32": "float", "float16": "float",
    "bfloat16": "float",
}  # fmt: skip
"""Types that expressions have in the text."""
STORED = {**COMPUTED, "bool": "uint8_t", "float16": "uint16_t", "bfloat16": "uint16_t"}
"""Types of elements of arrays."""
_READ = {"bool": "({} != 0)", "float16": "f16_to_float({})", "bfloat16": "bf16_to_float({})"}
_ROUNDED = {"float16": "to_f16({})", "bfloat16": "to_bf16({})", "bool": "uint8_t({} ? 1 : 0)"}
_INFIX = {
    "Add": "+", "Sub": "-", "Mul": "*", "Div": "/", "Mod": "%", "EQ": "==", "NE": "!=", "LT": "<",
    "LE": "<=", "GT": ">", "GE": ">=", "And": "&&", "Or": "||",
}  # fmt: skip
_PREFIX = {
    "FloorDiv": "floor_div", "FloorMod": "floor_mod", "Max": "larger", "Min": "smaller",
}  # fmt: skip
_BITS = {
    "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^", "shift_left": "<<", "shift_right": ">>",
}  # fmt: skip
_FLOAT = {
    n: n + "f"
    for n in (
        "exp", "exp2", "exp10", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "tanh", "erf", "atan",
        "floor", "ceil", "trunc", "round", "nearbyint", "pow",
    )
} | {"fabs": "fabsf", "abs": "fabsf"}  # fmt: skip
_DOUBLE = {n: n for n in _FLOAT} | {"abs": "fabs", "rsqrt": "inverse_root"}
_EITHER = {
    "sigmoid": "sigmoid", "isnan": "is_nan", "isinf": "is_infinite", "isfinite": "is_finite",
}  # fmt: skip
_TURNS = {"sin": "sine", "cos": "cosine"}
Span = tuple[int, int]
_LEAST, _MOST = -(2**31), 2**31 - 1


def _products(a: Span, b: Span) -> Span:
    ends = [x * y for x in a for y in b]
    return min(ends), max(ends)


def _quotients(a: Span, b: Span) -> Span | None:
    return (a[0] // b[0], a[1] // b[0]) if b[0] == b[1] > 0 else None


def _remainders(a: Span, b: Span) -> Span | None:
    if not b[0] == b[1] > 0:
        return None
    return (a[0] % b[0], a[1] % b[0]) if a[0] // b[0] == a[1] // b[0] else (0, b[0] - 1)


_SPANS: Mapping[str, Callable[[Span, Span], Span | None]] = {
    "Add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "Sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "Mul": _products,
    "FloorDiv": _quotients,
    "FloorMod": _remainders,
    "Max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "Min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
}


@dataclass(frozen=True, slots=True)
class Place:
    """An array of the function in the text."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def computed(self) -> str:
        """The type that its numbers have in expressions."""
        return COMPUTED[self.dtype]

    @property
    def stored(self) -> str:
        """The type of its elements."""
        return STORED[self.dtype]


@dataclass(slots=True)
class Printer:
    """Prints one block; variables and buffers are known by their identities."""

    places: Mapping[int, Place]
    loops: Mapping[int, tuple[str, int]]
    """Of each loop its variable's name and its extent: it begins at 0."""
    values: Mapping[int, Any]
    """What a block's variables are in terms of loops."""
    held: Mapping[int, tuple[str, Sequence[Any]]] = field(default_factory=dict)
    """Buffers whose one element that the block writes is in a variable, and the element's indices."""
    bound: dict[int, str] = field(default_factory=dict)
    """Names of variables that the block itself defines."""

    # -- assignments ---------------------------------------------------------------------------

    def statement(self, stmt: Any) -> str:
        """Return an assignment.

        Raises:
            ValueError: it has something that there are no words for.
        """
        if type(stmt).__name__ == "Bind":
            value, name = self.text(stmt.value), self.named(stmt.var)
            return f"const {self.computed(stmt.var)} {name} = {value};"
        value = self.text(stmt.value)
        if hash(stmt.buffer) in self.held:
            name, indices = self.held[hash(stmt.buffer)]
            self.same(indices, stmt.indices)
            return f"{name} = {value};"
        return self.store(stmt.buffer, stmt.indices, value)

    def store(self, buffer: Any, indices: Sequence[Any], value: str) -> str:
        """Return the assignment of a value to an element."""
        place = self.place(buffer)
        value = _ROUNDED.get(place.dtype, "{}").format(value)
        return f"{place.name}[{self.offset(place, indices)}] = {value};"

    def named(self, var: Any) -> str:
        """Return a new name for a variable."""
        return self.bound.setdefault(hash(var), f"v{len(self.bound)}")

    # -- expressions ---------------------------------------------------------------------------

    def text(self, expr: Any) -> str:
        """Return an expression; that of a smaller type than C++ computes in is cut to it.

        Raises:
            ValueError: there are no words for it.
        """
        kind, dtype = type(expr).__name__, str(expr.ty)
        if dtype in ("int32", "int64") and self.span(expr) is not None:
            return self.index(expr) if dtype == "int32" else f"int64_t({self.index(expr)})"
        if kind in ("IntImm", "FloatImm"):
            return constant(expr.value, dtype)
        if kind == "TensorLoad":
            return self.load(expr)
        if kind in _INFIX or kind in _PREFIX:
            a, b = self.text(expr.a), self.text(expr.b)
            if kind in _PREFIX:
                return f"{_PREFIX[kind]}<{self.computed(expr)}>({a}, {b})"
            if kind == "Mod" and str(expr.a.ty) not in _WHOLE:
                raise ValueError("there is no text for the remainder of floats")
            return self.cut(expr, f"({a} {_INFIX[kind]} {b})")
        if kind == "Cast":
            return self.cast(expr)
        if kind == "Not":
            return f"(!{self.text(expr.a)})"
        if kind == "Select":
            return self.choice(expr, expr.condition, expr.true_value, expr.false_value)
        if kind == "Let":
            value, name = self.text(expr.value), self.named(expr.var)
            inner = self.text(expr.body)
            kind = self.computed(expr.var)
            return f"[&] {{ const {kind} {name} = {value}; return {inner}; }}()"
        if kind == "Call":
            return self.call(expr)
        if hash(expr) in self.values:
            return self.text(self.values[hash(expr)])
        if hash(expr) in self.bound:
            return self.bound[hash(expr)]
        raise ValueError(f"there is no text for an expression of kind {kind}")

    def choice(self, expr: Any, condition: Any, a: Any, b: Any) -> str:
        """Return one of two, of which the other is not looked at."""
        kind = self.computed(expr)
        return f"({self.text(condition)} ? {kind}({self.text(a)}) : {kind}({self.text(b)}))"

    def cast(self, expr: Any) -> str:
        """Return a conversion."""
        source, target = str(expr.value.ty), str(expr.ty)
        value = self.text(expr.value)
        if target == "bool":
            return f"({value} != 0)"
        kind = self.computed(expr)
        if target in ("float16", "bfloat16") and source != target:
            return _READ[target].format(_ROUNDED[target].format(f"float({value})"))
        return f"{kind}({value})"

    def load(self, expr: Any) -> str:
        """Return an element of an array."""
        if hash(expr.source) in self.held:
            name, indices = self.held[hash(expr.source)]
            self.same(indices, expr.indices)
            return name
        place = self.place(expr.source)
        return _READ.get(place.dtype, "{}").format(
            f"{place.name}[{self.offset(place, expr.indices)}]"
        )

    def call(self, expr: Any) -> str:
        """Return a call of a function."""
        name = str(getattr(expr.op, "name", expr.op)).rpartition(".")[2]
        if name == "if_then_else":
            return self.choice(expr, *expr.args)
        if name == "likely":
            return self.text(expr.args[0])
        args = [self.text(a) for a in expr.args]
        kind = str(expr.args[0].ty) if expr.args else ""
        wide, real = kind == "float64", kind in ("float64", "float32", "float16", "bfloat16")
        if name in _BITS and kind in _WHOLE:
            return self.cut(expr, f"({args[0]} {_BITS[name]} {args[1]})")
        if name == "bitwise_not" and kind in _WHOLE:
            return self.cut(expr, f"(~{args[0]})")
        if name in ("abs", "fabs") and kind in _WHOLE:
            return f"larger<{COMPUTED[kind]}>({args[0]}, {COMPUTED[kind]}(-{args[0]}))"
        if real and name in _TURNS and not wide:
            return f"turn_of({args[0]}).{_TURNS[name]}"
        found = _EITHER.get(name) or (_DOUBLE if wide else _FLOAT).get(name)
        if not real or found is None:
            raise ValueError(f"there is no text for the function {name} of {kind or 'nothing'}")
        return f"{found}({', '.join(args)})"

    def cut(self, expr: Any, text: str) -> str:
        """Return a whole number's low bits where C++ computes in more than it has."""
        dtype = str(expr.ty)
        return (
            f"{COMPUTED[dtype]}{text}"
            if dtype in _WHOLE and dtype[-2:] not in ("32", "64")
            else text
        )

    def computed(self, expr: Any) -> str:
        """Return the type that an expression has in the text."""
        dtype = str(expr.ty)
        if dtype not in COMPUTED:
            raise ValueError(f"there is no text for numbers of type {dtype}")
        return COMPUTED[dtype]

    def place(self, buffer: Any) -> Place:
        """Return an array."""
        found = self.places.get(hash(buffer))
        if found is None:
            raise ValueError("there is no text for a buffer from elsewhere")
        return found

    def same(self, indices: Sequence[Any], others: Sequence[Any]) -> None:
        """Refuse another element than the one that is held."""
        from mimo_compile import _tvm

        equal = _tvm.runtime().structural_equal
        if not all(equal(a, b) for a, b in zip(indices, others, strict=True)):
            raise ValueError("there is no text for a reduction that reads other results")

    # -- indices -------------------------------------------------------------------------------

    def offset(self, place: Place, indices: Sequence[Any]) -> str:
        """Return where an element lies."""
        parts = [self.index(e) if self.span(e) is not None else self.text(e) for e in indices]
        at = parts[0] if parts else "0"
        if math.prod(place.shape) > _MOST:
            at = f"size_t({at})"
        for part, extent in zip(parts[1:], place.shape[1:], strict=True):
            at = f"({at} * {extent} + {part})"
        return at

    def span(self, expr: Any) -> Span | None:
        """Return the least and the largest value; None where 32 bits might not hold it and all its parts."""
        kind, found = type(expr).__name__, None
        if kind == "IntImm":
            found = (int(expr.value), int(expr.value))
        elif hash(expr) in self.loops:
            found = (0, self.loops[hash(expr)][1] - 1)
        elif hash(expr) in self.values:
            found = self.span(self.values[hash(expr)])
        elif kind == "Cast" and str(expr.ty) in ("int32", "int64"):
            found = self.span(expr.value)
        elif kind in _SPANS:
            a, b = self.span(expr.a), self.span(expr.b)
            found = _SPANS[kind](a, b) if a is not None and b is not None else None
        return found if found is not None and found[0] > _LEAST and found[1] <= _MOST else None

    def index(self, expr: Any) -> str:
        """Return an expression that has a `span` as an int."""
        kind = type(expr).__name__
        if kind == "IntImm":
            return str(int(expr.value)) if int(expr.value) >= 0 else f"({int(expr.value)})"
        if hash(expr) in self.loops:
            return self.loops[hash(expr)][0]
        if hash(expr) in self.values:
            return self.index(self.values[hash(expr)])
        if kind == "Cast":
            return self.index(expr.value)
        a, b = self.index(expr.a), self.index(expr.b)
        if kind in ("FloorDiv", "FloorMod") and (self.span(expr.a) or (-1,))[0] >= 0:
            return f"({a} {'/' if kind == 'FloorDiv' else '%'} {b})"
        if kind in _PREFIX:
            return f"{_PREFIX[kind]}<int>({a}, {b})"
        return f"({a} {_INFIX[kind]} {b})"


def constant(value: Any, dtype: str) -> str:
    """Return a constant of a type, rounded to it."""
    if dtype == "bool":
        return "true" if value else "false"
    if dtype in _WHOLE:
        return _whole(int(value), dtype)
    if dtype not in COMPUTED:
        raise ValueError(f"there is no text for numbers of type {dtype}")
    word, number = COMPUTED[dtype], float(value)
    if word == "float":
        with np.errstate(over="ignore"):
            narrow = np.float32(np.float16(number) if dtype == "float16" else number)
        if dtype == "bfloat16":
            narrow = bf16_to_f32(f32_to_bf16(np.asarray([narrow])))[0]
        number = float(narrow)
    if math.isnan(number):
        return f"{word}(__uint_as_float(0x7fc00000u))"
    if math.isinf(number):
        return f"{word}({'-' if number < 0 else ''}infinity())"
    text = number.hex() + ("f" if word == "float" else "")
    return f"({text})" if number < 0 else text


def _whole(number: int, dtype: str) -> str:
    kind = _WHOLE[dtype]
    if number == -(2**63):
        return f"{kind}(-{2**63 - 1}ll - 1)"
    return f"{kind}({number}{'ull' if dtype == 'uint64' else 'll'})"


def least(dtype: str) -> str:
    """Return what is below all numbers of a type, or the least of them."""
    return "false" if dtype == "bool" else _end(dtype, -1)


def most(dtype: str) -> str:
    """Return what is above all numbers of a type, or the largest of them."""
    return "true" if dtype == "bool" else _end(dtype, 1)


def _end(dtype: str, sign: int) -> str:
    if dtype not in _WHOLE:
        return constant(sign * math.inf, dtype)
    ends = np.iinfo(dtype)
    return constant(ends.max if sign > 0 else ends.min, dtype)
