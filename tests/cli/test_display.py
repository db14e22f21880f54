"""Colours say who wrote a token, and change no text."""

import io
import re

import torch

from hf_poss.cli.display import colored_text, describe_authors, describe_statistics, uses_color
from hf_poss.statistics import CallRecord, CallStatistics, GenerationStatistics


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


def call(authors: list[int]) -> CallStatistics:
    return CallStatistics(positions_per_specialist=2, num_specialists=2, authors=authors)


def statistics_of(*texts: list[int]) -> GenerationStatistics:
    """A call that wrote texts with these authors."""
    return GenerationStatistics([CallRecord([call(authors) for authors in texts], torch.device("cpu"))])


TEXT = "ab\ncd"
AUTHORS = [0, 1, 2, 3, 0]  # the target, twice specialist 1, specialist 2, the target


def test_coloured_text_is_the_text():
    colored = colored_text(Letters(), list(map(ord, TEXT)), call(AUTHORS), color=True)
    assert re.sub("\033\\[[0-9;]*m", "", colored) == TEXT
    assert colored_text(Letters(), list(map(ord, TEXT)), call(AUTHORS), color=False) == TEXT


def test_each_author_has_a_colour():
    colored = colored_text(Letters(), list(map(ord, "abcd")), call([0, 1, 3, 0]), color=True)
    styles = dict(re.findall("(\033\\[[0-9;]*m)([abcd])", colored))
    by_letter = {letter: style for style, letter in styles.items()}
    pairs = re.findall("(\033\\[[0-9;]*m)([abcd])\033\\[0m", colored)
    by_letter = {letter: style for style, letter in pairs}
    assert by_letter["a"] == by_letter["d"]
    assert len(set(by_letter.values())) == 3


def test_authors_are_counted():
    one = statistics_of(AUTHORS)
    assert describe_authors(one) == "written by: target 2, specialist 1 2, specialist 2 1 (tokens)"
    batch = statistics_of(AUTHORS, [0, 3])
    assert describe_authors(batch) == "written by: target 3, specialist 1 2, specialist 2 2 (tokens)"


def test_no_round_is_described_too():
    assert "0 rounds" in describe_statistics(statistics_of([0]))


def test_only_a_terminal_gets_colours(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert uses_color(Terminal()) and not uses_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not uses_color(Terminal())
