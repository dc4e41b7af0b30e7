"""The device that the sampler's kernels are tested on: the emulator, and with ``-m cuda`` a GPU."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # sample_cases

from sample_device import Emulator, Gpu


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Where ``sample``, ``apply_logits`` and ``Sampler`` run; the process is left as it was found."""
    chosen = Emulator() if request.param == "simt" else Gpu()
    yield chosen
    chosen.close()
