"""Perturbed text: as often as was asked, the same for a seed, and nothing else than what the kind is about."""

import math
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pressd.compress.perturb import KINDS, case, typos, whitespace

LETTERS = " ".join(["abcdefghij"] * 2000)
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("name", KINDS)
@given(text=st.text(max_size=80), seed=SEEDS)
def test_a_seed_gives_one_text_and_rate_zero_gives_the_text(name: str, text: str, seed: int) -> None:
    change = KINDS[name].change
    assert change(text, seed, 0.5) == change(text, seed, 0.5)
    assert change(text, seed, 0.0) == text


@pytest.mark.parametrize("name", KINDS)
def test_seeds_differ(name: str) -> None:
    text = "def spam(eggs):\n    return eggs or  None\n" * 20
    assert KINDS[name].apply(text, 1) != text
    assert KINDS[name].apply(text, 1) != KINDS[name].apply(text, 2)


@given(text=st.text(alphabet=string.ascii_letters + "_0. \n", max_size=60), seed=SEEDS)
def test_typos_leave_all_but_letters_and_first_letters_alone(text: str, seed: int) -> None:
    changed = typos(text, seed, 0.7)
    rest = re.compile(r"[A-Za-z]+")
    assert rest.sub("x", changed) == rest.sub("x", text)
    firsts = re.compile(r"[A-Za-z]+")
    assert [word[0] for word in firsts.findall(changed)] == [word[0] for word in firsts.findall(text)]


def test_typos_are_of_every_sort_and_as_many_as_asked() -> None:
    words = [(old, new) for old, new in zip(LETTERS.split(), typos(LETTERS, 3, 0.02).split(), strict=True)]
    sorts = {"swap": 0, "drop": 0, "double": 0, "replace": 0}
    for old, new in words:
        if old == new:
            continue
        if len(new) < len(old):
            sorts["drop"] += 1
        elif len(new) > len(old):
            sorts["double"] += 1
        elif sorted(new) == sorted(old):
            sorts["swap"] += 1
        else:
            sorts["replace"] += 1
    # 9 letters of each of 2000 words may change: 1 - 0.98^9 of the words do, binomially; five standard deviations.
    share = 1 - 0.98**9
    assert abs(sum(sorts.values()) - 2000 * share) < 5 * math.sqrt(2000 * share * (1 - share))
    # A quarter each; words with several changes (under a tenth of those with any) are counted as one of them.
    assert all(0.15 < count / sum(sorts.values()) < 0.35 for count in sorts.values())


def test_case_flips_words_as_often_as_asked() -> None:
    words = case(LETTERS, 5, 0.1).split()
    assert set(words) == {"abcdefghij", "ABCDEFGHIJ"}
    assert abs(words.count("ABCDEFGHIJ") - 200) < 5 * math.sqrt(2000 * 0.1 * 0.9)
    assert case("Ab x_YZ 12", 0, 1.0) == "aB x_yz 12"


@given(text=st.text(alphabet="ab \t\n", max_size=60), seed=SEEDS)
def test_white_space_changes_no_word_and_no_line(text: str, seed: int) -> None:
    changed = whitespace(text, seed, 0.8)
    assert [line.split() for line in changed.split("\n")] == [line.split() for line in text.split("\n")]


def test_white_space_changes_indentation_gaps_and_line_ends() -> None:
    lines = whitespace("    a b\n" * 900, 7, 0.5).split("\n")[:-1]
    found = [re.fullmatch(r"([ \t]+)a([ \t]+)b([ \t]*)", line) for line in lines]
    seen = [{match.group(part) for match in found if match} for part in (1, 2, 3)]
    assert seen == [{"    ", "     ", "   ", "\t"}, {" ", "  ", "\t"}, {"", " ", "  ", "\t"}]
    changed = sum(match.group(1) != "    " for match in found if match)
    assert abs(changed - 450) < 5 * math.sqrt(900 * 0.25)
