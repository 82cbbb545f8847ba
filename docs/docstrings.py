"""Docstrings as reStructuredText: they are prose, in which |z|^2 is a length and e_k a code."""

import re
from collections.abc import Sequence

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Example):$")


def as_rst(lines: Sequence[str]) -> list[str]:
    """The lines with accidental markup escaped and indented blocks (formulas, trees) literal."""
    result: list[str] = []
    literal = section = False
    for line in lines:
        indented = line.startswith(" ")
        if SECTION.match(line):
            section, literal = True, False
        elif line and not indented:
            section = literal = False
        starts_block = indented and not literal and not section and (not result or not result[-1])
        if starts_block:
            result += ["::", ""]
            literal = True
        result.append(line if literal and indented else escape(line))
    return result


def escape(line: str) -> str:
    """A line of prose with its markup escaped, except for `code` and *stressed* words."""
    return re.sub(
        r"(`+[^`]*`+|(?<!\S)\*\w+\*(?!\w))|([*|\\])|(?<=\w)(_)(?!\w)",
        lambda m: m[1] or "\\" + (m[2] or m[3]),
        line,
    )
