"""Arrays of any strides on the emulator or a GPU: an op runs there, and what it wrote is read back."""

from dataclasses import replace

import numpy as np
from attention_cases import torch

import tokenstep as ts

WRITTEN = ("k_cache", "v_cache", "q", "status")  # by append_kv


def moved(device, value):
    """An argument in the device's memory, strides and all; the emulator's is the host's."""
    if isinstance(value, ts.Rope):
        return replace(value, cos=moved(device, value.cos), sin=moved(device, value.sin))
    if device.name == "simt" or not isinstance(value, np.ndarray | torch.Tensor):
        return value
    value = torch.as_tensor(value)
    base = value if value._base is None else value._base
    storage = base.new_empty(0).set_(base.untyped_storage())
    return storage.cuda().as_strided(value.shape, value.stride(), value.storage_offset())


def append_on(device):
    """``append_kv`` on the device, for host arrays: caches, q and status are written."""

    def append(*arrays, **options):
        names = ("k", "v", "k_cache", "v_cache", "block_table", "seq_lens")
        given = dict(zip(names, arrays, strict=True)) | options
        there = {n: moved(device, a) for n, a in given.items()}
        with device.active():
            ts.append_kv(**there)
        for name in WRITTEN:
            if device.name != "simt" and given.get(name) is not None:
                torch.as_tensor(given[name]).copy_(there[name])

    return append
