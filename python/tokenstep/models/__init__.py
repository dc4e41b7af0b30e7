"""Models: loading from GGUF files and Hugging Face folders, tokenizers, and the decoder itself."""

from tokenstep.models.config import ModelConfig, RopeConfig
from tokenstep.models.decoder import DecoderModel, ForwardBatch, KVCache
from tokenstep.models.errors import ModelFileError, ModelNotFound, UnsupportedConfig
from tokenstep.models.load import LoadedModel, load
from tokenstep.models.lora import AdapterRows, LoraAdapter
from tokenstep.models.peft import load_adapter
from tokenstep.models.prefill import Span
from tokenstep.models.tokenizer import Tokenizer
from tokenstep.models.workspace import Workspace

__all__ = [
    "AdapterRows",
    "DecoderModel",
    "ForwardBatch",
    "KVCache",
    "LoadedModel",
    "LoraAdapter",
    "ModelConfig",
    "ModelFileError",
    "ModelNotFound",
    "RopeConfig",
    "Span",
    "Tokenizer",
    "UnsupportedConfig",
    "Workspace",
    "load",
    "load_adapter",
]
