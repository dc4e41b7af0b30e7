"""To change a module right behind its import."""

from __future__ import annotations

import importlib
import sys

import pytest

from tokenstep.integrations.vllm.late_import import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that nobody has imported yet."""
    (tmp_path / "to_be_changed.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "to_be_changed"
    sys.modules.pop("to_be_changed", None)
    sys.meta_path[:] = finders


def test_a_module_is_changed_by_whoever_imports_it_first(module):
    when_imported(module, lambda it: setattr(it, "value", it.value + 1))
    assert module not in sys.modules
    assert importlib.import_module(module).value == 2
    assert importlib.import_module(module).value == 2


def test_a_module_that_is_there_is_changed_at_once(module):
    it = importlib.import_module(module)
    when_imported(module, lambda it: setattr(it, "value", 7))
    assert it.value == 7


def test_several_changes_come_one_behind_another(module):
    seen = []
    for name in "ab":
        when_imported(module, lambda it, name=name: seen.append((name, it.value)))
    importlib.import_module(module)
    assert sorted(seen) == [("a", 1), ("b", 1)]


def test_nothing_stays_in_the_way_of_imports(module):
    before = list(sys.meta_path)
    when_imported(module, lambda it: None)
    assert importlib.import_module(module).__spec__.loader is importlib.import_module(module).__loader__
    assert sys.meta_path == before


def test_a_module_that_there_is_not_is_an_error_as_ever(module):
    when_imported("there_is_no_such_module", lambda it: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("there_is_no_such_module")
