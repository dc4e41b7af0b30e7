"""Chat templates: what transformers gives them is there, what they may not do ends with a clear error."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tokenstep.completions.sandbox import TemplateFailed, TemplateRefused, TemplateSandbox

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "é <b> \"quoted\" & 'x'\n", "name": "anna"},
    {"role": "assistant", "content": "日本", "tags": {"b": [1, None, True], "a": 0.5}},
]
TEMPLATES = {
    "trims the lines of its blocks": """
{%- for message in messages %}
    {% if message.role == 'user' %}
    <|user|>
    {{ message['content'] | trim }}
    {%- else %}
    {{ bos_token }}{{ message.content }}
    {% endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}
""",
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "loop": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "names": "{% set a = namespace(n=0) %}{% for i in [2, 3] %}{% set a.n = a.n + i %}{% endfor %}{{ a.n }}",
    "macro": "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%Y-%m') }}",
    "undefined": "{{ nothing }}{{ messages[0].name is defined }}{{ tools is none }}{{ messages[1:]|first }}",
    "strings": "{{ messages[0].content.strip().split(' ')[0].upper() }}{{ '%s!' % 'a' }}{{ 'a' ~ 1 }}",
}
HOSTILE = {
    "{{ 'a' * 10**11 }}": "512 MiB",
    "{{ 'x' | center(10**12) }}": "512 MiB",
    "{{ '%99999999999d' % 3 }}": "512 MiB",
    "{{ ('a' * 10**6) | replace('', 'b' * 10**6) }}": "512 MiB",
    "{% set a = namespace(x='aa') %}{% for i in range(60) %}{% set a.x = a.x ~ a.x %}{% endfor %}": "MiB",
    "{{ range(10**9) | list }}": "Range too big",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ cycler.__init__.__globals__.os.environ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}": "recursion",
    "{% include '/etc/passwd' %}": "no loader",
    "{% if": "TemplateSyntaxError",
    "{{ messages[0].content + 1 }}": "TypeError",
    "x" * (1 << 21): "expected at most 1048576",
}
ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[TemplateSandbox]:
    made = TemplateSandbox()
    yield made
    made.close()


def variables(**more: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "tools": None, "add_generation_prompt": True, "bos_token": "<s>", **more}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_template_writes_what_it_writes_in_transformers(sandbox: TemplateSandbox, template: str) -> None:
    ([expected], _) = render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    assert sandbox.render(template, variables()) == expected


def test_a_template_can_refuse_the_messages(sandbox: TemplateSandbox) -> None:
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        sandbox.render("{{ raise_exception('roles must alternate') }}", variables())


@pytest.mark.parametrize("template", HOSTILE)
def test_what_a_template_may_not_do_is_an_error_and_the_next_is_rendered(
    sandbox: TemplateSandbox, template: str
) -> None:
    begin = time.monotonic()
    with pytest.raises(TemplateFailed, match=HOSTILE[template]):
        sandbox.render(template, variables())
    assert time.monotonic() - begin < 5
    assert sandbox.render("{{ messages[2].content }}", variables()) == "日本"


def test_a_template_that_takes_too_long_is_given_up() -> None:
    sandbox = TemplateSandbox(seconds=0.5)
    with pytest.raises(TemplateFailed, match=r"0\.5 seconds"):
        sandbox.render(ENDLESS, variables())
    assert sandbox.render("{{ 1 + 1 }}", {}) == "2"
    sandbox.close()


def test_a_template_that_takes_too_long_ends_though_nobody_waits_any_more() -> None:
    sandbox = TemplateSandbox(seconds=0.5)
    sandbox.render("", {})
    worker = sandbox._worker
    assert worker is not None
    assert worker.stdin is not None
    request = {"template": ENDLESS, "variables": {}}
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.close()
    assert worker.wait(30) == -signal.SIGALRM
    worker.stdout.close()  # type: ignore[union-attr]


def test_a_template_sees_nothing_of_the_environment(
    sandbox: TemplateSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENSTEP_API_KEY", "secret")
    fresh = TemplateSandbox()
    fresh.render("", {})
    assert fresh._worker is not None
    with open(f"/proc/{fresh._worker.pid}/environ", "rb") as environment:
        assert b"secret" not in environment.read()
    fresh.close()


def test_unpaired_surrogates_and_odd_keys_come_through(sandbox: TemplateSandbox) -> None:
    assert (
        sandbox.render("{{ x }}{{ y['a b'] }}", {"x": "\ud800\n\u2028", "y": {"a b": "c"}})
        == "\ud800\n\u2028c"
    )


def test_many_threads_get_their_own_texts(sandbox: TemplateSandbox) -> None:
    wrong: list[str] = []

    def work(index: int) -> None:
        for turn in range(20):
            text = f"{index}-{turn}"
            if sandbox.render("{{ text }}", {"text": text}) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_worker_that_has_died_is_replaced(sandbox: TemplateSandbox) -> None:
    assert sandbox.render("{{ 1 }}", {}) == "1"
    assert sandbox._worker is not None
    sandbox._worker.kill()
    sandbox._worker.wait()
    assert sandbox.render("{{ 1 }}", {}) == "1"


def test_a_forked_child_has_a_worker_of_its_own() -> None:
    from tokenstep.completions.sandbox import sandbox as shared

    shared.render("{{ 1 }}", {})
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if shared._worker is None and shared.render("{{ 2 }}", {}) == "2" else 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert shared.render("{{ 3 }}", {}) == "3"
