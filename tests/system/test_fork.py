"""A model in a process that forks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import tokenstep as ts

SCRIPT = """
import os, signal
import torch
import tokenstep as ts

llm = ts.LLM("smollm2", max_batch=1, progress=False)
text = llm.complete("The capital of Germany is", max_tokens=4, temperature=0).choices[0].text
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    again = llm.complete("The capital of Germany is", max_tokens=4, temperature=0).choices[0].text
    os._exit(0 if again == text else 1)
_, status = os.waitpid(child, 0)
assert llm.complete("The capital of Germany is", max_tokens=4, temperature=0).choices[0].text == text
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_with_one_torch_thread_goes_on_with_the_model(llm: ts.LLM) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
