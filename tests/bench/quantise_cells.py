"""Which recipes tests/bench/quantise.py measures. No torch.

A cell is a recipe and a seed of the calibration rows; recipes that look at no text have one cell, without a seed.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pressd.compress.recipe import parse_recipe

SEEDS = (0, 1, 2)
# The rows that calibrate and the rows that are measured on: of the running Python's library, or those kept of peers.
STDLIB, PEERS = "stdlib", "peers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one process measures; `recipe` is TOML without its calibration, `scheme` and `passes` say what is in it."""

    scheme: str
    passes: str
    recipe: str
    seed: int | None
    rows: str = STDLIB

    @property
    def title(self) -> str:
        """The cell in words; unlike any other's."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.scheme}: {self.passes}{seed}{' on the rows of peers' if self.rows == PEERS else ''}"


def use(name: str, **options: object) -> str:
    """Return a pass of a recipe; JSON writes numbers, texts and truth as TOML does."""
    return f'[[pass]]\nuse = "{name}"\n' + "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())


RTN, GPTQ = use("rtn"), use("gptq")
PLAIN = "gptq, not corrected or swept"
WAYS = {
    "rtn": RTN,
    "awq": use("awq"),
    PLAIN: use("gptq", correct=False, sweeps=0),
    "gptq": GPTQ,
    "awq + gptq": use("awq") + GPTQ,
    "round": use("round"),
    "gptq + round": GPTQ + use("round"),
    "smooth": use("smooth"),
    "smooth + gptq": use("smooth") + GPTQ,
} | {f"static, {name}": RTN + use("static", observer=name) for name in ("minmax", "percentile", "mse", "kl")}
INTEGER_WAYS = ("rtn", "awq", PLAIN, "gptq", "awq + gptq", "round", "gptq + round")
INTEGERS = ("w4a16g128", "w4a16g32", "w3a16g32", "w2a16g32")
MIXED = "w3a16g32, down w4a16g32"
RULES = {MIXED: '"*" = "w3a16g32"\n"down" = "w4a16g32"\n'}
MEASURED: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((scheme, INTEGER_WAYS) for scheme in INTEGERS),
    ("w4a16g32-asym", ("rtn", "gptq")),
    ("w2a16g32-asym", ("rtn", "gptq")),
    (MIXED, ("rtn", "gptq")),
    ("w8a8", ("rtn", "smooth", "gptq", "smooth + gptq")),
    ("w8a8-static", ("static, minmax", "static, percentile", "static, mse", "static, kl")),
    ("fp8", ("rtn", "gptq")),
    ("fp8-block", ("rtn", "gptq")),
    ("fp8-static", ("static, minmax", "static, kl")),
)
BESIDE_PEERS = ("gptq", "gptq + round")
QUICK = (("w4a16g128", "rtn"), ("w4a16g128", "gptq"))


def all_cells() -> list[Cell]:
    """Return what the table has, in its order."""
    return [cell for scheme, ways in MEASURED for way in ways for cell in _cells(scheme, way)]


def quick_cells() -> list[Cell]:
    """Return two cells that show whether all still works."""
    return [next(_cells(scheme, way)) for scheme, way in QUICK]


def cells_beside_peers(schemes: Sequence[str]) -> list[Cell]:
    """Return what is compared with other tools in schemes that they have results of."""
    return [cell for scheme in schemes for way in BESIDE_PEERS for cell in _cells(scheme, way, PEERS)]


def _cells(scheme: str, way: str, rows: str = STDLIB) -> Iterator[Cell]:
    everywhere = f'"*" = "{scheme}"\n'
    recipe = f"{WAYS[way]}[scheme]\n{RULES.get(scheme, everywhere)}"
    reads_text = any(options.reads_text for options in parse_recipe(recipe, scheme).passes)
    for seed in SEEDS if reads_text else (None,):
        yield Cell(scheme=scheme, passes=way, recipe=recipe, seed=seed, rows=rows)
