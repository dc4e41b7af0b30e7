"""Runs vLLM's own tests of its sampler with ours in its place.

    PYTHON tests/integrations/vllm_own_tests.py CHECKOUT MODEL [PYTEST ARGUMENTS]

PYTHON has vllm, tokenstep, pytest, tblib and what else vLLM's conftest imports. CHECKOUT is vLLM's source at
the version of PYTHON (a clone, or an unpacked sdist), of which the tests of the sampler run unless the
arguments name others; MODEL is a folder that stands in for the models that these tests download. The last
lines say how many steps the kernel has drawn.
"""

from __future__ import annotations

import collections
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

DEFAULT = [
    "test_sampler.py",
    "test_sampling_params_e2e.py",
    "test_topk_topp_sampler.py",
    "test_batched_count_greater_than.py",
    "test_logprobs.py",
]


class OurSampler:
    """A plugin of pytest: the stand-in for models, and a count of steps."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._steps: collections.Counter[str] = collections.Counter()

    def pytest_configure(self) -> None:
        """Before anything of vLLM is imported by a test."""
        from tokenstep.integrations.vllm import register

        register()
        from tokenstep.integrations.vllm.batch import Batch
        from tokenstep.integrations.vllm.sampler import FusedSampler

        self._count(Batch, "step", "drawn by the kernel")
        self._count(FusedSampler, "forward", "all steps")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """One model stands in for others; engines are in this process, and stay for several tests."""
        for item in items:
            item.add_marker("skip_global_cleanup")
            if isinstance(getattr(item.module, "MODEL", None), str):
                item.module.MODEL = self._model

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """How much of it was ours."""
        terminalreporter.write_line(f"tokenstep: {dict(self._steps)}")

    def _count(self, owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._steps[what] += 1
            return function(*args, **kwargs)

        setattr(owner, name, counted)


def main() -> int:
    """Runs them; pytest's exit code."""
    checkout, model, *arguments = sys.argv[1:]
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENSTEP_VLLM", "sampler")  # 0 shows what fails without us
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that steps are counted
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import pytest

    with tempfile.TemporaryDirectory() as folder:  # without vLLM's source, which isn't built
        shutil.copytree(Path(checkout, "tests"), Path(folder, "tests"))
        shutil.copy(Path(checkout, "pyproject.toml"), folder)
        os.chdir(folder)
        sys.path.insert(0, folder)
        tests = arguments if any(a.startswith("tests/") for a in arguments) else [
            *(f"tests/v1/sample/{name}" for name in DEFAULT), *arguments
        ]  # fmt: skip
        return int(pytest.main(tests, plugins=[OurSampler(model)]))


if __name__ == "__main__":
    raise SystemExit(main())
