"""Which matrices stay as they are stored, and that a model with them is the model of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding import in_pieces
from gguf import GGMLQuantizationType, quants
from tiny_models import build, quantized, write_gguf

from tokenstep import _native
from tokenstep.llm import fingerprint
from tokenstep.models import load
from tokenstep.models.layers import Linear
from tokenstep.models.memory import SLAB, HugePages
from tokenstep.models.packed_linear import PackedLinear, PackedWeight, embed, form_of

CPU = torch.device("cpu")
TOKENS = [torch.arange(40).tolist(), [7, 5]]


@pytest.fixture
def isa() -> Iterator[None]:
    yield
    _native.cpu.set_isa("")


@pytest.mark.parametrize(
    ("forms", "columns", "dtype", "device", "expected"),
    [
        ({"q4_1"}, 576, "bfloat16", "cpu", "q4_1"),
        ({"q4_0"}, 32, "float32", "cpu", "q4_0"),
        ({"q8_0"}, 64, "float16", "cpu", "q8_0"),
        ({"q8_0"}, 48, "float32", "cpu", None),
        ({"q8_0"}, 64, "float32", "cuda", None),
        ({"q8_0", "q4_0"}, 64, "float32", "cpu", None),
        ({"q8_0", None}, 64, "float32", "cpu", None),
        ({None}, 64, "float32", "cpu", None),
        ({None}, 64, "bfloat16", "cuda", None),
    ],
)
def test_a_matrix_stays_as_it_is_if_all_its_parts_are_of_one_form_and_fit_the_kernel(
    forms: set[str | None], columns: int, dtype: str, device: str, expected: str | None
) -> None:
    assert form_of(forms, columns, getattr(torch, dtype), torch.device(device)) == expected


@pytest.mark.parametrize(("isa_name", "expected"), [("avx512_bf16", "bfloat16"), ("avx2", None)])
def test_bfloat16_is_packed_where_the_kernel_has_a_dot_product(
    isa: None, isa_name: str, expected: str | None
) -> None:
    try:
        _native.cpu.set_isa(isa_name)
    except ValueError as error:
        pytest.skip(str(error))
    assert form_of({None}, 64, torch.bfloat16, CPU) == expected
    assert form_of({"q4_0", "q8_0"}, 64, torch.bfloat16, CPU) == expected
    assert form_of({None}, 48, torch.bfloat16, CPU) is None


def test_a_packed_projection_does_what_a_dense_one_does() -> None:
    numbers, bias = torch.randn(50, 64), torch.randn(50)
    packed = PackedWeight("q8_0", 50, 64, torch.float32, HugePages())
    packed.pack(quants.quantize(numbers.numpy(), GGMLQuantizationType.Q8_0))
    ours = PackedLinear(packed, bias)
    theirs = Linear(ours.weight, bias)
    x, residual = torch.randn(9, 64), torch.randn(9, 50)
    before = residual.clone()

    assert torch.allclose(ours.weight, numbers, atol=0.03)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours.added_to(residual, x), theirs.added_to(residual, x), atol=1e-5)
    assert torch.equal(residual, before)
    assert torch.equal(ours.as_batch_invariant()(x), ours(x))
    ids = torch.tensor([49, 0, 3])
    assert torch.equal(embed(ids, packed), embed(ids, ours.weight))


def mixed(name: str, values: np.ndarray) -> tuple[np.ndarray, GGMLQuantizationType | None]:
    """As files are that keep some tensors in more bits: all value projections, one down projection."""
    kind = "Q8_0" if "attn_v" in name else "F16" if "blk.1.ffn_down" in name else "Q4_0"
    return quantized(GGMLQuantizationType[kind])(name, values)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "mixed"])
def test_a_packed_model_gives_the_logits_of_the_dequantised_one(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    encode = mixed if kind == "mixed" else quantized(GGMLQuantizationType[kind])
    path = write_gguf(build("llama-tied"), tmp_path / "tiny.gguf", encode=encode)
    expected = in_pieces(load(path, dtype="float32", weights="dequantised").model, TOKENS, 5)

    loaded = load(path, dtype=dtype)

    assert loaded.model.weight_forms[-1].startswith("q")
    assert isinstance(loaded.model.embedding, PackedWeight)
    assert loaded.model.head.packed is loaded.model.embedding
    # hidden states are rounded some twenty times on their way through three layers
    eps = max(8 * torch.finfo(loaded.model.dtype).eps, 1e-5)
    bound = eps * max(logits.abs().max() for logits in expected)
    for ours, theirs in zip(in_pieces(loaded.model, TOKENS, 5), expected, strict=True):
        assert (ours.float() - theirs).abs().max() <= bound


def test_the_fingerprint_names_the_forms(tmp_path: Path) -> None:
    path = write_gguf(build("llama"), tmp_path / "tiny.gguf", encode=quantized(GGMLQuantizationType.Q4_1))
    stored, dense = load(path, dtype="float32"), load(path, dtype="float32", weights="dequantised")
    assert "-float32-kv_int8-q4_1-" in fingerprint(stored, CPU, False, torch.int8)
    assert "-float32-dense-" in fingerprint(dense, CPU, False, torch.float32)


def test_another_word_for_weights_is_refused(tmp_path: Path) -> None:
    path = write_gguf(build("llama"), tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match="weights = 'int4', expected one of 'auto', 'dequantised'"):
        load(path, weights="int4")


def test_huge_pages_give_every_piece_memory_of_its_own() -> None:
    pages = HugePages()
    sizes = [1, 64, 100, SLAB // 2, SLAB // 2, SLAB + 5, 7] * 2
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(pages.take, sizes))
    assert [len(piece) for piece in pieces] == sizes
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
    spans = sorted((piece.data_ptr(), piece.data_ptr() + len(piece)) for piece in pieces)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
