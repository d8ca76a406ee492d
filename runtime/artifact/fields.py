"""Fields of config.json, read strictly: what is missing, of the wrong kind or out of range is one ArtifactError."""

from collections.abc import Mapping

from pressd.runtime.artifact.errors import ArtifactError

Config = Mapping[str, object]

# No real model comes near; a config that says more would only be used to exhaust memory.
MAX_SIZE = 1 << 24
_SMALLEST, _LARGEST = 1e-30, 1e30


def size(config: Config, key: str, *, default: int | None = None, least: int = 1, limit: int = MAX_SIZE) -> int:
    """Return an integer from `least` to `limit`; `default` where the key is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not least <= value <= limit:
        raise ArtifactError(f"config.json: {key} is {value!r}; it must be an integer from {least} to {limit}")
    return value


def number(config: Config, key: str, *, default: float | None = None) -> float:
    """Return a positive number of no absurd size; `default` where the key is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not _SMALLEST <= value <= _LARGEST:
        raise ArtifactError(f"config.json: {key} is {value!r}; it must be a positive number")
    return float(value)


def flag(config: Config, key: str, *, default: bool = False) -> bool:
    """Return true or false; `default` where the key is absent."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ArtifactError(f"config.json: {key} is {value!r}; it must be true or false")
    return value
