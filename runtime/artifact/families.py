"""What each architecture holds: its blocks, fused groups and tensor shapes, from config.json alone. No torch.

Linears that read the same input form one fused group (qkv, gate_up): a group has one scheme, and kernels may run it as
one matrix. Names are Hugging Face's for tensors and the recipe's for groups.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from pressd.runtime.artifact import fields
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.fields import Config
from pressd.runtime.artifact.windows import Windows, full_windows, mixed_windows, uniform_windows

EMBED = "embed"
LM_HEAD = "lm_head"
EMBED_PREFIX = "model.embed_tokens"
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
class AttentionShape:
    """Heads of every decoder layer, and each layer's window: the positions that a token sees, or None for all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMap:
    """Every tensor of a model in file order: embed, the decoder's layers, then final norm and lm_head (unless tied)."""

    architecture: str
    tied: bool
    attention: AttentionShape
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


def describe(config: Config) -> ModelMap:
    """Return the map of the model that config.json describes.

    Raises ArtifactError for an unknown architecture, and for a field that is missing, out of range or contradictory.
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else architectures
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ArtifactError(f"config.json: architecture {name!r} is not known; known: {', '.join(sorted(FAMILIES))}")
    return family(config)


def _llama(config: Config) -> ModelMap:
    biases = _kinds_with_bias(config, attention_bias=("qkv", "o"), mlp_bias=("gate_up", "down"))
    return _llama_like("LlamaForCausalLM", config, biases=biases)


def _mistral(config: Config) -> ModelMap:
    config = {"num_key_value_heads": 8, "sliding_window": 4096} | dict(config)
    return _llama_like("MistralForCausalLM", config, windows=uniform_windows)


def _qwen2(config: Config) -> ModelMap:
    return _llama_like("Qwen2ForCausalLM", _QWEN_DEFAULTS | dict(config), biases=("qkv",), windows=mixed_windows)


def _qwen3(config: Config) -> ModelMap:
    biases = _kinds_with_bias(config, attention_bias=("qkv", "o"))
    config = _QWEN_DEFAULTS | {"head_dim": 128} | dict(config)
    return _llama_like("Qwen3ForCausalLM", config, biases=biases, windows=mixed_windows, query_key_norm=True)


# What transformers takes an absent key to mean; a key that is null says something else.
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Callable[[Config], ModelMap]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}


def _llama_like(
    architecture: str,
    config: Config,
    *,
    biases: Collection[str] = (),
    windows: Callable[[Config, int], Windows] = full_windows,
    query_key_norm: bool = False,
) -> ModelMap:
    """The map that these families share; `biases` are the kinds of groups that have one."""
    hidden = fields.size(config, "hidden_size")
    vocab = fields.size(config, "vocab_size")
    tied = fields.flag(config, "tie_word_embeddings")
    num_layers = fields.size(config, "num_hidden_layers", limit=_MAX_LAYERS)
    attention = _attention_shape(config, hidden, windows(config, num_layers))
    ffn = fields.size(config, "intermediate_size")
    embed = FusedGroup(name=EMBED, members=(Linear(prefix=EMBED_PREFIX, out_features=vocab, in_features=hidden),))
    head = FusedGroup(name=LM_HEAD, members=(Linear(prefix=LM_HEAD, out_features=vocab, in_features=hidden),))
    head_norms = (f"self_attn.{part}_norm.weight" for part in "qk") if query_key_norm else ()
    norms = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    norms |= dict.fromkeys(head_norms, (attention.head_dim,))
    return ModelMap(
        architecture=architecture,
        tied=tied,
        attention=attention,
        blocks=(
            Block(name=EMBED, groups=(embed,), others={}),
            *(_layer(index, hidden, ffn, attention, biases, norms) for index in range(num_layers)),
            Block(name="head", groups=() if tied else (head,), others={"model.norm.weight": (hidden,)}),
        ),
    )


def _layer(
    index: int,
    hidden: int,
    ffn: int,
    attention: AttentionShape,
    biases: Collection[str],
    norms: Mapping[str, tuple[int, ...]],
) -> Block:
    at = f"model.layers.{index}"
    q, kv = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    # A group's name: its input's size, and the rows of each member.
    shapes: dict[str, tuple[int, dict[str, int]]] = {
        "qkv": (hidden, {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}),
        "o": (q, {"self_attn.o_proj": hidden}),
        "gate_up": (hidden, {"mlp.gate_proj": ffn, "mlp.up_proj": ffn}),
        "down": (ffn, {"mlp.down_proj": hidden}),
    }
    groups = tuple(
        FusedGroup(
            name=f"layers.{index}.{kind}",
            members=tuple(
                Linear(prefix=f"{at}.{part}", out_features=rows, in_features=columns, bias=kind in biases)
                for part, rows in members.items()
            ),
        )
        for kind, (columns, members) in shapes.items()
    )
    others = {f"{at}.{name}": shape for name, shape in norms.items()}
    others |= {f"{m.prefix}.bias": (m.out_features,) for group in groups for m in group.members if m.bias}
    return Block(name=f"layers.{index}", groups=groups, others=others)


def _attention_shape(config: Config, hidden: int, windows: Windows) -> AttentionShape:
    heads = fields.size(config, "num_attention_heads")
    kv_heads = fields.size(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ArtifactError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise ArtifactError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; set head_dim"
        )
    head_dim = fields.size(config, "head_dim", default=hidden // heads)
    if head_dim % 2:
        raise ArtifactError(f"config.json: head_dim is {head_dim}; rotary position embedding needs an even number")
    return AttentionShape(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, windows=windows)


def _kinds_with_bias(config: Config, **kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Kinds of groups, by the switch in config.json that gives them a bias; off where it is absent."""
    return tuple(kind for key, named in kinds.items() if fields.flag(config, key) for kind in named)
