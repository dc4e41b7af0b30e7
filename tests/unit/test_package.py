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


def test_a_wrong_instruction_set_fails_at_import_and_names_the_right_ones():
    result = python("import tokenstep", TOKENSTEP_ISA="sse9")
    assert result.returncode != 0
    assert "TOKENSTEP_ISA" in result.stderr
    assert "portable" in result.stderr


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
