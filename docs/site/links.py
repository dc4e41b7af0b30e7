"""Links that lead out of docs/ work on the site as they do in the repository.

Pages link to files beside docs/ (`../examples/engine.py`), as GitHub reads them. What is linked so, directly
or from another such file, becomes part of the site under `repository/`: Markdown as a page, source as a page
of code, a folder as a list of its files, data and pictures as they are. The site needs no repository address.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PLACE = "repository"
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(?=(?:#[^)\s]*)?\))")
CODE = re.compile(r"^(`{3,}).*?^\1$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
SHOWN_AS_CODE = {".py": "python", ".sh": "bash", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp"}
SHOWN_AS_CODE |= {".txt": "text", ".html": "html", ".css": "css", ".js": "javascript"}
SHOWN_AS_IS = {".md", ".json", ".svg", ".png"}
ASIDE = "---\nsearch: { exclude: true }\nhide: [toc]\n---\n"


def links(text: str) -> list[re.Match[str]]:
    """The links of a page to files of the repository, but for those within code."""
    code = [found.span() for found in CODE.finditer(text)]
    return [m for m in LINK.finditer(text) if not any(begin <= m.start() < end for begin, end in code)]


def target(path: str, link: str) -> str:
    """What a link means on a page that the repository has at `path`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def origin(uri: str) -> str:
    """Where the repository has what the site has at `uri`; the inverse of `place`."""
    inside, _, path = uri.partition(f"{PLACE}/")
    if inside or not path:
        return f"docs/{uri}"
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def place(path: str) -> str:
    """Where the site has what the repository has at `path`."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{PLACE}/{path}/index.md"
    return f"{PLACE}/{path}.md" if Path(path).suffix in SHOWN_AS_CODE else f"{PLACE}/{path}"


def content(path: str) -> str | bytes:
    """What the site shows of a file or folder beside docs/."""
    file = ROOT / path
    if file.is_dir():
        shown = [f for f in sorted(file.rglob("*")) if f.suffix in SHOWN_AS_CODE.keys() | SHOWN_AS_IS]
        names = [f.relative_to(file).as_posix() for f in shown]
        return f"{ASIDE}# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    if language := SHOWN_AS_CODE.get(file.suffix):
        return f"{ASIDE}# {path}\n\n~~~~~~{language}\n{file.read_text()}\n~~~~~~\n"
    return file.read_text() if file.suffix == ".md" else file.read_bytes()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is linked, beginning with the pages of docs/ and those that the navigation names."""
    pages = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    pages.append(("README.md", "[](CHANGELOG.md) [](CONTRIBUTING.md)"))
    while pages:
        path, text = pages.pop()
        for found in links(text):
            wanted = target(path, found[0])
            uri = place(wanted)
            if wanted.startswith("docs/") or files.get_file_from_path(uri) or not (ROOT / wanted).exists():
                continue
            shown = content(wanted)
            files.append(File.generated(config, uri, content=shown, inclusion=InclusionLevel.NOT_IN_NAV))
            if isinstance(shown, str) and uri.endswith((f"{PLACE}/{wanted}", "/index.md")):
                pages.append((origin(uri), shown))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Has each link lead to where the site has the file; a broken one stays, for mkdocs to complain of."""
    here = origin(page.file.src_uri)
    for found in reversed(links(markdown)):
        uri = place(target(here, found[0]))
        if files.get_file_from_path(uri):
            relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))
            markdown = markdown[: found.start()] + relative + markdown[found.end() :]
    return markdown
