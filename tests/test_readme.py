"""What the documents tell a reader to type, and point at, exists."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from pressd.client import messages
from pressd.client.options import GenerateOptions
from pressd.server import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text()


def command_lines(text: str) -> list[str]:
    """Lines of the sh blocks, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.split(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def make_targets(text: str) -> set[str]:
    """Targets of `make ...`, in blocks and in the running text."""
    return set(re.findall(r"(?:^|`)make (?:[A-Z]+=\S+ )?([a-z][\w-]*)", text, re.MULTILINE))


def paths(text: str) -> set[str]:
    """Targets of links into the repository, and what looks like a file or a folder in backticks."""
    linked = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    quoted = re.findall(r"`((?:[\w.-]+/)+(?:[\w.-]+\.\w+)?)`", text)
    return {path for path in (*linked, *quoted) if "<" not in path}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PRESSD = [line for line in command_lines(README) if line.startswith("pressd ")]


def test_the_readme_shows_the_main_verbs() -> None:
    verbs = {line.split()[1] for line in PRESSD}
    assert {"compress", "eval", "serve", "generate", "health"} <= verbs


@pytest.mark.parametrize("line", PRESSD)
def test_command_line_of_the_readme_parses(line: str) -> None:
    cli.make_parser().parse_args(shlex.split(line)[1:])


def test_a_command_line_that_is_wrong_does_not_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.make_parser().parse_args(["compress", "MODEL", "--no-such-flag"])
    assert "usage" in capsys.readouterr().err


def test_python_of_the_readme_calls_what_exists() -> None:
    program, _ = python_blocks(README)
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    (stream,) = [call for call in calls if ast.unparse(call.func) == "client.stream"]
    options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in stream.keywords}
    messages.generate_request("text", GenerateOptions(**options))  # type: ignore[typeddict-item]  # refuses unknown ones


def test_library_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """On the example model, where it prints two greedy answers and a drawn one."""
    from pressd.runtime import Engine, SamplingParams, StoppingParams

    _, program = python_blocks(README)
    assert program.count('"PRESSED"') == 1
    example = ROOT / "examples" / "pylm"
    code = compile(program.replace('"PRESSED"', repr(str(example))), "README.md", "exec")
    exec(code, {})  # noqa: S102 - it is our own document
    engine, stopping = Engine.from_pretrained(example), StoppingParams(max_new_tokens=40)
    expected = [completion.text for completion in engine.generate(["def main():", "import "], stopping=stopping)]
    drawn = engine.generate("class Node:", SamplingParams(temperature=0.8, seed=1), stopping)[0].text
    assert capsys.readouterr().out == f"{expected[0]}\n{expected[1]}\n{drawn}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document: Path) -> None:
    defined = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert make_targets(document.read_text()) <= defined


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    missing = {
        path
        for path in paths(document.read_text())
        if not (ROOT / path).exists() and not (document.parent / path).exists()
    }
    assert missing <= {
        "pressd/",
        "pressd/journal.jsonl",
        "pressd/manifest.json",
        "pressd/recipe.toml",
        "pressd/report.json",
        "pressd/report.html",
    }  # which are in artifacts


def test_what_a_document_points_at_is_found() -> None:
    text = "```sh\nmake demo   # all\npressd serve X\n```\n`make gone` [a](docs/gone.md) `server/gone.py` `tests/` [b](https://x.org/y)"
    assert command_lines(text) == ["make demo", "pressd serve X"]
    assert make_targets(text) == {"demo", "gone"}
    assert paths(text) == {"docs/gone.md", "server/gone.py", "tests/"}
