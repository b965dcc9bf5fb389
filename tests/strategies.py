"""Hypothesis strategies for operator calls: shapes, strides, lengths, masks, hostile values."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tokenmill.linear.linear_attention_cases import draw_state
from tokenmill.registry import Sample

LENGTHS = st.one_of(st.sampled_from([0, 1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65]), st.integers(0, 70))
HEAD_DIMS = st.one_of(st.sampled_from([1, 8, 16, 32, 64]), st.integers(1, 80))
WINDOWS = st.one_of(st.just(-1), st.integers(0, 70))


def accepted_tokens(batch, tokens):
    """The tokens that the states of a decode step keep, None or a number for each request."""
    return st.one_of(st.none(), st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))


def layouts(shape, dtype, generator):
    """Tensors of one shape in the memory layouts that callers use."""
    return (
        lambda: torch.randn(shape, generator=generator).to(dtype),
        # [B, H, S, D] viewed as [B, S, H, D]
        lambda: torch.randn(_swapped(shape), generator=generator).to(dtype).transpose(-3, -2),
        # one part of a fused projection
        lambda: torch.randn((*shape[:-1], 3 * shape[-1]), generator=generator).to(dtype)[
            ..., shape[-1] : 2 * shape[-1]
        ],
    )


def _swapped(shape):
    return (*shape[:-3], shape[-2], shape[-3], shape[-1])


@st.composite
def attention_samples(draw, max_length=70, kinds=("softmax", "sigmoid"), normalizers=None):
    """Draws a sample of attention with any combination of options; with normalizers, of kinds that
    support them, and with biases of -inf."""
    length = LENGTHS.filter(lambda n: n <= max_length)
    kind = draw(st.sampled_from(kinds))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (1, 7)]))
    heads = kv_heads * group
    d, dv = draw(HEAD_DIMS), draw(HEAD_DIMS)
    packed = draw(st.booleans())
    if packed:
        n = draw(st.integers(0, 3))
        lengths_q = draw(st.lists(length, min_size=n, max_size=n))
        lengths_k = draw(st.lists(length, min_size=n, max_size=n))
        batch, sq, sk = n, sum(lengths_q), sum(lengths_k)
        full = (n, heads, max(lengths_q, default=0), max(lengths_k, default=0))
    else:
        batch, sq, sk = draw(st.integers(0, 2)), draw(length), draw(length)
        full = (batch, heads, sq, sk)
    options = {
        "kind": kind,
        "causal": draw(st.booleans()),
        "window": (draw(WINDOWS), draw(WINDOWS)),
        "scale": draw(st.sampled_from([None, 0.0, 0.3, -0.2, 1.5])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.5])),
    }
    if normalizers:
        # A relu row may sum to almost 0: the result is as ill-conditioned as that sum.
        options["normalize"] = draw(
            st.sampled_from(normalizers if kind != "relu" else [None, "count"])
        )
    if kind == "softmax" or options.get("normalize") == "sum":
        options["return_lse"] = True
    score_bias = draw(st.sampled_from([None, -3.0, "neg_log_n", (heads,), (batch, heads)]))
    slopes = draw(st.sampled_from([None, None, (heads,), (batch, heads)]))
    sink = draw(st.sampled_from([None, (heads,)])) if kind == "softmax" else None
    keep = draw(st.tuples(*[st.booleans()] * 4))
    bias = None
    if draw(st.sampled_from([False, False, True])):
        bias = tuple(f if k else 1 for f, k in zip(full, keep, strict=True))
    layout = draw(st.tuples(*[st.integers(0, 2)] * 3))

    def make(dtype, g):
        lead = () if packed else (batch,)
        q, k, v = (
            layouts(lead + shape, dtype, g)[i]()
            for shape, i in zip(
                ((sq, heads, d), (sk, kv_heads, d), (sk, kv_heads, dv)), layout, strict=True
            )
        )
        wide = torch.promote_types(dtype, torch.float32)
        kwargs = dict(options)
        kwargs["score_bias"] = score_bias
        if isinstance(score_bias, tuple):
            kwargs["score_bias"] = torch.randn(score_bias, generator=g).to(wide)
        for name, shape in (("alibi_slopes", slopes), ("sink", sink)):
            if shape is not None:
                kwargs[name] = torch.randn(shape, generator=g).abs().to(wide)
        if bias is not None:
            kwargs["bias"] = torch.randn(bias, generator=g).to(dtype)
            if normalizers:
                kwargs["bias"][torch.rand(bias, generator=g) < 0.2] = -torch.inf
        if packed:
            for name, lengths in (("q", lengths_q), ("k", lengths_k)):
                ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
                kwargs[f"cu_seqlens_{name}"] = ends
                kwargs[f"max_seqlen_{name}"] = max(lengths, default=0)
        return (q, k, v), kwargs

    shapes = f"q {(batch, sq, heads, d)} k {(batch, sk, kv_heads, d)} v {dv} packed {packed}"
    terms = f"{options} bias {bias} score_bias {score_bias} slopes {slopes} sink {sink}"
    return Sample(f"{shapes} {terms}", make)


@st.composite
def linear_samples(
    draw,
    max_length=140,
    maps=("identity", "elu1", "relu", "silu", "taylor2"),
):
    """Draws a sample of linear attention with any combination of options."""
    lengths = st.one_of(
        st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129]), st.integers(0, 140)
    ).filter(lambda n: n <= max_length)
    feature_map = draw(st.sampled_from(maps))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3)]))
    heads = kv_heads * group
    d, dv = draw(st.integers(1, 20) if feature_map == "taylor2" else HEAD_DIMS), draw(HEAD_DIMS)
    packed = draw(st.booleans())
    sequences = draw(st.lists(lengths, max_size=3)) if packed else None
    n, length = draw(st.integers(0, 2)), draw(lengths)
    lead = (sum(sequences),) if packed else (n, length)
    n = len(sequences) if packed else n
    decays = [None, "head", "steep", "token", "steep token"]
    if feature_map == "identity":
        decays += ["channel", "steep channel"]
    decay = draw(st.sampled_from(decays))
    with_state = draw(st.booleans())
    # Weights of both signs may have a normalizer near 0. Over one token out is v, and gradients of
    # q and k are rounding errors.
    longest = max(sequences, default=0) if packed else length
    positive = feature_map in ("elu1", "taylor2") and (longest > 1 or with_state)
    normalize = draw(st.booleans()) if positive else False
    options = {
        "feature_map": feature_map,
        "normalize": normalize,
        "scale": draw(st.sampled_from([None, 0.3] + ([] if normalize else [0.0, -0.2]))),
        "chunk_size": draw(st.sampled_from([None, 16, 32, 64, 128, 256])),
        "return_final_state": draw(st.booleans()),
    }
    layout = draw(st.tuples(*[st.integers(0, 2)] * 3))

    def make(dtype, g):
        q, k, v = (
            layouts(lead + shape, dtype, g)[i]()
            for shape, i in zip(((heads, d), (kv_heads, d), (kv_heads, dv)), layout, strict=True)
        )
        wide = torch.promote_types(dtype, torch.float32)
        kwargs = dict(options)
        shape = (*lead, heads, d) if decay and "channel" in decay else (*lead, heads)
        if decay in ("token", "channel"):
            gates = torch.randn(shape, generator=g) * 3 + 2
            kwargs["log_decay"] = torch.nn.functional.logsigmoid(gates).to(wide)
        elif decay in ("steep token", "steep channel"):
            kwargs["log_decay"] = -(20 * torch.rand(shape, generator=g)).to(wide)
        elif decay is not None:
            top = 0.5 if decay == "head" else 20.0
            kwargs["log_decay"] = -(top * torch.rand(heads, generator=g)).to(wide)
        if packed:
            kwargs["cu_seqlens"] = torch.tensor([0, *sequences]).cumsum(0).to(torch.int32)
        if with_state:
            shape = (n, heads, d, dv)
            kwargs["initial_state"] = draw_state(shape, feature_map, normalize, dtype, g)
        return (q, k, v), kwargs

    shapes = f"q {(*lead, heads, d)} kv heads {kv_heads} v {dv} sequences {sequences}"
    return Sample(f"{shapes} {options} decay {decay} state {with_state}", make)
