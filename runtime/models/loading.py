"""From a checkpoint to a decoder: find the family, pick kernels, load weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pressd.runtime.artifact.families import EMBED_PREFIX, LM_HEAD, FusedGroup
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.kernels.attention.batch import AttentionProblem
from pressd.runtime.kernels.catalogue import ATTENTION
from pressd.runtime.kernels.registry import AttentionKernel, Preference, describe_device, select
from pressd.runtime.layers.attention import Attention
from pressd.runtime.layers.linear import LinearLoader
from pressd.runtime.layers.mlp import GatedMLP
from pressd.runtime.layers.norm import RMSNorm
from pressd.runtime.layers.rotary import Rotary
from pressd.runtime.models import llama
from pressd.runtime.models.config import DecoderConfig
from pressd.runtime.models.decoder import Block, Decoder
from pressd.runtime.request import KernelChoice

FAMILIES: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {"LlamaForCausalLM": llama.read_config}
GROUP_KINDS = ("qkv", "o", "gate_up", "down")


@torch.inference_mode()
def load_decoder(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, prefer: Preference = "fast"
) -> Decoder:
    """Load every weight and choose a kernel for every layer.

    Raises ArtifactError for numbers in config.json that this decoder cannot compute with.
    """
    config = FAMILIES[checkpoint.model.architecture](checkpoint.config)
    loader = LinearLoader(checkpoint=checkpoint, device=describe_device(device), dtype=dtype, prefer=prefer)
    problem = AttentionProblem(
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=dtype
    )
    attention, refusals = select(ATTENTION, lambda kernel: kernel.why_not(problem, loader.device), prefer)
    embedding = checkpoint.tensor(f"{EMBED_PREFIX}.weight").to(device, dtype)
    groups = {group.name: group for group in checkpoint.model.groups()}
    num_layers = sum(group.kind == "qkv" for group in groups.values())
    blocks = tuple(_load_block(loader, groups, index, config, problem, attention) for index in range(num_layers))
    head = loader.from_dense(embedding) if checkpoint.model.tied else loader.load(groups[LM_HEAD])
    chosen = KernelChoice(
        op="attention", storage="paged", implementation=attention.name, layers=len(blocks), refusals=refusals
    )
    return Decoder(
        config=config,
        device=device,
        dtype=dtype,
        embedding=embedding,
        rotary=Rotary(config.rope, config.head_dim, config.max_context, device, dtype),
        blocks=blocks,
        final_norm=_load_norm(loader, config.final_norm, config),
        head=head,
        kernels=(*loader.choices(), chosen),
        unfused_groups=loader.unfused_groups,
    )


def _load_block(
    loader: LinearLoader,
    groups: Mapping[str, FusedGroup],
    index: int,
    config: DecoderConfig,
    problem: AttentionProblem,
    kernel: AttentionKernel,
) -> Block:
    qkv, o, gate_up, down = (loader.load(groups[f"layers.{index}.{kind}"]) for kind in GROUP_KINDS)
    return Block(
        input_norm=_load_norm(loader, config.input_norm.format(index), config),
        attention=Attention(problem=problem, kernel=kernel, qkv=qkv, output=o),
        post_attention_norm=_load_norm(loader, config.post_attention_norm.format(index), config),
        mlp=GatedMLP(gate_up=gate_up, down=down),
    )


def _load_norm(loader: LinearLoader, name: str, config: DecoderConfig) -> RMSNorm:
    gain = loader.checkpoint.tensor(name).to(loader.device.torch_device, loader.dtype)
    return RMSNorm(gain=gain, epsilon=config.norm_epsilon)
