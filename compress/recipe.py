"""The recipe: which fused group gets which scheme, by which passes, and how good the result must be. No torch."""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pressd.compress.pass_options import PASSES, PassOptions
from pressd.runtime.artifact.families import EMBED, LM_HEAD, FusedGroup

KEEP = "keep"
_KINDS = ("qkv", "o", "gate_up", "down")
P = TypeVar("P", bound=PassOptions)
_PATTERN = re.compile(rf"(?:layers\.(?P<layers>\*|\d+(?:-\d+)?)\.)?(?P<kind>\*|{'|'.join((*_KINDS, EMBED, LM_HEAD))})")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Section):
    """The text that passes collect statistics from, in rows of `seq_len`; `seed` chooses the rows. rtn needs none."""

    data: str = "stdlib"
    tokens: Annotated[int, Field(ge=1)] = 65536
    seq_len: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0)] = 0


class Gates(_Section):
    """Bounds on what `pressd eval` measures: `top1_agreement` from below, everything else from above."""

    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    js_mean: float | None = None
    ppl_ratio: float | None = None
    top1_agreement: float | None = None


class _Text(_Section):
    source: str | None = None
    calibration: Calibration = Calibration()
    passes: Annotated[tuple[Annotated[PassOptions, Field(discriminator="use")], ...], Field(alias="pass")] = ()
    scheme: Annotated[dict[str, str], Field(min_length=1)]
    gates: Gates = Gates()

    @field_validator("passes", mode="before")
    @classmethod
    def _known(cls, passes: object) -> object:
        """Refuse unknown names in words of our own: what remains are options."""
        for entry in passes if isinstance(passes, list) else ():
            name = entry.get("use") if isinstance(entry, dict) else None
            if name not in PASSES:
                raise ValueError(f"pass {name!r} is not known; known now: {', '.join(PASSES)}")
        return passes

    @field_validator("passes")
    @classmethod
    def _once(cls, passes: tuple[PassOptions, ...]) -> tuple[PassOptions, ...]:
        names = [entry.use for entry in passes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"pass {name!r} is there twice; one of its kind is enough")
        if {"rtn", "gptq"} <= set(names):
            raise ValueError("passes 'rtn' and 'gptq' both round weights; choose one")
        return passes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Fused groups that `pattern` matches get the scheme of this name."""

    pattern: str
    scheme: str

    def matches(self, group: FusedGroup) -> bool:
        """Whether the rule is about this group; `*` is about the decoder's layers, not about embed and lm_head."""
        match = _PATTERN.fullmatch(self.pattern)
        assert match is not None
        name, kind = group.name.split("."), match["kind"]
        if len(name) == 1:
            return match["layers"] is None and kind == name[0]
        return kind in ("*", name[2]) and _in_range(int(name[1]), match["layers"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe that has been read: `text` is what the user wrote, `rules` are in its order, the last match wins."""

    text: str
    source: str | None
    rules: tuple[Rule, ...]
    gates: dict[str, float]
    passes: tuple[PassOptions, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def reads_text(self) -> bool:
        """Whether any pass needs to see what runs through the model."""
        return any(options.reads_text for options in self.passes)

    def pass_of(self, kind: type[P]) -> P | None:
        """Return the options of a pass, None if the recipe does not use it."""
        return next((options for options in self.passes if isinstance(options, kind)), None)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file; raises ValueError naming the key and the way out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: cannot be read ({error})") from None
    return parse_recipe(text, f"recipe {path}")


def recipe_of_scheme(
    scheme: str, passes: tuple[str, ...] = (), calibration: Mapping[str, str | int] | None = None
) -> Recipe:
    """Return the recipe that gives every linear of the decoder's layers one scheme, by passes of these names.

    `calibration` are the keys of its section that are not what they are by default.
    """
    keys = "".join(f"{key} = {_toml(value)}\n" for key, value in (calibration or {}).items())
    section = f"[calibration]\n{keys}" if keys else ""
    named = "".join(f"[[pass]]\nuse = {_toml(name)}\n" for name in passes)
    return parse_recipe(f'{section}{named}[scheme]\n"*" = "{scheme}"\n', f"scheme {scheme}")


def with_calibration(recipe: Recipe, changes: Mapping[str, str | int]) -> Recipe:
    """Return the recipe with other keys of its calibration; its text stays what the user wrote."""
    try:
        calibration = Calibration.model_validate(recipe.calibration.model_dump() | dict(changes))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(_mistake(("calibration", *first["loc"]), first["type"], first["msg"])) from None
    return dataclasses.replace(recipe, calibration=calibration)


def _toml(value: str | int) -> str:
    """A value as TOML writes it, whose strings are JSON's where these need no surrogates."""
    return json.dumps(value, ensure_ascii=False)


def parse_recipe(text: str, where: str) -> Recipe:
    """Parse TOML; `where` begins every error message."""
    try:
        content = _Text.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: not valid TOML ({error})") from None
    except ValidationError as error:
        # A misspelt key explains why another one is missing.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise ValueError(f"{where}: {_mistake(first['loc'], first['type'], first['msg'])}") from None
    for pattern in content.scheme:
        _check_pattern(pattern, where)
    return Recipe(
        text=text,
        source=content.source,
        rules=tuple(Rule(pattern=pattern, scheme=scheme) for pattern, scheme in content.scheme.items()),
        gates={name: bound for name, bound in content.gates.model_dump().items() if bound is not None},
        passes=content.passes,
        calibration=content.calibration,
    )


def _mistake(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    """What is wrong, and where; an option of a pass by the pass's name."""
    if loc[0] == "pass" and len(loc) > 3:
        name, option = str(loc[2]), str(loc[3])
        if kind == "extra_forbidden":
            known = ", ".join(sorted(PASSES[name].model_fields.keys() - {"use"})) or "none"
            return f"pass {name!r} has no option {option!r}; its options: {known}"
        return f"pass {name!r}: {option}: {message}"
    return f"{'.'.join(str(part) for part in loc)}: {message.removeprefix('Value error, ')}"


def _check_pattern(pattern: str, where: str) -> None:
    match = _PATTERN.fullmatch(pattern)
    if match is None or (match["layers"] and match["kind"] in (EMBED, LM_HEAD)):
        names = f"*, {', '.join(_KINDS)}, {LM_HEAD}, {EMBED}"
        raise ValueError(f"{where}: scheme.{pattern!r} is not a pattern; use a name ({names}) or layers.0-1.<name>")


def _in_range(layer: int, layers: str | None) -> bool:
    if layers in (None, "*"):
        return True
    first, _, last = layers.partition("-")
    return int(first) <= layer <= int(last or first)
