"""From a directory to a runner that is warm: read, verify, pack, size the KV pool."""

import time
from pathlib import Path

import psutil
import torch

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.config import EngineConfig
from pressd.runtime.models import Decoder, load_decoder
from pressd.runtime.request import EngineInfo
from pressd.runtime.runner import Runner

# Share of the memory that is free when the weights are loaded which an unconfigured KV pool may take.
KV_SHARE = 0.25
WARMUP_TOKENS = 16


def start(path: Path, config: EngineConfig) -> tuple[Runner, EngineInfo]:
    """Load the model and allocate its KV pool; raises ArtifactError or ValueError, one line each."""
    began = time.monotonic()
    checkpoint = Checkpoint.open(path)
    return start_from(checkpoint, config, verify_seconds=time.monotonic() - began)


def start_from(checkpoint: Checkpoint, config: EngineConfig, *, verify_seconds: float) -> tuple[Runner, EngineInfo]:
    """Start as `start` does from a checkpoint that is open already, which took `verify_seconds`."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seconds = {"verify": verify_seconds}
    device, dtype = pick_device(config), pick_dtype(config, checkpoint)
    began = time.monotonic()
    decoder = load_decoder(checkpoint, device=device, dtype=dtype, prefer=config.kernels)
    seconds["read"] = time.monotonic() - began
    began = time.monotonic()
    with torch.inference_mode():
        ids = torch.zeros(1, min(WARMUP_TOKENS, decoder.config.max_context), dtype=torch.int64)
        decoder.full_logits(ids)[:, -1].cpu()  # a copy to the host waits until the device has done it
    seconds["warmup"] = time.monotonic() - began
    max_context = context_limit(config, decoder)
    num_blocks = size_pool(config, decoder, max_context)
    runner = Runner(decoder, num_blocks=num_blocks, block_size=config.block_size)
    info = EngineInfo(
        architecture=decoder.config.architecture,
        artifact_id=checkpoint.artifact_id,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        kv_dtype=str(dtype).removeprefix("torch."),
        vocab_size=decoder.config.vocab_size,
        max_context=max_context,
        max_batch=config.max_batch,
        eos_token_ids=decoder.config.eos_token_ids,
        block_size=config.block_size,
        kv_blocks=num_blocks,
        kv_bytes=runner.kv_bytes,
        weights_bytes=decoder.weights_bytes,
        dense_bytes=checkpoint.dense_bytes,
        kernels=decoder.kernels,
        load_seconds=seconds,
    )
    return runner, info


def pick_device(config: EngineConfig) -> torch.device:
    """Return the device to run on; `auto` is CUDA where there is a usable one."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch sees no CUDA device; use --device cpu")
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", 0)
    return torch.device("cpu")


def pick_dtype(config: EngineConfig, checkpoint: Checkpoint) -> torch.dtype:
    """Return the type to compute in; `auto` is what the checkpoint says."""
    if config.dtype == "auto":
        return checkpoint.torch_dtype
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def context_limit(config: EngineConfig, decoder: Decoder) -> int:
    """Return the longest sequence served: the model's own limit or the configured smaller one."""
    if config.max_context is None:
        return decoder.config.max_context
    if config.max_context > decoder.config.max_context:
        raise ValueError(
            f"max_context is {config.max_context}; this model was trained for {decoder.config.max_context}"
        )
    return config.max_context


def size_pool(config: EngineConfig, decoder: Decoder, max_context: int) -> int:
    """Return the number of KV blocks that the configured or the free memory allows."""
    block_bytes = decoder.kv_bytes_per_token * config.block_size
    if config.kv_memory is not None:
        budget = config.kv_memory
    elif decoder.device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(decoder.device)[0] * KV_SHARE)
    else:
        budget = int(psutil.virtual_memory().available * KV_SHARE)
    num_blocks = budget // block_bytes
    if config.kv_memory is None:  # no more than can ever be used
        num_blocks = min(num_blocks, config.max_batch * -(-max_context // config.block_size))
    if num_blocks < 1:
        raise ArtifactError(f"KV memory of {budget} bytes holds no block of {block_bytes} bytes; raise --kv-memory")
    return num_blocks
