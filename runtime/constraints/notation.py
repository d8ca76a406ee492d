"""One constraint in the form that llguidance compiles."""

import json
from typing import Any

from pressd.runtime.constraints import ebnf, json_schema
from pressd.runtime.constraints.error import ConstraintError
from pressd.runtime.params import Constraint

# Time grows with the square of some of these: about a second for compiling, 30 ms for a token, at worst.
MAX_TEXT_BYTES = {"json_schema": 64 << 10, "json_object": 0, "regex": 16 << 10, "ebnf": 32 << 10, "choice": 64 << 10}
# Not the tokenizer but the model decides how forced text is cut into tokens: masks are then exactly what may follow.
_EXACT = {"name": "exact", "lark_grammar": '%llguidance {"no_forcing": true}\nstart: ""'}


def serialize(constraint: Constraint) -> str:
    """Return llguidance's own JSON form of the constraint.

    Choices are matched to the byte, one may begin another. A regular expression is in Rust's notation (no look-around,
    no references back, `\\d` is a digit of any script) and matches the text as a whole. Raises ConstraintError if the
    constraint is too large or its notation's own checks refuse it.
    """
    _check_size(constraint)
    match constraint.kind:
        case "json_schema":
            first: dict[str, Any] = {"json_schema": json_schema.prepare(constraint.text)}
        case "json_object":
            first = {"json_schema": json_schema.prepare('{"type": "object"}')}
        case "ebnf":
            first = {"lark_grammar": ebnf.prepare(constraint.text)}
        case "regex":
            first = _regex(constraint.text)
        case "choice":
            first = _regex("|".join(map(_literally, constraint.choices)))
    return json.dumps({"grammars": [first, _EXACT]})


def _check_size(constraint: Constraint) -> None:
    kind, limit = constraint.kind, MAX_TEXT_BYTES[constraint.kind]
    texts = constraint.choices if kind == "choice" else (constraint.text,) if limit else ()
    try:
        size = sum(len(text.encode()) for text in texts) + max(len(texts) - 1, 0)
    except UnicodeEncodeError as error:
        raise ConstraintError(f"{kind}: half of a surrogate pair at character {error.start}") from None
    if size > limit:
        raise ConstraintError(f"{kind}: {size} bytes are too many; at most {limit} are taken", lasting=False)


def _regex(text: str) -> dict[str, Any]:
    from llguidance import LLMatcher

    (grammar,) = json.loads(LLMatcher.grammar_from_regex(text))["grammars"]
    return {key: value for key, value in grammar.items() if value is not None}


def _literally(text: str) -> str:
    """A regular expression for exactly this text."""
    plain = (
        character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}" for character in text
    )
    return "".join(plain)
