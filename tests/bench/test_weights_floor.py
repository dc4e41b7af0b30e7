"""The floor of a decode step: one read of the model's weights."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from tokenstep import get_num_threads
from tokenstep.bench.weights_floor import read_seconds, weight_bytes


def test_the_weights_are_a_file_or_all_safetensors_of_a_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(bytes(1000))
    assert weight_bytes(tmp_path / "model.gguf") == 1000
    for part in (1, 2):
        (tmp_path / f"model-{part}.safetensors").write_bytes(bytes(300))
    assert weight_bytes(tmp_path) == 600


def test_reading_takes_time_and_leaves_the_number_of_threads_as_it_was():
    threads = get_num_threads()
    assert 0 < read_seconds(1 << 20, 1) < 1
    assert get_num_threads() == threads
