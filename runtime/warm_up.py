"""Before a GPU serves: every kernel compiled that will run, and the memory that steps need known."""

import torch

from pressd.runtime.config import EngineConfig
from pressd.runtime.models import Decoder

# Kernels go other ways beyond these numbers of tokens; each way is compiled once, before anybody waits for it.
BRANCHES = (1, 2, 4, 8, 16, 17, 33, 65, 129)
# Bytes for each logit of a batch while it is sampled: in float32 and float64, changed, filtered and raced.
SAMPLING_BYTES = 40
# What CUDA, its libraries' workspaces and the fragments of PyTorch's allocator take.
RESERVE = 768 << 20


@torch.inference_mode()
def warm_up(decoder: Decoder, max_step_tokens: int) -> int:
    """Run prompts of all kinds on a GPU's kernels and return the bytes that the largest took beyond the weights.

    Elsewhere nothing has to be compiled, and it returns 0.
    """
    if decoder.device.type != "cuda" or not decoder.reads_tables:
        return 0
    longest = min(max_step_tokens, decoder.config.max_context)
    before = torch.cuda.memory_allocated(decoder.device)
    torch.cuda.reset_peak_memory_stats(decoder.device)
    for length in (*(size for size in BRANCHES if size < longest), longest):
        ids = torch.zeros(1, length, dtype=torch.int64)
        decoder.lm_head(decoder.hidden_states(ids)[:, -1])
    torch.cuda.synchronize(decoder.device)
    peak = torch.cuda.max_memory_allocated(decoder.device) - before
    torch.cuda.empty_cache()
    return peak


def kv_memory(decoder: Decoder, config: EngineConfig, peak: int) -> int:
    """Return the bytes of a GPU that nothing but keys and values will need, given those of the largest step."""
    free, _ = torch.cuda.mem_get_info(decoder.device)
    sampling = SAMPLING_BYTES * config.max_batch * decoder.config.vocab_size
    return max(0, free - 2 * peak - sampling - RESERVE)  # twice: graphs have activations of their own
