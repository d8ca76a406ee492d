"""Structured output's edges: what is refused and how, ends of text, vocabularies, the cache and its threads."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pressd.runtime.constraints import ConstraintCompiler, ConstraintError, Grammar, Matcher
from pressd.runtime.constraints.error import MAX_MESSAGE
from pressd.runtime.params import Constraint, ConstraintKind

PYLM = Path(__file__).parents[2] / "examples/pylm"
Make = Callable[..., ConstraintCompiler]


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    made = []

    def make(path: Path = PYLM, vocab_size: int = 4096, eos: tuple[int, ...] = (0,), **more: int) -> ConstraintCompiler:
        made.append(ConstraintCompiler(path, vocab_size, eos, **more))
        return made[-1]

    yield make
    for compiler in made:
        compiler.close()


@pytest.fixture(scope="module")
def pylm(make: Make) -> ConstraintCompiler:
    return make()


def schema(value: object) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(value))


def compiled(compiler: ConstraintCompiler, kind: ConstraintKind, text: str = "", *choices: str) -> Grammar:
    return compiler.submit(Constraint(kind=kind, text=text, choices=choices)).result(60)


def allowed(matcher: Matcher, vocab_size: int) -> set[int]:
    bits = torch.full(((vocab_size + 31) // 32,), -1, dtype=torch.int32)
    matcher.write_mask(bits)
    return {token for token in range(32 * len(bits)) if int(bits[token // 32]) >> token % 32 & 1}


def text_matches(compiler: ConstraintCompiler, constraint: Constraint, text: str, path: Path = PYLM) -> bool:
    """Whether the text, cut by the model's own tokenizer, can be drawn and may end there."""
    from transformers import AutoTokenizer

    matcher = compiler.submit(constraint).result(60).matcher()
    try:
        for token in AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False).input_ids:
            matcher.accept(token)
    except ConstraintError:
        return False
    return matcher.may_end


def test_importing_it_imports_neither_llguidance_nor_transformers_and_a_missing_one_is_named() -> None:
    program = f"""if 1:
        import sys
        from pathlib import Path
        from pressd.runtime.constraints import ConstraintCompiler, ConstraintError
        from pressd.runtime.params import Constraint
        assert not {{"llguidance", "transformers"}} & set(sys.modules)
        sys.modules["llguidance"] = None
        compiler = ConstraintCompiler(Path({str(PYLM)!r}), 4096, (0,))
        error = compiler.submit(Constraint(kind="regex", text="a")).exception()
        assert isinstance(error, ConstraintError)
        assert str(error) == "structured output needs the package llguidance: pip install llguidance"
        compiler.close()
    """
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (schema(False), "false, which no text satisfies"),
        (schema({"enum": []}), "anyOf is empty"),
        (schema({"type": "string", "minLength": 3, "maxLength": 2}), "minLength (3) is greater than maxLength (2)"),
        (schema({"type": "integer", "minimum": 5, "maximum": 4}), "minimum (5) is greater than maximum (4)"),
        (schema({"properties": {"a": False}, "required": ["a"], "type": "object"}), "'a' is unsatisfiable"),
        (schema({"$ref": "#"}), "no text satisfies it"),
        (Constraint(kind="regex", text=r"[^\s\S]"), "no text satisfies it"),
        (Constraint(kind="regex", text=r"a[^\s\S]"), "no text satisfies it"),
        (Constraint(kind="ebnf", text="start: start"), "no text satisfies it"),
    ],
)
def test_the_impossible_ends_when_compiled(constraint: Constraint, words: str, pylm: ConstraintCompiler) -> None:
    with pytest.raises(ConstraintError) as caught:
        pylm.submit(constraint).result(60)
    assert caught.value.impossible
    assert words in str(caught.value)


UNSUPPORTED = """not uniqueItems contains minContains propertyNames if then dependentRequired dependentSchemas
dependencies unevaluatedProperties unevaluatedItems $dynamicRef $recursiveRef additionalItems maxLenght nullable
x-guidance"""


@pytest.mark.parametrize("keyword", UNSUPPORTED.split())
def test_a_keyword_that_would_be_ignored_is_refused_wherever_it_is(keyword: str, pylm: ConstraintCompiler) -> None:
    bad = {"type": "string", keyword: {}}
    places = {
        "#": bad,
        "#/properties/a": {"properties": {"a": bad}},
        "#/items": {"items": bad},
        "#/anyOf/1": {"anyOf": [{}, bad]},
        "#/prefixItems/0": {"prefixItems": [bad]},
        "#/additionalProperties/allOf/0": {"additionalProperties": {"allOf": [bad]}},
        "#/$defs/x/patternProperties/^a": {"$defs": {"x": {"patternProperties": {"^a": bad}}}},
    }
    for place, whole in places.items():
        with pytest.raises(ConstraintError, match=r"json_schema: .*is not supported") as caught:
            pylm.submit(schema(whole)).result(60)
        assert f"{keyword!r} at {place} " in str(caught.value)
        assert not caught.value.impossible


def test_what_is_no_keyword_may_be_there(pylm: ConstraintCompiler) -> None:
    """Names that look like keywords where names, values or annotations stand."""
    inner = {"not": {"const": {"if": 1}}, "contains": {"enum": [{"not": 2}]}}
    wanted = {"type": "object", "properties": inner, "required": ["not", "contains"], "additionalProperties": False}
    noted = {**wanted, "default": {"not": 1}, "examples": [{"if": 1}], "title": "t", "x-order": 1, "deprecated": True}
    assert text_matches(pylm, schema(noted), '{"not": {"if": 1}, "contains":{"not": 2}}')


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"exclusiveMinimum": True}, "exclusiveMinimum at # must be a number"),
        ({"properties": {"a": {"const": 2**53 + 1}}}, "at #/properties/a/const is beyond 2^53"),
        ({"enum": [1, [{"a": -(2**60)}]]}, "at #/enum is beyond 2^53"),
        ({"$ref": "https://example.org/schema"}, "leaves the schema"),
        ({"items": [{}]}, "write prefixItems"),
        ({"items": 3}, "at #/items there must be a schema"),
        ({"type": "object", "minProperties": 2}, "ask for at most 1"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "draft 2020-12 and back to draft-06"),
        ({"properties": {"a": {"$id": "https://example.org/a"}}}, "only the whole schema may have one"),
        ({"minimum": 10**400}, "at #/minimum is beyond 2^53"),
        ({"format": ["date"], "required": 3}, "is not known"),
        ({"format": "unknown"}, "format 'unknown' at # is not known"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf needs alternatives that plainly exclude"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"patternProperties": {f"^{n}a$": {} for n in range(65)}}, "more than 64 patternProperties"),
        ({"anyOf": [{"$ref": "#"}] * 501}, "anyOf at # has more than 500 parts"),
        ({"properties": {str(n): {} for n in range(1001)}}, "has 1001 entries; at most 1000"),
        ({"type": ["null"] * 8}, "type at # has 8 entries; at most 7"),
        ({"type": "text"}, "Invalid type: text"),
        ({"required": "a"}, "Expected array for 'required'"),
        (3, "a schema is an object or a boolean, not 3"),
    ],
)
def test_a_bad_schema_is_refused_with_the_place(value: object, words: str, pylm: ConstraintCompiler) -> None:
    with pytest.raises(ConstraintError) as caught:
        pylm.submit(schema(value)).result(60)
    assert str(caught.value).startswith("json_schema: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", '{"a": ', "not JSON: Expecting value: line 1 column 7"),
        ("json_schema", '{"minimum": NaN}', "not JSON: NaN"),
        ("json_schema", '{"minimum": 1e999}', "not JSON: Out of range"),
        ("json_schema", "[" * 30_000, "nested too deeply"),
        ("json_schema", r'{"const": "\ud800"}', "half of a surrogate pair"),
        ("json_schema", '{"const": "' + "x" * 10_000_000 + '"}', "10000013 bytes are too many; at most 65536"),
        ("regex", "a\udfff", "half of a surrogate pair at character 1"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "(" * 9000, "invalid regex"),
        ("regex", "a?" * 4000, "too complex"),
        ("ebnf", "start (", "1(7): Expected token ':'"),
        ("ebnf", "begin: /a/", "no start rule found"),
        ("ebnf", "start: " + "(" * 9000, "too deeply nested"),
        ("ebnf", "start: x\nx[temperature=0.5]: /a+/", "the rule attribute temperature= is not supported"),
        (
            "ebnf",
            'start: %lark { start: a\n a[capture,\nstop="x"]: /a+/ }',
            "the rule attribute stop= is not supported",
        ),
        ("ebnf", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}', "Unimplemented keys"),
        ("ebnf", 'start ::= "a"', "there is no rule named root"),
        ("ebnf", 'root ::= "a"\nroot ::= "b"', "the rule root is defined twice"),
        ("ebnf", "root ::= other", "Rule 'other' not found"),
        ("ebnf", r'root ::= "\q"', r"the escape \q"),
        ("ebnf", "root ::= " + "(" * 9000, "nested too deeply"),
    ],
)
def test_a_bad_text_is_refused_in_one_line(
    kind: ConstraintKind, text: str, words: str, pylm: ConstraintCompiler
) -> None:
    with pytest.raises(ConstraintError) as caught:
        compiled(pylm, kind, text)
    message = str(caught.value)
    assert message.startswith(f"{kind}: ")
    assert words in message
    assert "\n" not in message
    assert len(message) <= MAX_MESSAGE + 1


HOSTILE = [
    Constraint(kind="regex", text="((((a{9}b){9}c){9}d){9}e){9}"),
    Constraint(kind="regex", text=".*a.{200}b.{200}c.{200}"),
    Constraint(kind="regex", text="(a*)*" * 3000),
    Constraint(kind="choice", choices=tuple(f"choice number {n}" for n in range(3000))),
    schema({"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**8}}),
    schema({"type": "object", "properties": {f"p{n}": {} for n in range(1000)}}),
    schema({"type": "integer", "multipleOf": 999_999_937}),
    schema({"$ref": "#/$defs/0", "$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(1000)} | {"1000": {}}}),
    schema({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}, "$ref": "#/$defs/a"}),
    schema({"allOf": [{"anyOf": [{"required": [f"a{n}"]}, {"required": [f"b{n}"]}]} for n in range(20)]}),
    Constraint(kind="ebnf", text="start: a0\n" + "".join(f"a{n}: a{n + 1}\n" for n in range(2000)) + 'a2000: "x"'),
    Constraint(kind="ebnf", text="start: A0\n" + "".join(f"A{n}: A{n + 1} A{n + 1}\n" for n in range(40)) + 'A40: "x"'),
    Constraint(kind="ebnf", text="start: s\ns: s s s | s s | /a*/ | "),
    Constraint(kind="ebnf", text=" ".join(("start:", *(f'"a{n}"?' for n in range(2500))))),
    Constraint(
        kind="ebnf", text="root ::= a0\n" + "".join(f"a{n} ::= a{n + 1}\n" for n in range(1500)) + 'a1500 ::= "x"'
    ),
]


@pytest.mark.parametrize("constraint", HOSTILE, ids=lambda constraint: f"{constraint.kind}: {constraint.text[:20]}")
def test_the_hostile_costs_an_error_at_most(constraint: Constraint, pylm: ConstraintCompiler) -> None:
    with contextlib.suppress(ConstraintError):
        matcher = pylm.submit(constraint).result(60).matcher()
        for _ in range(20):
            tokens = allowed(matcher, 4096)
            if matcher.is_complete or not tokens - {0}:
                break
            matcher.accept(max(tokens))
    assert compiled(pylm, "regex", "a").matcher().may_end is False  # and the next one is served


PIECES = [*'ab A:|()[]{}*+?"/\\~&<>%=^$.,-\n0129#@_é', "start: ", "root ::= ", '"type": ', "%json ", "\\d"]
GRAMMAR_LIKE = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(("json_schema", "regex", "ebnf", "choice")), st.one_of(GRAMMAR_LIKE, st.text(max_size=20)))
def test_any_text_is_compiled_or_refused(pylm: ConstraintCompiler, kind: ConstraintKind, text: str) -> None:
    if text or kind == "choice":
        error = pylm.submit(Constraint(kind=kind, text=text, choices=(text,))).exception(60)
        assert error is None or (isinstance(error, ConstraintError) and "\n" not in str(error))
        assert error is None or kind != "choice" or "surrogate" in str(error)


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('start: "a" B+\nB: /b|c/', ["ab", "abcb"], ["a", "b", "abd"]),
        ('%llguidance {}\nstart: "x::=y"', ["x::=y"], ["x"]),
        ('root ::= [a-z]+ "x" # ::=', ["ax", "xxx"], ["x", "a", "ax "]),
        ('root ::= (root "+")? [0-9]{1,2} | "(" root ")"', ["1", "(12+3)+4"], ["123", "(1", "+1"]),
        (
            r'root ::= "\x41\u00e9\U0001F600\"\\/" [\u0041-\u0043\]-] [+--] .',
            ['Aé😀"\\/]-\n', 'Aé😀"\\/B,é'],
            ['Aé😀"\\/D,x'],
        ),
        ("start: a b\na[max_tokens=2]: /a+/\nb: /temperature=/", ["atemperature="], ["a", "b"]),
        ("root ::= [^a&&b-] ws\nws ::= [ \\t\\n]?", ["c", "+\n"], ["a", "&", "b", "-", "c  "]),
    ],
)
def test_both_notations_of_grammars(text: str, good: list[str], bad: list[str], pylm: ConstraintCompiler) -> None:
    constraint = Constraint(kind="ebnf", text=text)
    assert [text for text in good if not text_matches(pylm, constraint, text)] == []
    assert [text for text in bad if text_matches(pylm, constraint, text)] == []


def test_every_end_of_text_ends_where_the_text_may_and_nowhere_else(make: Make, tiny_llama: Path) -> None:
    """The end ids are 0, a letter's and one that no token has: the letter is then no text any more."""
    a, b, z = (2 + "0123456789abcdefghijklmnopqrstuvwxyz".index(letter) for letter in "abz")
    matcher = compiled(make(tiny_llama, 97, (0, z, 96)), "regex", "a[bz]?").matcher()
    assert (allowed(matcher, 97), matcher.may_end) == ({a}, False)
    with pytest.raises(ConstraintError, match=r"regex: token 0 may not come next"):
        matcher.accept(0)
    matcher.accept(a)
    assert (allowed(matcher, 97), matcher.may_end, matcher.is_complete) == ({b, 0, z, 96}, True, False)
    matcher.accept(z)
    assert (matcher.may_end, matcher.is_complete, allowed(matcher, 97)) == (True, True, {0, z, 96})
    with pytest.raises(ConstraintError, match="may not come next"):
        matcher.accept(b)
    stuck = compiled(make(tiny_llama, 97, (0, z)), "regex", "az").matcher()
    stuck.accept(a)
    assert (allowed(stuck, 97), stuck.is_stuck, stuck.is_complete) == (set(), True, False)


def test_without_any_end_of_text_the_last_token_completes(make: Make, tiny_llama: Path) -> None:
    compiler = make(tiny_llama, 97, ())
    a = next(iter(allowed(compiled(compiler, "regex", "a").matcher(), 97)))
    for text, length in (("a{1,3}", 3), ("aa", 2), ("(a|aa|)", 2)):
        matcher = compiled(compiler, "regex", text).matcher()
        for _ in range(length):
            assert not matcher.is_complete
            assert allowed(matcher, 97) == {a}
            matcher.accept(a)
        assert matcher.is_complete
        assert allowed(matcher, 97) == set()
        assert not matcher.is_stuck
    assert compiled(compiler, "choice", "", "").matcher().is_complete


@pytest.mark.parametrize("vocab_size", [4095, 4096, 4127, 4128, 4200])
def test_ids_without_a_token_are_never_allowed(vocab_size: int, make: Make) -> None:
    """Also where the tokenizer has more than the model, and in a grammar that takes any token."""
    compiler = make(PYLM, vocab_size)
    matcher = compiled(compiler, "ebnf", 'start: <[*]> "b"').matcher()
    assert allowed(matcher, vocab_size) == set(range(1, min(vocab_size, 4096)))
    for token in (-1, vocab_size, 2**40):
        with pytest.raises(ConstraintError, match="may not come next"):
            matcher.accept(token)
    matcher.accept(77)
    assert max(allowed(matcher, vocab_size)) < 4096


def test_a_token_that_was_not_allowed_changes_nothing(pylm: ConstraintCompiler) -> None:
    matcher = compiled(pylm, "regex", "[0-9]+;").matcher()
    before = allowed(matcher, 4096)
    with pytest.raises(ConstraintError, match=r"regex: token \d+ may not come next"):
        matcher.accept(next(token for token in range(1, 4096) if token not in before))
    assert allowed(matcher, 4096) == before
    matcher.accept(min(before))


def test_json_is_on_one_line_with_a_space_or_none_after_commas_and_colons(pylm: ConstraintCompiler) -> None:
    wanted = schema({"type": "object", "properties": {"a": {"items": {"type": "null"}}}, "required": ["a"]})
    good = ['{"a":[null,null]}', '{"a": [null, null]}', '{"a": [null,null], "b":1}']
    bad = ['{ "a":[]}', '{"a":[] }', '{"a" :[]}', '{"a":  []}', '{"a":[null,  null]}', '{"a":[null ,null]}']
    bad += ['{"a":\n[]}', '{"a":[null,\nnull]}', ' {"a":[]}', '{"a":[]}\n', '{"a":[null,\tnull]}']
    assert [text for text in good if not text_matches(pylm, wanted, text)] == []
    assert [text for text in bad if text_matches(pylm, wanted, text)] == []
