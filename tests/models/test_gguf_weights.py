"""Tensors of every ggml type: the loader's numbers are those of the gguf package, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from decoding import in_pieces
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from tiny_models import EMBEDDING_ROWS, build, quantized, write_gguf
from tiny_tokenizers import add_byte_level_metadata
from transformers import LlamaForCausalLM

from tokenstep.models import UnsupportedConfig, load
from tokenstep.models.dequantize import CHUNK, dequantize_into
from tokenstep.models.ggml_types import KNOWN, GgmlType
from tokenstep.models.packed_linear import embed

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 256, 4, 2, 64, 512
SHAPES = {
    "token_embd.weight": (EMBEDDING_ROWS, HIDDEN),
    "output.weight": (EMBEDDING_ROWS, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (INNER, HIDDEN),
    "blk.0.ffn_up.weight": (INNER, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, INNER),
}


def decodable(kind: GGMLQuantizationType) -> bool:
    block, size = GGML_QUANT_SIZES[kind]
    try:
        quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return block > 0


KINDS = [kind for kind in GGMLQuantizationType if decodable(kind)]
OTHERS = [kind for kind in GGMLQuantizationType if kind not in KINDS]


def random_bytes(kind: GGMLQuantizationType, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    block, size = GGML_QUANT_SIZES[kind]
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)


def write_random(path: Path, kind: GGMLQuantizationType) -> dict[str, np.ndarray]:
    """A one-layer Llama whose matrices are random bytes; returns what the file's tensors hold."""
    rng = np.random.default_rng(int(kind))
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    add_byte_level_metadata(writer)
    tensors = {}
    for name, shape in SHAPES.items():
        if len(shape) == 1:
            tensors[name] = rng.normal(1, 0.1, shape).astype(np.float32)
            writer.add_tensor(name, tensors[name])
        else:
            tensors[name] = random_bytes(kind, shape, rng)
            writer.add_tensor(name, tensors[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def assert_same_bits(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Equal bits; a NaN, which random scales may be, is any NaN."""
    numbers = ~np.isnan(theirs)
    assert np.array_equal(np.isnan(ours.numpy()), ~numbers)
    assert np.array_equal(ours.numpy().view(np.int32)[numbers], theirs.view(np.int32)[numbers])


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_are_the_numbers_that_the_gguf_package_decodes(
    tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    raw = write_random(tmp_path / "random.gguf", kind)

    def numbers(name: str) -> np.ndarray:
        return np.ascontiguousarray(quants.dequantize(raw[name], kind), np.float32)

    def halves(name: str, num_heads: int) -> np.ndarray:
        pairs = numbers(name).reshape(num_heads, HEAD_DIM // 2, 2, HIDDEN)
        return pairs.swapaxes(1, 2).reshape(-1, HIDDEN)

    model = load(tmp_path / "random.gguf", dtype="float32").model

    layer = model.layers[0]
    qkv = [halves("blk.0.attn_q.weight", HEADS), halves("blk.0.attn_k.weight", KV_HEADS)]
    assert_same_bits(embed(torch.arange(EMBEDDING_ROWS), model.embedding), numbers("token_embd.weight"))
    assert_same_bits(model.head.weight, numbers("output.weight"))
    assert_same_bits(layer.qkv.weight, np.concatenate([*qkv, numbers("blk.0.attn_v.weight")]))
    assert_same_bits(layer.output.weight, numbers("blk.0.attn_output.weight"))
    gate_up = [numbers("blk.0.ffn_gate.weight"), numbers("blk.0.ffn_up.weight")]
    assert_same_bits(layer.gate_up.weight, np.concatenate(gate_up))
    assert_same_bits(layer.down.weight, numbers("blk.0.ffn_down.weight"))
    assert_same_bits(layer.mlp_norm.weight, raw["blk.0.ffn_norm.weight"])


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_a_type_that_the_gguf_package_cannot_decode_is_named(
    tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    write_random(tmp_path / "random.gguf", kind)
    with pytest.raises(UnsupportedConfig, match=rf"token_embd\.weight.*ggml type {kind.name}\b"):
        load(tmp_path / "random.gguf", dtype="float32")


@pytest.mark.parametrize("kind", KNOWN.values(), ids=lambda kind: kind.name)
def test_what_is_known_without_the_gguf_package_is_what_it_says(kind: GgmlType) -> None:
    theirs = GGMLQuantizationType(kind.number)
    assert (theirs.name, *GGML_QUANT_SIZES[theirs]) == (kind.name, kind.block, kind.block_bytes)


@pytest.mark.parametrize("rows", [1, 3, CHUNK // 4096, CHUNK // 4096 * 2 + 1])
def test_a_tensor_is_decoded_alike_in_one_piece_and_in_many(rows: int) -> None:
    kind = GGMLQuantizationType.Q8_0
    raw = quants.quantize(np.random.default_rng(0).normal(size=(rows, 4096)).astype(np.float32), kind)
    target = torch.empty(rows, 2, 4096)[:, 1]  # strided

    dequantize_into(raw, GgmlType(8, "Q8_0", 32, 34), target)

    assert np.array_equal(target.numpy(), quants.dequantize(raw, kind))


def test_no_more_than_a_few_rows_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def record(raw: np.ndarray, kind: GgmlType) -> torch.Tensor:
        sizes.append(raw.size)
        return torch.zeros(raw.size)

    monkeypatch.setattr("tokenstep.models.dequantize.dequantize", record)
    for rows, columns in ((100_000, 64), (3, 2 * CHUNK)):
        raw = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (rows, columns), (0, 0))
        dequantize_into(raw, GgmlType(24, "I8", 1, 1), torch.zeros(1).expand(rows, columns).clone())
    assert sum(sizes) == 100_000 * 64 + 3 * 2 * CHUNK
    assert max(sizes) == 2 * CHUNK
    assert sorted(sizes)[-4] <= CHUNK


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_a_quantised_file_gives_the_logits_of_its_dequantised_weights(tmp_path: Path, kind: str) -> None:
    original = build("llama-biases")
    stored = GGMLQuantizationType[kind]
    path = write_gguf(original, tmp_path / "quantised.gguf", encode=quantized(stored))
    model = LlamaForCausalLM(original.config).eval()
    model.load_state_dict(original.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # row by row, so that the order of the rows doesn't matter
                rounded = quants.dequantize(quants.quantize(parameter.numpy(), stored), stored)
                parameter.copy_(torch.from_numpy(rounded))
    tokens = [torch.arange(40).tolist(), [7, 5]]

    ours = in_pieces(load(path, dtype="float32").model, tokens, 5)

    for row, logits in zip(tokens, ours, strict=True):
        with torch.inference_mode():
            theirs = model(torch.tensor([row])).logits[0]
        assert (logits - theirs).abs().max() <= 1e-4
