"""Renders templates that came with a model, with limits on time and memory: see `sandbox_worker`.

One worker process serves all models of this process. It begins with the first template, and ends with this
process, whose end closes its stdin.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RENDER_SECONDS = 10.0  # a template writes its text in a few milliseconds
WORKER = Path(__file__).with_name("sandbox_worker.py")


class TemplateRefused(ValueError):
    """The template says that it can't write what it was given; the message is its own."""


class TemplateFailed(RuntimeError):
    """The template is broken, or needs too much time or memory."""


class TemplateSandbox:
    """Renders templates in a worker process, one at a time. Safe from any thread.

    Args:
        seconds: after which a template is given up, and the worker with it.
    """

    def __init__(self, seconds: float = RENDER_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text that the Jinja `template` writes with `variables`, which are what JSON can hold.

        Raises:
            TemplateRefused: the template has called `raise_exception`.
            TemplateFailed: it can't be rendered.
            ModuleNotFoundError: jinja2 isn't installed.
        """
        request = json.dumps({"template": template, "variables": dict(variables)})
        with self._lock:
            reply = self._exchange(request)
        if "refused" in reply:
            raise TemplateRefused(reply["refused"])
        if "failed" in reply:
            raise TemplateFailed(reply["failed"])
        return reply["text"]

    def close(self) -> None:
        """Ends the worker; the next template starts another."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """After a fork, in the child: the worker and the lock are the parent's."""
        self._lock = threading.Lock()
        self._worker = None

    def _exchange(self, request: str) -> dict[str, str]:
        if self._worker is not None and self._worker.poll() is not None:
            self._end()  # somebody has killed it
        worker = self._worker or self._start()
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(request + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except OSError:
            line = ""
        except BaseException:  # an interrupt: the answer would be the next one's
            self._end()
            raise
        if not line.endswith("\n"):
            late = worker.wait() == -signal.SIGALRM
            self._end()
            return {
                "failed": f"it needs more than {self._seconds:g} seconds" if late else "its process has ended"
            }
        reply: dict[str, str] = json.loads(line)
        return reply

    def _start(self) -> subprocess.Popen[str]:
        if importlib.util.find_spec("jinja2") is None:
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        paths = [path for path in sys.path if path]
        worker = subprocess.Popen(
            [sys.executable, "-P", "-S", "-X", "utf8", str(WORKER), str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            # nothing else of the environment: it may hold keys
            env={"PYTHONPATH": os.pathsep.join(paths), **_inherited()},
            start_new_session=True,  # an interrupt of the terminal is for the parent
        )
        assert worker.stdout is not None
        worker.stdout.readline()  # it has imported what it needs, or has ended: the next write fails
        self._worker = worker
        return worker

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            with contextlib.suppress(BrokenPipeError), worker:  # closes the pipes and waits
                pass


def _inherited() -> dict[str, str]:
    """What the interpreter and the clock need."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}


sandbox = TemplateSandbox()
"""Of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=sandbox.forget)
