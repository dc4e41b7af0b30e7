from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tokenstep as ts


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The models are tiny: more threads only wait for each other."""
    before = torch.get_num_threads(), ts.get_num_threads()
    torch.set_num_threads(1)
    ts.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    ts.set_num_threads(before[1])
