"""Our paged attention as a backend of vLLM: one call a layer appends the new keys and values and attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tokenstep.attention import attention_workspace_bytes, paged_attention

__all__ = ["PagedAttentionBackend", "PagedAttentionImpl", "install"]

_MAX_HEAD_SIZE = 256


class PagedAttentionBackend(AttentionBackend):  # type: ignore[misc] # vLLM is not there when types are checked
    """What vLLM asks of a backend before it chooses one."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """The name of vLLM's place for the backends of others."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PagedAttentionImpl]:
        """What computes a layer."""
        return PagedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PagedAttentionMetadataBuilder]:
        """What prepares a step."""
        return PagedAttentionMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 8 up to 256."""
        return head_size % 8 == 0 and 0 < head_size <= _MAX_HEAD_SIZE

    @classmethod
    def supports_sink(cls) -> bool:
        """A score a head."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Any width."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """A query's bits depend on its own sequence alone."""
        return True


@dataclass
class PagedAttentionMetadata(AttentionMetadata):  # type: ignore[misc]
    """A step's sequences, as :func:`tokenstep.paged_attention` takes them; shared by the layers.

    Attributes:
        num_tokens: rows of q, k and v that are not padding.
        max_query_len: the most new tokens of a sequence.
        query_start: int32 ``[R + 1]``.
        seq_lens: int32 ``[R]``, new tokens included.
        block_table: int32 ``[R, max_blocks]``.
        workspace: of the CUDA kernel, else None.
    """

    num_tokens: int
    max_query_len: int
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    workspace: torch.Tensor | None


class PagedAttentionMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """There is no plan: a step's tensors are handed on as they are, and the host reads none of them."""

    _cudagraph_support: ClassVar[Any] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        """As vLLM makes one for each group of layers."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._workspace = None
        if device.type == "cuda":
            size = attention_workspace_bytes(device.index or 0)
            self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PagedAttentionMetadata:
        """What the layers of a step need.

        Raises:
            NotImplementedError: queries that see keys behind them.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("tokenstep attention: attention that is not causal")
        return PagedAttentionMetadata(
            common.num_actual_tokens,
            common.max_query_len,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            self._workspace,
        )


class PagedAttentionImpl(AttentionImpl):  # type: ignore[misc]
    """The attention of a layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """As vLLM makes one for each layer.

        Raises:
            NotImplementedError: a layer that the kernel cannot compute; the message says what it has.
        """
        backend = PagedAttentionBackend
        for what, fits in (
            (f"attention of type {attn_type}", attn_type == AttentionType.DECODER),
            (f"heads of size {head_size}", backend.supports_head_size(head_size)),
            (f"a cache of {kv_cache_dtype}", kv_cache_dtype in backend.supported_kv_cache_dtypes),
        ):
            if not fits:  # vLLM asks the backend on a GPU, and nobody on a CPU
                raise NotImplementedError(f"tokenstep attention: {what}; leave it out of TOKENSTEP_VLLM")
        device = current_platform.device_type
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self._options: dict[str, Any] = {
            "scale": self.scale,
            "window": sliding_window,
            "softcap": logits_soft_cap or None,
            "alibi_slopes": None
            if alibi_slopes is None
            else torch.tensor(alibi_slopes, dtype=torch.float32, device=device),
        }
        self._appends = kv_sharing_target_layer_name is None
        self.sinks = sinks
        self._sinks: torch.Tensor | None = None  # float32, once the weights are loaded

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The sinks as the kernel takes them."""
        if self.sinks is not None:
            self._sinks = self.sinks.detach().float()

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PagedAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends and attends.

        Args:
            layer: vLLM's layer.
            query: ``[T, Hq, D]``.
            key: ``[T, Hkv, D]``.
            value: ``[T, Hkv, D]``.
            kv_cache: ``[num_blocks, Hkv, block_size, 2 D]`` in any strides: a row is a key, then its value.
            attn_metadata: None while vLLM warms up.
            output: ``[T, Hq, D]`` or ``[T, Hq * D]``, written.
            output_scale: None.
            output_block_scale: None.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("tokenstep attention: quantised output")
        if attn_metadata is None:
            return output.zero_()
        tokens = slice(attn_metadata.num_tokens)
        rows = kv_cache.transpose(1, 2)
        paged_attention(
            query[tokens],
            rows[..., : self.head_size],
            rows[..., self.head_size :],
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            k=key[tokens] if self._appends else None,
            v=value[tokens] if self._appends else None,
            query_start=attn_metadata.query_start,
            max_query_len=attn_metadata.max_query_len,
            sinks=self._sinks,
            out=output.view(query.shape)[tokens],
            workspace=attn_metadata.workspace,
            **self._options,
        )
        return output


def install() -> None:
    """Registers the backend as vLLM's ``CUSTOM``, and on the CPU in the place of its only one.

    There vLLM ignores ``--attention-backend`` (``CpuPlatform.get_attn_backend_cls``), but asks its registry
    for the class behind CPU_ATTN.
    """
    path = f"{__name__}.{PagedAttentionBackend.__name__}"
    register_backend(AttentionBackendEnum.CUSTOM, path)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
