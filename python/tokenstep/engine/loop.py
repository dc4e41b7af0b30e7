"""The engine's steps in a thread of its own: requests come from any thread, outputs go to callbacks.

The thread begins with the first request and ends after a while without any, so that an engine nobody uses can
be collected. Threads don't survive a fork: in the child a new one begins with the next request, and requests
that were in flight fail there; they go on in the parent.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from tokenstep.engine.engine import Engine
from tokenstep.engine.errors import EngineStopped, QueueFull
from tokenstep.engine.request import FailureKind, FailureOutput, Output, Request, TokenOutput
from tokenstep.engine.stats import EngineStats, Observer

logger = logging.getLogger("tokenstep.engine")

Deliver = Callable[[list[Output]], None]
"""Takes what came of one submission in one step. Called in the engine's thread: it must be quick."""
LoopState = Literal["running", "draining", "stopped"]

IDLE_SECONDS = 10.0  # after which a thread without work ends
EXIT_SECONDS = 10.0  # that a stop waits for the step that runs
STALLED_SECONDS = 60.0  # a step that takes longer counts as no progress
SMOOTHING = 0.1  # weight of the newest step in the engine's speed
RETRY_SECONDS = (1.0, 60.0)  # what QueueFull may suggest

_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@dataclass(eq=False)
class _Submission:
    """Requests that came together; so many of them are open. `last_token`: when each choice had its last."""

    deliver: Deliver
    submitted: float
    num_open: int
    last_token: dict[tuple[Request, int], float] = field(default_factory=dict)


class EngineLoop:
    """Runs an engine for any number of threads. Nobody else may call that engine's `add` and `step`.

    Args:
        engine: what computes.

    Attributes:
        observer: is told what happens; may be replaced before the first request.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.observer = Observer()
        self._changed = threading.Condition()  # guards what follows
        self._state: LoopState = "running"
        self._thread: threading.Thread | None = None
        self._inbox: deque[Request] = deque()
        self._open: dict[Request, _Submission] = {}
        self._waiting: dict[Request, int] = {}  # the most tokens of each that hasn't begun, first come first
        self._waiting_tokens = 0
        # appended to without a lock: a stream is cancelled wherever the garbage collector finds it
        self._cancelled: deque[tuple[Request, int | None]] = deque()
        self._torch_threads = torch.get_num_threads()
        self._tokens_per_second = 0.0
        self._busy_since: float | None = None  # the last sign of progress; None while there is nothing to do
        self._stats = engine.stats()
        _loops.add(self)

    @property
    def state(self) -> LoopState:
        """Whether it takes requests ("running"), finishes those it has, or has stopped."""
        return self._state

    def submit(self, requests: Sequence[Request], deliver: Deliver) -> None:
        """Queues `requests`, all or none, which have passed `Engine.check`; what comes goes to `deliver`.

        Each choice of each request ends with a TokenOutput whose `finish` is set, unless the request has no
        tokens to generate (then with its PromptOutput), fails (FailureOutput) or is cancelled.

        Raises:
            QueueFull: too much is waiting. Whoever finds the queue empty is let in.
            EngineStopped: it takes no more.
        """
        tokens = sum(request.max_total_tokens for request in requests)
        with self._changed:
            if self._state != "running":
                raise EngineStopped("tokenstep.engine: the engine is shutting down")
            self._refuse_if_full(len(requests), tokens)
            submission = _Submission(deliver, time.monotonic(), len(requests))
            for request in requests:
                self._open[request] = submission
                self._waiting[request] = request.max_total_tokens
            self._waiting_tokens += tokens
            self._inbox.extend(requests)
            self._torch_threads = torch.get_num_threads()
            if self._thread is None:
                self._busy_since = time.monotonic()
                self._thread = threading.Thread(target=self._run, name="tokenstep-engine", daemon=True)
                _threads.add(self._thread)
                self._thread.start()
            self._changed.notify_all()

    def check_room(self) -> None:
        """Raises QueueFull if not even one more request would be taken: cheap to ask before costly work."""
        with self._changed:
            self._refuse_if_full(1, 1)

    def cancel(self, request: Request, choice: int | None = None) -> None:
        """Ends a choice that has begun, or all of `request`. Safe from any thread; never waits.

        Its blocks and rows are free before the next step; outputs of the step that runs may still be
        delivered.
        """
        self._cancelled.append((request, choice))

    def stats(self) -> EngineStats:
        """The engine after its last step, and what waits now."""
        with self._changed:
            return replace(self._stats, waiting=len(self._waiting), waiting_tokens=self._waiting_tokens)

    def seconds_without_progress(self) -> float:
        """How long the current step has taken; 0 while there is nothing to do."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def is_healthy(self) -> bool:
        """Whether it hasn't stopped, and makes progress if there is work."""
        thread = self._thread
        alive = thread is None or thread.is_alive()
        return self._state != "stopped" and alive and self.seconds_without_progress() < STALLED_SECONDS

    def close(self) -> None:
        """Takes no more requests; those in flight go on. Doesn't wait."""
        with self._changed:
            if self._state == "running":
                self._state = "draining"
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Takes no more requests, waits for those in flight, then stops.

        After `timeout` seconds the rest fails. Returns whether all were finished.
        """
        self.close()
        with self._changed:
            finished = self._changed.wait_for(lambda: not self._open, timeout)
        self.abort()
        return finished

    def abort(self, timeout: float = EXIT_SECONDS) -> None:
        """Stops after the step that runs; requests in flight fail. Waits for it, up to `timeout` seconds."""
        with self._changed:
            self._state = "stopped"
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            self._fail_all("stopped", "the engine has been stopped")
        elif thread is not threading.current_thread():
            thread.join(timeout)

    def _refuse_if_full(self, count: int, tokens: int) -> None:
        config = self.engine.config
        over = [
            f"{sum(numbers)} {what}, at most {limit} may wait"
            for what, limit, numbers in (
                ("requests", config.max_waiting, (len(self._waiting), count)),
                ("tokens", config.max_waiting_tokens, (self._waiting_tokens, tokens)),
            )
            if limit is not None and sum(numbers) > limit
        ]
        if over and self._waiting:
            seconds = self._waiting_tokens / self._tokens_per_second if self._tokens_per_second else 0.0
            retry_after = min(max(seconds, RETRY_SECONDS[0]), RETRY_SECONDS[1])
            raise QueueFull(f"tokenstep.engine: the queue is full: {over[0]}", retry_after)

    def _run(self) -> None:
        """The thread."""
        while self._wait_for_work():
            self._follow_torch_threads()
            begin, before = time.monotonic(), self.engine.counters.computed_tokens
            try:
                outputs = self.engine.step()
            except BaseException as error:
                logger.exception("a step of the engine has failed")
                outputs = self._recover(error)
            self._deliver(outputs)
            self._measure(time.monotonic() - begin, self.engine.counters.computed_tokens - before)
        if self._state == "stopped":
            self._fail_all("stopped", "the engine has been stopped")

    def _recover(self, error: BaseException) -> list[Output]:
        try:
            return self.engine.recover(error)
        except BaseException:
            logger.exception("the engine can't go on")
            self._state = "stopped"
            return []

    def _wait_for_work(self) -> bool:
        """Takes in what has come; returns whether to go on."""
        with self._changed:
            while self._state != "stopped":
                self._take_in()
                if self.engine.has_work:
                    self._busy_since = time.monotonic()
                    return True
                self._busy_since = None
                if self._state == "draining" or not self._changed.wait(IDLE_SECONDS):
                    if self._inbox:
                        continue
                    break
            self._busy_since = None
            self._thread = None
            return False

    def _take_in(self) -> None:
        while self._inbox:
            self.engine.add(self._inbox.popleft())
        while self._cancelled:
            request, choice = self._cancelled.popleft()
            self.engine.cancel(request, choice)
            if choice is None and self._open.pop(request, None) is not None:
                self._forget_waiting(request)
                self.observer.cancelled()
        if not self._open:
            self._changed.notify_all()

    def _deliver(self, outputs: list[Output]) -> None:
        now = time.monotonic()
        parcels: dict[_Submission, list[Output]] = {}
        with self._changed:
            for output in outputs:
                if submission := self._open.get(output.request):
                    parcels.setdefault(submission, []).append(output)
            for submission, parcel in parcels.items():
                done = {output.request for output in parcel if output.request not in self.engine}
                submission.num_open -= len(done)
                for request in done:
                    del self._open[request]
            while self._waiting:  # they begin in the order of arrival
                request = next(iter(self._waiting))
                if self.engine.is_waiting(request) or request in self._inbox:
                    break
                self._forget_waiting(request)
            self._stats = self.engine.stats()
            if not self._open:
                self._changed.notify_all()
        for submission, parcel in parcels.items():
            self._observe(submission, parcel, now)
            self._hand_over(submission, parcel)

    def _hand_over(self, submission: _Submission, outputs: list[Output]) -> None:
        try:
            submission.deliver(outputs)
        except Exception:
            logger.exception("a request is dropped: its outputs can't be delivered")
            for request in {output.request for output in outputs}:
                self.cancel(request)

    def _observe(self, submission: _Submission, outputs: list[Output], now: float) -> None:
        last = submission.last_token
        for output in outputs:
            if isinstance(output, FailureOutput):
                self.observer.failed(output.kind)
            if not isinstance(output, TokenOutput):
                continue
            key = output.request, output.choice
            if key in last:
                self.observer.next_token(now - last[key])
            elif not last:
                self.observer.first_token(now - submission.submitted)
            last[key] = now
        if not submission.num_open and not any(isinstance(output, FailureOutput) for output in outputs):
            self.observer.finished(now - submission.submitted)

    def _forget_waiting(self, request: Request) -> None:
        self._waiting_tokens -= self._waiting.pop(request, 0)

    def _measure(self, seconds: float, tokens: int) -> None:
        if seconds and tokens:
            newest = tokens / seconds
            speed = self._tokens_per_second or newest
            self._tokens_per_second = speed + SMOOTHING * (newest - speed)

    def _follow_torch_threads(self) -> None:
        """Computes on as many threads as torch did where the last request was submitted."""
        if torch.get_num_threads() != self._torch_threads:
            torch.set_num_threads(self._torch_threads)

    def _fail_all(self, kind: FailureKind, message: str) -> None:
        """Drops all requests, and says so."""
        with self._changed:
            submissions = dict(self._open)
            for holder in (self._open, self._waiting, self._inbox, self._cancelled):
                holder.clear()
            self._waiting_tokens = 0
            if self.engine.has_work:
                self.engine.reset()
            self._stats = self.engine.stats()
            self._changed.notify_all()
        for request, submission in submissions.items():
            self.observer.failed(kind)
            self._hand_over(submission, [FailureOutput(request, kind, message)])

    def _start_anew_in_child(self) -> None:
        """After a fork, in the child: the thread is gone, and a lock may be held for ever."""
        self._changed = threading.Condition()
        self._thread = None
        self._busy_since = None
        self._fail_all("forked", "the process has been forked: this request goes on in the parent alone")


def _stop_all() -> None:
    """At exit: a daemon thread must not be inside torch, or free a model, when the interpreter goes."""
    for loop in list(_loops):
        loop.abort()
    for thread in list(_threads):
        thread.join(EXIT_SECONDS)


def _after_fork_in_child() -> None:
    for loop in list(_loops):
        loop._start_anew_in_child()


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
