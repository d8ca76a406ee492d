"""Tables and sizes as text, alike in every verb. No torch."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def mebibytes(count: int) -> str:
    """A number of bytes, in MiB to two digits."""
    return f"{count / 2**20:.2f} MiB"


def size(count: int) -> str:
    """A number of bytes for people: in MiB below one GiB, else in GiB."""
    return mebibytes(count) if count < 2**30 else f"{count / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people: in minutes from two of them on, in hours from two of those."""
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
