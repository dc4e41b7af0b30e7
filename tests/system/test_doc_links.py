"""Links between pages lead somewhere, on GitHub and on the site alike; pages and examples can be found."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import tokenstep.integrations

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    DOCS.rglob("*.md")
)
CODE = re.compile(r"^```.*?^```$|^(?: {4}[^\n]*\n)+|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(page: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    words = (
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", h[1])) for h in HEADING.finditer(text)
    )
    return [heading.strip().lower().replace(" ", "-") for heading in words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for found in LINK.finditer(CODE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = found[1].partition("#")
        target = (page.parent / path).resolve() if path else page
        if found[1].startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(found[1])
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_two_headings_of_a_page_have_one_anchor(page: Path) -> None:
    """Where two have, GitHub and the site number them in different ways."""
    found = anchors(page)
    assert sorted(set(found)) == sorted(found)


def test_every_page_is_in_the_site_s_navigation() -> None:
    named = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    beside = {name.removeprefix("repository/") for name in named if name.startswith("repository/")}
    inside = {name for name in named if not name.startswith("repository/")}
    assert inside == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert all((ROOT / name).is_file() for name in beside)


INTEGRATIONS = [found.name for found in pkgutil.iter_modules(tokenstep.integrations.__path__)]
PUBLIC = ["", ".engine", ".models", ".torch_ops", *(f".integrations.{name}" for name in INTEGRATIONS)]


@pytest.mark.parametrize("module", [f"tokenstep{name}" for name in PUBLIC])
def test_every_public_name_is_in_the_api_reference(module: str) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    for of_module, members in re.findall(r"^::: (\S+)\n.*members: \[(.*)\]", pages, re.MULTILINE):
        shown |= {f"{of_module}.{name.strip()}" for name in members.split(",")}
    shown |= {
        name.rpartition(".")[0] for name in shown if re.search(r"\.(\w+)\.\1$", name)
    }  # beside its module
    public = getattr(importlib.import_module(module), "__all__", [])
    assert {f"{module}.{name}" for name in public if not name.startswith("__")} <= shown


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.name)
def test_every_example_is_about_a_page_long_named_in_the_docs_and_run_by_a_test(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 150
    assert f"(../examples/{example.name})" in (DOCS / "build_engines.md").read_text(encoding="utf-8")
    runs = [
        file
        for file in (ROOT / "tests").rglob("test_*.py")
        if f'example("{example.stem}")' in file.read_text()
    ]
    assert runs, f'no test calls example("{example.stem}")'
