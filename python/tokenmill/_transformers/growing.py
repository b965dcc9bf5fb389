"""A cache of transformers that grows without copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST_ROOM = 64  # tokens that a new buffer has room for,
PART = 8  # or this part of those that it holds: a token is copied about so many times


class GrowingCache(DynamicCache):
    """A DynamicCache that does not copy all keys and values in each step of generate(), to which it
    is passed as cache (past_key_values in older releases).

    Keys and values of layers with full attention or a window are slices of buffers with room for
    more tokens, an eighth of what they hold. Other layers, gradients and beams, which reorder the
    whole cache in each step, are as in DynamicCache. After a crop, tensors that a layer handed out
    before show what is written in place of the tokens that were taken back.

    Args:
        config: configuration of the model, with the windows of its layers; None: all layers have
            full attention.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tokenmill.integrations.transformers import GrowingCache, register
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> model.set_attn_implementation(register())
        >>> cache = GrowingCache(config)
        >>> out = model.generate(
        ...     torch.randint(50, (1, 40)), cache=cache, max_new_tokens=4, do_sample=False,
        ...     pad_token_id=0)
        >>> cache.get_seq_length()
        43
    """

    layer_class_to_replicate: Any

    def __init__(self, config: Any = None):
        super().__init__(config=config)
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = GrowingLayer()
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[i] = GrowingSlidingWindowLayer(layer.sliding_window)


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer with full attention."""

    keys: Any
    values: Any

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if needs_gradient(self.keys, self.values, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = append(self, key_states, value_states)
        return self.keys, self.values


class GrowingSlidingWindowLayer(DynamicSlidingWindowLayer):
    """Keys and values of one layer with a window."""

    keys: Any
    values: Any

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if needs_gradient(self.keys, self.values, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        every = append(self, key_states, value_states)
        behind = self.sliding_window - 1  # tokens that a query sees before its own
        last = [x[:, :, -behind:] for x in every]
        if not getattr(self, "record_past", False):
            self.keys, self.values = last
            return every
        # Until the crop after a draft all are kept, and the mask is for those that are seen.
        self.keys, self.values = every
        seen = behind + key_states.shape[-2]
        return every[0][:, :, -seen:], every[1][:, :, -seen:]


def append(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, S, D] of a layer, and n new ones after them."""
    joined = []
    for i, (old, new) in enumerate(((layer.keys, keys), (layer.values, values))):
        held = old.shape[-2] if old.numel() > 0 else 0
        if held == 0:
            joined.append(new)
            continue
        buffer, wanted = layer._buffers[i], held + new.shape[-2]
        first = place_in(buffer, old)
        if first is None or first + wanted > buffer.shape[2]:
            room = max(LEAST_ROOM, wanted // PART)
            buffer = new.new_empty(*new.shape[:2], wanted + room, new.shape[3])
            buffer[:, :, :held] = old
            layer._buffers[i], first = buffer, 0
        buffer[:, :, first + held : first + wanted] = new
        joined.append(buffer[:, :, first : first + wanted])
    return joined[0], joined[1]


def place_in(buffer: Tensor | None, old: Tensor) -> int | None:
    """The token of the buffer that is the first of old, None where old is no slice of it (it was
    reordered, or is on another device) or the buffer cannot be written.
    """
    if buffer is None or old.device != buffer.device or old.stride() != buffer.stride():
        return None
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return None
    offset = old.data_ptr() - buffer.data_ptr()
    if old.shape[:2] != buffer.shape[:2] or not 0 <= offset < buffer.nbytes:
        return None
    return offset // (buffer.stride(2) * buffer.element_size())


def needs_gradient(*states: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in states)
