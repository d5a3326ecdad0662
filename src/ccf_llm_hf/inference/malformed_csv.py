"""Where a CSV file is malformed, and how: Arrow counts rows, not lines, and tells little else."""

import csv
from pathlib import Path


def malformed_line(path: Path, delimiter: str) -> str | None:
    """The first line that no reader can make sense of; None when every line is sound.

    Args:
        path: CSV file in UTF-8 with a header.
        delimiter: between values.

    Returns:
        For example `line 3 has 3 values where the header has 2`. Lines count from 1, the header
        and blank ones included.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        width, line = 0, 1
        while True:
            try:
                row = next(reader, None)
            except csv.Error:  # a value of more than 128 kB
                return f"line {line} opens a quote that nothing closes"
            if row is None:
                return None
            if reason := _wrong(row, width or len(row)):
                return f"line {line} {reason}"
            width, line = width or len(row), reader.line_num + 1


def _wrong(row: list[str], width: int) -> str | None:
    text = "".join(row)
    if any("\udc80" <= letter <= "\udcff" for letter in text):  # bytes that are no UTF-8
        return "is not UTF-8"
    if "\n" in text or "\r" in text:
        return "opens a quote that is not closed on the same line"
    if row and len(row) != width:
        return f"has {len(row)} value{'s' * (len(row) != 1)} where the header has {width}"
    return None
