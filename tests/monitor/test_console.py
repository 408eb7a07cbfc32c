"""What people see: the same lines on the terminal and in the log, colours only where they are wanted."""

import io
import re

import pytest

from megacore.monitor.console import Console, Phases, bar, cut, human_count, human_time, phase_lines, visible_width


class Stream(io.StringIO):
    def __init__(self, encoding="utf-8"):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self):
        return self._encoding


def test_terminal_and_log_get_the_same_lines(tmp_path):
    stream = Stream()
    console = Console(stream, tmp_path / "out" / "log.txt", colour=True)
    console.line(f"loss {console.paint('1.5', 'bold', 'green')}")
    console.box("title", ["inside"])
    console.close()
    log = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert "\x1b" in stream.getvalue()
    assert log == re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert log.startswith("loss 1.5\n")


def test_without_colour_no_escape_codes_and_no_passing_lines(tmp_path):
    stream = Stream()
    console = Console(stream, colour=False)
    console.progress("half way")
    console.rule(console.paint("title", "bold"))
    assert stream.getvalue() == "── title " + "─" * 91 + "\n"


def test_a_passing_line_is_wiped_before_the_next_one_and_never_logged(tmp_path):
    stream = Stream()
    console = Console(stream, tmp_path / "log.txt", colour=True)
    console.progress("10%")
    console.progress("20%")
    console.line("done")
    assert stream.getvalue() == "10%\r\x1b[2K20%\r\x1b[2Kdone\n"
    assert (tmp_path / "log.txt").read_text() == "done\n"


def test_the_log_is_appended_to(tmp_path):
    for text in ("first", "second"):
        console = Console(log_path=tmp_path / "log.txt")
        console.line(text)
        console.close()
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"


def test_a_terminal_that_cannot_show_a_letter_gets_a_question_mark():
    stream = Stream("ascii")
    Console(stream).line("tp=2 × dp=2 中文")
    assert stream.getvalue() == "tp=2 ? dp=2 ??\n"


@pytest.mark.parametrize("line", ["short", "word " * 60, "中文" * 10, "x" * 200, "\x1b[1mbold\x1b[0m"])
def test_box_edges_stand_in_one_column(line):
    stream = Stream()
    Console(stream, width=60).box("title", [line, "other"])
    widths = {visible_width(row) for row in stream.getvalue().splitlines()}
    assert len(widths) == 1


def test_table_aligns_columns():
    stream = Stream()
    Console(stream).table([["tokenizer", "1"], ["x", "22"]], header=["what", "size"])
    assert stream.getvalue().splitlines() == ["  what       size", "  tokenizer  1", "  x          22"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (9.99, "9.99 s"),
        (59.9, "59.9 s"),
        (59.96, "1m00s"),
        (125, "2m05s"),
        (4020, "1h07m"),
        (273600, "3d04h"),
    ],
)
def test_human_time(seconds, text):
    assert human_time(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (11234, "11.2k"),
        (112340, "112k"),
        (3.4e6, "3.40M"),
        (8.03e9, "8.03G"),
        (15e12, "15T"),
    ],
)
def test_human_count(number, text):
    assert human_count(number) == text


def test_phases_add_up_and_survive_exceptions():
    clock = iter([0.0, 1.0, 1.0, 3.0, 3.0, 3.5])
    phases = Phases(lambda: next(clock))
    with phases.time("mesh"):
        pass
    with pytest.raises(RuntimeError), phases.time("data"):
        raise RuntimeError
    with phases.time("mesh"):
        pass
    assert phases.seconds == {"mesh": 1.5, "data": 2.0}
    lines = phase_lines(phases)
    assert [line.split()[0] for line in lines] == ["mesh", "data", "start-up"]
    assert "3.50 s" in lines[-1]


def test_no_phases_no_table():
    assert phase_lines(Phases()) == []


def test_bar():
    assert (bar(0, 4), bar(1, 4), bar(0.5, 4), bar(1 / 32, 4), bar(7, 4)) == ("", "████", "██", "▏", "████")


@pytest.mark.parametrize(
    ("text", "width", "kept"), [("abc", 3, "abc"), ("abc", 2, "ab"), ("中文字", 5, "中文"), ("a", -1, "")]
)
def test_cut_counts_columns(text, width, kept):
    assert cut(text, width) == kept
