"""From a checkpoint to a decoder: find the family, pick kernels, load weights."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from pressd.runtime.artifact.families import EMBED, LM_HEAD, FusedGroup, ModelMap
from pressd.runtime.artifact.fields import Config
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.kernels.attention.batch import AttentionProblem
from pressd.runtime.kernels.catalogue import ATTENTION
from pressd.runtime.kernels.registry import AttentionKernel, Device, Preference, describe_device, select
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
GROUP_KINDS = ("qkv", "o", "gate_up", "down")


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    """Return the numbers of the decoder; raises ArtifactError for those that it cannot compute with."""
    return FAMILIES[checkpoint.model.architecture](checkpoint.config, checkpoint.model)


@torch.inference_mode()
def load_decoder(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, prefer: Preference = "fast"
) -> Decoder:
    """Load every weight and choose a kernel for every layer.

    Raises ArtifactError for numbers in config.json that this decoder cannot compute with.
    """
    config = decoder_config(checkpoint)
    loader = LinearLoader(checkpoint=checkpoint, device=describe_device(device), dtype=dtype, prefer=prefer)
    problems = [
        AttentionProblem(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            window=window,
        )
        for window in config.windows
    ]
    attention, attention_choices = choose_attention(problems, loader.device, prefer)
    groups = {group.name: group for group in checkpoint.model.groups()}
    embedding = loader.load_embedding(groups[EMBED])
    blocks = tuple(
        _load_block(loader, groups, index, config, problem, attention[problem])
        for index, problem in enumerate(problems)
    )
    head = embedding.as_head() if checkpoint.model.tied else loader.load(groups[LM_HEAD])
    return Decoder(
        config=config,
        device=device,
        dtype=dtype,
        embedding=embedding,
        rotary=Rotary(config.rope, config.head_dim, config.max_context, device, dtype),
        blocks=blocks,
        final_norm=_load_norm(loader, config.final_norm, config),
        head=head,
        kernels=(*loader.choices(), *attention_choices),
        unfused_groups=loader.unfused_groups,
    )


def choose_attention(
    problems: Sequence[AttentionProblem], device: Device, prefer: Preference
) -> tuple[dict[AttentionProblem, AttentionKernel], tuple[KernelChoice, ...]]:
    """Return the kernel of each distinct problem, and each distinct choice with the number of layers it serves."""
    selected: dict[AttentionProblem, tuple[AttentionKernel, tuple[str, ...]]] = {}
    for problem in dict.fromkeys(problems):
        selected[problem] = select(ATTENTION, functools.partial(_refusal, problem, device), prefer)
    layers = Counter((selected[problem][0].name, selected[problem][1]) for problem in problems)
    choices = tuple(
        KernelChoice(op="attention", storage="paged", implementation=name, layers=count, refusals=refusals)
        for (name, refusals), count in sorted(layers.items())
    )
    return {problem: kernel for problem, (kernel, _) in selected.items()}, choices


def _refusal(problem: AttentionProblem, device: Device, kernel: AttentionKernel) -> str | None:
    return kernel.why_not(problem, device)


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
        attention=Attention(
            problem=problem,
            kernel=kernel,
            qkv=qkv,
            output=o,
            query_key_norm=_load_query_key_norm(loader, index, config),
        ),
        post_attention_norm=_load_norm(loader, config.post_attention_norm.format(index), config),
        mlp=GatedMLP(gate_up=gate_up, down=down),
    )


def _load_norm(loader: LinearLoader, name: str, config: DecoderConfig) -> RMSNorm:
    return RMSNorm(gain=_load_gain(loader, name), epsilon=config.norm_epsilon)


def _load_query_key_norm(loader: LinearLoader, index: int, config: DecoderConfig) -> RMSNorm | None:
    """One norm for all heads of queries and keys, which lie side by side: each head has its row of the gain."""
    if config.query_norm is None or config.key_norm is None:
        return None
    gains = [
        _load_gain(loader, name.format(index)).expand(num_heads, config.head_dim)
        for name, num_heads in ((config.query_norm, config.num_heads), (config.key_norm, config.num_kv_heads))
    ]
    return RMSNorm(gain=torch.cat(gains), epsilon=config.norm_epsilon)


def _load_gain(loader: LinearLoader, name: str) -> torch.Tensor:
    return loader.checkpoint.tensor(name).to(loader.device.torch_device, loader.dtype)
