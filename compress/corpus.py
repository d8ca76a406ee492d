"""Text for calibration and evaluation: the built-in `stdlib` data set, .txt and .jsonl files, here or on a hub.

`stdlib` is the source text of the running Python's standard library, found through sysconfig and read in place. Two
lists of modules are set aside: HELDOUT is never trained or calibrated on (its tests and near copies are kept out of
training as well), CALIBRATION is the sample that passes collect statistics from. Python 3.11 to 3.14 have every module
of both; a module that the running Python lacks is left out, which the digest of a split shows.
"""

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from pressd.compress.hub_text import PREFIX, SUFFIXES, fetch_text

HELDOUT = (
    "argparse.py",
    "asyncio/locks.py",
    "asyncio/queues.py",
    "calendar.py",
    "cmd.py",
    "concurrent/futures/thread.py",
    "configparser.py",
    "csv.py",
    "email/generator.py",
    "email/header.py",
    "fractions.py",
    "getopt.py",
    "gettext.py",
    "graphlib.py",
    "heapq.py",
    "http/cookies.py",
    "json/decoder.py",
    "json/encoder.py",
    "logging/handlers.py",
    "mailbox.py",
    "multiprocessing/pool.py",
    "netrc.py",
    "plistlib.py",
    "queue.py",
    "random.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
    "tokenize.py",
    "tomllib/_parser.py",
    "urllib/robotparser.py",
    "wave.py",
    "xml/dom/minidom.py",
    "zipapp.py",
)

CALIBRATION = (
    "asyncio/base_events.py",
    "base64.py",
    "bdb.py",
    "codecs.py",
    "collections/__init__.py",
    "contextlib.py",
    "copy.py",
    "dataclasses.py",
    "datetime.py",
    "difflib.py",
    "email/message.py",
    "enum.py",
    "functools.py",
    "gzip.py",
    "http/server.py",
    "inspect.py",
    "ipaddress.py",
    "logging/__init__.py",
    "multiprocessing/managers.py",
    "optparse.py",
    "pickle.py",
    "pprint.py",
    "shutil.py",
    "socketserver.py",
    "sqlite3/dump.py",
    "subprocess.py",
    "tarfile.py",
    "threading.py",
    "trace.py",
    "types.py",
    "typing.py",
    "unittest/case.py",
    "urllib/request.py",
    "uuid.py",
    "warnings.py",
    "weakref.py",
)

# Tables, generated files, vendored code and syntax that is wrong on purpose: no text worth learning from.
_UNWANTED = (
    "site-packages/",
    "dist-packages/",
    "__pycache__/",
    "encodings/",
    "lib2to3/tests/data/",
    "test/encoded_modules/",
    "test/tokenizedata/",
    "_sysconfigdata",
    "config-",
)
# Library files that hold a tenth or more of the lines of a held-out module.
_NEAR_COPIES = ("aifc.py", "chunk.py", "lib2to3/pgen2/tokenize.py", "sunau.py")
SPLITS = ("calibration", "heldout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents of one split, in a fixed order."""

    name: str
    split: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Digest of every document with its boundaries: two corpora with one digest hold the same text."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def load(name: str, split: str) -> Corpus:
    """Return the text called `name`: `stdlib` (splits calibration, heldout), or a path to a .txt or .jsonl file.

    `hf:OWNER/NAME/FILE` is a file of a data set on the Hugging Face hub. A .txt file is one document; each line of a
    .jsonl file is an object whose `text` is a document. A file has no splits: it is the same text whatever split is
    asked for.
    Raises ValueError naming the data set and what would be accepted.
    """
    if split not in SPLITS:
        raise ValueError(f"data split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    if name == "stdlib":
        documents = _stdlib_split(split)
        if not documents:
            raise ValueError(f"data stdlib: no source files under {stdlib_root()}; give a .txt or .jsonl file instead")
        return Corpus(name=name, split=split, documents=documents)
    path = fetch_text(name) if name.startswith(PREFIX) else Path(name)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"data {name!r} is not known; use `stdlib`, the path of a .txt or .jsonl file, or hf:OWNER/NAME/FILE"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {name}: cannot be read ({error})") from None
    documents = (text,) if path.suffix == ".txt" else _jsonl_documents(name, text)
    if not any(document.strip() for document in documents):
        raise ValueError(f"data file {name} holds no text")
    return Corpus(name=name if name.startswith(PREFIX) else path.name, split=split, documents=documents)


def stdlib_root() -> Path:
    """Return the directory of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def heldout_documents() -> tuple[str, ...]:
    """Return the documents of the built-in held-out split, as far as this Python has them."""
    return _stdlib_split("heldout")


def stdlib_training() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (library documents, test-suite documents) of the standard library without anything held out.

    Meant for training: the tests of held-out modules and of the packages these are in are left out too.
    """
    library: list[str] = []
    tests: list[str] = []
    for path in sorted(stdlib_root().rglob("*.py")):
        relative = path.relative_to(stdlib_root()).as_posix()
        if relative in HELDOUT or relative in _NEAR_COPIES or any(part in relative for part in _UNWANTED):
            continue
        if _tests_heldout(relative):
            continue
        document = _source(path)
        if document is not None:
            is_test = "test" in relative.split("/")[0] or "/tests/" in relative
            (tests if is_test else library).append(document)
    return tuple(library), tuple(tests)


def _tests_heldout(relative: str) -> bool:
    """Whether this file of the library tests a held-out module: `test_header` or, by its package, `test_email*`."""
    parts = [part.lstrip("_") for part in relative.removesuffix(".py").split("/")]
    for module in HELDOUT:
        *package, stem = module.removesuffix(".py").split("/")
        if f"test_{stem}" in parts or (package and any(part.startswith(f"test_{package[0]}") for part in parts)):
            return True
    return False


def _stdlib_split(split: str) -> tuple[str, ...]:
    modules = HELDOUT if split == "heldout" else CALIBRATION
    documents = (_source(stdlib_root() / module) for module in modules)
    return tuple(document for document in documents if document is not None)


def _source(path: Path) -> str | None:
    """Text of a source file; None for one that this Python lacks or that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _jsonl_documents(name: str, text: str) -> tuple[str, ...]:
    documents: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold the other line separators
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            document.encode()  # refuses what is not a string, and lone surrogates
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"data file {name}, line {number}: needs an object with a string `text`") from None
        documents.append(document)
    return tuple(documents)
