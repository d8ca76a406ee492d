"""The recipe: which fused group gets which scheme, by which passes, and how good the result must be. No torch."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pressd.runtime.artifact.families import EMBED, LM_HEAD, FusedGroup

PASSES = ("rtn",)
KEEP = "keep"
_KINDS = ("qkv", "o", "gate_up", "down")
_PATTERN = re.compile(rf"(?:layers\.(?P<layers>\*|\d+(?:-\d+)?)\.)?(?P<kind>\*|{'|'.join((*_KINDS, EMBED, LM_HEAD))})")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Section):
    """The text that passes collect statistics from; rtn needs none."""

    data: str = "stdlib"
    tokens: Annotated[int, Field(ge=1)] = 65536
    seq_len: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0)] = 0


class Pass(BaseModel):
    """One step of pressing, by name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str

    @field_validator("use")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PASSES:
            raise ValueError(f"pass {name!r} is not known; known now: {', '.join(PASSES)}")
        return name

    def model_post_init(self, context: object, /) -> None:
        if self.model_extra:
            raise ValueError(f"pass {self.use!r} has no option {next(iter(self.model_extra))!r}")


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
    passes: Annotated[tuple[Pass, ...], Field(alias="pass")] = ()
    scheme: Annotated[dict[str, str], Field(min_length=1)]
    gates: Gates = Gates()


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


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file; raises ValueError naming the key and the way out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: cannot be read ({error})") from None
    return parse_recipe(text, f"recipe {path}")


def recipe_of_scheme(scheme: str) -> Recipe:
    """Return the recipe that gives every linear of the decoder's layers one scheme."""
    return Recipe(
        text=f'[scheme]\n"*" = "{scheme}"\n', source=None, rules=(Rule(pattern="*", scheme=scheme),), gates={}
    )


def parse_recipe(text: str, where: str) -> Recipe:
    """Parse TOML; `where` begins every error message."""
    try:
        content = _Text.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: not valid TOML ({error})") from None
    except ValidationError as error:
        # A misspelt key explains why another one is missing.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        at = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {at}: {first['msg'].removeprefix('Value error, ')}") from None
    for pattern in content.scheme:
        _check_pattern(pattern, where)
    return Recipe(
        text=text,
        source=content.source,
        rules=tuple(Rule(pattern=pattern, scheme=scheme) for pattern, scheme in content.scheme.items()),
        gates={name: bound for name, bound in content.gates.model_dump().items() if bound is not None},
    )


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
