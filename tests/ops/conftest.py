"""Every test leaves the process with the instruction set, threads and backend that it found."""

import pytest

from tokenstep import _native


@pytest.fixture(autouse=True)
def same_process_settings_afterwards():
    isa, threads = _native.cpu.isa(), _native.cpu.num_threads()
    yield
    _native.cpu.set_isa(isa)
    _native.cpu.set_num_threads(threads)
    _native.cpu.set_thread_backend("auto")
