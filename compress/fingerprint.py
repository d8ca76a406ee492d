"""What two runs must have in common for one to take the other up, and still write the same bytes."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch

from pressd.compress.calibration import CalibrationRows
from pressd.compress.cost import cpu_name
from pressd.compress.journal import Fingerprint
from pressd.compress.plan import Plan
from pressd.runtime.artifact.manifest import StoredFile


def make_fingerprint(
    source: Mapping[str, StoredFile],
    plan: Plan,
    rows: CalibrationRows | None,
    devices: Sequence[torch.device],
    shard_bytes: int,
) -> Fingerprint:
    """Return what the result depends on, by a name that a user knows.

    Sums depend on how many threads there are and on what the processor can do: those of errors too, in the manifest.
    """
    recipe = hashlib.sha256(plan.recipe.text.encode()).hexdigest()
    files = {name: file.sha256 for name, file in sorted(source.items())}
    fingerprint: Fingerprint = {
        "source": hashlib.sha256(repr(files).encode()).hexdigest(),
        "recipe": recipe,
        "shard_bytes": shard_bytes,
        "pressd": version("pressd"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": [_describe(device) for device in devices],
    }
    if rows is not None:
        fingerprint |= {"calibration text": rows.text_sha256, "calibration tokens": rows.token_sha256}
    return fingerprint


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}: {cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
