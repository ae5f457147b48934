"""Papers in docstrings and on pages are in the references, and all references are cited."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCES = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})|arxiv\.org/abs/(\d{4}\.\d{4,5})")
SOURCE = re.compile(r"^ +Source:\s+(.+?)(?=\n\n|\n +\"\"\")", re.MULTILINE | re.DOTALL)
NO_PAPERS = ("`StableDiffusionInpaintPipeline`", "the packing of `FluxFillPipeline")


def identifiers(text: str) -> set[str]:
    return {one or other for one, other in ARXIV.findall(text)}


def sources() -> list[str]:
    files = sorted((ROOT / "src").rglob("*.py"))
    found = [source for file in files for source in SOURCE.findall(file.read_text("utf-8"))]
    return [" ".join(source.split()) for source in found]


def test_sources_are_in_the_references() -> None:
    papers = [source for source in sources() if not source.startswith(NO_PAPERS)]
    assert len(papers) >= 9
    for source in papers:
        names = re.match(r"([\w. ]+?)(?:,| et al)", source)
        assert names, source
        assert names[1] in REFERENCES, source
        assert identifiers(source) <= identifiers(REFERENCES), source


def test_papers_on_pages_and_in_code_are_in_the_references() -> None:
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "references.md"]
    for file in (*pages, *(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")):
        assert identifiers(file.read_text("utf-8")) <= identifiers(REFERENCES), file


def test_a_link_has_the_number_that_it_shows() -> None:
    links = re.findall(r"\[arXiv:([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\)", REFERENCES)
    assert len(links) >= 12
    assert all(shown == linked for shown, linked in links)


def test_every_entry_names_its_use_or_belongs_to_related_work() -> None:
    for section in REFERENCES.split("\n## ")[1:]:
        title, _, entries = section.partition("\n")
        used = all("{py:obj}" in e or "`" in e for e in re.split(r"\n- ", entries)[1:])
        assert used or re.search(r"\]\((?:explanation|reference)/\w+\.md\)", entries), title
