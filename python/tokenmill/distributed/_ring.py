"""Attention with keys and values that travel from rank to rank.

In step t rank r has the shard of rank r - t, and the next one is on its way. Partial results are
merged in float32 in the order of the steps. In the backward the gradients of a shard travel with it
and come home in step P; the probabilities come from the statistic of the whole row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._derivatives import below_autograd
from .._dispatch import call as run
from .._dispatch import choose, namespace
from ..dense.attention import BACKWARD, EXTRAS, FORWARD, SPEC, lower
from ..dense.merge_attention_states import merge_attention_states
from ..dense.terms import has_row_statistic
from ._band import Part, visible
from ._group import Group

if TYPE_CHECKING:
    from .attention import Call

SUM_FLOOR = 1e-8  # beside a row sum, as attention divides by it


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
    """Rows of this rank and keys of a shard that see each other: where both begin in the shards,
    and whether they are the same tokens, which every row sees."""

    row: int
    key: int
    part: Part
    same: bool


def _steps(call: Call, source: int) -> list[_Step]:
    """The calls for the keys of rank `source`."""
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
    """The calls of this rank, without their tensors of tokens."""

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
        if self.sink is not None and step.same:  # it takes weight once
            options["sink"] = self.sink
        rows, keys = step.part.rows.size, step.part.keys.size
        return lower(
            q.narrow(1, step.row, rows),
            k.narrow(1, step.key, keys),
            v.narrow(1, step.key, keys),
            window=step.part.window,
            **options,
        )

    def merge(self, out: Tensor, statistic: Tensor, part: Tensor, of_part: Tensor) -> None:
        """Adds the result of a part to out [B, n, H, Dv] and statistic [B, H, n], float32."""
        if self.kind == "softmax":
            merged, lse = merge_attention_states(
                torch.stack([out, part.float()]),
                torch.stack([statistic, of_part]),
                backend=self.backend,
            )
            out.copy_(merged)
            statistic.copy_(lse)
        elif self.normalize == "none":
            out += part
        else:
            out.addcmul_(part.float(), _of_rows(self.divisor(of_part)))
            statistic += of_part

    def belongs(self, name: str, step: _Step) -> bool:
        """Whether the gradient of a parameter is one of these keys. Of a softmax it comes from the
        statistics of rows."""
        return step.same or (name == "score_bias" and self.kind != "softmax")

    def divisor(self, statistic: Tensor) -> Tensor:
        """What attention divides a row by."""
        if self.normalize == "count":
            return statistic
        return statistic.abs().clamp(min=1) if self.kind == "linear" else statistic + SUM_FLOOR

    def finish(self, out: Tensor, statistic: Tensor) -> Tensor:
        if self.kind == "softmax" or self.normalize == "none":
            return out
        return out / _of_rows(self.divisor(statistic).masked_fill(statistic == 0, 1.0))


def _of_rows(x: Tensor) -> Tensor:
    """[B, H, n] beside [B, n, H, D]"""
    return x.transpose(1, 2)[..., None]


class _Shards:
    """The shards on their way: a flat buffer of a rank's keys and values, or of their gradients."""

    def __init__(self, group: Group, sizes: tuple[int, ...], k: Tensor, v: Tensor) -> None:
        self.group, self.sizes = group, sizes
        self.shapes = [t.shape for t in (k, v)]
        self.each = sum(t.shape[0] * t.shape[2] * t.shape[3] for t in (k, v))

    def source(self, step: int) -> int:
        """Whose shard is here."""
        return (self.group.rank - step) % self.group.size

    def pass_on(self, buffer: Tensor, step: int) -> Tensor:
        """Sends the shard of this step to the next rank; the buffer of the next step."""
        sent, received = [0] * self.group.size, [0] * self.group.size
        sent[(self.group.rank + 1) % self.group.size] = buffer.numel()
        before = (self.group.rank - 1) % self.group.size
        received[before] = self.sizes[self.source(step + 1)] * self.each
        return self.group.send(buffer, sent, received)

    def views(self, buffer: Tensor, step: int) -> list[Tensor]:
        """Keys and values [B, n, Hk, D] of the shard of this step."""
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
        batch, tokens, heads, _ = q.shape
        out = q.new_zeros((batch, tokens, heads, v.shape[-1]), dtype=torch.float32)
        start = -torch.inf if calls.kind == "softmax" else 0.0
        statistic = out.new_full((batch, heads, tokens), start)
        buffer = torch.cat([k.flatten(), v.flatten()])
        for step in range(call.group.size):
            last = step + 1 == call.group.size
            following = buffer if last else shards.pass_on(buffer, step)
            keys, values = shards.views(buffer, step)
            for part in _steps(call, shards.source(step)):
                found = run(SPEC, calls.lower(q, keys, values, part), calls.backend)
                rows = slice(part.row, part.row + part.part.rows.size)
                calls.merge(out[:, rows], statistic[:, :, rows], *found)
            buffer = following if last else call.group.wait(following)
        out = calls.finish(out, statistic).to(q.dtype)
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
        grads = torch.zeros(buffer.shape, dtype=torch.float32, device=q.device)
        for step in range(call.group.size):
            last = step + 1 == call.group.size
            following = buffer if last else shards.pass_on(buffer, step)
            keys, values = shards.views(buffer, step)
            found = []
            for part in _steps(call, shards.source(step)):
                rows = slice(part.row, part.row + part.part.rows.size)
                lowered = calls.lower(q, keys, values, part)
                of_rows = [
                    dout[:, rows].contiguous(),
                    None if dlse is None else dlse[:, :, rows].contiguous(),
                    out[:, rows] if keeps and calls.normalize != "count" else None,
                    statistic[:, :, rows].contiguous() if keeps else None,
                ]
                needs = [name in extra and calls.belongs(name, part) for name in EXTRAS]
                back = below_autograd(
                    BACKWARD,
                    namespace(choose(SPEC, lowered, calls.backend)),
                    (*of_rows, *needs, *lowered),
                )
                found.append((part, back))
                dq[:, rows] += back[0]
                a = FORWARD.record(*lowered)
                for name, needed, grad in zip(EXTRAS, needs, back[3:], strict=True):
                    if needed:
                        extra[name] += grad.sum_to_size(getattr(a, name).shape)
            if step:
                grads = call.group.wait(arriving)
            for part, back in found:
                for total, grad in zip(shards.views(grads, step), back[1:3], strict=True):
                    total[:, part.key : part.key + part.part.keys.size] += grad
            arriving = shards.pass_on(grads, step)
            buffer = following if last else call.group.wait(following)
        dk, dv = shards.views(call.group.wait(arriving), 0)
        given = (
            None if name not in extra else extra[name].to(t.dtype)
            for name, t in (("score_bias", score_bias), ("sink", sink))
        )
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *given, None
