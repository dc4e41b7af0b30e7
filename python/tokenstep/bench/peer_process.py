"""A peer in a process of its own (`tokenstep.bench.peers.worker`), which sleeps while others are measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

WORKER = Path(__file__).parent / "peers" / "worker.py"


class PeerFailed(RuntimeError):
    """A peer's process has ended; the message has the end of what it said."""


class PeerProcess:
    """Starts one, and waits for its first token.

    Args:
        name: for messages.
        module: the file of `tokenstep.bench.peers` that drives it.
        python: the interpreter that has it.
        options: what `worker` wants.

    Attributes:
        first_token_s: seconds from the start of the process to its first token.
        start_mib: the most memory it had by then.
        description: what it says of itself.
    """

    def __init__(self, name: str, module: str, python: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed with the process
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [python, str(WORKER), module, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,  # its children sleep and end with it
        )
        try:
            self.description = self._read()
        except BaseException:
            self.close()
            raise
        self.first_token_s = time.perf_counter() - begin
        self.start_mib = self.peak_mib()
        self._signal(signal.SIGSTOP)

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int,
        sampling: Mapping[str, float] | None,
        *,
        sampling_alone: bool = False,
    ) -> float:
        """Seconds that it took for `output_tokens` of each prompt, or that sampling took of them."""
        asked = {
            "do": "sample" if sampling_alone else "generate",
            "prompts": prompts,
            "output_tokens": output_tokens,
            "sampling": sampling,
        }
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading says why
        seconds: float = self._read()["seconds"]
        self._signal(signal.SIGSTOP)
        return seconds

    def peak_mib(self) -> float:
        """The most memory that its processes have had, those of its children added; mapped files count."""
        return sum(_high_water_kib(pid) for pid in _session(self._process.pid)) / 1024

    def close(self) -> None:
        """Ends it. Closing twice does nothing."""
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                stream.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            raise PeerFailed(f"{self.name} has ended ({code}): {self._said.read()[-1500:].strip()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


def first_output(command: Sequence[str]) -> tuple[float, float]:
    """Seconds until `command` prints its first byte, and the most memory it takes (MiB); it runs to its end.

    Raises PeerFailed if it ends without a word.
    """
    begin = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None
        if not process.stdout.read(1):
            process.wait()
            said.seek(0)
            raise PeerFailed(f"{command[0]} has ended without output: {said.read()[-1500:].strip()}")
        seconds = time.perf_counter() - begin
        process.stdout.read()
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return seconds, usage.ru_maxrss / 1024


def interpreter_has(python: str, package: str) -> bool:
    """Whether that interpreter finds the package; it isn't imported."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    if python == sys.executable:
        import importlib.util

        return importlib.util.find_spec(package) is not None
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def _session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                behind_name = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(behind_name[3]) == leader:
                found.append(int(entry))
    return found


def _high_water_kib(pid: int) -> int:
    try:
        status = Path("/proc", str(pid), "status").read_text()
    except OSError:
        return 0
    return int((status.partition("VmHWM:")[2].split() or ["0"])[0])
