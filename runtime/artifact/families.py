"""What each architecture holds: its blocks, fused groups and tensor shapes, from config.json alone. No torch.

Linears that read the same input form one fused group (qkv, gate_up): a group has one scheme, and kernels may run it as
one matrix. Names are Hugging Face's for tensors and the recipe's for groups.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pressd.runtime.artifact.errors import ArtifactError

EMBED = "embed"
LM_HEAD = "lm_head"
EMBED_PREFIX = "model.embed_tokens"
# No real model comes near; a config that says more would only be used to exhaust memory.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One weight [out_features, in_features] at `prefix`.weight, and a bias or none."""

    prefix: str
    out_features: int
    in_features: int
    bias: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features]."""
        return self.out_features, self.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedGroup:
    """Linears with one input and one scheme; `name` is layers.<i>.{qkv,o,gate_up,down}, embed or lm_head."""

    name: str
    members: tuple[Linear, ...]

    @property
    def kind(self) -> str:
        """The group's role, equal in every block."""
        return self.name.rpartition(".")[2]

    @property
    def shape(self) -> tuple[int, int]:
        """[sum of the members' rows, in_features]."""
        return sum(member.out_features for member in self.members), self.members[0].in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A unit of streaming: fused groups, and the tensors that are never pressed (norms, biases) with their shapes."""

    name: str
    groups: tuple[FusedGroup, ...]
    others: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMap:
    """Every tensor of a model in file order: embed, the decoder's layers, then final norm and lm_head (unless tied)."""

    architecture: str
    tied: bool
    blocks: tuple[Block, ...]

    def groups(self) -> Iterator[FusedGroup]:
        """Every fused group, in file order."""
        return (group for block in self.blocks for group in block.groups)

    def linears(self) -> Iterator[Linear]:
        """Every member of every group; the embedding is one of them."""
        return (member for group in self.groups() for member in group.members)

    def others(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor outside the groups."""
        return {name: shape for block in self.blocks for name, shape in block.others.items()}

    @property
    def num_params(self) -> int:
        """Parameters of the dense model, a tied head counted once."""
        others = sum(math.prod(shape) for shape in self.others().values())
        return others + sum(math.prod(linear.shape) for linear in self.linears())


def describe(config: Mapping[str, object]) -> ModelMap:
    """Return the map of the model that config.json describes.

    Raises ArtifactError for an unknown architecture, and for a size that is missing or out of range.
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else architectures
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ArtifactError(f"config.json: architecture {name!r} is not known; known: {', '.join(sorted(FAMILIES))}")
    return family(config)


def _llama(config: Mapping[str, object]) -> ModelMap:
    hidden = _size(config, "hidden_size")
    vocab = _size(config, "vocab_size")
    tied = _flag(config, "tie_word_embeddings")
    embed = FusedGroup(name=EMBED, members=(_linear(EMBED_PREFIX, vocab, hidden),))
    head = FusedGroup(name=LM_HEAD, members=(_linear(LM_HEAD, vocab, hidden),))
    layers = range(_size(config, "num_hidden_layers", limit=_MAX_LAYERS))
    return ModelMap(
        architecture="LlamaForCausalLM",
        tied=tied,
        blocks=(
            Block(name=EMBED, groups=(embed,), others={}),
            *(_llama_layer(config, index, hidden) for index in layers),
            Block(name="head", groups=() if tied else (head,), others={"model.norm.weight": (hidden,)}),
        ),
    )


def _llama_layer(config: Mapping[str, object], index: int, hidden: int) -> Block:
    heads = _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", default=heads)
    head_dim = _size(config, "head_dim", default=hidden // heads)
    ffn = _size(config, "intermediate_size")
    if heads % kv_heads:
        raise ArtifactError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    q, kv = heads * head_dim, kv_heads * head_dim
    at = f"model.layers.{index}"
    bias = _flag(config, "attention_bias")
    mlp_bias = _flag(config, "mlp_bias")
    members = {
        "qkv": tuple(
            _linear(f"{at}.self_attn.{part}_proj", rows, hidden, bias)
            for part, rows in zip("qkv", (q, kv, kv), strict=True)
        ),
        "o": (_linear(f"{at}.self_attn.o_proj", hidden, q, bias),),
        "gate_up": tuple(_linear(f"{at}.mlp.{part}_proj", ffn, hidden, mlp_bias) for part in ("gate", "up")),
        "down": (_linear(f"{at}.mlp.down_proj", hidden, ffn, mlp_bias),),
    }
    groups = tuple(FusedGroup(name=f"layers.{index}.{kind}", members=parts) for kind, parts in members.items())
    norms = {f"{at}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    biases = {f"{m.prefix}.bias": (m.out_features,) for group in groups for m in group.members if m.bias}
    return Block(name=f"layers.{index}", groups=groups, others=norms | biases)


FAMILIES: dict[str, Callable[[Mapping[str, object]], ModelMap]] = {"LlamaForCausalLM": _llama}


def _linear(prefix: str, out_features: int, in_features: int, bias: bool = False) -> Linear:
    return Linear(prefix=prefix, out_features=out_features, in_features=in_features, bias=bias)


def _size(config: Mapping[str, object], key: str, *, default: int | None = None, limit: int = _MAX_SIZE) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= limit:
        raise ArtifactError(f"config.json: {key} is {value!r}; it must be an integer from 1 to {limit}")
    return value


def _flag(config: Mapping[str, object], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ArtifactError(f"config.json: {key} is {value!r}; it must be true or false")
    return value
