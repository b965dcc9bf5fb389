"""Ring attention: keys and values travel from rank to rank.

In step t rank r holds the shard of rank r - t, and the next one is in flight. Partial results are
merged in float32 in step order. In the backward the gradients of a shard travel with it and arrive
home in step P; probabilities are recomputed from the statistics of whole rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._call.autograd import below_autograd
from .._call.choose import choose, namespace
from .._call.run import call as run
from ..dense.attention import BACKWARD, EXTRAS, FORWARD, SPEC, lower
from ..dense.terms import has_row_statistic
from ._call import Call, Part, visible
from ._group import Group
from ._merge import Merge


def ring_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    options = dict(call.options)
    score_bias = options.get("score_bias")
    score_bias = options.pop("score_bias") if isinstance(score_bias, Tensor) else None
    sink = options.pop("sink", None)
    found: tuple[Tensor, Tensor] = _Ring.apply(
        q, k, v, score_bias, sink, call._replace(options=options)
    )
    return found


class _Step(NamedTuple):
    """Rows of this rank and keys of a shard that see each other: their offsets within the shards,
    and whether they are the same tokens, the diagonal step that every row takes part in.
    """

    row: int
    key: int
    part: Part
    same: bool


def _steps(call: Call, source: int) -> list[_Step]:
    """The steps for the keys of rank `source`."""
    found: list[_Step] = []
    row = 0
    for rows in call.where.pieces[call.group.rank]:
        key = 0
        for keys in call.where.pieces[source]:
            part = visible(rows, keys, call.left, call.right)
            if part is not None:
                begin = row + part.rows.first - rows.first, key + part.keys.first - keys.first
                found.append(_Step(*begin, part, rows == keys))
            key += keys.size
        row += rows.size
    return found


class _Calls:
    """The attention calls of this rank, without their token tensors."""

    def __init__(self, call: Call, score_bias: Tensor | None, sink: Tensor | None) -> None:
        self.options = dict(call.options)
        self.backend = self.options.pop("backend", None)
        self.score_bias, self.sink = score_bias, sink
        self.kind: str = self.options["kind"]
        self.normalize: str = self.options["normalize"] or "none"

    def lower(self, q: Tensor, k: Tensor, v: Tensor, step: _Step) -> tuple[Any, ...]:
        options = dict(self.options)
        if self.score_bias is not None:
            options["score_bias"] = self.score_bias
        if self.sink is not None and step.same:  # the sink is counted once
            options["sink"] = self.sink
        rows, keys = step.part.rows.size, step.part.keys.size
        return lower(
            q.narrow(1, step.row, rows),
            k.narrow(1, step.key, keys),
            v.narrow(1, step.key, keys),
            window=step.part.window,
            **options,
        )

    def differentiate(
        self, of_rows: tuple[Tensor | None, ...], needs: dict[str, bool], lowered: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Gradients of queries, keys, values and of the required parameters, from the gradients,
        results and statistics of whole rows.
        """
        kernels = namespace(choose(SPEC, lowered, self.backend))
        dq, dk, dv, *grads = below_autograd(
            BACKWARD, kernels, (*of_rows, *needs.values(), *lowered)
        )
        a = FORWARD.record(*lowered)
        found = zip(needs, grads, strict=True)
        return dq, dk, dv, {n: g.sum_to_size(getattr(a, n).shape) for n, g in found if needs[n]}

    def belongs(self, name: str, step: _Step) -> bool:
        """Whether the gradient of a parameter includes a contribution from these keys. For softmax
        it comes from the row statistics and is counted once.
        """
        return step.same or (name == "score_bias" and self.kind != "softmax")


class _Shards:
    """The shards in flight: a flat buffer of a rank's keys and values, or of their gradients."""

    def __init__(self, group: Group, sizes: tuple[int, ...], k: Tensor, v: Tensor) -> None:
        self.group, self.sizes = group, sizes
        self.shapes = [t.shape for t in (k, v)]
        self.each = sum(t.shape[0] * t.shape[2] * t.shape[3] for t in (k, v))

    def source(self, step: int) -> int:
        """Rank whose shard is held now."""
        return (self.group.rank - step) % self.group.size

    def pass_on(self, buffer: Tensor, step: int) -> Tensor:
        """Sends the shard of this step to the next rank; returns the buffer of the next step."""
        sent, received = [0] * self.group.size, [0] * self.group.size
        sent[(self.group.rank + 1) % self.group.size] = buffer.numel()
        before = (self.group.rank - 1) % self.group.size
        received[before] = self.sizes[self.source(step + 1)] * self.each
        return self.group.send(buffer, sent, received)

    def views(self, buffer: Tensor, step: int) -> list[Tensor]:
        """Keys and values [B, n, Hk, D] of this step's shard."""
        tokens = self.sizes[self.source(step)]
        shapes = [(shape[0], tokens, *shape[2:]) for shape in self.shapes]
        parts = buffer.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        score_bias: Tensor | None,
        sink: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        calls = _Calls(call, score_bias, sink)
        shards = _Shards(call.group, call.where.sizes, k, v)
        merge = Merge(calls.kind, calls.normalize, calls.backend)
        out, statistic = merge.start((*q.shape[:3], v.shape[-1]), q)
        buffer = torch.cat([k.flatten(), v.flatten()])
        for step in range(call.group.size):
            last = step + 1 == call.group.size
            following = buffer if last else shards.pass_on(buffer, step)
            keys, values = shards.views(buffer, step)
            for part in _steps(call, shards.source(step)):
                found = run(SPEC, calls.lower(q, keys, values, part), calls.backend)
                rows = slice(part.row, part.row + part.part.rows.size)
                merge.add(out[:, rows], statistic[:, :, rows], *found)
            buffer = following if last else call.group.wait(following)
        out = merge.finish(out, statistic).to(q.dtype)
        ctx.save_for_backward(q, k, v, score_bias, sink, out, statistic)
        ctx.call = call
        if not has_row_statistic(calls.kind, calls.normalize):
            statistic = statistic.new_empty(0)
        if calls.normalize == "count":
            ctx.mark_non_differentiable(statistic)
        ctx.set_materialize_grads(False)
        return out, statistic

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, score_bias, sink, out, statistic = ctx.saved_tensors
        call = ctx.call
        calls = _Calls(call, score_bias, sink)
        shards = _Shards(call.group, call.where.sizes, k, v)
        if dout is None:
            dout = torch.zeros_like(out)
        keeps = has_row_statistic(calls.kind, calls.normalize)
        dq = torch.zeros_like(q, dtype=torch.float32)
        extra = {
            name: torch.zeros_like(t, dtype=torch.float32)
            for name, t, needed in zip(
                ("score_bias", "sink"), (score_bias, sink), ctx.needs_input_grad[3:5], strict=True
            )
            if needed
        }
        buffer = torch.cat([k.flatten(), v.flatten()])
        arriving = torch.zeros(buffer.shape, dtype=torch.float32, device=q.device)
        for step in range(call.group.size):
            last = step + 1 == call.group.size
            following = buffer if last else shards.pass_on(buffer, step)
            keys, values = shards.views(buffer, step)
            found = []
            for part in _steps(call, shards.source(step)):
                rows = slice(part.row, part.row + part.part.rows.size)
                of_rows = (
                    dout[:, rows].contiguous(),
                    None if dlse is None else dlse[:, :, rows].contiguous(),
                    out[:, rows] if keeps and calls.normalize != "count" else None,
                    statistic[:, :, rows].contiguous() if keeps else None,
                )
                needs = {name: name in extra and calls.belongs(name, part) for name in EXTRAS}
                lowered = calls.lower(q, keys, values, part)
                dq_part, dk, dv, more = calls.differentiate(of_rows, needs, lowered)
                dq[:, rows] += dq_part
                for name, grad in more.items():
                    extra[name] += grad
                found.append((slice(part.key, part.key + part.part.keys.size), dk, dv))
            grads = call.group.wait(arriving) if step else arriving
            totals = shards.views(grads, step)
            for place, *grads_of_part in found:
                for total, grad in zip(totals, grads_of_part, strict=True):
                    total[:, place] += grad
            arriving = shards.pass_on(grads, step)
            buffer = following if last else call.group.wait(following)
        dk, dv = shards.views(call.group.wait(arriving), 0)
        given = (
            None if name not in extra else extra[name].to(t.dtype)
            for name, t in (("score_bias", score_bias), ("sink", sink))
        )
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *given, None
