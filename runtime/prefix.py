"""Names of prefixes: a chain of hashes, one for each full block. No torch."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence

from pressd.runtime.blocks import Content

KEY_BYTES = 16


def root_key(*, artifact_id: str, kv_dtype: str, cache_salt: str, adapter: str = "", exit_layer: str = "full") -> bytes:
    """Return the key of the empty prefix: keys and values are the same only where all of these are."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in (artifact_id, kv_dtype, adapter, exit_layer, cache_salt):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def full_blocks(root: bytes, token_ids: Sequence[int], block_size: int) -> Iterator[Content]:
    """Yield the content of each full block of a sequence, in order."""
    parent = root
    for stop in range(block_size, len(token_ids) + 1, block_size):
        tokens = tuple(token_ids[stop - block_size : stop])
        key = hashlib.blake2b(array("Q", tokens).tobytes(), key=parent, digest_size=KEY_BYTES).digest()
        yield Content(parent=parent, token_ids=tokens, key=key)
        parent = key
