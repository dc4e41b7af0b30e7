"""Models: loading from GGUF files and Hugging Face folders, tokenizers, and the decoder itself."""

from tokenstep.models.config import ModelConfig, RopeConfig
from tokenstep.models.decoder import DecoderModel, ForwardBatch, KVCache
from tokenstep.models.errors import ModelFileError, ModelNotFound, UnsupportedConfig
from tokenstep.models.load import LoadedModel, load
from tokenstep.models.tokenizer import Tokenizer
from tokenstep.models.workspace import Workspace

__all__ = [
    "DecoderModel",
    "ForwardBatch",
    "KVCache",
    "LoadedModel",
    "ModelConfig",
    "ModelFileError",
    "ModelNotFound",
    "RopeConfig",
    "Tokenizer",
    "UnsupportedConfig",
    "Workspace",
    "load",
]
