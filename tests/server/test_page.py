"""The page, in a real browser and by keyboard: what it does, how it looks, and whom it asks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, CONTROL, SHIFT, Browser, browser
from openai_answers import GERMANY, KEY
from running_server import RunningServer

pytestmark = pytest.mark.slow
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)

IDLE = "!controller && !asking && !askAgain"
ROWS = """[...byId('chart').tBodies[0].rows].map((row) => ({
  text: row.cells[0].textContent, drawn: row.cells[3].textContent, cut: row.classList.contains('cut'),
  chosen: row.classList.contains('chosen'), width: row.querySelector('.drawn').getBoundingClientRect().width,
  of: row.querySelector('.bar').getBoundingClientRect().width }))"""
CONTROLS = {"textbox", "slider", "button", "combobox", "spinbutton", "table"}
SETTLED = "document.getAnimations().length === 0"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("profile")
    with browser(profile) as running:
        yield running
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def page(chromium: Browser, smollm2_server: RunningServer) -> Iterator[Browser]:
    """The page with a key in it and its first chart. In all that is done, it asks nobody but the server."""
    chromium.requests.clear()
    chromium.problems.clear()
    chromium.open(smollm2_server.url + "/")
    chromium.until("byId('status').textContent")  # it wants a key
    chromium.problems.clear()
    focus(chromium, "key")
    chromium.type(KEY)
    chromium.press("Tab")
    chromium.until(f"byId('chart').tBodies[0].rows.length && {IDLE}")
    yield chromium
    assert chromium.requests
    for url in chromium.requests:
        assert url.startswith(smollm2_server.url + "/")
    assert chromium.problems == []


def focus(page: Browser, name: str) -> list[str]:
    """Presses Tab until the element of this id has the focus; the ids on the way."""
    passed = []
    for _ in range(40):
        page.press("Tab")
        passed.append(page.run("document.activeElement.id || document.activeElement.classList[0]"))
        if passed[-1] == name:
            return passed
    raise AssertionError(f"{name} can't be reached: {passed}")


def write_prompt(page: Browser, text: str) -> None:
    focus(page, "prompt")
    page.press("a", CONTROL)
    page.type(text)


def rows(page: Browser) -> list[dict[str, Any]]:
    page.until(IDLE)
    page.until(SETTLED)
    found: list[dict[str, Any]] = page.run(ROWS)
    return found


def ask(page: Browser, path: str, **body: Any) -> Any:
    """What the server answers."""
    options = {
        "method": "POST",
        "headers": {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        "body": json.dumps({"model": "smollm2", **body}),
    }
    return page.run(f"fetch('/v1/{path}', {json.dumps(options)}).then((answer) => answer.json())")


def test_every_control_is_reached_by_tab_and_has_a_name(page: Browser) -> None:
    write_prompt(page, "Hello")
    page.press("Enter", CONTROL)
    page.until(f"byId('output').querySelector('.token') && {IDLE}")
    expected = ["go", "token", "reset", "temperature", "min_p", "top_k", "top_p", "repetition_penalty"]
    expected += ["presence_penalty", "frequency_penalty", "max_tokens", "seed", "stop"]
    assert focus(page, "stop") == expected  # what comes before the prompt, the fixture has passed
    for element in page.call("Accessibility.getFullAXTree")["nodes"]:
        if element.get("role", {}).get("value") in CONTROLS and not element["ignored"]:
            assert element["name"]["value"], element


def test_a_completion_is_streamed_token_by_token(page: Browser) -> None:
    write_prompt(page, "1, 2, 3,")
    page.run("""byId('temperature').value = 0; byId('max_tokens').value = 40; globalThis.seen = [];
        new MutationObserver(() => seen.push(byId('output').querySelectorAll('.token').length))
          .observe(byId('output'), { childList: true })""")
    page.press("Enter", CONTROL)
    page.until("controller !== null")
    assert page.run("byId('go').disabled && !byId('halt').disabled")
    page.until(IDLE)
    seen = page.run("seen")
    assert len(set(seen)) > 10, "many steps, not one at the end"
    expected = ask(page, "completions", prompt="1, 2, 3,", temperature=0, max_tokens=40, logprobs=0)
    (choice,) = expected["choices"]
    assert page.run("output.text") == choice["text"]
    shown = page.run("[...byId('output').querySelectorAll('.token')].map((token) => token.textContent)")
    assert "".join(shown).replace("↵", "") == choice["text"]
    shades = page.run(
        "output.tokens.map(({ span }) => parseInt(getComputedStyle(span).getPropertyValue('--surprise')))"
    )
    order = sorted(range(len(shades)), key=choice["logprobs"]["token_logprobs"].__getitem__, reverse=True)
    assert [shades[index] for index in order] == sorted(shades), "the less likely, the more shade"
    assert re.fullmatch(r"40 tokens in .* s \(.* a second\)", page.run("byId('status').textContent"))


def test_a_token_shows_what_else_could_have_come(page: Browser) -> None:
    write_prompt(page, GERMANY)
    page.run("byId('temperature').value = 0; byId('max_tokens').value = 8")
    page.press("Enter", CONTROL)
    page.until("output.tokens.length === 8")
    page.until(IDLE)
    focus(page, "token")
    page.press("Enter")
    (chosen,) = [row for row in rows(page) if row["chosen"]]
    assert (chosen["text"], chosen["drawn"]) == ("␣Berlin", "100 %")
    assert page.run("byId('after').textContent") == f"after “{GERMANY}”"
    page.press("ArrowRight")
    (chosen,) = [row for row in rows(page) if row["chosen"]]
    assert chosen["text"] == "."
    page.press("End")
    rows(page)
    assert page.run("output.selected") == 7
    page.click(".token")
    assert [row["text"] for row in rows(page) if row["chosen"]] == ["␣Berlin"]
    assert page.run("document.querySelectorAll('.token[aria-pressed=true]').length") == 1


def test_a_slider_changes_the_bars_as_the_server_says(page: Browser) -> None:
    write_prompt(page, "My favourite colour is")
    page.until("byId('after').textContent.includes('colour is')")
    before = rows(page)
    assert not any(row["cut"] for row in before)
    focus(page, "top_k")
    page.press("ArrowRight", times=5)
    cut = rows(page)
    assert [row["cut"] for row in cut] == [False] * 5 + [True] * 11
    assert all(row["drawn"] == "top-k" for row in cut[5:])
    assert page.run("byId('top_k').getAttribute('aria-valuetext')") == "5"
    assert "top-k leaves 5" in page.run("byId('left').textContent")
    shares = [float(found[0]["drawn"].removesuffix(" %")) for found in (before, cut)]
    assert shares[0] < shares[1], "the others' share goes to what is left"

    focus(page, "presence_penalty")  # nothing has been generated: it takes nothing
    page.press("End")
    assert rows(page) == cut
    page.press("Tab", SHIFT, times=5)
    assert page.run("document.activeElement.id") == "temperature"
    page.press("End")
    hot = rows(page)
    assert 0 < hot[0]["width"] / hot[4]["width"] < cut[0]["width"] / cut[4]["width"]

    fields = {"temperature": 2, "top_k": 5, "presence_penalty": 2, "top": 16}
    said = ask(page, "next_token", prompt="My favourite colour is", **fields)["tokens"]
    largest = max(max(token["probability"], token["model_probability"]) for token in said)
    for row, token in zip(hot, said, strict=True):
        assert row["text"].replace("␣", " ") == token["text"]
        assert row["width"] / row["of"] == pytest.approx(token["probability"] / largest, abs=0.01)
    page.click("#reset")
    assert [row["cut"] for row in rows(page)] == [False] * 16


def test_escape_stops_it(page: Browser, smollm2_server: RunningServer) -> None:
    write_prompt(page, "Once upon a time")
    page.run("byId('max_tokens').value = 2000")
    page.press("Enter", CONTROL)
    page.until("output.tokens.length > 2")
    page.press("Escape")
    page.until(IDLE)
    assert page.run("byId('status').textContent") == "Stopped."
    assert page.run("output.tokens.length") < 2000
    assert smollm2_server.is_idle()


def test_what_is_wrong_is_said(page: Browser) -> None:
    write_prompt(page, "Hello")
    page.run("byId('max_tokens').value = 100000")
    page.press("Enter", CONTROL)
    page.until("byId('status').className === 'error'")
    assert "maximum context length" in page.run("byId('status').textContent")
    page.until(IDLE)
    page.problems.clear()  # that the server said 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 900, 390])
def test_it_can_be_read_in_both_schemes_and_at_any_width(
    page: Browser, scheme: str, width: int, tmp_path: Path
) -> None:
    page.prefer(scheme)
    page.resize(width, 900)
    write_prompt(page, "Once upon a time")
    page.run("byId('temperature').value = 1.5; byId('top_k').value = 9; byId('max_tokens').value = 12")
    page.press("Enter", CONTROL)
    page.until("output.tokens.length > 9")
    rows(page)
    page.screenshot(tmp_path / "page.png")
    assert page.run("document.documentElement.scrollWidth") == width, "nothing is cut off"
    background = luminance(page.run("getComputedStyle(document.body).backgroundColor"))
    assert (background > 0.5) is (scheme == "light")
    for text, colour, behind in page.run(COLOURS):
        lighter, darker = sorted((luminance(colour), luminance(behind)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, colour, behind)
    page.prefer("light")


COLOURS = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {  // as the screen shows them, one above the other
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(",")})`;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const holder = node.parentElement;
    const left_out = holder.closest("script, style, :disabled, .mark");
    if (!node.textContent.trim() || !holder.checkVisibility() || left_out) continue;
    const layers = [];
    for (let at = holder; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
    found.push([node.textContent.trim(), paint([...layers, getComputedStyle(holder).color]), paint(layers)]);
  }
  return found;
})()"""
"""Each text with its colour and what lies behind it."""


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 has it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    "attempt",
    [
        "fetch('http://127.0.0.1:9/').catch(() => {})",
        "Object.assign(new Image(), { src: 'http://127.0.0.1:9/' })",
        "document.head.append(element('script', { src: 'http://127.0.0.1:9/' }))",
        "document.head.append(element('script', { textContent: '1' }))",
    ],
)
def test_the_browser_would_refuse_whatever_comes_from_elsewhere(page: Browser, attempt: str) -> None:
    refused = page.run(
        "new Promise((done) => { addEventListener('securitypolicyviolation', "
        f"(event) => done(event.effectiveDirective), {{ once: true }}); {attempt}; }})"
    )
    assert refused in ("connect-src", "img-src", "script-src-elem")
    page.problems.clear()  # that it was refused
    page.requests[:] = [url for url in page.requests if ":9/" not in url]
