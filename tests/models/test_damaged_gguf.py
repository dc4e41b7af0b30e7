"""Damaged, cut and fuzzed GGUF files: a clear error, no other exception, no memory for what isn't there."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from damage import FUZZ, LARGE, REFUSALS, Edit, damaged, edits, load_or_refuse
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build, write_gguf

from tokenstep.models import ModelFileError, UnsupportedConfig, load
from tokenstep.models.gguf_file import GgufFile


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound GGUF file of a tiny Llama."""
    return write_gguf(build("llama"), tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


@pytest.fixture(scope="module")
def header_only(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file with every type of value and little data."""
    path = tmp_path_factory.mktemp("gguf") / "header.gguf"
    writer = GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "zażółć")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_array("a.bools", [True, False])
    writer.add_array("a.strings", ["", "a", "bc"])
    writer.add_tensor("w", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.add_tensor("q", np.zeros((3, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def to_file(contents: bytes) -> Path:
        path = tmp_path / "tiny.gguf"
        path.write_bytes(contents)
        return path

    return to_file


def test_metadata_and_tensors_are_those_that_the_gguf_package_reads(
    write: Callable[[bytes], Path], whole: bytes, header_only: bytes
) -> None:
    for contents in (whole, header_only):
        ours, theirs = GgufFile(write(contents)), GGUFReader(write(contents))
        names = [name for name in theirs.fields if not name.startswith("GGUF.")]
        assert list(ours.metadata) == names
        for name in names:
            value = ours.metadata[name]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs.fields[
                name
            ].contents()
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            found = ours.tensors[tensor.name]
            assert found.kind.number == tensor.tensor_type
            assert found.shape == tuple(tensor.shape.tolist())[::-1]
            assert ours.raw(found).tobytes() == tensor.data.tobytes()


def test_a_file_that_is_no_gguf_is_named(write: Callable[[bytes], Path], whole: bytes) -> None:
    with pytest.raises(
        ModelFileError, match=r"tiny\.gguf: starts with b'PK\\x03\\x04', a GGUF file with b'GGUF'"
    ):
        load(write(b"PK\x03\x04" + whole[4:]))
    with pytest.raises(ModelFileError, match=r"tiny\.gguf: 10 bytes are too few"):
        load(write(whole[:10]))
    with pytest.raises(ModelFileError, match=r"tiny\.gguf: 0 bytes are too few"):
        load(write(b""))


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "version 1, expected 2 or 3"), (4, "version 4"), (3 << 24, "big-endian GGUF")],
)
def test_another_version_is_refused(
    write: Callable[[bytes], Path], whole: bytes, version: int, message: str
) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        load(write(whole[:4] + struct.pack("<I", version) + whole[8:]))


def test_a_file_cut_anywhere_is_refused(write: Callable[[bytes], Path], whole: bytes) -> None:
    for end in [*range(24, 2000, 97), *range(2000, len(whole), len(whole) // 40), len(whole) - 33]:
        with pytest.raises(ModelFileError, match=r"tiny\.gguf: .*\(is the file complete\?\)"):
            load(write(whole[:end]))


def patched(contents: bytes, before: bytes, code: str, value: int, skip: int = 0) -> bytes:
    """The file with the number `skip` bytes behind the only occurrence of `before` replaced."""
    assert contents.count(before) == 1
    at = contents.index(before) + len(before) + skip
    return contents[:at] + struct.pack(code, value) + contents[at + struct.calcsize(code) :]


def entry(name: str) -> bytes:
    """How the entry of a tensor begins in the table."""
    return struct.pack("<Q", len(name)) + name.encode()


@pytest.mark.parametrize(
    ("code", "skip", "value", "message"),
    [
        ("<I", 0, 0, "has 0 dimensions, expected 1 to 4"),
        ("<I", 0, 5, "has 5 dimensions, expected 1 to 4"),
        ("<Q", 4, 2**62, "needs bytes"),
        ("<Q", 4, 0, r"has shape \[2, 0\], expected rows in F32 blocks"),
        ("<I", 20, 99, "has ggml type 99, which the installed gguf package doesn't know"),
        ("<I", 20, 8, "needs bytes|rows in Q8_0 blocks of 32|has shape"),
        ("<Q", 24, 2**62, "needs bytes 46"),
        ("<Q", 24, 8, "needs bytes"),
    ],
)
def test_a_wrong_entry_of_the_table_names_the_tensor(
    write: Callable[[bytes], Path], header_only: bytes, code: str, skip: int, value: int, message: str
) -> None:
    path = write(patched(header_only, entry("w"), code, value, skip))
    if value == 8 and code == "<I":  # still fits the file
        assert GgufFile(path).tensors["w"].kind.name == "Q8_0"
        return
    with pytest.raises(REFUSALS, match=rf"tiny\.gguf: tensor 'w' .*({message})"):
        GgufFile(path)


def test_a_name_may_not_be_twice_in_metadata_or_table(
    write: Callable[[bytes], Path], header_only: bytes
) -> None:
    twice = header_only.replace(entry("a.int8"), entry("a.bool"))
    with pytest.raises(ModelFileError, match=r"the key 'a\.bool' occurs twice"):
        GgufFile(write(twice))
    with pytest.raises(ModelFileError, match="the tensor 'w' occurs twice"):
        GgufFile(write(header_only.replace(entry("q"), entry("w"))))


@pytest.mark.parametrize("value", LARGE)
def test_a_count_that_the_file_has_no_room_for_takes_no_memory(
    write: Callable[[bytes], Path], header_only: bytes, value: int
) -> None:
    damaged = [header_only[:at] + struct.pack("<Q", value) + header_only[at + 8 :] for at in (8, 16)]
    for name, skip in (("a.string", 4), ("a.numbers", 8), ("a.floats", 8), ("a.bools", 8), ("a.strings", 8)):
        damaged.append(patched(header_only, entry(name), "<Q", value, skip))
    tracemalloc.start()
    for contents in damaged:
        with pytest.raises(ModelFileError, match=r"\(is the file complete\?\)"):
            GgufFile(write(contents))
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_string_longer_than_the_file_is_refused(write: Callable[[bytes], Path], header_only: bytes) -> None:
    for name, skip in (("a.string", 4), ("a.strings", 16)):
        with pytest.raises(
            ModelFileError, match=r"bytes expected at|a string of 4096 bytes at .* reaches over"
        ):
            GgufFile(write(patched(header_only, entry(name), "<Q", 4096, skip)))
    last = header_only.index(entry("w"))  # nothing else would miss the end
    cut = patched(header_only[:last], entry("a.strings"), "<Q", 4096, 16)
    with pytest.raises(ModelFileError, match=r"a string of 4096 bytes at .* reaches over the end"):
        GgufFile(write(cut[:8] + bytes(8) + cut[16:]))


def test_arrays_nested_too_deep_are_refused(write: Callable[[bytes], Path], header_only: bytes) -> None:
    nest = struct.pack("<IQ", 9, 1)
    deep = patched(header_only, entry("a.numbers"), "<I", 9) + nest
    at = deep.index(entry("a.numbers")) + len(entry("a.numbers")) + 4
    with pytest.raises(ModelFileError, match=r"a\.numbers: arrays nested too deep"):
        GgufFile(write(deep[:at] + nest * 10 + deep[at + 120 :]))


@pytest.mark.parametrize("alignment", [0, 1, 12, 2**32 - 1])
def test_an_alignment_that_is_none_is_refused(tmp_path: Path, alignment: int) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_uint32("general.alignment", alignment)

    path = write_gguf(build("llama"), tmp_path / "tiny.gguf", metadata=edit)
    with pytest.raises(ModelFileError, match=rf"general\.alignment = {alignment}, expected a multiple of 8"):
        GgufFile(path)


def test_another_alignment_is_kept(tmp_path: Path) -> None:
    path = write_gguf(
        build("llama"), tmp_path / "tiny.gguf", metadata=lambda writer: writer.add_custom_alignment(256)
    )
    expected = build("llama").model.embed_tokens.weight
    assert torch.equal(load(path, dtype="float32").model.embedding, expected)


def test_a_missing_a_misshapen_and_a_left_over_tensor_are_named(tmp_path: Path) -> None:
    def named(old: str, new: str) -> Path:
        def encode(name: str, values: np.ndarray) -> tuple[np.ndarray, None]:
            return (values[:-1] if name == old == new else values), None

        path = write_gguf(build("llama"), tmp_path / "tiny.gguf", encode=encode)
        path.write_bytes(path.read_bytes().replace(entry(old), entry(new)))
        return path

    with pytest.raises(ModelFileError, match=r"the tensor blk\.1\.ffn_up\.weight is missing"):
        load(named("blk.1.ffn_up.weight", "blk.1.ffn_xx.weight"))
    with pytest.raises(
        ModelFileError, match=r"blk\.2\.attn_q\.weight has shape \[63, 64\], expected \[64, 64\]"
    ):
        load(named("blk.2.attn_q.weight", "blk.2.attn_q.weight"))
    with pytest.raises(ModelFileError, match=r"token_embd\.weight is missing or no matrix"):
        load(named("token_embd.weight", "token_xxxx.weight"))

    def edit(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((2, 32), np.float32))

    with pytest.raises(
        ModelFileError, match=r"1 tensors have no place in a llama model: blk\.0\.ffn_gate_inp"
    ):
        load(write_gguf(build("llama"), tmp_path / "tiny.gguf", metadata=edit))


@settings(max_examples=250, **FUZZ)
@given(changes=st.lists(edits(), min_size=1, max_size=4))
def test_any_damage_to_a_header_is_read_or_refused(
    write: Callable[[bytes], Path], header_only: bytes, changes: list[Edit]
) -> None:
    path = write(damaged(header_only, changes, len(header_only) - 400))
    try:
        file = GgufFile(path)
    except REFUSALS:
        return
    for tensor in file.tensors.values():
        assert file.raw(tensor).nbytes == tensor.num_bytes


@pytest.mark.parametrize(
    ("begin", "end"),
    [("general.architecture", "tokenizer.ggml.tokens"), ("tokenizer.ggml.tokens", "blk.2.ffn_down.weight")],
)
@settings(max_examples=150, **FUZZ)
@given(changes=st.lists(edits(), min_size=1, max_size=3))
def test_any_damage_to_a_model_is_loaded_or_refused(
    write: Callable[[bytes], Path], whole: bytes, changes: list[Edit], begin: str, end: str
) -> None:
    start = whole.index(begin.encode())
    length = whole.index(end.encode()) - start
    load_or_refuse(write(whole[:start] + damaged(whole[start:], changes, length)))
