"""The inputs of a step against the plain-torch reference, to the bit."""

import random

import pytest
import torch

from pressd.runtime.kernels.step import reference
from pressd.runtime.kernels.step import triton as kernels
from pressd.runtime.kernels.step.buffers import StepBuffers


def poisoned(num_tokens: int, num_places: int, num_groups: int, device: torch.device) -> StepBuffers:
    buffers = StepBuffers.new(num_tokens, num_places, num_groups, device)
    for name in StepBuffers.__dataclass_fields__:
        getattr(buffers, name).fill_(-77)
    return buffers


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5, 0, 1, 70, 0, 3], [0, 0], [0, 2, 0], [1] * 130], ids=len)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_step_is_prepared_as_the_reference_does(
    device: torch.device, lengths: list[int], padding: int, num_groups: int
) -> None:
    rng = random.Random(len(lengths))
    num_rows, max_length, block_size = len(lengths) + 2, 200, 16
    rows = rng.sample(range(num_rows), len(lengths))
    starts = [rng.randrange(max_length - length) for length in lengths]
    columns = torch.tensor([rows, starts, lengths], dtype=torch.int32)
    token_ids = torch.randint(0, 1 << 17, (num_rows, max_length))
    tables = tuple(
        torch.randint(0, 1 << 20, (num_rows, -(-max_length // block_size)), dtype=torch.int32)
        for _ in range(num_groups)
    )
    num_tokens = sum(lengths) + padding
    if num_tokens == 0:
        pytest.skip("a step has tokens")
    expected = poisoned(num_tokens, len(lengths), num_groups, torch.device("cpu"))
    reference.prepare(columns, token_ids, tables, block_size, num_tokens, expected)
    found = poisoned(num_tokens, len(lengths), num_groups, device)
    there = tuple(table.to(device) for table in tables)
    kernels.prepare(columns.to(device), token_ids.to(device), there, block_size, num_tokens, found)
    for name in StepBuffers.__dataclass_fields__:
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    # And the reference by hand: the last token of the first sequence that has any.
    first = next((place for place, length in enumerate(lengths) if length), None)
    if first is not None:
        at = starts[first] + lengths[first] - 1
        assert expected.token_ids[lengths[first] - 1] == token_ids[rows[first], at]
        assert expected.slots[0, lengths[first] - 1] == tables[0][rows[first], at // 16] * 16 + at % 16
        assert expected.kv_lengths[first] == at + 1
