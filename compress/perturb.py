"""Text as hurried people write it: typos, other case, other white space. Functions of text, seed and rate. No torch.

Only `Random.random` is drawn from, the one method whose sequence Python promises to keep: a text, a seed and a rate
give the same text on every version.
"""

import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Change: TypeAlias = Callable[[str, int, float], str]

_WORD = re.compile(r"[^\W\d_]{2,}")
_BLANKS = re.compile(r"[ \t]+|(?=\n)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """A change, and the share of what it is about (letters, words, blanks) that it changes."""

    change: Change
    rate: float

    def apply(self, text: str, seed: int) -> str:
        """Return the changed text."""
        return self.change(text, seed, self.rate)


def typos(text: str, seed: int, rate: float) -> str:
    """Change each letter of a word but its first with probability `rate`.

    Such a letter changes places with the next one, is left out, is doubled, or becomes another letter, each as often.
    """
    rng = random.Random(seed)

    def mistype(found: re.Match[str]) -> str:
        letters = list(found.group())
        for index in range(1, len(letters)):
            if rng.random() < rate:
                _slip(letters, index, rng)
        return "".join(letters)

    return _WORD.sub(mistype, text)


def case(text: str, seed: int, rate: float) -> str:
    """Flip upper and lower case of each word with probability `rate`."""
    rng = random.Random(seed)
    return _WORD.sub(lambda found: found.group().swapcase() if rng.random() < rate else found.group(), text)


def whitespace(text: str, seed: int, rate: float) -> str:
    """Change each run of blanks, and each line end, with probability `rate`.

    A run becomes one blank longer, one blank shorter (a single one: longer as well, so that words stay apart) or a tab,
    each as often; a line end gets one or two trailing blanks or a tab. Line breaks stay.
    """
    rng = random.Random(seed)

    def respace(found: re.Match[str]) -> str:
        run = found.group()
        if rng.random() >= rate:
            return run
        pick = int(3 * rng.random())
        if not run:
            return (" ", "  ", "\t")[pick]
        shorter = run[:-1] or f"{run} "
        return (f"{run} ", shorter, "\t" if run != "\t" else " ")[pick]

    return _BLANKS.sub(respace, text)


# One letter in fifty is what hasty typists leave; words and blanks are fewer than letters.
KINDS = {
    "typos": Perturbation(change=typos, rate=0.02),
    "case": Perturbation(change=case, rate=0.1),
    "whitespace": Perturbation(change=whitespace, rate=0.1),
}


def _slip(letters: list[str], index: int, rng: random.Random) -> None:
    """Change the letter at `index`, in place: entries may become empty or longer, none moves out of the word."""
    pick = int(4 * rng.random())
    letter = letters[index]
    if pick == 0 and index + 1 < len(letters):
        letters[index], letters[index + 1] = letters[index + 1], letter
    elif pick == 1:
        letters[index] = ""
    elif pick == 2:
        letters[index] = 2 * letter
    else:
        others = [other for other in string.ascii_lowercase if other != letter.lower()]
        other = others[int(len(others) * rng.random())]
        letters[index] = other.upper() if letter.isupper() else other
