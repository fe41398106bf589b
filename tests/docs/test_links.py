"""Links between the pages lead to files and headings that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("k8s/*/README.md")])


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them: words in lower case, joined by hyphens, numbered."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*)$", prose(page), re.MULTILINE):
        words = re.sub(r"\]\([^)]*\)|[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[words] = found.get(words, 0) + 1
    return {
        words if number == 0 else f"{words}-{number}"
        for words, count in found.items()
        for number in range(count)
    }


def broken(page: Path) -> Iterator[str]:
    """Links to other files or headings that are not there. Other sites are not asked."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_a_broken_link_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `b_c`, d\n\n## [Twice](x)\n\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[ok](other.md) [ok](other.md#a-b_c-d) [ok](other.md#twice-1) [ok](https://a.b/c.md#d)\n"
        "[no](gone.md) [over\nlines](other.md#twice-2) [no](#here)\n\n"
        "```bash\n# here\necho [x](no-link.md)\n```\n"
    )
    assert list(broken(page)) == ["gone.md", "other.md#twice-2", "#here"]
