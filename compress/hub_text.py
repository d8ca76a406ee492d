"""Text in a data set of the Hugging Face hub: one file of it, fetched into Hugging Face's own cache. No torch."""

from pathlib import Path

PREFIX = "hf:"
SUFFIXES = (".txt", ".jsonl")


def fetch_text(name: str) -> Path:
    """Return where the file that `hf:OWNER/NAME/FILE` names is on this machine, fetched if it is not there.

    Raises ValueError of one line if that is no such name, or the file cannot be had.
    """
    parts = name.removeprefix(PREFIX).split("/", 2)
    if len(parts) < 3 or not all(parts) or not parts[2].endswith(SUFFIXES):
        kinds = " or ".join(SUFFIXES)
        raise ValueError(f"data {name!r} names no file of text; write hf:OWNER/NAME/FILE, where FILE ends in {kinds}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    owner, repository, file = parts
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        cause = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"data {name} cannot be fetched: {cause.rstrip('.')}; check name and network, or give a local file"
        ) from None
