"""Models of transformers: their parts, and what marks one that has a policy."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

POLICY = "tokenmill_policy"  # the attention implementation of a model under a policy
KEEP = "_tokenmill_policy"  # attribute of such a model


def pretrained(model: torch.nn.Module) -> list[Any]:
    """The transformers models within a model, including itself."""
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)]


def configs_of(model: torch.nn.Module, *others: Any) -> list[Any]:
    """All configurations, each once: of the models within a model, the given others, and the nested
    configurations, including configurations without a module.
    """
    configs = [*(m.config for m in pretrained(model)), *others]
    found: dict[int, Any] = {}
    while configs:
        config = configs.pop(0)
        if config is not None and id(config) not in found:
            found[id(config)] = config
            configs += [getattr(config, name, None) for name in config.sub_configs]
    return [*found.values()]
