"""From a checkpoint to a decoder: find the family, pick kernels, load weights."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pressd.runtime.artifact.families import EMBED, LM_HEAD, FusedGroup, ModelMap
from pressd.runtime.artifact.fields import Config
from pressd.runtime.artifact.kv_scales import KVScheme
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.config import KVDtypeName
from pressd.runtime.kernels.attention.batch import AttentionProblem, KVFormat
from pressd.runtime.kernels.catalogue import attention_kernels, pointwise_kernels
from pressd.runtime.kernels.registry import (
    AttentionKernel,
    Device,
    PointwiseKernels,
    Preference,
    describe_device,
    select,
)
from pressd.runtime.layers.attention import Attention
from pressd.runtime.layers.linear_loader import LinearLoader
from pressd.runtime.layers.mlp import GatedMLP
from pressd.runtime.layers.norm import RMSNorm
from pressd.runtime.layers.rotary import Rotary
from pressd.runtime.models import llama, qwen3
from pressd.runtime.models.config import DecoderConfig
from pressd.runtime.models.decoder import Block, Decoder
from pressd.runtime.report import KernelChoice

FAMILIES: dict[str, Callable[[Config, ModelMap], DecoderConfig]] = {
    "LlamaForCausalLM": llama.read_config,
    "MistralForCausalLM": llama.read_config,
    "Qwen2ForCausalLM": llama.read_config,
    "Qwen3ForCausalLM": qwen3.read_config,
}
KV_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
GROUP_KINDS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a block runs on besides its linears' kernels."""

    problem: AttentionProblem
    attention: AttentionKernel
    pointwise: PointwiseKernels


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    """Return the numbers of the decoder; raises ArtifactError for those that it cannot compute with."""
    return FAMILIES[checkpoint.model.architecture](checkpoint.config, checkpoint.model)


@torch.inference_mode()
def load_decoder(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    prefer: Preference = "fast",
    kv_dtype: KVDtypeName = "auto",
) -> Decoder:
    """Load every weight and choose a kernel for every layer.

    Raises ArtifactError for numbers in config.json that this decoder cannot compute with, and ValueError for a
    `kv_dtype` that no fast kernel of a GPU reads.
    """
    config = decoder_config(checkpoint)
    loader = LinearLoader(checkpoint=checkpoint, device=describe_device(device), dtype=dtype, prefer=prefer)
    kv = kv_format(checkpoint.kv_scheme, kv_dtype)
    layers, choices = choose_kernels(config, loader.device, dtype, prefer, kv, kv_dtype)
    groups = {group.name: group for group in checkpoint.model.groups()}
    embedding = loader.load_embedding(groups[EMBED])
    blocks = tuple(load_block(loader, groups, index, config, kernels) for index, kernels in enumerate(layers))
    head = embedding.as_head() if checkpoint.model.tied else loader.load(groups[LM_HEAD])
    return Decoder(
        config=config,
        device=device,
        dtype=dtype,
        embedding=embedding,
        rotary=Rotary(config.rope, config.head_dim, config.max_context, device, dtype),
        pointwise=layers[0].pointwise,
        blocks=blocks,
        final_norm=_load_norm(loader, config.final_norm, config, layers[0].pointwise),
        head=head,
        kernels=(*loader.choices(), *choices),
        unfused_groups=loader.unfused_groups,
    )


def choose_kernels(
    config: DecoderConfig,
    device: Device,
    dtype: torch.dtype,
    prefer: Preference,
    kv: KVFormat,
    kv_dtype: KVDtypeName = "auto",
) -> tuple[list[Kernels], tuple[KernelChoice, ...]]:
    """Return what each layer runs on besides its linears' kernels, and the choices as they are reported.

    `kv` is how keys and values are stored, `kv_dtype` what was asked for. Raises ValueError as `load_decoder` does.
    """
    problems = [
        AttentionProblem(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            window=window,
            kv=kv,
        )
        for window in config.windows
    ]
    attention, attention_choices = choose_attention(problems, device, prefer)
    if kv_dtype != "auto" and device.kind == "cuda" and prefer == "fast":
        check_fast_attention(attention, kv_dtype, attention_choices)
    pointwise, pointwise_choice = choose_pointwise(dtype, device, prefer, len(problems))
    layers = [Kernels(problem, attention[problem], pointwise) for problem in problems]
    return layers, (*attention_choices, *pointwise_choice)


def choose_attention(
    problems: Sequence[AttentionProblem], device: Device, prefer: Preference
) -> tuple[dict[AttentionProblem, AttentionKernel], tuple[KernelChoice, ...]]:
    """Return the kernel of each distinct problem, and each distinct choice with the number of layers it serves."""
    selected: dict[AttentionProblem, tuple[AttentionKernel, tuple[str, ...]]] = {}
    for problem in dict.fromkeys(problems):
        selected[problem] = select(attention_kernels(device), functools.partial(_refusal, problem, device), prefer)
    layers = Counter((selected[problem][0].name, selected[problem][1]) for problem in problems)
    choices = tuple(
        KernelChoice(op="attention", storage="paged", implementation=name, layers=count, refusals=refusals)
        for (name, refusals), count in sorted(layers.items())
    )
    return {problem: kernel for problem, (kernel, _) in selected.items()}, choices


def kv_format(scheme: KVScheme | None, kv_dtype: KVDtypeName) -> KVFormat:
    """Return how keys and values are stored, given the scales that the checkpoint has."""
    if kv_dtype == "auto":
        return KVFormat()
    if kv_dtype == "bf16":
        return KVFormat(dtype=torch.bfloat16)
    is_calibrated = scheme is not None and scheme.kind == kv_dtype
    return KVFormat(dtype=KV_CODES[kv_dtype], scales="layer" if is_calibrated else "token")


def check_fast_attention(
    attention: Mapping[AttentionProblem, AttentionKernel], kv_dtype: KVDtypeName, choices: Sequence[KernelChoice]
) -> None:
    """Refuse, on a GPU, a pool that nothing but the reference reads, which is there to compare with."""
    if any(not kernel.reads_tables and problem.why_not_as_computed() for problem, kernel in attention.items()):
        reasons = "; ".join(dict.fromkeys(reason for choice in choices for reason in choice.refusals))
        raise ValueError(
            f"--kv-dtype {kv_dtype}: no fast attention on a GPU takes it ({reasons}); leave it out, or give "
            "--kernels reference"
        )


def choose_pointwise(
    dtype: torch.dtype, device: Device, prefer: Preference, num_layers: int
) -> tuple[PointwiseKernels, tuple[KernelChoice, ...]]:
    """Return what norms, rotations and gates run on, and the choice as it is reported, where there was one."""
    candidates = pointwise_kernels(device)
    kernels, refusals = select(candidates, lambda kernels: kernels.why_not(dtype, device), prefer)
    choice = KernelChoice(
        op="pointwise", storage="dense", implementation=kernels.name, layers=num_layers, refusals=refusals
    )
    return kernels, (choice,) if len(candidates) > 1 else ()


def _refusal(problem: AttentionProblem, device: Device, kernel: AttentionKernel) -> str | None:
    return kernel.why_not(problem, device)


def load_block(
    loader: LinearLoader,
    groups: Mapping[str, FusedGroup],
    index: int,
    config: DecoderConfig,
    kernels: Kernels,
) -> Block:
    """Load one layer from the loader's source; `groups` by name hold at least that layer's."""
    qkv, o, gate_up, down = (loader.load(groups[f"layers.{index}.{kind}"]) for kind in GROUP_KINDS)
    key_scale, value_scale = _load_kv_scales(loader, index, kernels.problem)
    return Block(
        input_norm=_load_norm(loader, config.input_norm.format(index), config, kernels.pointwise),
        attention=Attention(
            problem=kernels.problem,
            kernel=kernels.attention,
            kernels=kernels.pointwise,
            qkv=qkv,
            output=o,
            head_gain=_load_head_gain(loader, index, config),
            head_epsilon=config.norm_epsilon,
            key_scale=key_scale,
            value_scale=value_scale,
        ),
        post_attention_norm=_load_norm(loader, config.post_attention_norm.format(index), config, kernels.pointwise),
        mlp=GatedMLP(gate_up=gate_up, down=down, kernels=kernels.pointwise),
    )


def _load_kv_scales(
    loader: LinearLoader, index: int, problem: AttentionProblem
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    if problem.kv.scales != "layer":
        return None, None
    keys, values = loader.checkpoint.kv_scales(index)
    return keys.to(loader.device.torch_device), values.to(loader.device.torch_device)


def _load_norm(loader: LinearLoader, name: str, config: DecoderConfig, kernels: PointwiseKernels) -> RMSNorm:
    return RMSNorm(gain=_load_gain(loader, name), epsilon=config.norm_epsilon, kernels=kernels)


def _load_head_gain(loader: LinearLoader, index: int, config: DecoderConfig) -> torch.Tensor | None:
    """The gains of the norms of queries and keys, whose heads lie side by side: a row for each head."""
    if config.query_norm is None or config.key_norm is None:
        return None
    gains = [
        _load_gain(loader, name.format(index)).expand(num_heads, config.head_dim)
        for name, num_heads in ((config.query_norm, config.num_heads), (config.key_norm, config.num_kv_heads))
    ]
    return torch.cat(gains)


def _load_gain(loader: LinearLoader, name: str) -> torch.Tensor:
    return loader.checkpoint.tensor(name).to(loader.device.torch_device, loader.dtype)
