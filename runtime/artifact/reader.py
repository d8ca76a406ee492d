"""Opens a model directory: an artifact of ours, or a plain or compressed-tensors Hugging Face checkpoint.

Everything is checked from headers before a byte of weights is loaded: names, shapes, types and sizes must be exactly
what config.json announces. Tensors are then mapped by the safetensors library; pickles are never read.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pressd.runtime.artifact.directory import Shards, find_shards, read_config
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.expected import FLOATS, check_tensors, linear_specs
from pressd.runtime.artifact.families import EMBED_PREFIX, LM_HEAD, ModelMap, describe
from pressd.runtime.artifact.kv_scales import KVScheme, read_kv_scheme, scale_names, scale_shapes
from pressd.runtime.artifact.manifest import Manifest, digest_file, read_manifest
from pressd.runtime.artifact.own_config import restore
from pressd.runtime.artifact.quantization import read_quantization
from pressd.runtime.artifact.specs import LinearSpec
from pressd.runtime.kernels.integer_codes import INPUT_SCALE
from pressd.runtime.kernels.mask import format as mask

__all__ = ["ArtifactError", "Checkpoint", "LinearSpec"]

# Above this, hashing every byte would dominate the start of a server; `pressd verify --full` does it at any size.
HASH_BELOW_BYTES = 256 << 20

SMALL = 1 << 20  # bytes


class Checkpoint:
    """A model directory whose headers have been checked. Tensors are on the CPU, mapped from disk when asked for."""

    def __init__(
        self,
        *,
        path: Path,
        config: dict[str, object],
        manifest: Manifest | None,
        shards: Shards,
        model: ModelMap,
        dtype: torch.dtype,
        specs: dict[str, LinearSpec],
        kv_scheme: KVScheme | None,
    ) -> None:
        self.path = path
        self.config = config
        self.manifest = manifest
        self.model = model
        self.torch_dtype = dtype
        self.kv_scheme = kv_scheme
        self._shards = shards
        self._specs = specs
        self._open: dict[str, safe_open] = {}

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Check the directory and return it; raises ArtifactError with one line that says what is wrong."""
        path = Path(path)
        config = restore(read_config(path))
        manifest = read_manifest(path)
        if manifest is not None:
            _check_sizes(path, manifest)
        model = describe(config)
        shards = find_shards(path)
        if manifest is not None:
            _check_listed(path, manifest, shards)
        if model.tied:
            shards = _without_tied_copy(path, shards)
        dtype = _dtype(config, shards)
        specs = linear_specs(model, read_quantization(config, model), dtype)
        kv_scheme = read_kv_scheme(config)
        check_tensors(path, shards, specs, model, scale_shapes(kv_scheme, len(model.attention.windows)))
        checkpoint = cls(
            path=path,
            config=config,
            manifest=manifest,
            shards=shards,
            model=model,
            dtype=dtype,
            specs=specs,
            kv_scheme=kv_scheme,
        )
        if manifest is not None and sum(file.bytes for file in manifest.files.values()) < HASH_BELOW_BYTES:
            checkpoint.verify(full=True)
        return checkpoint

    @property
    def artifact_id(self) -> str:
        """The manifest's id; for a directory that is not ours, a digest of its config and its weights' headers."""
        if self.manifest is not None:
            return self.manifest.id
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for name, header in sorted(self._shards.headers.items()):
            digest.update(f"{name} {(self.path / name).stat().st_size} {header.sha256}\n".encode())
        return digest.hexdigest()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the unpressed model's tensors in its own precision."""
        if self.manifest is not None:
            return self.manifest.totals.dense_bytes
        return self.model.num_params * self.torch_dtype.itemsize

    @property
    def artifact_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum((self.path / name).stat().st_size for name in self._shards.headers)

    @property
    def tokenizer_path(self) -> Path:
        """The directory to load the tokenizer from."""
        return self.path

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Names of the .safetensors files, sorted."""
        return tuple(sorted(self._shards.headers))

    def names(self) -> frozenset[str]:
        """Names of the tensors the model is made of."""
        return frozenset(self._shards.entries)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as it is stored; `lm_head` may be the embedding.

        A large one is not copied from the page cache. A small one is: kept for good, as norms and scales are, it would
        keep the whole file mapped and resident.
        """
        prefix, _, suffix = name.rpartition(".")
        name = f"{self._untied(prefix)}.{suffix}"
        shard = self._shards.file_of[name]
        if shard not in self._open:
            self._open[shard] = safe_open(self.path / shard, framework="pt", device="cpu")
        tensor: Tensor = self._open[shard].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor.clone() if tensor.nbytes < SMALL else tensor

    def close(self) -> None:
        """Let go of the files that are mapped; they are mapped anew when a tensor is asked for.

        Tensors that are still held keep theirs.
        """
        self._open.clear()

    def linear(self, prefix: str) -> LinearSpec:
        """Return how the weight at `prefix` is stored; `lm_head` of a tied model is the embedding."""
        return self._specs[self._untied(prefix)]

    def linear_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the stored tensors of the weight at `prefix` by suffix.

        Raises ArtifactError if a scale is not finite, one of activations not positive, or a mask does not keep two of
        every four.
        """
        prefix = self._untied(prefix)
        spec = self._specs[prefix]
        tensors = {suffix: self.tensor(f"{prefix}.{suffix}") for suffix in spec.layout(self.torch_dtype)}
        for suffix, tensor in tensors.items():
            where = f"{prefix}.{suffix}"
            file = self._shards.file_of[where]
            if suffix.endswith("weight_scale") and not bool(torch.isfinite(tensor).all()):
                raise ArtifactError(f"{file}: {where} holds NaN or infinity; press the source again")
            if suffix.endswith(INPUT_SCALE) and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
                raise ArtifactError(f"{file}: {where} is {tensor.item()}, not a scale; press the source again")
            if suffix.endswith("mask") and not mask.is_two_of_four(tensor, spec.in_features):
                raise ArtifactError(f"{file}: {where} does not keep two of every four; press the source again")
        return tensors

    def kv_scales(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the scales, float32 [1], of the keys and of the values of a layer, where `kv_scheme` says that it has.

        Raises ArtifactError if one is not finite or not above 0.
        """
        keys, values = (self._kv_scale(name) for name in scale_names(layer))
        return keys, values

    def _kv_scale(self, name: str) -> Tensor:
        scale = self.tensor(name).to(torch.float32)
        if not 0.0 < scale.item() < torch.inf:
            file = self._shards.file_of[name]
            raise ArtifactError(
                f"{file}: {name} is {scale.item()}; a scale is finite and above 0, press the source again"
            )
        return scale

    def verify(self, *, full: bool) -> None:
        """Compare the files with the manifest, sizes or (full) digests; raises ArtifactError on the first difference.

        A directory without a manifest has nothing to compare with, and passes.
        """
        if self.manifest is None:
            return
        _check_sizes(self.path, self.manifest)
        for name, stored in self.manifest.files.items() if full else ():
            if digest_file(self.path / name).sha256 != stored.sha256:
                raise ArtifactError(
                    f"{self.path / name} is not the file that was written (sha256 differs); copy it again"
                )

    def _untied(self, prefix: str) -> str:
        return EMBED_PREFIX if prefix == LM_HEAD and self.model.tied else prefix


def _dtype(config: Mapping[str, object], shards: Shards) -> torch.dtype:
    """The type config.json announces (`dtype`, formerly `torch_dtype`), else that of the embedding."""
    name = config.get("dtype", config.get("torch_dtype"))
    embedding = shards.entries.get(f"{EMBED_PREFIX}.weight")
    if name is None and embedding is not None and embedding.dtype in FLOATS:
        return FLOATS[embedding.dtype]
    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}
    if not isinstance(name, str) or name not in known:
        raise ArtifactError(f"config.json: dtype {name!r} is not known; known: {', '.join(known)}")
    return known[name]


def _check_sizes(path: Path, manifest: Manifest) -> None:
    for name, stored in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; the manifest lists it")
        size = file.stat().st_size
        if size != stored.bytes:
            raise ArtifactError(f"{file} has {size} bytes, the manifest says {stored.bytes}; copy it again")


def _check_listed(path: Path, manifest: Manifest, shards: Shards) -> None:
    """What is loaded must be what the manifest vouches for, or its id says nothing."""
    for name in ("config.json", *shards.headers):
        if name not in manifest.files:
            raise ArtifactError(f"{path / name} is not listed in the manifest; press the source again")


def _without_tied_copy(path: Path, shards: Shards) -> Shards:
    """Some tools store a tied head a second time: leave the copy out, after making sure that it is one."""
    head, embed = f"{LM_HEAD}.weight", f"{EMBED_PREFIX}.weight"
    if head not in shards.entries or embed not in shards.entries:
        return shards
    if _digest(path, shards, head) != _digest(path, shards, embed):
        raise ArtifactError(
            f"config.json: tie_word_embeddings is true but {head} differs from {embed}; set it to false"
        )
    entries = {name: entry for name, entry in shards.entries.items() if name != head}
    file_of = {name: file for name, file in shards.file_of.items() if name != head}
    return Shards(headers=shards.headers, entries=entries, file_of=file_of)


def _digest(path: Path, shards: Shards, name: str) -> str:
    entry, digest = shards.entries[name], hashlib.sha256(f"{shards.entries[name].dtype}".encode())
    with (path / shards.file_of[name]).open("rb") as file:
        for start in range(entry.start, entry.end, 1 << 20):
            file.seek(start)
            digest.update(file.read(min(1 << 20, entry.end - start)))
    return digest.hexdigest()
