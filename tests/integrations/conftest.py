"""Tiny random models and prompts of different lengths, padded on the left."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="4.57")
sys.path.append(str(Path(__file__).parents[1] / "models"))

PAD = 1


@pytest.fixture(scope="session")
def tiny():
    """``tiny("llama")``: a float32 model of that case of tests/models/tiny_models.py."""
    from tiny_models import build

    def get(name):
        model = build(name)
        model.generation_config.pad_token_id = PAD
        return model

    return get


@pytest.fixture(scope="session")
def prompts():
    """Three prompts of 12, 5 and 9 ids: ``input_ids`` and ``attention_mask``."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(10, 200, (3, 12), generator=generator)
    mask = torch.arange(12) >= torch.tensor([[0], [7], [3]])
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}
