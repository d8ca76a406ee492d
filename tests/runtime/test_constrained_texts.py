"""Whatever a model prefers, what comes out is what was asked for: generated constraints, foreign validators."""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pressd.runtime.constraints import ConstraintCompiler, Grammar, Matcher
from pressd.runtime.params import Constraint

PYLM = Path(__file__).parents[2] / "examples/pylm"
VOCAB = 4096
EOS = 0
ALPHABET = "abc"
Choose = Callable[[np.random.Generator, np.ndarray], int]


@pytest.fixture(scope="module")
def compiler() -> Iterator[ConstraintCompiler]:
    compiler = ConstraintCompiler(PYLM, VOCAB, (EOS,))
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def spellings() -> list[bytes]:
    """What each token of pylm adds to a text, by transformers' own table of GPT-2's stand-ins for bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads((PYLM / "tokenizer.json").read_text())["model"]["vocab"]
    return [bytes(byte_of.get(c, 0xFF) for c in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]


def allowed(matcher: Matcher, vocab_size: int = VOCAB) -> np.ndarray:
    bits = torch.empty((vocab_size + 31) // 32, dtype=torch.int32)
    matcher.write_mask(bits)
    (tokens,) = np.unpackbits(bits.numpy().view(np.uint8), bitorder="little").nonzero()
    return tokens


def any_token(rng: np.random.Generator, tokens: np.ndarray) -> int:
    return int(rng.choice(tokens))


def long_and_odd(spellings: list[bytes]) -> Choose:
    """Prefers the longest tokens and those that are no whole characters; one time in four, any."""
    odd = np.array([len(text) + 8 * (max(text) >= 0x80) for text in spellings])

    def choose(rng: np.random.Generator, tokens: np.ndarray) -> int:
        if rng.random() < 0.25:
            return any_token(rng, tokens)
        return int(tokens[np.lexsort((rng.random(len(tokens)), odd[tokens]))[-1]])

    return choose


def draw(grammar: Grammar, choose: Choose, seed: int, spellings: list[bytes]) -> str:
    """Draw until the constraint is complete, or the end is drawn, or by one chance in three where it may end."""
    rng, matcher, text = np.random.default_rng(seed), grammar.matcher(), b""
    for _ in range(3000):
        if matcher.is_complete or (matcher.may_end and rng.random() < 1 / 3):
            return text.decode()
        token = choose(rng, allowed(matcher))
        matcher.accept(token)
        if token == EOS:
            return text.decode()
        text += spellings[token]
    raise AssertionError(f"no end after 3000 tokens: {text[-200:]!r}")


STRINGS = ["a", 'b"\\\n', "é😀", "\u2028", "x/y", "\x00\x1f"]
VALUES: list[Any] = [
    0,
    1,
    -2,
    123456789012,
    1.5,
    0.1,
    -0.5,
    None,
    True,
    False,
    [],
    [1, ["x"]],
    {},
    {"k": None},
    *STRINGS,
]
PATTERNS = ["^[a-f]{2,5}$", "^(ab|cd){1,3}e?$", r"^\d{3}-\d{2}$", r'^[^"\\]{1,4}$', "^a.c$", "^(?:x|yz)?$"]
FORMATS = ["uuid", "ipv4", "ipv6"]
NAMES = ["a", "name", "a b", "é", 'quo"te', "\\", "long_property_name", "x-y"]


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose every text ends: no unbounded strings, and recursion in none."""
    kinds = [_integer, _number, _string, _pattern, _choice, _multiple, _map]
    kinds += [_object, _object, _array, _any, _tuple, _all] if depth < 3 else []
    return rng.choice(kinds)(rng, depth + 1)


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    high = low + rng.choice([2, 3, 17, 5000])
    lower, upper = rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "exclusiveMaximum"])
    return {"type": "integer", lower: low, upper: high}


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    low = round(rng.uniform(-100, 100), rng.randint(0, 4))
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + rng.choice([0.5, 1, 33.25])}


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    shortest = rng.randint(0, 4)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randint(0, 6)}


def _pattern(rng: random.Random, _: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"type": "string", "format": rng.choice(FORMATS)}
    return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 12}


def _choice(rng: random.Random, _: int) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"enum": rng.sample(VALUES, rng.randint(1, 6))},
        {"const": rng.choice(VALUES)},
        {"type": rng.sample(["boolean", "null"], rng.randint(1, 2))},
    ]
    return rng.choice(kinds)


def _multiple(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": -50, "maximum": 300, "multipleOf": rng.choice([2, 3, 7, 10])}


def _map(rng: random.Random, _: int) -> dict[str, Any]:
    values = {"^k[0-9]$": {"type": "boolean"}}
    return {
        "type": "object",
        "patternProperties": values,
        "additionalProperties": False,
        "maxProperties": rng.randint(0, 3),
    }


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    fewest = rng.randint(0, 2)
    return {
        "type": "array",
        "items": schema(rng, depth),
        "minItems": fewest,
        "maxItems": fewest + rng.randint(0, 2),
    }


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    items = [schema(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, 1)}


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [schema(rng, depth) for _ in range(rng.randint(1, 3))]}


def _all(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"allOf": [{"type": "integer", "minimum": 3}, {"$ref": "#/$defs/small"}]}


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_generated_schemas_are_obeyed(first: int, compiler: ConstraintCompiler, spellings: list[bytes]) -> None:
    from jsonschema import Draft202012Validator

    for seed in range(first, first + 50):
        wanted = {**schema(random.Random(seed)), "$defs": {"small": {"maximum": 9}}}
        validator = Draft202012Validator(wanted, format_checker=Draft202012Validator.FORMAT_CHECKER)
        grammar = compiler.submit(Constraint(kind="json_schema", text=json.dumps(wanted))).result()
        for choose in (any_token, long_and_odd(spellings)):
            text = draw(grammar, choose, seed, spellings)
            assert [error.message for error in validator.iter_errors(json.loads(text))] == [], (seed, wanted, text)


@pytest.mark.parametrize("form", ["date", "date-time"])
def test_dates_are_dates_of_a_leap_year(form: str, compiler: ConstraintCompiler, spellings: list[bytes]) -> None:
    grammar = compiler.submit(
        Constraint(kind="json_schema", text=json.dumps({"type": "string", "format": form}))
    ).result()
    for seed in range(20):
        text = json.loads(draw(grammar, any_token, seed, spellings))
        # Its form is RFC 3339's, which knows a second 60 and any number of decimals; Python has neither.
        within_python = re.sub(r":60(?=[zZ+-])", ":59", re.sub(r"\.\d+", "", text)).upper()
        datetime.fromisoformat(f"2000{within_python[4:]}")


@pytest.mark.parametrize("seed", range(5))
def test_json_object_is_an_object_and_its_white_space_ends(
    seed: int, compiler: ConstraintCompiler, spellings: list[bytes]
) -> None:
    grammar = compiler.submit(Constraint(kind="json_object")).result()
    # Where a space is allowed it is taken: two in a row, or one before a bracket, would show.
    spaces = {token for token, text in enumerate(spellings) if text and not text.strip()}

    def spaced(rng: np.random.Generator, tokens: np.ndarray) -> int:
        blank = [token for token in tokens.tolist() if token in spaces]
        return int(rng.choice(blank)) if blank and rng.random() < 0.8 else any_token(rng, tokens)

    text = draw(grammar, spaced, seed, spellings)
    assert isinstance(json.loads(text), dict)
    outside = re.sub(r'"(?:\\.|[^"\\])*"', '""', text)
    assert re.findall(r"[^,:] |  |[\n\t\r]", outside) == []


def regular_expression(rng: random.Random, depth: int = 0) -> str:
    """In the part of the notation that Python and Rust read alike; bounded."""
    if depth == 3 or rng.random() < 0.3:
        return rng.choice(
            [
                "a",
                "0",
                "é",
                "_",
                " ",
                "[a-f]",
                "[^a-f]",
                "[0-9]",
                ".",
                r"\.",
                "/",
                '"',
                "😀",
                r"\[",
                r"\n",
                r"\\",
                "\n",
                "#",
            ]
        )
    inner = [regular_expression(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    repeat = rng.choice(["?", "{2}", "{0,3}", "{1,2}", ""])
    return rng.choice(["".join(inner), f"(?:{'|'.join(inner)})", f"(?:{inner[0]}){repeat}"])


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_generated_expressions_match_as_a_whole(
    first: int, compiler: ConstraintCompiler, spellings: list[bytes]
) -> None:
    for seed in range(first, first + 50):
        wanted = regular_expression(random.Random(seed))
        grammar = compiler.submit(Constraint(kind="regex", text=wanted)).result()
        for choose in (any_token, long_and_odd(spellings)):
            text = draw(grammar, choose, seed, spellings)
            assert re.fullmatch(wanted, text), (seed, wanted, text)


def test_choices_are_matched_to_the_byte(compiler: ConstraintCompiler, spellings: list[bytes]) -> None:
    """In every state that a token leads to: exactly the tokens that begin the rest of a choice."""
    choices = ("yes", "yes, sir", 'a "quote"\n', "\\d+|.*", "naïve 😀", "naïve 😁", "日本", "")
    grammar = compiler.submit(Constraint(kind="choice", choices=choices)).result()
    encoded = [choice.encode() for choice in choices]
    reached, paths = set(), [()]
    while paths:
        path = paths.pop()
        prefix = b"".join(spellings[token] for token in path)
        matcher = grammar.matcher()
        for token in path:
            matcher.accept(token)
        rests = [choice[len(prefix) :] for choice in encoded if choice.startswith(prefix)]
        following = {t for t, text in enumerate(spellings) if t != EOS and any(rest.startswith(text) for rest in rests)}
        assert set(allowed(matcher).tolist()) == following | ({EOS} if b"" in rests else set())
        assert (matcher.may_end, matcher.is_complete) == (b"" in rests, rests == [b""])
        fresh = [(*path, token) for token in following if prefix + spellings[token] not in reached]
        reached |= {prefix + spellings[token] for token in following}
        paths += fresh
    assert reached >= {choice for choice in encoded if choice}


@pytest.fixture(scope="module")
def abc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ConstraintCompiler, list[str]]]:
    """A vocabulary of all strings of a, b and c up to three letters, in a model with room for more."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["".join(word) for length in (1, 2, 3) for word in itertools.product(ALPHABET, repeat=length)]
    path = tmp_path_factory.mktemp("abc")
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(["<end>", *words])}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    compiler = ConstraintCompiler(path, 67, (EOS,))
    yield compiler, ["", *words]
    compiler.close()


Expression = tuple[str, int]  # and how long a text it matches at most


def combined(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    several = st.lists(inner, min_size=2, max_size=3)
    return st.one_of(
        several.map(lambda parts: ("".join(part for part, _ in parts), sum(longest for _, longest in parts))),
        several.map(lambda parts: (f"({'|'.join(part for part, _ in parts)})", max(longest for _, longest in parts))),
        inner.map(lambda part: (f"({part[0]})?", part[1])),
        inner.map(lambda part: (f"({part[0]}){{1,2}}", 2 * part[1])),
    )


LETTERS = [("a", 1), ("b", 1), ("c", 1), ("[ab]", 1), ("[bc]", 1), ("(a|)", 1)]


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.sampled_from(LETTERS), combined, max_leaves=5).filter(lambda part: part[1] <= 6))
def test_masks_are_what_a_search_finds(abc: tuple[ConstraintCompiler, list[str]], expression: Expression) -> None:
    """Against all texts of up to six letters."""
    (compiler, words), (wanted, longest) = abc, expression
    texts = ("".join(text) for length in range(longest + 1) for text in itertools.product(ALPHABET, repeat=length))
    language = [text for text in texts if re.fullmatch(wanted, text)]
    grammar = compiler.submit(Constraint(kind="regex", text=wanted)).result()
    prefixes = {text[:length] for text in language for length in range(len(text) + 1)}
    for prefix in sorted(prefixes)[:60]:
        matcher = grammar.matcher()
        for letter in prefix:
            matcher.accept(words.index(letter))
        following = {token for token, word in enumerate(words) if word and prefix + word in prefixes}
        assert set(allowed(matcher, 67).tolist()) == following | ({EOS} if prefix in language else set())
        assert matcher.is_complete == (prefix in language and not following)
