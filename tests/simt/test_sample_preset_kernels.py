"""semantics= on the device: the CPU's bits for every preset, any kind of row and any number of blocks."""

import numpy as np
import pytest
from sample_cases import DTYPES, PRESETS, ROW_KINDS, array_of, assert_same, random_case, row_of, same_floats
from sample_device import GEOMETRIES, apply_logits, editing, sample
from test_sampler_on_device import Twins, random_logits

from tokenstep import sampling as ts

every_preset = pytest.mark.parametrize("semantics", PRESETS)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g[0]}{g[1]}")


def check_case(device, case):
    want = ts.sample(case.logits, check=False, **case.arguments)
    assert_same(sample(device, case.logits, case.arguments), want, f"{case.logits.shape},")
    processed = np.asarray(ts.apply_logits(case.logits, check=False, **editing(case.arguments)))
    assert same_floats(apply_logits(device, case.logits, case.arguments), processed).all()


@every_preset
@pytest.mark.parametrize("geometry", [("solo", 1), ("cluster", 3), ("soft", 2)], ids=lambda g: g[0])
def test_rows_of_every_kind_equal_the_cpu(device, geometry, semantics):
    pytest.importorskip("torch")
    for i, vocab_size in enumerate((7, 33, 257, 1000)):
        device.use(geometry, seed=i)
        rng = np.random.default_rng([70, i, PRESETS.index(semantics)])
        check_case(device, random_case(rng, DTYPES[i % 3], vocab_size, 4, semantics=semantics))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@every_preset
@every_geometry
def test_thousands_of_rows_equal_the_cpu(device, geometry, semantics, dtype):
    pytest.importorskip("torch")
    for i in range(40):
        device.use(geometry, seed=i)
        rng = np.random.default_rng([71, i, PRESETS.index(semantics)])
        vocab_size = int(rng.choice([1, 31, 257, 1000, 2050, 4099, 8192]))
        check_case(device, random_case(rng, dtype, vocab_size, 4, semantics=semantics))


@pytest.mark.slow
@every_preset
@every_geometry
def test_rows_of_real_vocabularies_equal_the_cpu(device, geometry, semantics):
    pytest.importorskip("torch")
    device.use(geometry)
    check_case(device, random_case(np.random.default_rng(72), "float32", 128256, 2, semantics=semantics))


WAYS = {
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 50, "temperature": 1.3},
    "large top_k": {"top_k": 1500, "temperature": 0.6},
    "top_p": {"top_p": 0.9, "temperature": 0.7},
    "wide top_p": {"top_p": 0.9999, "temperature": 2.0},
    "wide top_p and min_p": {"top_p": 0.9999, "min_p": 1e-4, "temperature": 1.7},
    "low min_p": {"min_p": 1e-6, "temperature": 1.7},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.03, "temperature": 0.7},
}


@every_preset
@pytest.mark.parametrize("way", WAYS)
def test_each_way_through_the_kernel_equals_the_cpu_for_each_kind_of_row(device, way, semantics):
    rng = np.random.default_rng([73, list(WAYS).index(way)])
    logits, _ = array_of(np.stack([row_of(rng, kind, 3000) for kind in ROW_KINDS]), "float32")
    arguments = {
        **WAYS[way],
        "seed": list(range(len(logits))),
        "logprobs": 3,
        "logprobs_mode": "processed",
        "semantics": semantics,
    }
    device.use(("cluster", 2))
    assert_same(sample(device, logits, arguments), ts.sample(logits, check=False, **arguments))


@every_preset
def test_a_sampler_equals_the_cpu_s_through_admissions_steps_and_releases(device, semantics):
    device.use(("solo", 1))
    rng = np.random.default_rng([74, PRESETS.index(semantics)])
    twins, admitted = Twins(device, semantics=semantics), set()
    for _ in range(50):
        if rng.random() < 0.2 or not admitted:
            row = int(rng.integers(twins.max_rows))
            twins.admit_random(rng, row, semantics)
            admitted.add(row)
        elif rng.random() < 0.1:
            twins.release(admitted.pop())
        else:
            rows = sorted(admitted)
            twins.check_step(random_logits(rng, len(rows)), rows, logprobs_mode="processed")
