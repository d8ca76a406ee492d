"""A JSON schema as llguidance compiles it, or a refusal: no keyword is ignored."""

import json
from typing import Any

from pressd.runtime.constraints.error import ConstraintError

# What llguidance turns into grammar.
_IMPLEMENTED = frozenset(
    (
        *("anyOf", "oneOf", "allOf", "$ref", "const", "enum", "type"),
        *("items", "prefixItems", "minItems", "maxItems"),
        *("properties", "additionalProperties", "patternProperties", "required", "minProperties", "maxProperties"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)
# What says something to people only, or names parts of the schema.
_ANNOTATIONS = frozenset(
    (
        *("$schema", "$id", "$anchor", "$defs", "definitions", "$comment", "title", "description", "default"),
        *("examples", "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator"),
    )
)
_DRAFTS = frozenset(
    {"https://json-schema.org/draft/2020-12/schema", "https://json-schema.org/draft/2019-09/schema"}
    | {f"http://json-schema.org/draft-0{number}/schema" for number in (6, 7)}
)
_HOLD_ONE = ("items", "additionalProperties")
_HOLD_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_HOLD_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
)
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# llguidance compares these in pairs.
_MAX_PATTERN_PROPERTIES = 64
_MAX_ALTERNATIVES = 500
_MAX_PROPERTIES = 1000
_MAX_TYPES = 7
# Doubles hold every whole number up to here, and llguidance keeps numbers as doubles.
_MAX_EXACT = 2**53
_OPTIONS = {
    # One line: at most one space, after a comma or a colon. What models write, and never white space without end.
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}

Schema = dict[str, Any]


def prepare(text: str) -> Schema:
    """Parse a schema, check it, and add how its JSON is laid out: on one line, no or one space after `,` and `:`.

    Keywords are those of draft 2020-12 that llguidance implements; annotations and `x-...` are passed over, anything
    else is refused with its place, as are remote references and numbers that doubles do not hold. Properties come in
    the schema's order; `pattern` finds its match anywhere, as in JSON Schema; `format` is held in form (every year has
    a 29 February). Raises ConstraintError.
    """
    schema = _parse(text)
    if schema is False:
        raise ConstraintError("json_schema: the schema is false, which no text satisfies", impossible=True)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ConstraintError(f"json_schema: a schema is an object or a boolean, not {json.dumps(schema)[:40]}")
    _check(schema)
    return {**{key: value for key, value in schema.items() if key != "$schema"}, "x-guidance": _OPTIONS}


def _parse(text: str) -> Any:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError:
        raise ConstraintError("json_schema: the text is nested too deeply") from None
    except UnicodeEncodeError:
        raise ConstraintError("json_schema: a string holds half of a surrogate pair") from None
    except ValueError as error:
        raise ConstraintError(f"json_schema: not JSON: {error}") from None
    return schema


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check(root: Schema) -> None:
    """Visit every subschema; a stack, because nesting is the user's."""
    stack: list[tuple[str, object]] = [("#", root)]
    num_patterns = 0
    while stack:
        place, schema = stack.pop()
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, dict):
            raise ConstraintError(f"json_schema: at {place} there must be a schema: an object or a boolean")
        _check_keywords(place, schema)
        _check_values(place, schema)
        num_patterns += len(_of_type(dict, place, schema, "patternProperties"))
        if num_patterns > _MAX_PATTERN_PROPERTIES:
            raise ConstraintError(f"json_schema: there are more than {_MAX_PATTERN_PROPERTIES} patternProperties")
        stack += [(f"{place}/{key}", schema[key]) for key in _HOLD_ONE if key in schema]
        for key in _HOLD_LIST:
            parts = _of_type(list, place, schema, key)
            if len(parts) > _MAX_ALTERNATIVES and key != "prefixItems":
                raise ConstraintError(f"json_schema: {key} at {place} has more than {_MAX_ALTERNATIVES} parts")
            for index, part in enumerate(parts):
                stack.append((f"{place}/{key}/{index}", part))
        for key in _HOLD_NAMED:
            for name, part in _of_type(dict, place, schema, key).items():
                stack.append((f"{place}/{key}/{name}", part))


def _of_type(wanted: type, place: str, schema: Schema, key: str) -> Any:
    value = schema.get(key, wanted())
    if not isinstance(value, wanted):
        words = "a list of schemas" if wanted is list else "an object of schemas"
        raise ConstraintError(f"json_schema: {key} at {place} must be {words}")
    return value


def _check_keywords(place: str, schema: Schema) -> None:
    for key in schema:
        if key in _IMPLEMENTED or key in _ANNOTATIONS or (key.startswith("x-") and key != "x-guidance"):
            continue
        raise ConstraintError(f"json_schema: keyword {key!r} at {place} is not supported; remove it")
    if place == "#":
        if str(schema.get("$schema", "")).rstrip("#") not in {*_DRAFTS, ""}:
            raise ConstraintError(
                f"json_schema: $schema is {schema['$schema']!r}; draft 2020-12 and back to draft-06 are known"
            )
    elif "$id" in schema:  # it would change what "#/..." inside it means
        raise ConstraintError(f"json_schema: $id at {place}: only the whole schema may have one")


def _check_values(place: str, schema: Schema) -> None:
    reference = schema.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
        raise ConstraintError(f"json_schema: $ref {reference!r} at {place} leaves the schema; only #/... is followed")
    if "format" in schema and str(schema["format"]) not in _FORMATS:
        known = ", ".join(sorted(_FORMATS))
        raise ConstraintError(f"json_schema: format {schema['format']!r} at {place} is not known; there are {known}")
    if isinstance(schema.get("items"), list):
        raise ConstraintError(f"json_schema: items at {place} is a list; write prefixItems")
    for key, most in (("properties", _MAX_PROPERTIES), ("type", _MAX_TYPES)):
        if isinstance(schema.get(key), dict | list) and len(schema[key]) > most:
            raise ConstraintError(
                f"json_schema: {key} at {place} has {len(schema[key])} entries; at most {most} are taken"
            )
    for key in _NUMBERS:
        if isinstance(schema.get(key, 0), bool | str | list | dict | None):
            raise ConstraintError(f"json_schema: {key} at {place} must be a number")
    for key in ("const", "enum", *_NUMBERS):
        if key in schema:
            _check_numbers(f"{place}/{key}", schema[key])
    # Keys that are not named in `properties` may be written twice, and then count once.
    required = schema.get("required")
    distinct = 1 + (len(set(map(str, required))) if isinstance(required, list) else 0)
    if isinstance(schema.get("minProperties"), int | float) and schema["minProperties"] > distinct:
        raise ConstraintError(
            f"json_schema: minProperties {schema['minProperties']} at {place} counts keys that required does not name, "
            f"which are not held apart; name them, or ask for at most {distinct}"
        )


def _check_numbers(place: str, value: object) -> None:
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, int) and abs(value) > _MAX_EXACT:
            raise ConstraintError(
                f"json_schema: {str(value)[:20]} at {place} is beyond 2^53, where numbers are not exact"
            )
