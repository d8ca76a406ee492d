"""Grammars in Lark's and llama.cpp's notations, as llguidance takes them."""

import re

from pressd.runtime.constraints import gbnf
from pressd.runtime.constraints.error import ConstraintError

# Lark's strings, regular expressions and comments: what looks like an attribute inside them is none.
_OPAQUE = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?![/\s])(?:\\.|[^/\\\n])+/|(?://|#)[^\n]*')
_ATTRIBUTES = re.compile(r"[_a-z][\w-]*\s*\[([^\]]*)\]\s*:")
_NOT_HONOURED = ("temperature", "stop")


def prepare(text: str) -> str:
    """Return the grammar in Lark notation.

    A text in which a line begins with `name ::=` is GBNF, whose first rule is `root`; every other text is Lark as
    llguidance reads it (its docs/syntax.md), whose first rule is `start`. In both, a terminal (in GBNF: a rule that
    names no other) takes as much text as it can. Raises ConstraintError for rule attributes that only an engine with
    backtracking or several temperatures could honour.
    """
    if gbnf.RULE.search(text):
        return gbnf.to_lark(text)
    for attributes in _ATTRIBUTES.findall(_OPAQUE.sub(" ", text)):
        for name in _NOT_HONOURED:
            if re.search(rf"\b{name}\s*=", attributes):
                raise ConstraintError(f"ebnf: the rule attribute {name}= is not supported; remove it")
    return text
