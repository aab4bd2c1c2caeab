"""What a browser would make of a report, for the tests of its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img"}


@dataclass
class Page(HTMLParser):
    """What a browser would make of a report: elements, texts, scripts."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    raw: dict[str, list[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw.setdefault(self.open[-1], []).append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def page(source: str) -> Page:
    parsed = Page()
    parsed.feed(source)
    parsed.close()
    assert not parsed.open, f"left open: {parsed.open}"
    return parsed


def shape(parsed: Page) -> list[tuple[str, list[str]]]:
    return [(tag, sorted(attributes)) for tag, attributes in parsed.tags]


def section(source: str, name: str) -> str:
    """One section of a report, as text."""
    start = source.index(f'<section id="{name}">')
    found = page(source[start : source.index("</section>", start) + len("</section>")])
    return " ".join(" ".join(found.words).split())
