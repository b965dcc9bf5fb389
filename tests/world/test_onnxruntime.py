"""onnxruntime's CPU kernels as an oracle: attention, caches, selection, recurrences.

The operators are specified in https://onnx.ai/onnx/operators (Attention-24, RotaryEmbedding-23,
TopK-24, LinearAttention-27) and in onnxruntime's docs/ContribOperators.md (GroupQueryAttention,
MultiHeadAttention, LinearAttention).
"""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from each import each_backend, ints
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import MICROSOFT, answer
from tier import daily, examples

import tokenmill as tm

# Both sum in float32; they differ only in summation order.
CLOSE = {"rtol": 1e-5, "atol": 3e-6}
ON_HOST = [b for b in backends("reference") if b in ("cpu", "reference")]
on_host = pytest.mark.parametrize("backend", ON_HOST)


def close(found, wanted):
    torch.testing.assert_close(found.cpu(), wanted, **CLOSE)


def heads_first(x):
    """[B, S, H, D] <-> [B, H, S, D]."""
    return x.transpose(1, 2).contiguous()


def moved(backend, *tensors):
    return [t if t is None else t.to(device_of(backend)) for t in tensors]


# Options of an ONNX call, and of ours. Without a cache, onnx aligns causal rows top-left.
CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "causal": {"is_causal": 1},
    "mask": {"mask": "bool"},
    "bias": {"mask": "float", "softcap": 2.0},
    "bias of each head": {"mask": "heads", "is_causal": 1},
}
FEW = ("softcap", "bias of each head")


def drawn(seed, b=2, sq=5, sk=9, h=4, hk=2, d=16, dv=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, dv))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def mask_of(kind, q, k, seed=1):
    """Mask [B, H, Sq, Sk], with size 1 where broadcast; one row of the boolean mask sees
    nothing."""
    g = torch.Generator().manual_seed(seed)
    pairs = (q.shape[1], k.shape[1])
    if kind == "bool":
        seen = torch.rand(pairs, generator=g) < 0.6
        seen[0] = False
        return seen
    lead = (1, 1) if kind == "float" else (q.shape[0], q.shape[2])
    return torch.randn(*lead, *pairs, generator=g).to(q.dtype)


def theirs(q, k, v, mask=None, *, opset=24, **options):
    given = [heads_first(x) for x in (q, k, v)]
    return heads_first(answer("Attention", [*given, mask], opset=opset, **options)[0])


def ours(q, k, v, mask, backend, is_causal=0, **options):
    if is_causal and q.shape[1] == k.shape[1]:
        options["causal"] = True
    elif is_causal:  # query i sees keys 0 .. i
        end = ints(*range(1, q.shape[1] + 1))[None, None, :, None]
        options["mask"] = tm.masks.ranges(*moved(backend, torch.zeros_like(end), end))
    q, k, v, mask = moved(backend, q, k, v, mask)
    return tm.attention(q, k, v, bias=mask, backend=backend, **options)


@pytest.mark.parametrize(
    ("case", "backend"),
    [(c, b) for b in backends("reference") for c in (CASES if b in ON_HOST else FEW)],
)
def test_attention_is_that_of_onnx(case, backend):
    options = dict(CASES[case])
    q, k, v = drawn(0)
    mask = options.pop("mask", None)
    mask = None if mask is None else mask_of(mask, q, k)
    wanted = theirs(q, k, v, mask, **options)
    close(ours(q, k, v, mask, backend, **options), wanted)


@pytest.mark.parametrize("opset", daily("23", full=("25",)))
@on_host
def test_attention_of_other_opsets(opset, backend):
    q, k, v = drawn(2, sk=5)
    wanted = theirs(q, k, v, is_causal=1, opset=int(opset))
    close(ours(q, k, v, None, backend, is_causal=1), wanted)


@pytest.mark.skipif(not ON_HOST, reason="neither cpu nor reference is selected")
@examples(30)
@given(data=st.data())
def test_any_attention_is_that_of_onnx(data):
    draw = data.draw
    hk, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3)]))
    size = st.integers(1, 70)
    q, k, v = drawn(
        draw(st.integers(0, 9)), draw(st.integers(1, 2)), draw(size), draw(size), hk * group, hk,
        draw(size), draw(size),
    )  # fmt: skip
    options = {
        "is_causal": draw(st.integers(0, 1)),
        "softcap": draw(st.sampled_from([0.0, 2.5])),
        "scale": draw(st.sampled_from([0.3, 0.05])),
    }
    kind = draw(st.sampled_from([None, "bool", "float", "heads"]))
    mask = None if kind is None else mask_of(kind, q, k)
    wanted = theirs(q, k, v, mask, **options)
    for backend in ON_HOST:
        close(ours(q, k, v, mask, backend, **options), wanted)


@on_host
def test_16_bits_are_as_good_as_those_of_onnxruntime(backend):
    q, k, v = drawn(3, sq=33, sk=70, dtype=torch.float16)
    plain = theirs(q, k, v, softcap=2.0)
    oracle = theirs(q.float(), k.float(), v.float(), softcap=2.0)
    found = ours(q, k, v, None, backend, softcap=2.0)
    tm.testing.assert_accurate(found, oracle, plain)


@each_backend
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_lengths_of_a_cache(causal, backend):
    """nonpad_kv_seqlen: keys per request; the leading queries of the last request see nothing."""
    q, k, v = drawn(4, b=3, sq=4, sk=12)
    lengths = ints(12, 7, 2)
    given = [heads_first(x) for x in (q, k, v)]
    inputs = [*given, None, None, None, lengths.long()]
    wanted = heads_first(answer("Attention", inputs, is_causal=int(causal))[0])
    q, k, v, lengths = moved(backend, q, k, v, lengths)
    close(tm.attention(q, k, v, seqlens_k=lengths, causal=causal, backend=backend), wanted)
    found = tm.attention_decode(q, k, v, seqlens_k=lengths, causal=causal, backend=backend)
    close(found, wanted)


@each_backend
def test_new_keys_after_past_ones(backend):
    """past_key and present_key: kv_cache_append and attention_decode do the same in place."""
    q, k, v = drawn(5, sq=3, sk=3)
    _, past_k, past_v = drawn(6, sk=6)
    inputs = [*map(heads_first, (q, k, v)), None, *map(heads_first, (past_k, past_v))]
    wanted, *present = answer("Attention", inputs, 3, is_causal=1, softcap=2.0)
    caches = [torch.cat([x, torch.zeros_like(x)], 1) for x in (past_k, past_v)]
    q, k, v, *caches = moved(backend, q, k, v, *caches)
    slots = torch.arange(6, 9) + 12 * torch.arange(2)[:, None]
    slots = slots.flatten().to(q.device)
    tm.kv_cache_append(*caches, k.flatten(0, 1), v.flatten(0, 1), slots, backend=backend)
    for cache, of_onnx in zip(caches, present, strict=True):
        assert torch.equal(cache[:, :9].cpu(), heads_first(of_onnx))
    lengths = ints(9, 9).to(q.device)
    options = {"seqlens_k": lengths, "softcap": 2.0, "backend": backend}
    close(tm.attention_decode(q, *caches, **options), heads_first(wanted))


# B, S, past tokens, options. onnxruntime takes several tokens after a past only for B = 1.
STEPS = {
    "a step": (2, 1, (7, 3), {}),
    "softcap": (2, 1, (7, 3), {"softcap": 1.5}),
    "window": (2, 1, (7, 3), {"local_window_size": 4}),
    "smooth softmax": (2, 1, (7, 3), {"smooth_softmax": 1}),
    "sinks": (2, 1, (7, 3), {"sinks": True}),
    "rotary": (2, 1, (7, 3), {"do_rotary": 1}),
    "rotary of neighbours": (2, 1, (7, 3), {"do_rotary": 1, "rotary_interleaved": 1}),
    "a chunk": (1, 4, (5,), {"local_window_size": 3, "do_rotary": 1}),
    "a prompt": (2, 8, (0, 0), {"do_rotary": 1, "softcap": 2.0}),
}
FEW_STEPS = ("window", "sinks", "rotary of neighbours", "a chunk")


@pytest.mark.parametrize(
    ("case", "backend"),
    [(c, b) for b in backends("reference") for c in (STEPS if b in ON_HOST else FEW_STEPS)],
)
def test_a_step_is_group_query_attention(case, backend):
    """Rotation, cache update and attention over the cache: one operator there, two here. A window
    of w there is (w - 1, 0) here; its smooth softmax has a sink of 0."""
    batch, tokens, past, options = STEPS[case]
    options = dict(options)
    h, hk, d, capacity = 4, 2, 16, 12
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    q = randn(batch, tokens, h, d)
    k, v = randn(2, batch, tokens, hk, d)
    caches = list(randn(2, batch, capacity, hk, d))
    lengths = ints(*past) + tokens
    cos, sin = randn(2, 16, d // 2) if options.get("do_rotary") else (None, None)
    sink = randn(h) if options.pop("sinks", None) else None
    inputs = [
        *(x.flatten(2) for x in (q, k, v)), *map(heads_first, caches), lengths - 1,
        lengths.max(), cos, sin, None, None, sink,
    ]  # fmt: skip
    wanted, *present = answer(
        "GroupQueryAttention", inputs, 3, domain=MICROSOFT, num_heads=h, kv_num_heads=hk, **options
    )

    positions = ints(*past)[:, None] + torch.arange(tokens)
    slots = (positions + capacity * torch.arange(batch)[:, None]).flatten()
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    rows = moved(backend, *rows, *caches, slots, lengths, cos, sin, sink, positions.flatten())
    q, k, v, *caches, slots, lengths, cos, sin, sink, positions = rows
    if cos is not None:
        interleaved = bool(options.get("rotary_interleaved"))
        rope = {"q": q, "rope": (cos, sin, positions), "interleaved": interleaved}
        q = tm.kv_cache_append(*caches, k, v, slots, **rope, backend=backend)
    else:
        tm.kv_cache_append(*caches, k, v, slots, backend=backend)
    for cache, of_onnx in zip(caches, present, strict=True):
        for b, n in enumerate(lengths.tolist()):
            close(cache[b, :n], heads_first(of_onnx)[b, :n])
    if options.get("smooth_softmax"):
        sink = torch.zeros(h, device=q.device)
    found = tm.attention_decode(
        q.view(batch, tokens, h, d), *caches, seqlens_k=lengths, sink=sink,
        softcap=options.get("softcap", 0.0), window=(options.get("local_window_size", 0) - 1, 0),
        backend=backend,
    )  # fmt: skip
    close(found.flatten(2), wanted)


@each_backend
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_rotation_is_rotary_embedding(interleaved, backend):
    """Rotates the first 12 of 16 channels."""
    g = torch.Generator().manual_seed(0)
    q, cos, sin = (torch.randn(s, generator=g) for s in ((2, 5, 4, 16), (9, 6), (9, 6)))
    positions = torch.randint(0, 9, (2, 5), generator=g)
    wanted = answer(
        "RotaryEmbedding", [heads_first(q), cos, sin, positions], opset=23,
        interleaved=int(interleaved), rotary_embedding_dim=12,
    )[0]  # fmt: skip
    rows, cos, sin, positions = moved(backend, q.flatten(0, 1), cos, sin, positions.flatten())
    cache = torch.zeros(1, 10, 4, 16, device=rows.device)
    slots = torch.arange(10, device=rows.device)
    rope = (cos, sin, positions)
    options = {"q": rows, "rope": rope, "interleaved": interleaved, "backend": backend}
    turned = tm.kv_cache_append(cache, None, rows, None, slots, **options)
    close(turned.view(2, 5, 4, 16), heads_first(wanted))
    close(cache.view(2, 5, 4, 16), heads_first(wanted))


@on_host
def test_keys_of_padded_sentences(backend):
    """MultiHeadAttention: a length per sentence, and a bias added to the scores."""
    q, k, v = drawn(7, sq=6, sk=6, hk=4, dv=16)
    lengths = ints(6, 3)
    bias = torch.randn(1, 4, 6, 6)
    inputs = [*(x.flatten(2) for x in (q, k, v)), None, lengths, bias]
    wanted = answer("MultiHeadAttention", inputs, domain=MICROSOFT, num_heads=4)[0].view_as(q)
    hidden = torch.where(torch.arange(6) < lengths[:, None], 0.0, -torch.inf)[:, None, None]
    close(tm.attention(q, k, v, bias=bias + hidden, backend=backend), wanted)
    wanted = answer("MultiHeadAttention", inputs[:5], domain=MICROSOFT, num_heads=4)[0].view_as(q)
    found = tm.attention(q, k, v, seqlens_k=lengths, causal=False, backend=backend)
    close(found, wanted)


@on_host
@examples(20)
@given(seed=st.integers(0, 99), n=st.integers(1, 300), levels=st.sampled_from([2, 9, 1000]))
def test_topk_is_that_of_onnx(backend, seed, n, levels):
    """Values, indices and their order agree; ties go to the lower index."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (3, n), generator=g).float() - levels // 2
    k = 1 + seed % n
    for largest in (1, 0):
        values, wanted = answer(
            "TopK", [scores, torch.tensor([k])], 2, largest=largest,
            output_types=(torch.float32, torch.int64),
        )  # fmt: skip
        signed = scores if largest else -scores
        indices, counts, found = tm.topk_select(
            signed.to(device_of(backend)), k, order="score", return_values=True, backend=backend
        )
        assert (counts == k).all()
        assert torch.equal(indices.cpu().long(), wanted)
        assert torch.equal(found.cpu(), values if largest else -values)


def recurrence(rule, decay, beta, domain, seed=0, h=4, hk=2, tokens=37):
    """Inputs of one recurrence [B, T, H, D], and onnxruntime's results."""
    g = torch.Generator().manual_seed(seed)
    b, d, dv = 2, 16, 8
    q = torch.randn(b, tokens, h, d, generator=g)
    k = torch.nn.functional.normalize(torch.randn(b, tokens, hk, d, generator=g), dim=-1)
    v = torch.randn(b, tokens, hk, dv, generator=g)
    state = torch.randn(b, hk, d, dv, generator=g)
    decay = -torch.rand(b, tokens, hk, generator=g) if decay else None
    beta = torch.rand(b, tokens, hk, generator=g) if beta else None
    out, final = answer(
        "LinearAttention", [*(x.flatten(2) for x in (q, k, v)), state, decay, beta], 2,
        opset=24 if domain else 27, domain=domain, update_rule=rule, q_num_heads=h,
        kv_num_heads=hk, scale=0.5,
    )  # fmt: skip
    return q, k, v, state, decay, beta, out.view(b, tokens, h, dv), final


DOMAINS = pytest.mark.parametrize("domain", ["", MICROSOFT], ids=["onnx", "contrib"])


@DOMAINS
@each_backend
@pytest.mark.parametrize("rule", ["linear", "gated"])
def test_recurrences_are_linear_attention(rule, backend, domain):
    """States are per KV head there and per query head here."""
    tokens = 37 if backend in ON_HOST else 5
    decay = rule == "gated"
    *call, wanted, final = recurrence(rule, decay, False, domain, tokens=tokens)
    q, k, v, state, decay, _ = moved(backend, *call)
    if decay is not None:
        decay = decay.repeat_interleave(2, 2)
    found, left = tm.linear_attention(
        q, k, v, log_decay=decay, scale=0.5, initial_state=state.repeat_interleave(2, 1),
        return_final_state=True, backend=backend,
    )  # fmt: skip
    close(found, wanted)
    close(left, final.repeat_interleave(2, 1))


@DOMAINS
@each_backend
def test_the_delta_rule_is_a_titans_memory_without_momentum(backend, domain):
    """The delta rule in chunks of one token: theta is the update rate, and nothing decays."""
    tokens = 37 if backend in ON_HOST else 5
    *call, wanted, final = recurrence("delta", False, True, domain, h=2, tokens=tokens)
    q, k, v, state, _, beta = moved(backend, *call)
    nothing = torch.zeros_like(beta)
    found, (left, _) = tm.titans_memory(
        0.5 * q, k, v, alpha=nothing, eta=nothing, theta=beta, chunk_size=1,
        initial_state=(state, torch.zeros_like(state)), return_final_state=True, backend=backend,
    )  # fmt: skip
    close(found, wanted)
    close(left, final)
