"""Points in, a curve drawn with characters out."""

import itertools
from collections.abc import Sequence

# Bits of the eight dots of a Braille character, by column and row.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
BRAILLE = 0x2800


def draw(
    points: Sequence[tuple[float, float]], *, width: int = 64, height: int = 10, ascii_only: bool
) -> str:
    """x ascending; where several points share a column, their mean stands. Empty below two points.

    In Braille a character is 2 x 4 dots, in ASCII one.
    """
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return ""
    wide, high = (1, 1) if ascii_only else (2, 4)
    curve = _columns(points, width * wide)
    low, top = min(curve), max(curve)
    grid = [[0] * width for _ in range(height)]
    scale = (height * high - 1) / (top - low or 1.0)
    before = None
    for column, y in enumerate(curve):
        dot = round((top - y) * scale)
        for number in range(*_span(before, dot)):  # steep parts stay connected
            grid[number // high][column // wide] |= DOTS[column % wide][number % high]
        before = dot
    lines = []
    for number, cells in enumerate(grid):
        y = top - (top - low) * number / max(1, height - 1)
        drawn = "".join(" " if not c else "*" if ascii_only else chr(BRAILLE + c) for c in cells)
        lines.append(f"{y:8.4g} {'|' if ascii_only else '┤'}{drawn}".rstrip())
    first, last = f"{points[0][0]:,.0f}", f"{points[-1][0]:,.0f}"
    return "\n".join([*lines, f"{'step':>8}  {first}{last:>{max(1, width - len(first))}}"])


def _span(before: int | None, dot: int) -> tuple[int, int]:
    """The dots of a column: from next to the one before it, to its own."""
    if before is None or before == dot:
        return dot, dot + 1
    return (before + 1, dot + 1) if before < dot else (dot, before)


def _columns(points: Sequence[tuple[float, float]], num_columns: int) -> list[float]:
    """y of every column: the mean of its points, else on the line between its neighbours'."""
    first, last = points[0][0], points[-1][0]
    sums: dict[int, tuple[float, int]] = {}
    for x, y in points:
        column = round((x - first) / (last - first) * (num_columns - 1))
        total, number = sums.get(column, (0.0, 0))
        sums[column] = (total + y, number + 1)
    known = [(column, total / number) for column, (total, number) in sums.items()]
    curve = [known[0][1]]
    for (left, y), (right, next_y) in itertools.pairwise(known):
        curve += [y + (next_y - y) * n / (right - left) for n in range(1, right - left + 1)]
    return curve
