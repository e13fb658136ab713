"""Small charts as inline SVG text: axes with readable ticks, points, steps, lines.

Colours are CSS classes of the page, so one drawing serves light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]


def escape(text: object) -> str:
    """Return text as HTML and SVG attributes can hold it."""
    return html.escape(str(text), quote=True)


def short(value: float) -> str:
    """Return a number in few characters: ``0.012``, ``3.4``, ``120``, ``1.2k``, ``3.4M``."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    if size < 1e-3:
        return f"{value:.0e}"
    return f"{value:.3g}"


def duration(us: float) -> str:
    """Return a time for people: ``41.2 µs``, ``3.9 ms``."""
    return f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{short(us)} µs"


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its range, whether it is logarithmic, its title."""

    low: float
    high: float
    log: bool = False
    title: str = ""

    @classmethod
    def around(
        cls, values: Sequence[float], *, log: bool = False, title: str = "", zero: bool = False
    ) -> Axis:
        """Return an axis that holds all values with a little room."""
        good = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        if not good:
            return cls(1.0 if log else 0.0, 10.0 if log else 1.0, log, title)
        low, high = min(good), max(good)
        if log:
            room = max((high / low) ** 0.06, 1.06)
            return cls(low / room, high * room, True, title)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return cls(0.0 if zero else low - room, high + room, False, title)

    def place(self, value: float) -> float:
        """Return where a value stands: 0 at the low end, 1 at the high end."""
        if self.log:
            if value <= 0:
                return 0.0
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """Return round values on the axis."""
        return (
            _log_ticks(self.low, self.high, count)
            if self.log
            else _ticks(self.low, self.high, count)
        )


def _ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(found) >= min(3, count):
            return found[:: max(1, math.ceil(len(found) / (count + 2)))]
    return _ticks(low, high, count)


@dataclass(slots=True)
class Plot:
    """A frame with two axes into which marks are drawn."""

    x: Axis
    y: Axis
    width: int = 330
    height: int = 210
    title: str = ""
    left: int = 52
    right: int = 12
    top: int = 14
    bottom: int = 40
    _marks: list[str] = field(default_factory=list)

    def at(self, point: Point) -> Point:
        """Return a point's place in the drawing."""
        wide, high = self.width - self.left - self.right, self.height - self.top - self.bottom
        px = self.left + self.x.place(point[0]) * wide
        py = self.height - self.bottom - self.y.place(point[1]) * high
        return round(px, 1), round(py, 1)

    def points(
        self, points: Sequence[Point], kind: str, radius: float = 3, labels: Sequence[str] = ()
    ) -> None:
        """Draw dots; a label shows when the pointer rests on its dot."""
        for i, point in enumerate(points):
            px, py = self.at(point)
            tip = f"<title>{escape(labels[i])}</title>" if i < len(labels) else ""
            self._marks.append(
                f'<circle class="{kind}" cx="{px}" cy="{py}" r="{radius}">{tip}</circle>'
            )

    def line(self, points: Sequence[Point], kind: str) -> None:
        """Join points with straight lines."""
        if points:
            text = " ".join(f"{px},{py}" for px, py in map(self.at, points))
            self._marks.append(f'<polyline class="{kind}" points="{text}"/>')

    def steps(self, points: Sequence[Point], kind: str) -> None:
        """Join points so that each value holds until the next one."""
        out: list[Point] = []
        for point in points:
            if out:
                out.append((point[0], out[-1][1]))
            out.append(point)
        self.line(out, kind)

    def ring(self, point: Point, kind: str, label: str) -> None:
        """Draw a ring around a point."""
        px, py = self.at(point)
        tip = f"<title>{escape(label)}</title>"
        self._marks.append(f'<circle class="{kind}" cx="{px}" cy="{py}" r="6.5">{tip}</circle>')

    def svg(self) -> str:
        """Return the drawing."""
        x0, y0 = self.left, self.height - self.bottom
        x1, y1 = self.width - self.right, self.top
        out = [
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}" '
            f'style="max-width:{self.width * 1.35:.0f}px">'
        ]
        for value in self.y.ticks(4):
            py = self.at((self.x.low, value))[1]
            out.append(f'<line class="grid" x1="{x0}" y1="{py}" x2="{x1}" y2="{py}"/>')
            out.append(
                f'<text class="tick" x="{x0 - 6}" y="{py + 3.5}" text-anchor="end">{short(value)}</text>'
            )
        for value in self.x.ticks(5):
            px = self.at((value, self.y.low))[0]
            out.append(f'<line class="grid" x1="{px}" y1="{y0}" x2="{px}" y2="{y0 + 4}"/>')
            out.append(
                f'<text class="tick" x="{px}" y="{y0 + 15}" text-anchor="middle">{short(value)}</text>'
            )
        out.append(f'<line class="axis" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y0}"/>')
        middle = (y0 + y1) / 2
        out.append(
            f'<text class="tick" x="{(x0 + x1) / 2}" y="{self.height - 6}" text-anchor="middle">'
            f"{escape(self.x.title)}</text>"
        )
        out.append(
            f'<text class="tick" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.title)}</text>"
        )
        return "".join([*out, *self._marks, "</svg>"])
