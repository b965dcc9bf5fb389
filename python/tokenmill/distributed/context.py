"""Models of one process on sequences that lie on several ranks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .._sharded import sharded_attention
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
    """Within it, the attention layers of a model that is registered with
    :mod:`tokenmill.integrations.transformers` take the tokens of a rank for a shard of a sequence.

    Everything else in a model works on tokens alone. Give it the shards of input ids, of positions
    (``position_ids``, or all ranks would begin at 0) and of labels, which are shifted before they
    are sharded; sum the gradients of parameters over the ranks, as in data parallelism. A padding
    mask is refused. The backward may run outside.

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
