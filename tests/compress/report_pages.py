"""Pages of made-up artifacts, and what a browser makes of a page."""

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

from pressd.compress.cost import Cost
from pressd.compress.report import Machine, make_report
from pressd.compress.report_html import report_page
from pressd.runtime.artifact.manifest import Manifest, PlannedGroup

MACHINE = Machine(cpu="abacus", cores=2, torch="2.x", python="3.y")
SVG = "{http://www.w3.org/2000/svg}"
KINDS = ("qkv", "o", "gate_up", "down")


class Words(HTMLParser):
    """What a browser makes of a page: the elements it sees, their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def tree_of(page: str) -> ElementTree.Element:
    """The page as XML; raises if anything is left open, or an attribute or an entity is none."""
    declaration, _, document = page.partition("\n")
    assert declaration == "<!DOCTYPE html>"
    return ElementTree.fromstring(document)


def text_of(page: str) -> str:
    return " ".join(" ".join(Words(page).words).split())


def cells_of(page: str) -> list[list[str]]:
    """Rows of all tables."""
    return [["".join(cell.itertext()) for cell in row] for row in tree_of(page).iter("tr")]


def group_of(name: str, error: float, **more: Any) -> PlannedGroup:
    kind: Any = more.pop("kind", PlannedGroup)
    fields = {"scheme": "w4a16g128", "shape": (64, 64), "bits": 4.125, "bytes": 2112, "fallback": None, "members": ()}
    made: PlannedGroup = kind(name=name, error=error, **fields | more)
    return made


def altered(manifest: Manifest, **update: Any) -> Manifest:
    return manifest.model_copy(update=update)


def page_of(manifest: Manifest, command: str | None = None, **cost: Any) -> str:
    """A page of a manifest with a made-up cost."""
    made = make_report(
        manifest,
        Cost(wall_seconds=2.5, peak_rss_bytes=3 << 20, blocks={"embed": 0.5, "layers.0": 1.5}, schemes={"keep": 1.0}),
        MACHINE,
        command,
    )
    return report_page(manifest, made.model_copy(update={"cost": made.cost.model_copy(update=cost)}))


def deep(manifest: Manifest, layers: int) -> Manifest:
    plan = [group_of(f"layers.{n}.{kind}", 0.05 + n / 1000) for n in range(layers) for kind in KINDS]
    return altered(manifest, plan=(group_of("embed", 0.0, scheme="keep"), *plan, group_of("lm_head", 0.01)))


def assert_no_nan(page: str) -> None:
    for drawing in tree_of(page).iter(f"{SVG}svg"):
        for part in drawing.iter():
            assert not [value for value in part.attrib.values() if re.search(r"\b(nan|inf)\b", value)]
    assert not re.search(r"\b(nan|inf)\b", text_of(page))
