"""Every family against transformers, from folders and from GGUF files, in all the ways the engine runs it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from decoding import in_pieces
from tiny_models import CASES, EMBEDDING_ROWS, build, save_folder, write_gguf

from tokenstep.models import LoadedModel, load

TOLERANCE = 1e-4
LENGTHS = (61, 1, 40, 17)
NOT_IN_GGUF = {
    "llama-yarn-mscale",  # no keys for mscale and truncate
    "qwen2-window",  # one window for all layers
    "gemma2-scalar",  # no key for layer_types and query_pre_attn_scalar
}


@cache
def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(EMBEDDING_ROWS, (length,), generator=generator).tolist() for length in LENGTHS]


@cache
def expected(name: str) -> list[torch.Tensor]:
    """transformers' logits, each sequence alone in one pass."""
    with torch.inference_mode():
        return [build(name)(torch.tensor([tokens])).logits[0] for tokens in sequences()]


def assert_same_logits(loaded: LoadedModel, name: str, size: int | None) -> None:
    for ours, theirs in zip(in_pieces(loaded.model, sequences(), size), expected(name), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=CASES, scope="module")
def from_folder(request: pytest.FixtureRequest, folders: Path) -> tuple[str, LoadedModel]:
    folder = save_folder(build(request.param), folders / request.param)
    return request.param, load(folder, dtype="float32")


@pytest.fixture(params=sorted(set(CASES) - NOT_IN_GGUF), scope="module")
def from_gguf(request: pytest.FixtureRequest, folders: Path) -> tuple[str, LoadedModel]:
    path = write_gguf(build(request.param), folders / f"{request.param}.gguf")
    return request.param, load(path, dtype="float32")


@pytest.mark.parametrize("size", [61, 1, None], ids=["prefill", "steps", "chunks"])
def test_a_folder_gives_the_logits_of_transformers(
    from_folder: tuple[str, LoadedModel], size: int | None
) -> None:
    name, loaded = from_folder
    assert_same_logits(loaded, name, size)


@pytest.mark.parametrize("size", [61, 1, None], ids=["prefill", "steps", "chunks"])
def test_a_gguf_file_gives_the_logits_of_transformers(
    from_gguf: tuple[str, LoadedModel], size: int | None
) -> None:
    name, loaded = from_gguf
    assert_same_logits(loaded, name, size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama-yarn", "qwen2", "qwen3", "gemma2"])
def test_narrow_dtypes_stay_as_near_to_float32_as_in_transformers(
    tmp_path: Path, name: str, dtype: str
) -> None:
    narrow = copy.deepcopy(build(name)).to(getattr(torch, dtype))
    ours = in_pieces(load(save_folder(build(name), tmp_path / name), dtype=dtype).model, sequences(), 61)
    with torch.inference_mode():
        theirs = [narrow(torch.tensor([tokens])).logits[0] for tokens in sequences()]

    def error(logits: list[torch.Tensor]) -> float:
        exact = torch.cat(expected(name))
        return (torch.cat(logits).float() - exact).square().mean().sqrt().item()

    assert ours[0].dtype == getattr(torch, dtype)
    assert error(ours) <= error(theirs)


def test_the_cases_exercise_what_they_are_named_for() -> None:
    """Logits must move by far more than the tolerance when the feature is taken away."""
    changes = {
        "llama-linear": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "llama-llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "llama-yarn": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "mistral-window": {"sliding_window": None},
        "qwen2-window": {"max_window_layers": 0},
        "gemma2": {"attn_logit_softcapping": None},
        "gemma2-scalar": {"query_pre_attn_scalar": 16},
        "gemma2-46-layers": {"query_pre_attn_scalar": 24},
    }
    for name, change in changes.items():
        model = build(name)
        other = type(model)(
            type(model.config)(**{**model.config.to_diff_dict(), "layer_types": None, **change})
        )
        other.config._attn_implementation = "eager"
        other.load_state_dict(model.state_dict())
        with torch.inference_mode():
            moved = other.eval()(torch.tensor([sequences()[0]])).logits[0] - expected(name)[0]
        assert moved.abs().max() > 100 * TOLERANCE, name
