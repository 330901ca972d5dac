"""Tables in a terminal."""

from collections.abc import Sequence


def columns(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells under their heads; None is an empty cell."""
    texts = [["" if cell is None else " ".join(str(cell).split()) for cell in row] for row in rows]
    wide = [max(map(len, column)) for column in zip(heads, *texts, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, wide, strict=True)).rstrip()
        for row in [list(heads), *texts]
    )
