"""How many threads one op may use on the CPU."""

from tokenstep import _native

__all__ = ["get_num_threads", "set_num_threads"]


def get_num_threads() -> int:
    """The number of threads that one op may use on the CPU; results do not depend on it.

    At first the environment's ``TOKENSTEP_NUM_THREADS`` or ``OMP_NUM_THREADS``, else the number of CPUs that
    this process may run on.
    """
    count: int = _native.cpu.num_threads()
    return count


def set_num_threads(n: int) -> None:
    """Sets the number of threads that one op may use on the CPU, for the whole process.

    Raises:
        ValueError: n < 1.
    """
    _native.cpu.set_num_threads(n)
