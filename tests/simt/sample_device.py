"""One interface to the emulator and to a GPU, for tests that hold the kernels to the CPU's results."""

import importlib
from contextlib import contextmanager

import numpy as np
import pytest

from tokenstep import _native
from tokenstep import sampling as ts

# What rows are taken by: kind of group, blocks in it. Results depend on none of it.
GEOMETRIES = (("solo", 1), ("cluster", 2), ("cluster", 8), ("soft", 3))
DRAW_ARGUMENTS = ("seed", "position", "substream", "logprobs", "logprobs_mode")


def editing(arguments):
    """The arguments of a case that apply_logits takes for their effect."""
    return {k: v for k, v in arguments.items() if k not in DRAW_ARGUMENTS}


def as_numpy(array):
    """An output as a NumPy array."""
    return None if array is None else np.asarray(array.cpu() if hasattr(array, "cpu") else array)


class Emulator:
    """The CUDA kernels on the CPU. Its arrays are the host's, but stand for memory of the device."""

    name = "simt"
    max_threads = 128  # of a block; fewer are emulated faster

    def __init__(self):
        try:
            self.module = importlib.import_module("tokenstep._C_simt")
        except ImportError:
            pytest.skip("built without the emulator (TOKENSTEP_SIMT)")

    def close(self):
        """Leaves other geometries to other tests."""
        self.module.testing.force_sample_geometry("auto")

    @contextmanager
    def active(self):
        """Within it, tokenstep's functions run in the emulator."""
        cpu, _native.cpu = _native.cpu, self.module
        try:
            yield
        finally:
            _native.cpu = cpu

    def use(self, geometry, threads=None, seed=0):
        """Rows are taken by groups of this kind and size, and threads run in another order."""
        mode, size = geometry
        self.module.testing.force_sample_geometry(mode, size, threads or self.max_threads)
        self.module.testing.set_seed(seed)

    def array(self, host):
        """A copy of an array in the device's memory."""
        return host if host is None or not isinstance(host, np.ndarray) else host.copy()

    def sampler(self, max_rows, vocab_size, semantics="tokenstep"):
        """A Sampler of the device."""
        with self.active():
            return ts.Sampler(max_rows, vocab_size, semantics=semantics)


class Gpu:
    """A real device, by torch tensors."""

    name = "cuda"
    max_threads = 512

    def __init__(self):
        if (reason := _native.cuda_unusable_because()) is not None:
            pytest.skip(reason)
        self.module = _native.cuda

    def close(self):
        """Leaves other geometries to other tests."""
        self.module.testing.force_sample_geometry("auto")

    @contextmanager
    def active(self):
        """Nothing to do: the tensors say where they are."""
        yield

    def use(self, geometry, threads=None, seed=0):
        """Rows are taken by groups of this kind and size, if this GPU has such groups."""
        import torch

        mode, size = geometry
        if mode == ("soft" if torch.cuda.get_device_capability()[0] >= 9 else "cluster"):
            pytest.skip(f"this GPU does not use {mode} groups")
        self.module.testing.force_sample_geometry(mode, size)

    def array(self, host):
        """A copy of an array in the device's memory."""
        import torch

        return None if host is None else torch.as_tensor(host).cuda()

    def sampler(self, max_rows, vocab_size, semantics="tokenstep"):
        """A Sampler of the device."""
        return ts.Sampler(max_rows, vocab_size, "cuda", semantics=semantics)


def on_device(device, arguments):
    """Arguments with the bitmask where the logits are."""
    return {k: device.array(v) if k == "token_bitmask" else v for k, v in arguments.items()}


def sample(device, logits, arguments):
    """The outputs of sample() on the device, as NumPy arrays."""
    with device.active():
        out = ts.sample(device.array(logits), check=False, **on_device(device, arguments))
    return [as_numpy(a) for a in out]


def apply_logits(device, logits, arguments, out=None):
    """The result of apply_logits() on the device, as a NumPy array."""
    with device.active():
        result = ts.apply_logits(
            device.array(logits), check=False, out=out, **on_device(device, editing(arguments))
        )
    return as_numpy(result)
