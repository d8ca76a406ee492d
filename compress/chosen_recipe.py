"""The recipe that the command line asks for: a file's or one scheme's, with what the flags say of passes and text."""

import argparse
from pathlib import Path

from pressd.compress.planned_passes import default_passes
from pressd.compress.recipe import Recipe, read_recipe, recipe_of_scheme, with_calibration
from pressd.runtime.artifact.schemes import parse_scheme

# Flags that stand for keys of a recipe's [calibration]: the name of the parsed argument, and the key.
CALIBRATION_FLAGS = {"calibration": "data", "tokens": "tokens", "seq_len": "seq_len", "seed": "seed"}


def source_and_recipe(args: argparse.Namespace) -> tuple[str, Recipe]:
    """Return the source and the recipe that arguments of `compress` and `plan` mean.

    Raises ValueError for flags that do not go together, and for calibration text that nothing would read.
    """
    changes = {key: value for flag, key in CALIBRATION_FLAGS.items() if (value := getattr(args, flag)) is not None}
    recipe = _of_scheme(args, changes) if args.recipe is None else _of_file(args, changes)
    if changes and not recipe.reads_text:
        given = next(flag for flag in CALIBRATION_FLAGS if getattr(args, flag) is not None)
        passes = ", ".join(options.use for options in recipe.passes) or "none"
        raise ValueError(
            f"--{given.replace('_', '-')} is given, but nothing reads text (passes: {passes}); leave it out, or add a "
            f"pass that does, such as gptq"
        )
    source = args.source or recipe.source
    if source is None:
        raise ValueError("there is no source; give SOURCE, or `source` in the recipe")
    return source, recipe


def _of_scheme(args: argparse.Namespace, changes: dict[str, str | int]) -> Recipe:
    scheme = parse_scheme(args.scheme)
    passes = default_passes(scheme) if args.passes is None else args.passes
    # Passes and text that are named are in the recipe that the artifact will hold.
    return recipe_of_scheme(scheme.name, passes, changes)


def _of_file(args: argparse.Namespace, changes: dict[str, str | int]) -> Recipe:
    if args.passes is not None:
        raise ValueError("--pass goes with -s; a recipe names its passes itself, under [[pass]]")
    recipe = read_recipe(Path(args.recipe))
    return with_calibration(recipe, changes) if changes else recipe
