import io
import math
from html.parser import HTMLParser

import pytest
import rich.console

from inhibitor.report.tables import Table, number, plain, span, to_html, to_markdown, to_rich

HOSTILE = "=cmd|' /C calc'!A0 \x1b[31m\u202e<script>alert(1)</script> | `x` [red]b[/red] $y$"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([], "-"),
        (0, "0"),
        (832.4, "832"),
        (0.59, "0.590"),
        (0.0123456, "0.0123"),
        (-1.5, "-1.50"),
        (123456.0, "123456"),
        (3e7, "3.00e+07"),
        (2e-7, "2.00e-07"),
        ([0.15, 0.17], "0.160 ± 0.014"),
        ([0.5], "0.500"),
        (math.nan, "nan"),
        ([1.0, math.inf], "inf"),
    ],
)
def test_numbers_have_sensible_digits(value: float | list[float], shown: str) -> None:
    assert number(value) == shown


def test_digits_may_be_given() -> None:
    assert number([90.0, 91.0], 1) == "90.5 ± 0.7"
    assert number(100, 1) == "100.0"


def test_control_characters_are_shown() -> None:
    assert plain("a\x1b[2J\r\n\x9b\u202eb\x00é γ") == r"a\x1b[2J\r\n\x9b\u202eb\x00é γ"


def test_formulas_are_disarmed_and_numbers_left_alone() -> None:
    table = Table("=t", ["=a", "b"], [["=1+1", "-1.50"], ["@x", "-"], ["+2 cmd", "-2e+09"], ["-3|x", "nan"]], labels=1)
    assert table.columns[0] == "'=a"
    assert [row[0] for row in table.rows] == ["'=1+1", "'@x", "'+2 cmd", "'-3|x"]
    assert [row[1] for row in table.rows] == ["-1.50", "-", "-2e+09", "nan"]


def test_the_terminal_shows_text_as_it_is_without_obeying_it() -> None:
    console = rich.console.Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    console.print(to_rich(Table(HOSTILE, [HOSTILE, "score"], [[HOSTILE, "1.0"]], [HOSTILE])))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown
    assert shown.count("[red]b[/red]") == 4


def test_the_terminal_aligns_numbers_right() -> None:
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(to_rich(Table("t", ["state", "score"], [["a", "1.0"], ["b", "100.0"]])))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a         1.0" in shown
    assert "b       100.0" in shown


def test_title_and_notes_may_be_wider_than_the_table() -> None:
    console = rich.console.Console(file=io.StringIO(), width=80)
    title, note = "A title of some words", "A note that is wider than the table, on one line all the same."
    console.print(to_rich(Table(title, ["a", "b"], [["1", "2"]], [note])))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == title
    assert lines[-2:] == [note, ""]


def test_a_span_names_equal_ends_once() -> None:
    assert [span(counts) for counts in ([], [3], [3, 3], [4, 2, 3])] == ["", "3", "3", "2 to 4"]


def test_markdown() -> None:
    table = Table("T", ["state", "score"], [["a|b *c* <i>", "1.0"]], ["One note."])
    assert to_markdown(table) == (
        "**T**\n\n| state | score |\n| :-- | --: |\n| a\\|b \\*c\\* \\<i\\> | 1.0 |\n\nOne note.\n"
    )


def test_html_is_escaped_and_says_what_is_a_header() -> None:
    text = to_html(Table(HOSTILE, ["state", "metric", "score"], [[HOSTILE, "f1", "1.0"]], [HOSTILE], labels=2))
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(text)
    assert set(tags) == {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert "\x1b" not in text
    assert '<th scope="col" class="label">metric</th><th scope="col">score</th>' in text
    assert '<td class="label">f1</td><td>1.0</td>' in text
