"""Renders chat templates in a process of its own. `sandbox` runs this file; it imports nothing of ours.

A template is code that came with a model: Jinja's sandbox keeps it from Python's insides, the limits of the
process keep it from memory. Each line of stdin is a JSON object {template, variables}, each line of stdout
{text}, {refused} (the template itself raised) or {failed}.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20
MAX_SOURCE = 1 << 20  # characters of a template
MAX_TEXT = 16 << 20  # characters of what it writes


class Refused(jinja2.TemplateError):
    """The template has called `raise_exception`."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model writes; here it is its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: object) -> None:
    """The messages are none that the model knows."""
    raise Refused(str(message))


def strftime_now(form: str) -> str:
    """The local time, as `form` has it."""
    return datetime.datetime.now().strftime(form)


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for people: Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> ImmutableSandboxedEnvironment:
    """What templates written for transformers expect."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    helpers: tuple[Callable[..., Any], ...] = (raise_exception, strftime_now)
    made.globals.update({helper.__name__: helper for helper in helpers})
    made.filters["tojson"] = tojson
    return made


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template of this source."""
    if len(source) > MAX_SOURCE:
        raise ValueError(f"it has {len(source)} characters, expected at most {MAX_SOURCE}")
    return environment().from_string(source)


def answer(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """What is written to the parent."""
    try:
        text = compiled(template).render(variables)
        if len(text) > MAX_TEXT:
            raise ValueError(f"it writes {len(text)} characters, expected at most {MAX_TEXT}")
        return {"text": text}
    except Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Says that it is ready, then answers until stdin ends. A template that takes too long ends the process.

    The alarm is this process's own, so that it also ends when nobody waits for the answer any more.
    """
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it may have been ignored where this process comes from
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("{}", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nothing handles SIGALRM: it kills
        reply = json.dumps(answer(**json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
