"""`tokenstep serve` as people run it: a process of its own on a free port."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVE = [sys.executable, "-m", "tokenstep.cli.main", "serve"]
SCRIPTED = [sys.executable, str(Path(__file__).with_name("scripted_server.py"))]
LISTENING = re.compile(r"listening on (http://\S+)")


class RunningServer:
    """One server; its log is in `lines` as it comes."""

    def __init__(self, *options: str, command: list[str] = SERVE) -> None:
        self.process = subprocess.Popen(
            [*command, "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """The first line from here on that has `pattern`."""
        deadline = time.monotonic() + seconds
        while True:
            line = self._new.get(timeout=max(0.01, deadline - time.monotonic()))
            assert line is not None, f"the server has ended: {''.join(self.lines)}"
            if found := re.search(pattern, line):
                return found

    def wait_until_ready(self) -> RunningServer:
        self.url = self.wait_for(LISTENING.pattern)[1]
        self.wait_for("is ready after")
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """The value of one metric, labels included in its name."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"{name} isn't there")

    def is_idle(self, seconds: float = 10) -> bool:
        """Whether nothing runs, waits or holds blocks soon."""
        deadline = time.monotonic() + seconds
        names = ("tokenstep_choices_running", "tokenstep_requests_waiting", "tokenstep_kv_blocks_used")
        while any(self.metric(name) for name in names):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def memory(self) -> int:
        """Bytes of resident memory."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def cpu_seconds(self) -> float:
        """Seconds of processor time that it has taken."""
        with open(f"/proc/{self.process.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            self._new.put(line)
        self._new.put(None)


@contextmanager
def running_server(
    *options: str, command: list[str] = SERVE, until_ready: bool = True
) -> Iterator[RunningServer]:
    """A server that is ready; killed at the end if the test hasn't stopped it."""
    server = RunningServer(*options, command=command)
    try:
        yield server.wait_until_ready() if until_ready else server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
