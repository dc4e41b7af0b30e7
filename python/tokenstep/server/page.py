"""The page to try the server in a browser: the files of the folder `page`, sent as one."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

STYLE = re.compile(r'<link rel="stylesheet" href="([^"]+)">')
SCRIPTS = re.compile(r'(?:<script src="[^"]+"></script>\s*)+')
SOURCE = re.compile(r'src="([^"]+)"')


def load_page() -> tuple[str, dict[str, str]]:
    """The page, with its style and scripts inside, and the headers to send it with.

    One file works under any path that a proxy has for it. It may run what it has inside and call this server:
    whatever else it tried, a browser would refuse.
    """
    folder = files("tokenstep.server").joinpath("page")

    def read(name: str) -> str:
        return folder.joinpath(name).read_text("utf-8")

    page = read("index.html")
    style = "\n".join(read(name) for name in STYLE.findall(page))
    script = "\n".join(read(name) for group in SCRIPTS.findall(page) for name in SOURCE.findall(group))
    page = STYLE.sub(lambda _: f"<style>{style}</style>", page)
    page = SCRIPTS.sub(lambda _: f"<script>{script}</script>\n", page)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}


def _hash(contents: str) -> str:
    digest = base64.b64encode(hashlib.sha256(contents.encode()).digest()).decode()
    return f"'sha256-{digest}'"
