"""attention: exact attention with any score map, normalised or not."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import masks
from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, keep, kept, needed_gradients
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    check,
    check_bool,
    check_cu_seqlens_values,
    check_longest,
    check_tensor,
    fail,
)
from .._flops import band, known, masked_pairs
from .._lowering import scale_or_default, take_options, widen, widen_fields
from .._other_names import answered_by
from ..masks import Decay2d, Grid, Masks, lower_mask
from ..reference.dense import attention as reference
from ..registry import OpSpec, Sharding, register_op
from .attention_decode import attention_decode
from .attention_options import AttentionOptions, Precision
from .nested import as_packed, is_nested, over_nested
from .terms import (
    NO_WINDOW,
    Kind,
    Normalize,
    ScoreBias,
    as_window,
    check_return_lse,
    has_row_statistic,
    lower_normalize,
    lower_score_bias,
    row_statistic_like,
)

OP = "attention"
OF_CACHE = frozenset({"seqlens_k", "block_table", "k_scale", "v_scale"})


def _attend(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor | tuple[Tensor, ...]:
    if type(q) is not Tensor and is_nested(q):
        return over_nested(attention, q, k, v, given)
    if not given:
        return call(SPEC, (q, k, v), given, used=1)[0]
    out, backend = take_options(attention, given)
    if not OF_CACHE.isdisjoint(given):
        if given.get("seqlens_k") is not None or given.get("block_table") is not None:
            return _over_cache(q, k, v, out=out, backend=backend, **given)
        for name in sorted(OF_CACHE & given.keys()):
            if (value := given.pop(name, None)) is not None:
                fail(OP, name, "requires a cache (seqlens_k)", value)
    used = 2 if given.get("return_lse") is True else 1
    results = call(SPEC, (q, k, v), given, backend, out, used=used)
    return results[:2] if used == 2 else results[0]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


@answered_by(_attend)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: Kind = "softmax",
    normalize: Normalize = None,
    scale: float | None = None,
    score_bias: ScoreBias = None,
    bias: Tensor | None = None,
    mask: Masks = None,
    alibi_slopes: Tensor | None = None,
    alibi_grid: Grid | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    post_decay: Decay2d | None = None,
    causal: bool = False,
    window: tuple[int, int] = NO_WINDOW,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    precision: Precision = "accurate",
    out: Tensor | None = None,
    backend: str | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact attention with any score map; the score matrix is never materialised.

    For query i and key j of one head, with :math:`r = i + S_k - S_q - j`:

    .. math::
        z_{ij} = cap(scale \; q_i \cdot k_j) + bias_{ij} - slope\,|r| + score\_bias, \qquad
        cap(x) = softcap \tanh(x / softcap)

    softmax: :math:`P_{ij} = e^{z_{ij} - lse_i}` with
    :math:`lse_i = \log(e^{sink} + \sum_j e^{z_{ij}})`; other kinds: :math:`P_{ij} = f(z_{ij})`,
    divided according to normalize:

    ==========  ==========================================================
    kind        f(z)
    ==========  ==========================================================
    "sigmoid"   :math:`1 / (1 + e^{-z})`
    "relu"      :math:`\max(z, 0)`, with derivative 1 at 0
    "elu1"      :math:`z + 1` for z > 0, else :math:`e^z`
    "linear"    :math:`z`
    "taylor2"   :math:`1 + z + z^2 / 2`
    ==========  ==========================================================

    Hidden pairs have :math:`P_{ij} = 0` whatever the kind; then :math:`out_i = \sum_j P_{ij} v_j`.

    Args:
        q: ``[B, Sq, H, D]``, or packed ``[Tq, H, D]`` with cu_seqlens; float16, bfloat16 or float32
            (float64 on the reference), D up to 256. Any strides; q, k and v are copied only where
            their last dimension is not contiguous. Jagged nested tensors ``[B, *, H, D]`` are
            packed sequences; out then is one, too.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]`` (packed ``[Tk, Hk, ...]``); Hk divides H;
            query head h reads head h // (H // Hk) (GQA, MQA) without copies. Dv up to 256.
        kind: "softmax", "sigmoid", "relu", "elu1", "linear" or "taylor2".
        normalize: for kinds other than softmax. None: weights unchanged. "sum": divided by
            :math:`s_i + 10^{-8}` with the row sum :math:`s_i = \sum_j f(z_{ij})`; with "linear",
            whose sums have either sign, by :math:`\max(|s_i|, 1)`. "count": divided by the number
            of keys visible to the query (after all masks, a bias of -inf included).
        scale: factor of q.k; None = 1/sqrt(D).
        score_bias: added to every score of a head: a float, "neg_log_n" (-log Sk; packed: for each
            sequence), or a tensor ``[H]`` or ``[B, H]``. None = 0. +inf gives weights of 1 in
            sigmoid; in softmax it makes the weights, lse and all gradients of the head NaN.
        bias: broadcastable to ``[B, H, Sq, Sk]`` (packed: ``[B, H, max_seqlen_q, max_seqlen_k]``),
            in the dtype of q or float32. -inf hides a pair; +inf is the largest finite logit. Or
            bool, like the attn_mask of scaled_dot_product_attention: True = visible. A bool mask is
            converted to a bias of the same shape in the dtype of q; it has no gradient.
        mask: of :mod:`tokenmill.masks` (prefix, segments, ranges), or a tuple of at most one of
            each class. A pair is visible if mask, causal and window all allow it.
        alibi_slopes: ``[H]`` or ``[B, H]``; subtracts slope times distance.
        alibi_grid: distances between cells of a grid (:func:`tokenmill.masks.grid`) instead of
            positions; Sq = Sk, not packed.
        sink: ``[H]``, softmax only: a learnable logit that adds to the row sum and has no value.
        softcap: 0 = off.
        post_decay: softmax only: weights are multiplied by gamma^distance on a grid after
            normalisation (:func:`tokenmill.masks.decay2d`), and not renormalised; lse is the value
            before the decay. Sq = Sk, neither packed nor with alibi_slopes.
        causal: query i sees keys j <= i + Sk - Sq (bottom-right aligned).
        window: (left, right) numbers of keys on each side of a query's own position; -1 = no limit.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``, offsets of the packed sequences;
            cu_seqlens_k None = cu_seqlens_q. On a GPU, which does not check these values, tokens
            before the first sequence and after the last one are empty rows: out 0, lse -inf,
            gradients 0.
        max_seqlen_q, max_seqlen_k: bounds on the lengths of packed sequences; None = all tokens.
        seqlens_k, block_table: k and v are a KV cache, ``[B, S, Hk, D]`` or pages ``[P, page size,
            Hk, D]``, with seqlens_k[b] keys for request b; q is ``[B, Sq, H, D]`` or packed
            with cu_seqlens_q, without cu_seqlens_k. This calls :func:`attention_decode` with the
            given causal, under its rules: forward only; no bias, alibi_grid, post_decay or
            precision "fast".
        return_lse: also return lse (softmax), or the row sums s (normalize="sum").
        precision: "fast" allows a hardware tanh for the sigmoid (absolute error 2^-12 in P).
        out: preallocated result: shape and dtype as returned, any non-overlapping strides with a
            contiguous last dimension; it shares no memory with the inputs. Then no input may
            require a gradient, unless under no_grad.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).
        k_scale, v_scale: scales of caches (seqlens_k) in float8_e4m3fn, as in
            :func:`attention_decode`.
        invariant: on CPUs one order of sums for any number of queries: a token has the same bits in
            a prompt, in any chunk of it and decoded (:func:`attention_decode` with invariant), a
            head the same alone and among others. Few queries of many keys take up to 4 times as
            long. True is refused on GPUs; the reference, which promises no bits, ignores it.

    Returns:
        out ``[B, Sq, H, Dv]`` (packed ``[Tq, H, Dv]``) in the dtype of q; with return_lse also lse
        ``[B, H, Sq]`` (packed ``[H, Tq]``) float32, natural log, or the row sums s of the same
        shape, both differentiable. A query with no visible key has out 0 and lse -inf (with a sink:
        lse = sink), s 0. Gradients: q, k, v, score_bias, bias, alibi_slopes, sink, gamma. Under
        torch.autocast q, k, v and bias are cast like the inputs of torch's
        scaled_dot_product_attention. Parts over disjoint keys: :func:`merge_attention_states`
        merges softmax by its lse and sums kinds without normalize; with "sum", numerators
        :math:`(s_i + 10^{-8})\,out_i` and row sums add up.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: 2 B H Sq Sk (D + Dv) operations over visible pairs, backward 2.5 times that; memory
    linear in Sq and Sk.

    Paper: FlashAttention-2 (Dao 2023); sigmoid: Theory, Analysis, and Best Practices for Sigmoid
    Self-Attention (Ramapuram et al. 2024), section 2 and, for the bias -log n, section 5; sink, and
    sigmoid and elu1 with "sum": When Attention Sink Emerges in Language Models (Gu et al. 2024);
    relu: Active-Dormant Attention Heads (Guo et al. 2024) and, with "count", Replacing Softmax with
    ReLU in Vision Transformers (Wortsman et al. 2023); taylor2: Simple Linear Attention Language
    Models Balance the Recall-Throughput Tradeoff (Arora et al. 2024).

    Example:
        >>> import torch, tokenmill as tm
        >>> q = torch.randn(2, 100, 8, 64)
        >>> k = v = torch.randn(2, 100, 2, 64)
        >>> tm.attention(q, k, v, causal=True).shape
        torch.Size([2, 100, 8, 64])
        >>> out, lse = tm.attention(q, k, v, window=(15, 0), return_lse=True)
        >>> lse.shape
        torch.Size([2, 8, 100])
        >>> tm.attention(q, k, v, kind="relu", normalize="count").shape
        torch.Size([2, 100, 8, 64])
    """
    raise NotImplementedError


DEFAULTS: dict[str, Any] = attention.__wrapped__.__kwdefaults__  # type: ignore[attr-defined]
SUPPORTED: frozenset[str] = attention_decode.keywords  # type: ignore[attr-defined]


def _over_cache(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor | tuple[Tensor, ...]:
    """Calls attention_decode, which supports a part of the arguments."""
    for name, default in DEFAULTS.items():
        value = given.get(name, default)
        if name not in SUPPORTED and (value is not None if default is None else value != default):
            fail(OP, name, "must not be given with a cache (seqlens_k)", value)
    if given.get("seqlens_k") is None:
        fail(OP, "seqlens_k", "must be given with block_table", None)
    options = {name: value for name, value in given.items() if name in SUPPORTED}
    options.setdefault("causal", DEFAULTS["causal"])
    results: Tensor | tuple[Tensor, ...] = attention_decode(q, k, v, **options)
    return results


def lower(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalize: str | None = None,
    scale: float | None = None,
    score_bias: ScoreBias = None,
    bias: Tensor | None = None,
    mask: Masks = None,
    alibi_grid: Grid | None = None,
    window: tuple[int, int] = NO_WINDOW,
    post_decay: Decay2d | None = None,
    return_lse: bool = False,
    **given: Any,
) -> tuple[Any, ...]:
    """given: the arguments that the schema has under the same name and of the same kind."""
    a = FORWARD.fields(q=q, k=k, v=v, **given)
    if bias is not None:
        check_tensor(OP, "bias", bias, optional=True)
        a["bias"] = _lower_bias(bias, q)
    if normalize is not None:
        a["normalize"] = lower_normalize(OP, normalize)
    if return_lse is not False:
        check_bool(OP, "return_lse", return_lse)
        check_return_lse(OP, a["kind"], a["normalize"])
    a["scale"] = scale_or_default(OP, scale, q)
    a["window_left"], a["window_right"] = as_window(OP, window)
    if a["cu_seqlens_q"] is not None and a["cu_seqlens_k"] is None:
        a["cu_seqlens_k"] = a["cu_seqlens_q"]
        if a["max_seqlen_k"] is None:
            a["max_seqlen_k"] = a["max_seqlen_q"]
    if post_decay is not None:
        absent = {name: a[name] for name in ("alibi_slopes", "cu_seqlens_q", "cu_seqlens_k")}
        a["alibi_slopes"], alibi_grid = _lower_post_decay(
            post_decay, q, {**absent, "alibi_grid": alibi_grid}
        )
        a["post_decay"] = True
    if mask is not None and k.dim() > 2:
        a["mask_ranges"], a["mask_q_spans"], a["mask_k_spans"] = lower_mask(
            OP, mask, q, k.shape[-3], causal=a["causal"], cu_seqlens_q=a["cu_seqlens_q"],
            cu_seqlens_k=a["cu_seqlens_k"],
        )  # fmt: skip
    if score_bias is not None:
        a["score_bias"], a["score_bias_value"], a["score_bias_neg_log_n"] = lower_score_bias(
            OP, score_bias, q
        )
    if alibi_grid is not None:
        a["grid_width"], a["grid_distance"], a["grid_window"] = _lower_grid(alibi_grid)
    if a["invariant"] and q.is_cuda:
        fail(OP, "invariant", "must be False on a GPU", True)
    widen_fields(a, q, "alibi_slopes", "sink")
    return tuple(a.values())


def _lower_grid(grid: Grid) -> tuple[int, str, int]:
    check(isinstance(grid, Grid), OP, "alibi_grid", "must be a tokenmill.masks.grid", grid)
    width, distance, window = masks.grid(grid.width, grid.distance, window=grid.window)
    return width, distance, -1 if window is None else window


def _lower_bias(bias: Tensor, q: Tensor) -> Tensor:
    """The bias as [..., Sq, Sk] with four dimensions; a bool mask becomes additive logits."""
    if bias.dtype == torch.bool:
        wide = not q.is_floating_point() or q.dtype.itemsize == 1  # no kernel takes either
        dtype = torch.float32 if wide else q.dtype
        bias = torch.zeros_like(bias, dtype=dtype).masked_fill_(~bias, -torch.inf)
    return bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias


# Replaces smaller decays, whose logarithm would be infinite; the weights left are below rounding.
MIN_GAMMA = 1e-20


def _lower_post_decay(decay: Decay2d, q: Tensor, absent: dict[str, Any]) -> tuple[Tensor, Grid]:
    """Slopes -log gamma and their grid. absent: arguments that post_decay excludes."""
    rule = "must be a tokenmill.masks.decay2d"
    ok = isinstance(decay, Decay2d) and isinstance(decay.grid, Grid)
    check(ok, OP, "post_decay", rule, decay)
    for name, value in absent.items():
        check(value is None, OP, name, "must be None with post_decay", value)
    decay = masks.decay2d(decay.gamma, *decay.grid)  # the record may have been built by hand
    gamma = widen(decay.gamma, q)
    gamma = gamma + (MIN_GAMMA - gamma.detach()).clamp(min=0)  # keeps the derivative 1
    return -gamma.log(), decay.grid


def _check_values(a: Any) -> None:
    """Lengths and offsets of packed sequences."""
    for side, total in (("q", a.q.shape[0]), ("k", a.k.shape[0])):
        name, bound = f"cu_seqlens_{side}", f"max_seqlen_{side}"
        starts = getattr(a, name)
        if starts is not None:
            ends = check_cu_seqlens_values(OP, name, starts, total)
            check_longest(OP, bound, ends, getattr(a, bound))


# Float32 gradients: the kernels return [B, H] for all of these but bias.
EXTRAS = ("score_bias", "bias", "alibi_slopes", "sink")


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    out = a.q.new_empty((*a.q.shape[:-1], a.v.shape[-1]))
    return out, row_statistic_like(a.q, a.kind, a.normalize)


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    heads = (a.q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.shape[0] - 1, a.q.shape[-2])

    def grad(name: str) -> Tensor:
        t, needed = getattr(a, name), getattr(a, f"needs_d{name}")
        shape = (0,) if not needed or t is None else t.shape if name == "bias" else heads
        return a.q.new_empty(shape, dtype=torch.float32)

    return (*(t.new_empty(t.shape) for t in (a.q, a.k, a.v)), *map(grad, EXTRAS))


def _setup_context(ctx: Any, a: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output if has_row_statistic(a["kind"], a["normalize"]) else (None, None)
    keep(ctx, a, None if a["normalize"] == "count" else out, lse)


def _backward(ops: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
    a, (out, lse) = kept(ctx)
    if dout is None:
        dout = a.q.new_zeros((*a.q.shape[:-1], a.v.shape[-1]))
    if dout.stride(-1) != 1:  # e.g. the expanded gradient of a sum
        dout = dout.contiguous()
    if dlse is not None:
        dlse = None if out is None else dlse.contiguous()  # the count has no gradient
    needed = needed_gradients(ctx)
    needs = [needed[name] for name in EXTRAS]
    dq, dk, dv, *grads = ops.attention_backward(dout, dlse, out, lse, *needs, *a)
    extra = {
        name: grad.sum_to_size(getattr(a, name).shape).to(getattr(a, name).dtype)
        for name, grad in zip(EXTRAS, grads, strict=True)
        if needed[name]
    }
    return dict(q=dq, k=dk, v=dv, **extra)


def flops(a: Any) -> float:
    """Operations of the two products over visible pairs."""
    right = 0 if a.causal else a.window_right
    starts_q, starts_k = a.cu_seqlens_q, a.cu_seqlens_k
    if starts_q is None:
        sizes = [(a.q.shape[1], a.k.shape[1])] * a.q.shape[0]
    elif known(starts_q) and known(starts_k):
        sizes = [*zip(starts_q.diff().tolist(), starts_k.diff().tolist(), strict=True)]
    else:
        sizes = [(a.q.shape[0], a.k.shape[0])]
    pairs = sum(band(sq, sk, a.window_left, right) for sq, sk in sizes)
    mask = (a.mask_ranges, a.mask_q_spans, a.mask_k_spans)
    batch = 1 if starts_q is not None else a.q.shape[0]
    pairs = min(pairs, masked_pairs(*mask, batch, a.k.shape[-3]))
    return 2.0 * a.q.shape[-2] * pairs * (a.q.shape[-1] + a.v.shape[-1])


def _unsupported(backend: str, a: Any) -> list[str]:
    if a.invariant and backend in ("cuda", "triton"):
        return ["invariant must be False"]
    return []


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "v", "bias")),
        check_values=_check_values,
        fake=_fake,
        triton="dense.attention:attention",
        backward=_backward,
        setup_context=_setup_context,
    )
)
OUT = register(TorchOp(OP + "_out"))
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="dense.attention:attention_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=attention,
        lower=lower,
        sugar=frozenset(
            {
                "normalize",
                "score_bias",
                "bias",
                "mask",
                "alibi_grid",
                "window",
                "post_decay",
                "return_lse",
                "invariant",
                "alibi_slopes",
                "sink",
                "cu_seqlens_q",
            }
        ),
        reference=reference.attention,
        plain=functools.partial(reference.attention, upcast=False),
        forward=FORWARD,
        as_packed=as_packed,
        copied=("q", "k", "v"),
        differentiable=("q", "k", "v", "score_bias", "bias", "alibi_slopes", "sink"),
        logarithms=(1,),
        over_cache="attention_decode",
        unsupported=_unsupported,
        sharding=Sharding(
            {
                "q k v": "b.h.",
                "score_bias alibi_slopes sink": "bh",
                "mask_q_spans mask_k_spans": "b..",
                "bias": "bh..",
                "mask_ranges": "bh...",
            },
            ("b.h.", "bh."),
        ),
        paper="FlashAttention-2 (Dao 2023); Sigmoid Self-Attention (Ramapuram et al. 2024)",
        flops=flops,
        backward_flops=lambda a: 2.5 * flops(a),  # five products
    )
)
