"""Runs vLLM's own tests of its sampler with ours in its place.

    PYTHON tests/integrations/vllm_own_tests.py CHECKOUT MODEL [FILE …] [PYTEST OPTION …]

PYTHON has vllm, tokenstep, pytest, tblib and what else vLLM's conftest imports. CHECKOUT is vLLM's source at
the version of PYTHON (a clone, or an unpacked sdist); of its tests/v1/sample those of the sampler run, or the
files that are named. MODEL is a folder that stands in for the models that these tests download.
TOKENSTEP_VLLM=0 shows what fails without us.
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FILES = [
    "test_sampler.py",
    "test_sampling_params_e2e.py",
    "test_topk_topp_sampler.py",
    "test_batched_count_greater_than.py",
    "test_logprobs.py",
]
SEVERAL_ENGINES = ["test_logprobs.py"]  # at a time, which one process cannot hold


class OurSampler:
    """A plugin of pytest: one model in the place of all, and a count of the steps that this process takes."""

    def __init__(self, model: str, *, in_process: bool) -> None:
        self._model, self._in_process = model, in_process
        self._steps: collections.Counter[str] = collections.Counter()

    def pytest_configure(self) -> None:
        """Before anything of vLLM is imported by a test."""
        from vllm.engine.arg_utils import EngineArgs

        from tokenstep.integrations.vllm import register

        register()
        from tokenstep.integrations.vllm.batch import Batch
        from tokenstep.integrations.vllm.sampler import FusedSampler

        self._count(Batch, "step", "drawn by the kernel")
        self._count(FusedSampler, "forward", "in all")
        prepare = EngineArgs.__post_init__

        def with_our_model(args: Any) -> None:
            args.model = args.tokenizer = self._model
            prepare(args)

        EngineArgs.__post_init__ = with_our_model

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """One model stands in for others; an engine in this process stays for all tests of its file."""
        for item in items:
            if self._in_process:
                item.add_marker("skip_global_cleanup")
            if isinstance(getattr(item.module, "MODEL", None), str):
                item.module.MODEL = self._model

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """How much of it was ours."""
        if self._in_process:
            terminalreporter.write_line(f"sampler's steps: {dict(self._steps)}")

    def _count(self, owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._steps[what] += 1
            return function(*args, **kwargs)

        setattr(owner, name, counted)


def run_file(model: str, file: str, options: list[str]) -> int:
    """Runs one file of the tests in the current folder; pytest's exit code."""
    import pytest

    in_process = file not in SEVERAL_ENGINES
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    sys.path.insert(0, os.getcwd())
    plugin = OurSampler(model, in_process=in_process)
    return int(pytest.main([f"tests/v1/sample/{file}", *options], plugins=[plugin]))


def main() -> int:
    """Runs all; 1 if one has failed."""
    if sys.argv[1] == "--file":
        return run_file(sys.argv[2], sys.argv[3], sys.argv[4:])
    checkout, model, *arguments = sys.argv[1:]
    files = [a for a in arguments if a.endswith(".py")] or FILES
    options = [a for a in arguments if not a.endswith(".py")]
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENSTEP_VLLM", "sampler")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:  # without vLLM's source, which isn't built
        shutil.copytree(Path(checkout, "tests"), Path(folder, "tests"))
        shutil.copy(Path(checkout, "pyproject.toml"), folder)
        for file in files:
            command = [sys.executable, str(Path(__file__).resolve()), "--file", model, file, *options]
            failed |= subprocess.run(command, cwd=folder, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
