"""Figures in, small plots as SVG text out: bars, for a page that needs nothing from elsewhere."""

from html import escape

BAR, GAP, LABEL, VALUE = 18, 6, 220, 70


def bars(values: list[tuple[str, float, str]], title: str, width: int = 740) -> str:
    """Horizontal bars. values: (label, size, what is written beside the bar)."""
    largest = max((size for _, size, _ in values), default=0) or 1
    height = len(values) * (BAR + GAP) + GAP
    room = width - LABEL - VALUE
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>"
    ]
    for number, (label, size, text) in enumerate(values):
        top = GAP + number * (BAR + GAP)
        length = max(1.0, size / largest * room) if size else 0
        middle = top + BAR * 0.72
        parts.append(
            f'<text x="{LABEL - 8}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{LABEL}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2"/>'
            f'<text x="{LABEL + length + 6:.1f}" y="{middle:.1f}" class="value">{escape(text)}</text>'
        )
    return "".join([*parts, "</svg>"])
