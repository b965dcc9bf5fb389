"""Single-process models on sequences sharded over ranks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .._call.sharded import sharded_attention
from .attention import Schedule, attention
from .sequence import Order


@contextlib.contextmanager
def context_parallel(
    mesh: DeviceMesh | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    schedule: Schedule = "auto",
    order: Order = "contiguous",
    length: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Iterator[None]:
    """Context manager in which the attention layers of a model using
    :mod:`tokenmill.integrations.transformers` treat the tokens of a rank as a shard of a sequence.

    Everything else in a model is per token. Pass the shards of input ids, of positions
    (``position_ids``; otherwise all ranks would start at 0) and of labels, which are shifted before
    sharding; sum the gradients of parameters over the ranks, as in data parallelism. A padding mask
    is refused. The backward may run outside the context.

    Args:
        mesh, group, schedule, order, length, sizes: as in :func:`attention`.

    Raises:
        RuntimeError: naming argument, rule and value, at the first layer.

    Example:
        >>> import torch, torch.distributed as dist, tokenmill.distributed as tmd
        >>> from transformers import LlamaConfig, LlamaModel
        >>> from tokenmill.integrations.transformers import register
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...                      intermediate_size=32, vocab_size=8)
        >>> model = LlamaModel(config)
        >>> model.set_attn_implementation(register())
        >>> ids, places = torch.zeros(1, 10, dtype=torch.long), torch.arange(10)[None]
        >>> with tmd.context_parallel(length=10):
        ...     found = model(tmd.shard_sequence(ids), position_ids=tmd.shard_sequence(places))
        >>> dist.destroy_process_group()
    """
    run = functools.partial(
        attention,
        mesh=mesh,
        group=group,
        schedule=schedule,
        order=order,
        length=length,
        sizes=sizes,
    )
    token = sharded_attention.set(run)
    try:
        yield
    finally:
        sharded_attention.reset(token)
