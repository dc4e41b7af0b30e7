"""parallel_for (csrc/cpu/parallel.h): each task runs once, whoever calls, under both backends."""

import os
import subprocess
import sys
import threading

import pytest

from tokenstep import _native

cpu = _native.cpu


@pytest.fixture(params=["pool", "openmp"])
def backend(request):
    if request.param == "openmp":
        pytest.importorskip("torch")  # brings the runtime
    before = cpu.num_threads()
    cpu.set_thread_backend("auto")
    if request.param == "openmp" and cpu.thread_backend() != "openmp":
        pytest.skip("no OpenMP runtime in this process")
    cpu.set_thread_backend(request.param)
    yield request.param
    cpu.set_thread_backend("auto")
    cpu.set_num_threads(before)


def test_the_backend_in_use_is_reported(backend):
    assert cpu.thread_backend() == backend


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 1000])
def test_every_task_runs_exactly_once(backend, threads, tasks):
    cpu.set_num_threads(threads)
    for _ in range(20):
        assert cpu.testing.parallel_count(tasks) == tasks


def test_many_short_regions_in_a_row_lose_no_task(backend):
    cpu.set_num_threads(2)
    assert all(cpu.testing.parallel_count(3) == 3 for _ in range(5000))


def test_several_python_threads_at_once_each_get_their_tasks_run_once(backend):
    cpu.set_num_threads(2)
    wrong = []

    def work():
        wrong.extend(n for n in (cpu.testing.parallel_count(64) for _ in range(300)) if n != 64)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert not any(t.is_alive() for t in threads)
    assert wrong == []


def test_the_number_of_threads_may_change_between_regions(backend):
    for threads in [1, 4, 2, 8, 1, 3] * 20:
        cpu.set_num_threads(threads)
        assert cpu.testing.parallel_count(50) == 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_can_use_its_own_pool():
    # In a process of its own: an OpenMP runtime does not survive a fork, and pytest has threads.
    script = """
import os, signal
from tokenstep import _native
cpu = _native.cpu
cpu.set_thread_backend("pool")
cpu.set_num_threads(4)
assert cpu.testing.parallel_count(100) == 100
child = os.fork()
if child == 0:
    signal.alarm(5)
    os._exit(0 if all(cpu.testing.parallel_count(100) == 100 for _ in range(50)) else 1)
_, status = os.waitpid(child, 0)
assert cpu.testing.parallel_count(100) == 100
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    run_in_a_process(script)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_under_openmp_can_use_its_threads():
    pytest.importorskip("torch")
    script = """
import os, signal
import torch
from tokenstep import _native
cpu = _native.cpu
cpu.set_num_threads(2)
assert cpu.testing.parallel_count(100) == 100
child = os.fork()
if child == 0:
    signal.alarm(5)
    os._exit(0 if all(cpu.testing.parallel_count(100) == 100 for _ in range(50)) else 1)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    run_in_a_process(script)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
def test_few_tasks_do_not_end_the_threads_that_torch_uses_next():
    pytest.importorskip("torch")
    script = """
import os
import torch
from tokenstep import _native
cpu = _native.cpu
torch.set_num_threads(4)
numbers = torch.randn(200_000)
torch.exp(numbers)
cpu.testing.parallel_count(2)
threads = set(os.listdir("/proc/self/task"))
for _ in range(20):
    cpu.testing.parallel_count(2)
    torch.exp(numbers)
    assert set(os.listdir("/proc/self/task")) == threads
"""
    run_in_a_process(script)


def test_beside_torch_the_number_of_threads_is_torchs_unless_it_was_set():
    pytest.importorskip("torch")
    script = """
import tokenstep as ts
import torch
for count in (3, 1, 2):
    torch.set_num_threads(count)
    assert ts.get_num_threads() == count, (ts.get_num_threads(), count)
ts.set_num_threads(5)
torch.set_num_threads(3)
assert ts.get_num_threads() == 5
"""
    run_in_a_process(script, TOKENSTEP_NUM_THREADS="", OMP_NUM_THREADS="")
    script = "import torch, tokenstep as ts; torch.set_num_threads(3); assert ts.get_num_threads() == 2"
    run_in_a_process(script, TOKENSTEP_NUM_THREADS="2")


def run_in_a_process(script, **environment):
    path = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TOKENSTEP_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"TOKENSTEP_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, 5),
        ({"TOKENSTEP_NUM_THREADS": "none", "OMP_NUM_THREADS": ""}, None),
    ],
)
def test_the_environment_sets_the_number_of_threads(environment, expected):
    script = "from tokenstep import _native; print(_native.cpu.num_threads())"
    want = len(os.sched_getaffinity(0)) if expected is None else expected
    assert int(run_in_a_process(script, **environment)) == want


@pytest.mark.parametrize("n", [0, -1])
def test_less_than_one_thread_is_refused(n):
    with pytest.raises(ValueError, match=f"n = {n}, expected n >= 1"):
        cpu.set_num_threads(n)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="name = 'tbb', expected 'auto', 'pool' or 'openmp'"):
        cpu.set_thread_backend("tbb")


def test_the_instruction_set_can_be_chosen_and_chosen_again():
    before = cpu.isa()
    cpu.set_isa("portable")
    assert cpu.isa() == "portable"
    cpu.set_isa("")
    assert cpu.isa() == before or os.environ.get("TOKENSTEP_ISA")
