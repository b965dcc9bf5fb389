"""The classes that vLLM expects of an attention backend. vLLM imports this module by name.

A step has T tokens of R requests, packed with offsets query_start_loc ``[R + 1]``; request r has
seq_lens[r] keys, including the new ones, in pages block_table[r]. Prefills, chunked prefills,
drafts and decode rows are one call.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)

from .._check import MAX_HEAD_DIM
from ..dense.attention import NO_WINDOW, attention
from ..select.kv_cache_append import kv_cache_append

FP8 = ("fp8", "fp8_e4m3")
WITHOUT_CACHE = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
# Whether vLLM writes new keys in a separate call; in versions without it, forward writes them.
SEPARATE_UPDATE = hasattr(AttentionBackend, "forward_includes_kv_cache_update")
# rows (queries times heads of a GQA group) supported by the split-KV decode kernels
ROWS_OF_DECODE = 64
INVARIANT = "VLLM_BATCH_INVARIANT"  # environment variable: the same bits in any batch


@dataclass
class TokenmillMetadata:
    """Metadata shared by all layers of a step."""

    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    causal: bool = True

    @property
    def queries(self) -> int:
        """Number of queries per request if equal for all, else 0. Nothing is read from the
        device.
        """
        uniform = self.num_reqs * self.max_query_len == self.num_actual_tokens
        return self.max_query_len if uniform and len(self.seq_lens) == self.num_reqs else 0


class TokenmillMetadataBuilder(AttentionMetadataBuilder):
    supports_update_block_table: bool = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> TokenmillMetadata:
        common = common_attn_metadata
        if not isinstance(common.causal, bool):
            raise NotImplementedError("tokenmill vllm: causal: must be the same for all requests")
        return TokenmillMetadata(
            num_reqs=common.num_reqs,
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
        )

    def update_block_table(
        self, metadata: TokenmillMetadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> TokenmillMetadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class TokenmillImpl(AttentionImpl):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if not TokenmillBackend.supports_attn_type(attn_type):
            rule = "must be decoder, encoder or encoder_only"
            raise NotImplementedError(f"tokenmill vllm: attn_type: {rule}; got {attn_type}")
        if not TokenmillBackend.supports_kv_cache_dtype(kv_cache_dtype):
            raise NotImplementedError(
                f"tokenmill vllm: kv_cache_dtype: has no kernel; got {kv_cache_dtype}"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.softcap = logits_soft_cap or 0.0
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes)
        self.sinks = sinks
        self.invariant = os.environ.get(INVARIANT, "0") not in ("", "0")
        self.window = NO_WINDOW
        if sliding_window is not None:
            reach = sliding_window - 1
            self.window = (reach, reach if attn_type == AttentionType.ENCODER_ONLY else 0)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TokenmillMetadata | None,
        output: Tensor | None = None,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes output ``[T, H, D]`` (or ``[T, H D]``) and returns it.

        query is ``[T, H, D]``, key and value ``[T, Hk, D]``, kv_cache as in get_kv_cache_shape. T
        may exceed the number of tokens of the step; later rows are not written.
        """
        if output is None:
            raise ValueError("tokenmill vllm: output: must be given; got None")
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("tokenmill vllm: output_scale: must be None; got a tensor")
        if attn_metadata is None:  # a memory profiling run
            return output.fill_(0)
        step = attn_metadata
        tokens = slice(step.num_actual_tokens)
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.to(query.device)
        query = query[tokens]
        out = output.view(-1, self.num_heads, self.head_size)[tokens]
        options: dict[str, Any] = {
            "scale": self.scale,
            "softcap": self.softcap,
            "window": self.window,
            "alibi_slopes": self.alibi_slopes,
            "sink": self.sinks,
        }
        if self._takes_decode(step):  # [R, n, H, D], the layout of the split-KV decode kernels
            query, out = (x.unflatten(0, (step.num_reqs, step.queries)) for x in (query, out))
        else:
            options |= {"cu_seqlens_q": step.query_start_loc, "max_seqlen_q": step.max_query_len}
        if self.attn_type in WITHOUT_CACHE:
            attention(query, key[tokens], value[tokens], causal=False, out=out, **options)
            return output
        if not SEPARATE_UPDATE:
            self.do_kv_cache_update(layer, key, value, kv_cache, step.slot_mapping)
        k_cache, v_cache, scales = self._pages(layer, kv_cache)
        attention(
            query,
            k_cache,
            v_cache,
            out=out,
            causal=step.causal,
            seqlens_k=step.seq_lens,
            block_table=step.block_table,
            **scales,
            **options,
        )
        return output

    def _takes_decode(self, step: TokenmillMetadata) -> bool:
        """Whether the requests of a step have equally many, and few, queries. Longer prompts fill a
        GPU without splitting keys, and packed calls have the same bits in any batch.
        """
        if self.attn_type in WITHOUT_CACHE or self.invariant or not step.causal:
            return False
        rows = step.queries * (self.num_heads // self.num_kv_heads)
        return 0 < rows <= ROWS_OF_DECODE

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes the new keys and values ``[T, Hk, D]`` into their slots; slot -1 skips a token."""
        if self.attn_type in WITHOUT_CACHE or self.kv_sharing_target_layer_name is not None:
            return
        k_cache, v_cache, scales = self._pages(layer, kv_cache)
        tokens = slice(slot_mapping.shape[0])  # keys may be padded
        kv_cache_append(k_cache, v_cache, key[tokens], value[tokens], slot_mapping, **scales)

    def _pages(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Keys and values [pages, page size, Hk, D], and their float8 scales."""
        k_cache, v_cache = kv_cache.unbind(0)
        if self.kv_cache_dtype not in FP8:
            return k_cache, v_cache, {}
        k_cache, v_cache = (x.view(torch.float8_e4m3fn) for x in (k_cache, v_cache))
        k_scale, v_scale = (x.float().reshape(-1) for x in (layer._k_scale, layer._v_scale))
        return k_cache, v_cache, {"k_scale": k_scale, "v_scale": v_scale}


class TokenmillBackend(AttentionBackend):
    accept_output_buffer: bool = True
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", *FP8]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TokenmillImpl]:
        return TokenmillImpl

    @staticmethod
    def get_builder_cls() -> type[TokenmillMetadataBuilder]:
        return TokenmillMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int]:
        return [16, 32, 64, 128, 256]  # the page size is a power of two

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return 2, num_blocks, block_size, num_kv_heads, head_size

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 0 < head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER or attn_type in WITHOUT_CACHE

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) >= (8, 0)
