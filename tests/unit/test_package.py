"""What a user sees first: the import, the names, `tokenstep info`."""

import json
import subprocess
import sys
import types

import pytest

import tokenstep as ts
from tokenstep import _native
from tokenstep.cli import info
from tokenstep.cli.main import main


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**base_environment(), **environment},
    )


def base_environment():
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_import_brings_in_neither_torch_nor_the_engine():
    code = """
import sys, tokenstep
heavy = {"torch", "transformers", "tokenizers", "pydantic", "gguf", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert not [name for name in sys.modules if name.startswith(("tokenstep.engine", "tokenstep.models"))]
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there_and_documented():
    for name in ts.__all__:
        value = getattr(ts, name)
        assert name in dir(ts)
        if name != "__version__":
            assert value.__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        ts.smaple  # noqa: B018


def test_the_stubs_of_the_core_name_all_that_it_has():
    from importlib.resources import files

    stub = files("tokenstep").joinpath("_C.pyi").read_text()
    for name in dir(_native.cpu):
        if not name.startswith("_"):
            assert name in stub


OPS_ON_ARRAYS_OF_SEVENS = """
import numpy as np, tokenstep as ts

def sevens(*shape):
    return np.full(shape, 7, np.float32)

cache, out, floats = sevens(64, 16, 8, 64), sevens(512, 8, 64), sevens(2, 32)
q, k = sevens(512, 8, 64), sevens(512, 8, 64) + 1
where = np.arange(64, dtype=np.int32).reshape(1, 64), np.array([600], np.int32)
start = np.array([0, 512], np.int32)
sampler = ts.Sampler(2, 32, "cpu")
for row in range(2):
    sampler.admit(row, ts.SamplingParams(), [1])
calls = {
    "sample": lambda: ts.sample(sevens(2, 32)),
    "apply_logits": lambda: ts.apply_logits(sevens(2, 32), temperature=0.5, out=floats),
    "Sampler.step": lambda: sampler.step(sevens(2, 32)),
    "append_kv": lambda: ts.append_kv(k, k, cache, cache.copy(), *where, query_start=start),
    "paged_attention": lambda: ts.paged_attention(
        q, cache, cache.copy(), *where, k=k, v=k, query_start=start, max_query_len=512, out=out
    ),
    "merge_attention": lambda: ts.merge_attention(sevens(4, 512, 8, 64), sevens(4, 512, 8)),
}
for name, call in calls.items():
    try:
        call()
    except ValueError as error:
        assert all((array == 7).all() for array in (cache, out, floats)), name
        print(name, error)
"""


def test_a_wrong_instruction_set_is_an_error_of_each_op_that_has_written_nothing():
    result = python(OPS_ON_ARRAYS_OF_SEVENS, TOKENSTEP_ISA="sse9", TOKENSTEP_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    ops = ["sample", "apply_logits", "Sampler.step", "append_kv", "paged_attention", "merge_attention"]
    assert [line.split()[0] for line in lines] == ops
    reason = "TOKENSTEP_ISA = 'sse9', expected portable, avx2, avx512 or avx512_bf16"
    assert all(line.endswith(reason) for line in lines)
    assert python(OPS_ON_ARRAYS_OF_SEVENS).stdout == ""


def test_info_reports_a_wrong_instruction_set_instead_of_raising():
    code = "import sys; from tokenstep.cli.main import main; sys.exit(main(['info', '--json']))"
    result = python(code, TOKENSTEP_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert "TOKENSTEP_ISA = 'sse9', expected portable" in json.loads(result.stdout)["cpu"]["reason"]


@pytest.mark.parametrize("name", ["TOKENSTEP_NUM_THREADS", "OMP_NUM_THREADS"])
def test_the_environment_sets_the_number_of_threads(name):
    result = python("import tokenstep as ts; print(ts.get_num_threads())", **{name: "3"})
    assert result.stdout.strip() == "3", result.stderr


def test_set_num_threads_refuses_less_than_one():
    with pytest.raises(ValueError, match="n = 0, expected n >= 1"):
        ts.set_num_threads(0)


def test_info_tells_version_isa_threads_cuda_and_torch(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokenstep"] == ts.__version__
    assert report["cpu"]["isa"] == _native.cpu.isa()
    assert report["cpu"]["threads"] == ts.get_num_threads()
    assert report["cpu"]["numerics_version"] == _native.cpu.numerics_version
    assert report["cuda"]["available"] is (_native.cuda_unusable_because() is None)
    assert report["cuda"]["available"] or report["cuda"]["reason"]


def test_info_for_people_has_the_same_facts(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"tokenstep: {ts.__version__}" in text
    assert f"isa: {_native.cpu.isa()}" in text


def test_info_reports_a_broken_core_instead_of_raising(monkeypatch, capsys):
    broken = types.ModuleType("tokenstep._native")  # has neither cpu nor cuda
    monkeypatch.setitem(sys.modules, "tokenstep._native", broken)
    monkeypatch.setattr("tokenstep._native", broken)
    monkeypatch.setattr(info.importlib.metadata, "version", lambda name: 1 / 0)
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "ImportError" in report["cpu"]["reason"]
    assert report["torch"] is None
    assert report["peers"] == {}
