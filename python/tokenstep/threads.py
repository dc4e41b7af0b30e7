"""How many threads one op may use on the CPU, and what idle ones do."""

import os

from tokenstep import _native

SPIN_COUNT = "3000"  # some 100 µs, more than passes from one operation of a decode step to the next

__all__ = ["get_num_threads", "set_num_threads"]


def get_num_threads() -> int:
    """The number of threads that one op may use on the CPU; results do not depend on it.

    What was set; else the environment's ``TOKENSTEP_NUM_THREADS`` or ``OMP_NUM_THREADS``; else, with torch in
    the process, torch's number; else the number of CPUs that this process may run on.
    """
    count: int = _native.cpu.num_threads()
    return count


def set_num_threads(n: int) -> None:
    """Sets the number of threads that one op may use on the CPU, for the whole process.

    Raises:
        ValueError: n < 1.
    """
    _native.cpu.set_num_threads(n)


def let_idle_threads_sleep() -> None:
    """Has the workers of GNU's OpenMP runtime, torch's, sleep soon after each parallel region.

    By default they spin for milliseconds. Where other programs want the same cores, each of the hundreds of
    regions of a decode step then waits until the system takes a core from one that spins. A process calls
    this before torch is imported; later it does nothing. What the environment says already stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
