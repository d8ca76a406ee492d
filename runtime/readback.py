"""Results on their way from the device to the host."""

from collections.abc import Sequence

import torch


class Readback:
    """Copies of tensors, begun now and read later.

    On a GPU they stand in the queue behind what makes them and before whatever is launched next: to wait for them is
    not to wait for the next step.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin; the tensors are on one device."""
        self._copies = tuple(tensors)
        self._done: torch.cuda.Event | None = None
        if tensors and tensors[0].device.type == "cuda":
            self._copies = tuple(_begin_copy(tensor) for tensor in tensors)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Return the copies, in order, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._copies


def _begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
