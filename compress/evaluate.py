"""Measures an artifact against its source on the same held-out tokens, with the engine's own decoder.

Both models compute in float32 with the kernels that serve on this machine: so what is measured is what the scheme costs
(rounded weights, and the scheme's own rounding of activations), not what 16-bit arithmetic costs on top, and it is
measured on the code path that answers users.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pressd.compress.fidelity import PerToken, compare, summarise
from pressd.compress.measurement import keeps
from pressd.compress.protocol import SEQ_LEN, TOKENS
from pressd.compress.report import refresh_quality
from pressd.compress.token_rows import read_rows
from pressd.runtime.artifact.manifest import Manifest, read_manifest, write_manifest
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import Decoder, load_decoder

# Tokens that run through a decoder at once, and numbers per temporary of the comparison (32 MiB in float64).
_BATCH_TOKENS = 4096
_CHUNK_LOGITS = 1 << 22

Progress = Callable[[str, int, int], None]


@torch.inference_mode()
def evaluate(
    artifact: str | Path,
    source: str | Path | None = None,
    *,
    data: str = "stdlib",
    tokens: int = TOKENS,
    seq_len: int = SEQ_LEN,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Return fidelity metrics of `artifact` against `source` (default: what its manifest says it was pressed from).

    `data` is what corpus.load knows. Raises ValueError if there is no source, the two differ in vocabulary, rows are
    longer than a context, or the text is too short. `progress` is told (model, rows done, rows).
    """
    pressed = Checkpoint.open(artifact)
    dense = Checkpoint.open(_source_of(pressed) if source is None else source)
    vocabularies = [checkpoint.linear("lm_head").out_features for checkpoint in (dense, pressed)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"{dense.path} has {vocabularies[0]} tokens and {pressed.path} {vocabularies[1]}: not one model"
        )
    rows = read_rows(data, dense, tokens=tokens, seq_len=seq_len)
    progress = progress or _silent
    source_hidden, source_head = _final_hidden(dense, rows.ids, progress)
    per_token = _compare_all(pressed, rows.ids, source_hidden, source_head, progress)
    # Resolved as in the manifest, so that one source has one name wherever the command was run.
    paths = {"source": str(dense.path.resolve()), "artifact": str(pressed.path)}
    return {**paths, "data": rows.describe(), **summarise(per_token)}


def record_quality(artifact: str | Path, quality: dict[str, object]) -> bool:
    """Write a measurement into the manifest of an artifact of ours; the id does not change, the file atomically does.

    Returns False, and writes nothing, for a foreign directory and for fewer tokens than the default.
    """
    path = Path(artifact)
    manifest = read_manifest(path)
    if manifest is None or _tokens(quality) < TOKENS:
        return False
    recorded = {name: value for name, value in quality.items() if name != "artifact"}
    measured = manifest.model_copy(update={"quality": recorded})
    write_manifest(path, measured)
    refresh_quality(path, measured)
    return True


def missed_gates(manifest: Manifest | None, quality: Mapping[str, object]) -> list[str]:
    """Return one line per gate of the artifact's recipe that the measurement misses."""
    lines = []
    for name, bound in sorted(manifest.gates.items()) if manifest else ():
        value = quality[name]
        assert isinstance(value, float)
        if not keeps(name, value, bound):
            lines.append(f"gate missed: {name} is {value:.6g}, the recipe asks for {bound:.6g}")
    return lines


def _silent(model: str, done: int, total: int) -> None:
    pass


def _tokens(quality: Mapping[str, object]) -> int:
    data = quality["data"]
    assert isinstance(data, dict)
    return int(data["tokens"])


def _source_of(artifact: Checkpoint) -> Path:
    if artifact.manifest is None:
        raise ValueError(f"{artifact.path} does not say what it was pressed from; give --against SOURCE")
    recorded = artifact.manifest.source
    path = Path(recorded.path)
    if not path.is_dir():
        raise ValueError(f"{artifact.path} was pressed from {path}, which is not here; give --against SOURCE")
    for name, stored in recorded.files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != stored.bytes:
            raise ValueError(
                f"{path / name} has changed since {artifact.path} was pressed from it; give --against SOURCE"
            )
    return path


def _load(checkpoint: Checkpoint, seq_len: int) -> Decoder:
    decoder = load_decoder(checkpoint, device=torch.device("cpu"), dtype=torch.float32, prefer="fast")
    if seq_len > decoder.config.max_context:
        raise ValueError(f"{checkpoint.path} reads {decoder.config.max_context} tokens at once; seq_len is {seq_len}")
    return decoder


def _final_hidden(
    checkpoint: Checkpoint, ids_RT: Tensor, progress: Progress
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the source's hidden states [R, T - 1, H] and its head.

    Logits of every token would take V / H times the memory; they are computed again where they are compared.
    """
    decoder = _load(checkpoint, ids_RT.size(1))
    parts = []
    for batch_BT in _batches(ids_RT):
        parts.append(decoder.hidden_states(batch_BT)[:, :-1])
        progress("source", sum(len(part) for part in parts), len(ids_RT))
    return torch.cat(parts), decoder.head


def _compare_all(
    checkpoint: Checkpoint,
    ids_RT: Tensor,
    source_hidden_RTH: Tensor,
    source_head: Callable[[Tensor], Tensor],
    progress: Progress,
) -> PerToken:
    decoder = _load(checkpoint, ids_RT.size(1))
    parts: list[PerToken] = []
    done = 0
    for batch_BT in _batches(ids_RT):
        hidden = decoder.hidden_states(batch_BT)[:, :-1].flatten(0, 1)
        source_hidden = source_hidden_RTH[done : done + len(batch_BT)].flatten(0, 1)
        targets = batch_BT[:, 1:].flatten()
        chunk = max(1, _CHUNK_LOGITS // decoder.config.vocab_size)
        for piece in zip(
            torch.split(source_hidden, chunk), torch.split(hidden, chunk), torch.split(targets, chunk), strict=True
        ):
            parts.append(compare(source_head(piece[0]), decoder.head(piece[1]), piece[2]))
        done += len(batch_BT)
        progress("artifact", done, len(ids_RT))
    return PerToken.join(parts, len(ids_RT))


def _batches(ids_RT: Tensor) -> tuple[Tensor, ...]:
    return torch.split(ids_RT, max(1, _BATCH_TOKENS // ids_RT.size(1)))
