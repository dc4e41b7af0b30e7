"""Paged attention on the emulator or a GPU, for tests that hold the kernel to the reference."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from attention_cases import Paged, paged, torch
from device_arrays import moved

import tokenstep as ts

# How a launch is divided: blocks, stages of a warp's ring, slots of partial results, blocks that run at once
# in the emulator. Results depend on none of it.
DIVISIONS = {
    "as chosen": {},
    "one block": {"grid": 1},
    "three blocks, one stage": {"grid": 3, "stages": 1, "together": 3},
    "seven blocks, two stages, few slots": {"grid": 7, "stages": 2, "slots": 9, "together": 4},
    "all at once": {"grid": 11, "slots": 11, "together": 11},
}


@contextmanager
def divided(device, grid=0, stages=0, slots=0, together=1, seed=0):
    """Within it, launches are divided like this, and the emulator runs threads in this order."""
    testing = device.module.testing
    testing.force_attention_geometry(grid, stages, slots)
    if device.name == "simt":
        testing.set_together(together)
        testing.set_seed(seed)
    try:
        yield
    finally:
        testing.force_attention_geometry()
        if device.name == "simt":
            testing.set_together(1)


@dataclass
class DevicePaged(Paged):
    """Sequences in pages of the device. `attend` gives host arrays; caches and status are read back."""

    device: object = None
    division: dict = field(default_factory=dict)

    def attend(self, **options):
        """The kernel's ``out`` and ``lse``; ``status`` and the caches are the host's again afterwards."""
        given = {**self.arguments, **options}
        there = {n: moved(self.device, a) for n, a in given.items()}
        with divided(self.device, **self.division), self.device.active():
            result = ts.paged_attention(**there, return_lse=True)
        if self.device.name != "simt":
            for name in ("k_cache", "v_cache", "status"):
                if name in given:
                    copy_back(there[name], given[name])
        return tuple(r.cpu() if isinstance(r, torch.Tensor) else r for r in result)


def copy_back(there, here):
    """The values of a device's tensor, into the host array that it was made from."""
    (torch.from_numpy(here) if isinstance(here, np.ndarray) else here).copy_(there)


def on_device(device, batch, **division):
    """A batch whose attention runs on the device."""
    return DevicePaged(batch.arguments, batch.exact, batch.counts, device, division)


def device_paged(device, sequences, dtype, division=None, **how):
    """``paged``, on the device."""
    return on_device(device, paged(sequences, dtype, **how), **(division or {}))
