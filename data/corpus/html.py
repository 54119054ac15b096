"""An HTML page in, its main text out: without menus, footers and scripts. By trafilatura."""

import trafilatura


def main_text(page: str) -> str | None:
    """Paragraphs parted by line breaks; None where no main text is found."""
    try:
        text = trafilatura.extract(
            page,
            include_comments=False,
            include_tables=False,
            include_links=False,
            deduplicate=False,
        )
    except (ValueError, AttributeError, RecursionError):  # trees that it cannot walk
        return None
    return text or None
