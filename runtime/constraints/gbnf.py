"""llama.cpp's grammar notation (GBNF, its grammars/README.md) in Lark's."""

import re
from collections import Counter

from pressd.runtime.constraints.error import ConstraintError

RULE = re.compile(r"^[ \t]*([A-Za-z0-9_-]+)[ \t]*::=", re.MULTILINE)
_PARTS = re.compile(
    r'"(?P<literal>(?:\\.|[^"\\\n])*)"|\[(?P<set>(?:\\.|[^\]\\\n])*)\]|(?P<comment>#[^\n]*)'
    r"|(?P<any>\.)|(?P<root>(?<![\w-])root(?![\w-]))"
)
_CHARACTER = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.DOTALL)
_NAMED = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "[": "[", "]": "]"}
_ANY = "[\\x00-\U0010ffff]"
_WHOLE = "whole-text"


def to_lark(text: str) -> str:
    """Return the grammar for llguidance.

    Literals and character sets are spelled anew first: the converter hands some escapes on in forms that Lark's
    notation reads differently, and `.`, which there is no line break. `root` becomes a rule of its own, so that a
    grammar without recursion is one terminal, and no terminal in it takes what the next one needs.
    Raises ConstraintError with the converter's line for what is no GBNF.
    """
    from llguidance.gbnf_to_lark import gbnf_to_lark

    names = RULE.findall(_PARTS.sub(lambda part: "root" if part["root"] else " ", text))
    counts = Counter((*names, _WHOLE))
    if "root" not in counts:
        raise ConstraintError("ebnf: there is no rule named root")
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ConstraintError(f"ebnf: the rule {twice[0]} is defined twice")
    try:
        return gbnf_to_lark(_PARTS.sub(_respell, text) + f"\nroot ::= {_WHOLE}\n")
    except ConstraintError:
        raise
    except RecursionError:
        raise ConstraintError("ebnf: the grammar is nested too deeply") from None
    except IndexError:
        raise ConstraintError("ebnf: the grammar ends inside an escape") from None
    except Exception as error:  # the converter raises bare Exception
        raise ConstraintError(f"ebnf: {error}") from None


def _respell(part: re.Match[str]) -> str:
    if part["literal"] is not None:
        return '"' + "".join(_in_literal(character) for character, _ in _characters(part["literal"])) + '"'
    if part["set"] is not None:
        inverted = part["set"].startswith("^")
        return f"[{'^' * inverted}{_in_set(_characters(part['set'][inverted:]))}]"
    return _ANY if part["any"] else _WHOLE if part["root"] else " "


def _characters(text: str) -> list[tuple[str, bool]]:
    """Decode escapes: (character, whether it was written without one)."""
    found = []
    for match in _CHARACTER.finditer(text):
        two, four, eight, escaped, plain = match.groups()
        if plain is not None:
            found.append((plain, True))
        elif escaped is not None:
            if escaped not in _NAMED:
                raise ConstraintError(f"ebnf: the escape \\{escaped} in {text[:40]!r} is not known")
            found.append((_NAMED[escaped], False))
        else:
            code = int(two or four or eight, 16)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise ConstraintError(f"ebnf: {match.group()} in {text[:40]!r} is no character")
            found.append((chr(code), False))
    return found


def _in_literal(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if ord(character) >= 0x20 and character != "\x7f" else f"\\x{ord(character):02x}"


def _in_set(characters: list[tuple[str, bool]]) -> str:
    last = len(characters) - 1
    return "".join(
        "-" if plain and character == "-" and 0 < index < last else _set_member(character)
        for index, (character, plain) in enumerate(characters)
    )


def _set_member(character: str) -> str:
    """Punctuation by its number: in Rust's sets `&&`, `--` and `~~` are operators."""
    return character if character.isalnum() or ord(character) >= 0x80 else f"\\x{ord(character):02x}"
