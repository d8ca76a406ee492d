"""What each pass can be told in a recipe, and what it does if it is told nothing. No torch.

A pass belongs to a scope, and scopes have a fixed order: whatever the recipe's order, weights are transformed before
they are rounded.
"""

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Scope = Literal["transform", "quantise", "tune", "calibrate"]
Part = Annotated[float, Field(ge=0, le=1)]
Observer = Literal["minmax", "percentile", "mse", "kl"]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    # Whether the pass looks at text.
    reads_text: ClassVar[bool] = True
    scope: ClassVar[Scope]


class Rtn(_Options):
    """Every weight to the nearest level; looks at no text."""

    reads_text: ClassVar[bool] = False
    scope: ClassVar[Scope] = "quantise"
    use: Literal["rtn"]


class Gptq(_Options):
    """Column by column, later columns making up for earlier ones.

    `damp` is added to the Hessian as a part of its mean diagonal; `act_order` takes columns in falling order of their
    inputs' energy; `clip` searches the grid's ends by squared error; `sweeps` rounds of coordinate descent follow.
    `correct` fits to the source's outputs for the source's inputs instead of to its outputs for the pressed model's:
    what layers before have lost is made up for, at the cost of running the source beside.
    """

    scope: ClassVar[Scope] = "quantise"
    use: Literal["gptq"]
    damp: Annotated[float, Field(gt=0, le=1)] = 0.05
    act_order: bool = True
    clip: bool = True
    sweeps: Annotated[int, Field(ge=0, le=100)] = 4
    correct: bool = True


class Awq(_Options):
    """Channels with large inputs get finer weights; `steps` scales are tried, then, with `clip`, the grid's ends."""

    scope: ClassVar[Scope] = "transform"
    use: Literal["awq"]
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    clip: bool = True


class Smooth(_Options):
    """Part of the size of inputs moves into the weights that read them: all of it with `alpha` 1."""

    scope: ClassVar[Scope] = "transform"
    use: Literal["smooth"]
    alpha: Part = 0.5


class Round(_Options):
    """Codes and scales of a whole layer are tuned together, by the sign of the gradient, to its outputs.

    `steps` of `rows` rows each; `rate` is how far a step goes at first, 1 / steps if it is not given.
    """

    scope: ClassVar[Scope] = "tune"
    use: Literal["round"]
    steps: Annotated[int, Field(ge=1, le=100_000)] = 200
    rows: Annotated[int, Field(ge=1)] = 8
    rate: Annotated[float, Field(gt=0, le=1)] | None = None


class Static(_Options):
    """Static scales of activations, and of keys and values if `kv` says in which type they may be kept.

    `observer` decides from a histogram where they end; `percentile` is for the observer of that name. The default is
    the one for what flows into `down`: most of it is near zero, and the few values far away matter most; `kl`, which
    looks at frequencies alone, cuts them off.
    """

    scope: ClassVar[Scope] = "calibrate"
    use: Literal["static"]
    observer: Observer = "mse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    kv: Literal["int8", "fp8"] | None = None


PassOptions: TypeAlias = Rtn | Gptq | Awq | Smooth | Round | Static
PASSES: dict[str, type[_Options]] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "awq": Awq,
    "smooth": Smooth,
    "round": Round,
    "static": Static,
}
