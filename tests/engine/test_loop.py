"""The engine in its own thread: many submitters, bounded queues, failures, shutdown."""

from __future__ import annotations

import gc
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable

import pytest
from history_model import Generated, HistoryModel, alone, choices, hash_tokens

from tokenstep.engine import (
    Engine,
    EngineLoop,
    EngineStopped,
    FailureKind,
    Observer,
    Output,
    QueueFull,
    Request,
)
from tokenstep.engine import loop as loop_module
from tokenstep.sampling import SamplingParams

MakeEngine = Callable[..., Engine]
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11)


def request(prompt: Iterable[int] = (1, 2, 3), count: int = 1, max_tokens: int = 8) -> Request:
    return Request(prompt=list(prompt), choices=choices(count, SAMPLED), max_tokens=max_tokens)


class Client:
    """Submits requests and collects what comes."""

    def __init__(self, loop: EngineLoop, *requests: Request) -> None:
        self.found = {wanted: Generated() for wanted in requests}
        self.outputs: queue.SimpleQueue[list[Output]] = queue.SimpleQueue()
        loop.submit(requests, self.outputs.put)

    def collect(self) -> list[Generated]:
        deadline = time.monotonic() + 20
        while not all(self.is_done(wanted) for wanted in self.found):
            for output in self.outputs.get(timeout=max(0.01, deadline - time.monotonic())):
                self.found[output.request].take(output)
        assert self.outputs.empty()
        return list(self.found.values())

    def is_done(self, wanted: Request) -> bool:
        generated = self.found[wanted]
        if not wanted.max_tokens:
            return generated.prompt_logprobs is not None
        return generated.failure is not None or len(generated.finish) == len(wanted.choices)


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def is_idle(loop: EngineLoop) -> bool:
    engine = loop.engine
    return soon(lambda: not engine.has_work and engine.blocks.num_free == engine.blocks.num_blocks)


@pytest.fixture
def held(model: HistoryModel) -> Iterable[threading.Event]:
    """The model waits for this after its first pass."""
    model.gate = threading.Event()
    yield model.gate
    model.gate.set()


def test_requests_of_many_threads_get_their_own_tokens(make_engine: MakeEngine) -> None:
    loop = EngineLoop(make_engine())
    wrong: list[Request] = []

    def work(first: int) -> None:
        for second in range(5):
            wanted = request([first, second], count=1 + second % 3)
            (generated,) = Client(loop, wanted).collect()
            if any(generated.tokens[i] != alone(wanted, i) for i in range(len(wanted.choices))):
                wrong.append(wanted)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert is_idle(loop)


def test_all_requests_of_a_submission_come_to_one_place(make_engine: MakeEngine) -> None:
    wanted = [request([i]) for i in range(5)] + [request([9], max_tokens=0)]
    found = Client(EngineLoop(make_engine()), *wanted).collect()
    assert [generated.tokens.get(0, []) for generated in found[:5]] == [alone(r, 0) for r in wanted[:5]]
    assert found[5].tokens == {}


@pytest.mark.parametrize(("limit", "what"), [("max_waiting", "requests"), ("max_waiting_tokens", "tokens")])
def test_more_than_may_wait_is_refused_whole_with_a_time_to_come_back(
    make_engine: MakeEngine, held: threading.Event, limit: str, what: str
) -> None:
    each = 1 if limit == "max_waiting" else 11
    loop = EngineLoop(make_engine(max_batch=1, **{limit: 3 * each}))
    clients = [Client(loop, request([0]))]
    assert soon(lambda: loop.stats().waiting == 0)  # it has begun
    clients += [Client(loop, request([1, 2, 3])), Client(loop, request([2, 2, 3]))]
    with pytest.raises(QueueFull, match=f"{4 * each} {what}, at most {3 * each} may wait") as caught:
        loop.submit([request([3, 2, 3]), request([4, 2, 3])], lambda outputs: None)
    assert 1 <= caught.value.retry_after <= 60
    loop.check_room()
    clients.append(Client(loop, request([5, 2, 3])))
    assert loop.stats().waiting == 3
    with pytest.raises(QueueFull):
        loop.check_room()
    held.set()
    for client in clients:
        (wanted,) = client.found
        assert client.collect()[0].tokens[0] == alone(wanted, 0)
    assert loop.stats().waiting == loop.stats().waiting_tokens == 0


def test_whoever_finds_the_queue_empty_is_let_in_however_large(make_engine: MakeEngine) -> None:
    loop = EngineLoop(make_engine(max_waiting=1, max_waiting_tokens=1))
    assert len(Client(loop, *[request([i]) for i in range(10)]).collect()) == 10


def test_cancelling_frees_blocks_whether_it_runs_or_waits(
    make_engine: MakeEngine, held: threading.Event
) -> None:
    loop = EngineLoop(make_engine(max_batch=2))
    running, waiting, kept = request([1], 2, 40), request([2], 2, 40), request([3])
    Client(loop, running)
    assert soon(lambda: loop.stats().waiting == 0)
    Client(loop, waiting)
    client = Client(loop, kept)
    loop.cancel(running)
    loop.cancel(waiting)
    held.set()
    assert client.collect()[0].tokens[0] == alone(kept, 0)
    assert loop.stats().counters.generated_tokens <= 2 + 2 + 8  # of the step that ran, and the kept one's
    assert is_idle(loop)


def test_a_request_cancelled_before_its_turn_is_never_computed(
    make_engine: MakeEngine, model: HistoryModel, held: threading.Event
) -> None:
    loop = EngineLoop(make_engine())
    first = Client(loop, request([1, 2]))
    assert soon(lambda: loop.stats().waiting == 0)
    wanted = request([7] * 9)
    loop.submit([wanted], lambda outputs: None)
    loop.cancel(wanted)
    assert loop.stats().waiting == 1
    held.set()
    first.collect()
    assert is_idle(loop)
    assert model.prompt_tokens == 2
    assert loop.stats().waiting == loop.stats().waiting_tokens == 0


def test_a_receiver_that_raises_loses_its_own_request_alone(make_engine: MakeEngine) -> None:
    loop = EngineLoop(make_engine())

    def refuse(outputs: list[Output]) -> None:
        raise RuntimeError("the client has gone")

    loop.submit([request([1], 3, 50)], refuse)
    kept = request([2])
    assert Client(loop, kept).collect()[0].tokens[0] == alone(kept, 0)
    assert is_idle(loop)


def test_failures_are_counted_by_kind_and_reach_the_observer(
    make_engine: MakeEngine, model: HistoryModel
) -> None:
    class Notes(Observer):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def first_token(self, seconds: float) -> None:
            assert 0 < seconds < 20
            self.seen.append("first")

        def next_token(self, seconds: float) -> None:
            self.seen.append("next")

        def finished(self, seconds: float) -> None:
            self.seen.append("finished")

        def failed(self, kind: FailureKind) -> None:
            self.seen.append(kind)

        def cancelled(self) -> None:
            self.seen.append("cancelled")

    loop = EngineLoop(make_engine())
    loop.observer = notes = Notes()
    Client(loop, request([1], 2, 3)).collect()
    assert sorted(notes.seen) == ["finished", "first", *["next"] * 4]
    notes.seen.clear()
    model.poisoned.add(hash_tokens([4, 5]))
    Client(loop, request([4, 5])).collect()
    assert notes.seen == ["bad_logits"]
    assert loop.stats().counters.failures == {"bad_logits": 1}
    dropped = request([6], 1, 80)
    loop.submit([dropped], lambda outputs: None)
    loop.cancel(dropped)
    assert soon(lambda: notes.seen[-1] == "cancelled")


class TestHealth:
    def test_it_is_healthy_while_idle_and_while_steps_end(self, make_engine: MakeEngine) -> None:
        loop = EngineLoop(make_engine())
        assert loop.is_healthy()
        Client(loop, request()).collect()
        assert soon(lambda: loop.seconds_without_progress() == 0)
        assert loop.is_healthy()

    def test_a_step_that_hangs_shows(
        self, make_engine: MakeEngine, held: threading.Event, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loop_module, "STALLED_SECONDS", 0.05)
        loop = EngineLoop(make_engine())
        client = Client(loop, request())
        assert soon(lambda: not loop.is_healthy())
        held.set()
        client.collect()
        assert soon(loop.is_healthy)


class TestShutdown:
    def test_draining_finishes_what_is_there_and_takes_no_more(
        self, make_engine: MakeEngine, held: threading.Event
    ) -> None:
        loop = EngineLoop(make_engine())
        wanted = request([1, 2], 2)
        client = Client(loop, wanted)
        loop.close()
        with pytest.raises(EngineStopped):
            Client(loop, request())
        held.set()
        assert loop.drain(timeout=20)
        assert loop.state == "stopped"
        assert not loop.is_healthy()
        assert client.collect()[0].tokens[1] == alone(wanted, 1)

    @pytest.mark.parametrize("how", ["drain", "abort"])
    def test_what_does_not_finish_in_time_fails_and_frees_its_blocks(
        self, make_engine: MakeEngine, held: threading.Event, how: str
    ) -> None:
        loop = EngineLoop(make_engine(max_batch=1))
        clients = [Client(loop, request([i], max_tokens=60)) for i in range(3)]
        threading.Timer(0.1, held.set).start()
        if how == "drain":
            assert not loop.drain(timeout=0.01)
        else:
            loop.abort()
        for client in clients:
            assert client.collect()[0].failure == ("stopped", "the engine has been stopped")
        assert is_idle(loop)

    def test_an_idle_engine_stops_at_once(self, make_engine: MakeEngine) -> None:
        loop = EngineLoop(make_engine())
        assert loop.drain(timeout=0)
        with pytest.raises(EngineStopped):
            Client(loop, request())

    def test_the_thread_ends_without_work_and_a_dropped_engine_is_collected(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loop_module, "IDLE_SECONDS", 0.01)
        loop = EngineLoop(make_engine())
        for _ in range(3):
            Client(loop, request()).collect()
            assert soon(lambda: loop._thread is None)
        engine = weakref.ref(loop.engine)
        loop = None  # type: ignore[assignment]
        assert soon(lambda: gc.collect() >= 0 and engine() is None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_in_a_forked_child_open_requests_fail_and_new_ones_run(
    make_engine: MakeEngine, held: threading.Event
) -> None:
    loop = EngineLoop(make_engine())
    wanted, new = request([1, 2]), request([3, 4])
    client = Client(loop, wanted)
    assert soon(lambda: loop.seconds_without_progress() > 0)
    child = os.fork()
    if child == 0:
        held.set()
        failed = client.collect()[0].failure
        tokens = Client(loop, new).collect()[0].tokens[0]
        os._exit(0 if failed and failed[0] == "forked" and tokens == alone(new, 0) else 1)
    _, status = os.waitpid(child, 0)
    held.set()
    assert os.waitstatus_to_exitcode(status) == 0
    assert client.collect()[0].tokens[0] == alone(wanted, 0)
