"""Reports as text: tables, timelines and trees. Draws what it is given and computes nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest

import msgspec

from . import Report, Step, Table

WIDTH = 100


class Span(msgspec.Struct, frozen=True):
    """From ``start`` to ``end`` on a timeline, drawn with the letter ``mark``."""

    start: int
    end: int
    mark: str


class Node(msgspec.Struct, frozen=True):
    """Of a tree."""

    text: str
    children: tuple[Node, ...] = ()


def report(told: Report, *, steps: int = 60, width: int = WIDTH) -> Iterator[str]:
    """A report as lines; of a long trace the first ``steps``."""
    yield from textwrap.wrap(told.question, width)
    if shown := told.steps[:steps]:
        yield ""
        yield from trace(shown, width=width)
    if len(told.steps) > steps:
        yield f"… and {len(told.steps) - steps} steps more (--steps)"
    for drawing in told.drawings:
        yield from ("", drawing.title, "")
        yield from drawing.lines
    for one in told.tables:
        yield ""
        yield from table(one, width=width)
    if told.conclusions:
        yield ""
    for conclusion in told.conclusions:
        yield from textwrap.wrap(conclusion, width, initial_indent="• ", subsequent_indent="  ")
    if told.page:
        yield from ("", f"More: {told.page}")


def trace(steps: Sequence[Step], *, width: int = WIDTH) -> Iterator[str]:
    who = max(len(step.who) for step in steps)
    times = [str(step.time) if step.time is not None else "" for step in steps]
    time = max(map(len, times))
    for step, at in zip(steps, times, strict=True):
        head = f"{at:>{time}}  {step.who:<{who}}  " if time else f"{step.who:<{who}}  "
        yield from textwrap.wrap(
            step.what, width, initial_indent=head, subsequent_indent=" " * len(head)
        )


def table(told: Table, *, width: int = WIDTH) -> Iterator[str]:
    """Numbers and bounds (≤ 3) to the right, words to the left; None is a dash. What is too wide is wrapped,
    heads before cells."""
    cells = [tuple(_cell(value) for value in row) for row in told.rows]
    widths = _widths(told.columns, cells, width)
    numeric = [all(_is_number(row[at]) for row in told.rows) for at in range(len(told.columns))]
    yield told.title
    for row in (told.columns, *cells):
        wrapped = [textwrap.wrap(text, size) for text, size in zip(row, widths, strict=True)]
        for line in zip_longest(*wrapped, fillvalue=""):
            yield "  ".join(
                f"{text:>{size}}" if right else f"{text:<{size}}"
                for text, size, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
    yield from textwrap.wrap(told.note, width)


def _widths(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Of the columns, so that no word is broken and, if that can be, all of them fit."""
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(1, *map(len, column)) for column in columns]
    words = [max(1, *(len(word) for text in column for word in text.split())) for column in columns]
    inner = [max(1, *map(len, column[1:])) if rows else 1 for column in columns]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        free = [at for at, size in enumerate(widths) if size > words[at]]
        if not free:
            break
        widest = max(free, key=lambda at: (widths[at] > inner[at], widths[at]))
        widths[widest] -= 1
    return widths


def _is_number(value: str | int | float | None) -> bool:
    return value.startswith("≤ ") if isinstance(value, str) else True


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def timeline(lanes: Mapping[str, Iterable[Span]], *, width: int = 70) -> Iterator[str]:
    """One lane a row, one column a slice of time; what fills most of a column is drawn."""
    spans = {name: list(lane) for name, lane in lanes.items()}
    end = max((span.end for lane in spans.values() for span in lane), default=0)
    if not end:
        return
    label = max(map(len, spans))
    for name, lane in spans.items():
        yield f"{name:<{label}} │{''.join(_column(lane, at, end, width) for at in range(width))}│"
    yield f"{'':<{label}} 0{f'{end:,}':>{width + 1}}"


def _column(lane: list[Span], at: int, end: int, width: int) -> str:
    low, high = at * end / width, (at + 1) * end / width
    shares: dict[str, float] = {" ": (high - low) / 1000}
    for span in lane:
        if (part := min(span.end, high) - max(span.start, low)) > 0:
            shares[span.mark] = shares.get(span.mark, 0) + part
    return max(shares, key=lambda mark: shares[mark])


def tree(root: Node) -> Iterator[str]:
    yield root.text
    yield from _children(root, "")


def _children(node: Node, indent: str) -> Iterator[str]:
    for child in node.children:
        last = child is node.children[-1]
        yield f"{indent}{'└─ ' if last else '├─ '}{child.text}"
        yield from _children(child, indent + ("   " if last else "│  "))
