"""How the KV memory is divided among the KV groups. No torch."""

from collections.abc import Sequence

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.kv_cache import KVGroup, most_blocks


def plan_groups(
    windows: Sequence[int | None],
    *,
    layer_block_bytes: int,
    memory: int,
    block_size: int,
    max_context: int,
    max_batch: int,
    chunk: int,
    bounded: bool,
) -> tuple[KVGroup, ...]:
    """Return the groups of layers with equal `windows`, each with its number of blocks; raises ArtifactError for none.

    `memory` bytes are divided so that every group holds the same number of the longest sequences, which a window makes
    short. With `bounded`, there are no more blocks than `max_batch` of those can use. Memory for less than one of them
    goes first to the windows, where a longer sequence needs no more than a shorter.
    """
    layers = {window: tuple(i for i, w in enumerate(windows) if w == window) for window in dict.fromkeys(windows)}
    demand = {window: most_blocks(window, max_context, chunk, block_size) for window in layers}
    costs = {window: layer_block_bytes * len(layers[window]) for window in layers}
    whole = sum(demand[window] * costs[window] for window in layers)  # what the longest sequence takes
    counts = {window: demand[window] * memory // whole for window in layers}
    if bounded:
        counts = {window: min(count, demand[window] * max_batch) for window, count in counts.items()}
    if memory < whole and None in layers and len(layers) > 1:
        slid = {window: demand[window] for window in layers if window is not None}
        left = memory - sum(slid[window] * costs[window] for window in slid)
        if left >= costs[None]:
            counts = slid | {None: left // costs[None]}
    if min(counts.values()) < 1:
        one_each = sum(costs.values())
        raise ArtifactError(
            f"KV memory of {memory} bytes holds no block of {block_size} tokens in every layer ({one_each} bytes); "
            "raise --kv-memory"
        )
    return tuple(KVGroup(layers=layers[w], window=w, num_blocks=counts[w]) for w in layers)


def longest_sequence(groups: Sequence[KVGroup], *, block_size: int, max_context: int, chunk: int) -> int:
    """Return the most tokens of one sequence whose keys and values the groups can hold."""
    longest = max_context
    for group in groups:
        if most_blocks(group.window, longest, chunk, block_size) > group.num_blocks:
            longest = group.num_blocks * block_size  # what a window cannot hold as it slides, it holds as a whole
    return longest
