"""What is known of the served model besides the engine: its manifest, its generation defaults. No protocol."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pressd.runtime.artifact.manifest import Manifest, read_manifest
from pressd.runtime.params import SamplingParams, StoppingParams

if TYPE_CHECKING:
    from pressd.runtime.artifact.schemes import Scheme

# Most tokens of a completion whose request does not say; also bounded by the context and by the KV pool.
DEFAULT_MAX_NEW_TOKENS = 1024
GENERATION_CONFIG = "generation_config.json"
# The scheme of a group that a recipe leaves as it was.
KEPT = "keep"
# What generation_config.json may ask of every request that this build does not do, with the value that asks nothing.
_NOT_APPLIED: dict[str, object] = {
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the files beside the weights say.

    `sampling` (its seed apart) and `max_new_tokens` are for requests that leave them unset, `schemes` the distinct ones
    of the pressed groups, `not_applied` the generation defaults which this build leaves out.
    """

    sampling: SamplingParams
    max_new_tokens: int
    manifest: Manifest | None
    schemes: "tuple[Scheme, ...]"
    not_applied: tuple[str, ...]

    @property
    def format(self) -> str:
        """The name of the one scheme of all pressed groups, `mixed`, or `dense`."""
        return "dense" if not self.schemes else self.schemes[0].name if len(self.schemes) == 1 else "mixed"

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes of the recipe; round-to-nearest where it names none."""
        if self.manifest is None:
            return ()
        entries = tomllib.loads(self.manifest.recipe.text).get("pass", [])
        return tuple(str(entry["use"]) for entry in entries) or ("rtn",)

    @property
    def quality(self) -> dict[str, float]:
        """Measured fidelity, by measure; what is not a single number is left out."""
        found = self.manifest.quality if self.manifest else {}
        return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def read_card(path: Path) -> ModelCard:
    """Read the card of a model directory; raises ValueError with one line.

    As in transformers, a model samples by default only if its generation_config says so. For an artifact this imports
    torch: call it in a thread.
    """
    manifest = read_manifest(path)
    generation = _generation_config(path)
    samples = bool(generation.get("do_sample"))
    try:
        sampling = SamplingParams(
            temperature=_number(generation, "temperature", 1.0) if samples else 0.0,
            top_p=_number(generation, "top_p", 1.0) if samples else 1.0,
            top_k=int(_number(generation, "top_k", 0)) or None if samples else None,
            min_p=_number(generation, "min_p", 0.0) if samples else 0.0,
            typical_p=_number(generation, "typical_p", 1.0) if samples else 1.0,
            repetition_penalty=_number(generation, "repetition_penalty", 1.0),
        )
        stopping = StoppingParams(max_new_tokens=int(_number(generation, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS)))
    except ValueError as error:
        raise ValueError(f"{path / GENERATION_CONFIG}: {error}") from None
    return ModelCard(
        sampling=sampling,
        max_new_tokens=stopping.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        manifest=manifest,
        schemes=() if manifest is None else _schemes(manifest),
        not_applied=tuple(
            name for name, nothing in _NOT_APPLIED.items() if generation.get(name) not in (None, nothing)
        ),
    )


def _schemes(manifest: Manifest) -> "tuple[Scheme, ...]":
    from pressd.runtime.artifact.schemes import parse_scheme

    names = {group.scheme for group in manifest.plan if group.scheme != KEPT}
    return tuple(parse_scheme(name) for name in sorted(names))


def _generation_config(path: Path) -> dict[str, object]:
    file = path / GENERATION_CONFIG
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; mend it or remove it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object; mend it or remove it")
    return content


def _number(config: dict[str, object], name: str, default: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return value
