"""The fused chain keeps what transformers' processors keep, ties and extreme parameters included.

Theirs runs in float64, so that only a row whose cut falls within rounding of a boundary may differ; such rows
are left out, and must be few. Which of several equal values survive top-p's boundary is unspecified there (an
unstable sort), so the kept values are compared, and the kept ids where top-p is off.
"""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("transformers.generation.logits_process")

from tokenstep.integrations.transformers import FusedLogitsProcessor  # noqa: E402
from tokenstep.integrations.transformers.chain import Chain  # noqa: E402

ROWS = 48
DEFAULTS = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits(vocab_size, *, tied, seed):
    """Rows from flat to peaked; ``tied``: bfloat16 values, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(ROWS, 1, generator=generator) * 6 + 0.2
    x = torch.randn(ROWS, vocab_size, generator=generator) * scale
    return x.bfloat16().float() if tied else x


def histories(vocab_size):
    return torch.randint(0, vocab_size, (ROWS, 12), generator=torch.Generator().manual_seed(9))


def processed_by_theirs(x, seen, p):
    """Their chain in float64, and the rows that are clear of every boundary."""
    clear = np.ones(len(x), bool)
    x = theirs.RepetitionPenaltyLogitsProcessor(p["repetition_penalty"])(seen, x.clone())
    x = theirs.TemperatureLogitsWarper(p["temperature"])(seen, x)  # rounds as theirs: top-k compares these
    if p["top_k"]:
        x = theirs.TopKLogitsWarper(p["top_k"])(seen, x)
    x = x.double()
    if p["top_p"] < 1:
        top_p = float(np.float32(p["top_p"]))
        mass = x.softmax(-1).sort(descending=True).values.cumsum(-1).numpy()
        clear &= np.abs(mass - top_p).min(1) > 1e-8
        x = theirs.TopPLogitsWarper(top_p)(seen, x)
    if p["min_p"]:
        edge = x - x.amax(-1, keepdim=True) - np.log(np.float32(p["min_p"]))
        clear &= (p["min_p"] == 1) | (edge.abs().min(1).values > 1e-5).numpy()
        x = theirs.MinPLogitsWarper(float(np.float32(p["min_p"])))(seen, x)
    return x, clear


def assert_same(ours, expected, clear, *, ids_too):
    assert clear.mean() > 0.6, "too many rows are left out"
    ours, expected = ours[clear], expected[clear]
    a, b = (np.sort(rows.double().numpy(), 1) for rows in (ours, expected))
    assert np.array_equal(np.isfinite(a), np.isfinite(b)), "another number of tokens is kept"
    assert np.array_equal(a[np.isfinite(a)], b[np.isfinite(b)]), "another value"
    if ids_too:
        assert torch.equal(torch.isfinite(ours), torch.isfinite(expected))


CUTS = [
    dict(zip(("top_k", "top_p", "min_p"), cut, strict=True))
    for cut in itertools.product((0, 1, 5, 40), (1.0, 0.9, 0.3), (0.0, 0.05, 0.6))
]


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("vocab_size", [61, 1000, 20013])
def test_kept_sets_are_those_of_transformers(vocab_size, tied):
    for number, cut in enumerate(CUTS if vocab_size < 5000 else CUTS[4::9]):
        p = DEFAULTS | cut | {"repetition_penalty": (1.0, 1.3, 0.8)[number % 3]}
        p["temperature"] = (1.0, 0.7, 1.3)[number // 3 % 3]  # division makes ties and breaks them
        x, seen = logits(vocab_size, tied=tied, seed=number), histories(vocab_size)
        expected, clear = processed_by_theirs(x, seen, p)
        ours = Chain(**p).apply(x.clone(), seen)
        assert_same(ours, expected, clear, ids_too=not (tied and p["top_p"] < 1))


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_k": 10**6},
        {"top_k": 999},
        {"top_k": 1000},
        {"top_p": 0.0},
        {"top_p": 0.0, "min_p": 1.0},
        {"min_p": 1.0},
        {"top_k": 1, "top_p": 0.0, "min_p": 1.0},
        {"temperature": 1e-4, "top_k": 50, "top_p": 0.5},
        {"temperature": 1e-6, "top_k": 50, "min_p": 0.5},
        {"temperature": 1e4, "top_k": 50, "min_p": 0.5},
        {"temperature": 0.7, "repetition_penalty": 10.0, "top_k": 3, "min_p": 0.01},
    ],
    ids=str,
)
def test_extreme_parameters(extreme):
    p, seen = DEFAULTS | extreme, histories(1000)
    x = logits(1000, tied=False, seed=3)
    expected, clear = processed_by_theirs(x, seen, p)
    assert_same(Chain(**p).apply(x.clone(), seen), expected, clear, ids_too=True)


def test_every_token_tied_with_the_kth_is_kept():
    x = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    seen = torch.zeros(1, 0, dtype=torch.int64)
    assert torch.isfinite(Chain(top_k=2).apply(x.clone(), seen)).tolist() == [
        [False, True, True, True, True, False]
    ]


def test_top_p_takes_its_share_of_what_top_k_left_not_of_what_min_p_left():
    """Of 0.5, 0.3, 0.2 the first two make 0.8; were the last cut first, the first alone would make 0.625."""
    x = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    kept = Chain(top_p=0.6, min_p=0.5).apply(x, torch.zeros(1, 0, dtype=torch.int64))
    assert torch.isfinite(kept).tolist() == [[True, True, False]]


def test_the_processor_gives_what_the_five_of_transformers_give():
    p = {"repetition_penalty": 1.2, "temperature": 0.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02}
    x, seen = logits(1000, tied=True, seed=1), histories(1000)
    before = x.clone()
    expected, clear = processed_by_theirs(x, seen, p)
    assert_same(FusedLogitsProcessor(**p)(seen, x), expected, clear, ids_too=False)
    assert torch.equal(x, before), "the scores were changed in place"


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("ignore", [3, torch.arange(ROWS) % 11])
def test_the_penalty_leaves_ignored_ids_alone(ignore, top_k):
    x, seen = logits(200, tied=False, seed=2), histories(200)
    kind = theirs.RepetitionPenaltyLogitsProcessor
    if not isinstance(ignore, int) and transformers.__version__ < "5":
        pytest.skip("4.57 takes a number alone")
    expected = kind(2.0, prompt_ignore_length=ignore)(seen, x.clone())
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(seen, expected)
    ours = FusedLogitsProcessor(2.0, top_k=top_k, prompt_ignore_length=ignore)(seen, x)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        FusedLogitsProcessor(**{name: value})
