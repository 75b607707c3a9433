"""Tests of the pictures for a terminal, drawn small enough to check by eye."""

import io

from kvcache.observe import terminal
from kvcache.observe.terminal import PoolSample, ProgressLine, Style

SAMPLES = [
  PoolSample(step=2, used=4, cached=0),
  PoolSample(step=4, used=4, cached=4),
  PoolSample(step=8, used=0, cached=2),
]


class Screen(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True


def test_chart_shows_used_cached_and_free():
  chart = terminal.pool_chart(SAMPLES, num_blocks=8, style=Style(width=12), height=4)
  assert chart.splitlines() == [
    " 8 |..++....",
    "   |..++....",
    "   |####....",
    "   |####++++",
    " 0 +--------",
    "    0 step 8",
    "    ## used   ++ cached   .. free",
  ]


def test_chart_of_nothing_is_empty():
  chart = terminal.pool_chart([], num_blocks=3, style=Style(width=12), height=1)
  assert chart.splitlines()[0] == " 3 |........"


def test_chart_fits_the_terminal():
  for width in (10, 40, 200):
    style = Style(width=width, color=False, unicode=True)
    chart = terminal.pool_chart(SAMPLES, num_blocks=1000, style=style)
    assert max(map(len, chart.splitlines()[:-1])) <= max(width, 15)


def test_sparkline_goes_from_nothing_to_the_top():
  assert terminal.sparkline([0, 4, 8, 99], top=8, style=Style(unicode=True)) == " ▄██"
  assert terminal.sparkline([0, 8], top=8, style=Style()) == " @"
  assert terminal.sparkline([1], top=0, style=Style()) == " "


def test_colours_only_where_wanted(monkeypatch):
  for name in ("NO_COLOR", "TERM"):
    monkeypatch.delenv(name, raising=False)
  assert Style.of(Screen()).paint("x", "used") == "\x1b[38;5;74mx\x1b[0m"
  assert Style.of(io.StringIO()).paint("x", "used") == "x"
  monkeypatch.setenv("NO_COLOR", "1")
  assert Style.of(Screen()).paint("x", "used") == "x"
  monkeypatch.delenv("NO_COLOR")
  monkeypatch.setenv("TERM", "dumb")
  assert not Style.of(Screen()).color


def test_glyphs_follow_the_encoding():
  assert Style.of(Screen()).unicode
  assert not Style.of(io.TextIOWrapper(io.BytesIO(), encoding="latin-1")).unicode


def test_progress_is_one_line_on_a_terminal_only(monkeypatch):
  monkeypatch.setenv("COLUMNS", "10")
  screen = Screen()
  line = ProgressLine(screen)
  line.show("0123456789abc")
  line.clear()
  line.clear()
  assert screen.getvalue() == "\r\x1b[K012345678\r\x1b[K         \r"
  for silent in (
    ProgressLine(io.StringIO()),
    ProgressLine(Screen(), enabled=False),
  ):
    silent.show("x")
    silent.clear()
    assert silent.stream.getvalue() == ""


def test_a_shorter_line_leaves_nothing_of_a_longer_one():
  screen = Screen()
  line = ProgressLine(screen)
  line.show("0123")
  line.show("ab")
  assert screen.getvalue().endswith("ab  ")


def test_a_notebook_is_looked_at():
  stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
  line = ProgressLine(stream)
  line.show("half of it")
  assert "half of it" in stream.getvalue()
