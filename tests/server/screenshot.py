"""The picture of the page in the documentation: `python tests/server/screenshot.py docs/page.png`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import browser
from running_server import running_server

FIELDS = {
    "prompt": "Once upon a time, in a small village by the sea,",
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "presence_penalty": 0.5,
    "seed": 7,
}
SELECTED = 4  # the token whose alternatives are shown


def main(file: Path) -> None:
    with (
        running_server("--kv-tokens", "4096") as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browser(Path(profile)) as page,
    ):
        page.open(server.url + "/", width=1280, height=680)
        page.until("byId('model').value")
        for name, value in FIELDS.items():
            page.run(f"byId({name!r}).value = {value!r}")
        page.run("SLIDERS.forEach(showValue)")
        page.click("#go")
        page.until("output.tokens.length && !controller")
        page.run(f"output.select({SELECTED})")
        page.until("!asking && !askAgain && document.getAnimations().length === 0")
        page.screenshot(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
