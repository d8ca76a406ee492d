"""Where the model that `serve` is told is: a directory, or a repository of the Hugging Face hub, which is fetched."""

import glob
import json
import re
from pathlib import Path

from pressd.runtime.artifact.directory import INDEX, SINGLE

# What the engine, the tokenizer and the workshop read, and the terms of use; weights come after, by their names.
FILES = (
    *("config.json", "generation_config.json", INDEX, "pressd/*.json", "pressd/*.jsonl", "pressd/*.toml"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja"),
    *("additional_chat_templates/*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
# Code and pickles, whatever their name begins with.
NEVER = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.so")
_ID = re.compile(r"(?P<repository>[\w.-]+/(?P<name>[\w.-]+))(?:@(?P<revision>[\w.-]+))?", re.ASCII)


def default_name(model: Path) -> str:
    """Return the name that requests use: the directory's, or the repository's without its owner and revision."""
    id_ = None if model.exists() else _ID.fullmatch(str(model))
    return model.resolve().name if id_ is None else id_["name"]


def find_model(model: Path) -> Path:
    """Return the model's directory, fetched if `model` is an id such as org/name or org/name@revision.

    What exists on disk wins; what neither exists nor looks like an id is returned as it is. Raises ValueError with one
    line. SIGTERM ends a fetch at once, and the next one goes on where it was.
    """
    id_ = None if model.exists() else _ID.fullmatch(str(model))
    if id_ is None:
        return model
    return _fetch(id_["repository"], id_["revision"])


def _fetch(repository: str, revision: str | None) -> Path:
    """Bring what is read of a repository into Hugging Face's own cache, which rules where it is and when to be offline.

    In two steps, for many repositories hold the same weights twice or in formats that are not read.
    """
    found = _snapshot(repository, revision, FILES)
    # The commit: what the revision means must not change between the two.
    found = _snapshot(repository, found.name, (*FILES, *_weight_files(found)))
    if not any((found / name).is_file() for name in (SINGLE, INDEX)):
        raise ValueError(f"{repository} has no {SINGLE} and no {INDEX}; only models saved as safetensors are served")
    return found


def _weight_files(snapshot: Path) -> list[str]:
    """Return patterns of the files that hold weights; whether the index is sound is for its reader to say."""
    try:
        files = set(json.loads((snapshot / INDEX).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return [SINGLE]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{snapshot / INDEX} does not list weights; the repository is damaged") from None
    return [SINGLE, *sorted(glob.escape(str(name)) for name in files if str(name).endswith(".safetensors"))]


def _snapshot(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(NEVER)
        )
    except errors.GatedRepoError:
        way_out = f"accept its terms at https://huggingface.co/{repository} and log in with `hf auth login`"
        raise ValueError(f"{repository} is gated; {way_out}") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{repository} has no revision {revision!r}; give a branch, a tag or a commit") from None
    except errors.RepositoryNotFoundError:
        way_out = "check the name, or log in with `hf auth login` if it is private"
        raise ValueError(f"there is no directory and no repository {repository}; {way_out}") from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            cause, way_out = "HF_HUB_OFFLINE is set", "unset it, or give a directory"
        else:
            cause, way_out = _first_line(error.__cause__ or error), "check the network, or give a directory"
        problem = f"{repository} is neither a directory nor in the Hugging Face cache, and cannot be fetched: {cause}"
        raise ValueError(f"{problem}; {way_out}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{repository} cannot be fetched: {_first_line(error)}") from None
    return Path(found)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
