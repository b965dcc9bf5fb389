"""landmark_decode against the inference rule of the released code: several queries, retrieval with
rotary embedding, and a prompt in chunks."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import gradients
from conftest import backends
from each import each_backend, ints
from hypothesis import given
from hypothesis import strategies as st
from landmark_calls import inputs
from tier import examples

import tokenmill as tm


def angles(positions, pairs):
    frequencies = 50.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    return positions[..., None].double() * frequencies.to(positions.device)


def tables(rows, pairs, device="cpu"):
    """cos and sin of the first positions."""
    at = angles(torch.arange(rows, device=device), pairs)
    return at.cos().float(), at.sin().float()


def turned(x, positions):
    """x [..., n, D] at positions [n]: pairs are columns (i, i + D / 2)."""
    at = angles(positions, x.shape[-1] // 2).to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * at.cos() - b * at.sin(), a * at.sin() + b * at.cos()], -1)


def span(first, count, like):
    return torch.arange(first, first + count, device=like.device)


def as_released(q, k, v, block, topk, share="none", rotate=True):
    """One request: q [Sq, H, D] are the newest tokens of k and v [n, Hk, D], all without positions.

    It computes what epfml/landmark-attention at d963e50 does with a cache (llama/llama_mem.py,
    LlamaAttention with mem_freq = block - 1 and cache_top_k): places are positions in the text, and
    the topk + 1 slots end at the start of the block in which the queries begin. share="queries" is
    its "max_over_tokens", "heads" is "max_over_heads" of lm_benchmark/models/caches/mem_cache.py.
    """
    turn = turned if rotate else lambda x, positions: x
    count, heads = q.shape[:2]
    begin = len(k) - count
    blocks = begin // block
    full, kept = blocks * block, min(topk, blocks)
    first_slot = full - (kept + 1) * block
    repeated = [t.repeat_interleave(heads // t.shape[1], 1).transpose(0, 1) for t in (k, v)]
    keys, values = repeated  # [H, n, D]
    rows = turn(q.transpose(0, 1), span(begin, count, q))
    scale = q.shape[2] ** -0.5
    slot = (span(0, blocks, q) - (blocks - kept) + 1).clamp(min=0)
    marks = turn(keys[:, block - 1 : full : block], first_slot + slot * block + block - 1)
    scores = torch.softmax(scale * rows @ marks.transpose(1, 2), -1)  # [H, Sq, blocks]
    if share != "none":
        scores = scores.amax(0 if share == "heads" else 1, keepdim=True).expand_as(scores)
    local = turn(keys[:, full:], span(full, len(k) - full, q))
    out = torch.zeros(count, heads, v.shape[2], dtype=q.dtype, device=q.device)
    log_z = torch.zeros(heads, count, dtype=q.dtype, device=q.device)
    for h in range(heads):
        for i in range(count):
            groups = []  # (logit of the landmark, logits of its tokens, their values)
            chosen = sorted(scores[h, i].topk(kept).indices.tolist()) if kept else []
            for place, b in enumerate(chosen):
                at = first_slot + (place + (b >= blocks - kept)) * block
                held = slice(b * block, b * block + block)
                z = scale * turn(keys[h, held], span(at, block, q)) @ rows[h, i]
                groups.append((z[-1], z[:-1], values[h, held][:-1]))
            z = scale * local[h] @ rows[h, i]
            own = (begin + i - full) // block * block
            for b in range(0, own, block):
                held = values[h, full + b : full + b + block - 1]
                groups.append((z[b + block - 1], z[b : b + block - 1], held))
            last = min(begin + i - full + 1, own + block - 1)
            logits = torch.cat([z[own:last], *(mark[None] for mark, _, _ in groups)])
            log_z[h, i] = logits.logsumexp(0)
            w = (logits - log_z[h, i]).exp()
            row = w[: last - own] @ values[h, full + own : full + last]
            for share_, (_, inner, held) in zip(w[last - own :], groups, strict=True):
                row = row + share_ * torch.softmax(inner, 0) @ held
            out[i, h] = row
    return out, log_z


def close(got, want, tolerance=5e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def paged(k, v, size):
    """Dense caches as pages in reverse order, and their block_table."""
    pages = -(-k.shape[1] // size)
    table = torch.arange(len(k) * pages, device=k.device).flip(0).view(len(k), pages)
    caches = []
    for t in (k, v):
        t = torch.nn.functional.pad(t, (0, 0, 0, 0, 0, pages * size - t.shape[1]), value=torch.nan)
        caches.append(t.reshape(-1, size, *t.shape[2:])[table.flatten().argsort()])
    return (*caches, table.int())


@each_backend
@examples(5)
@given(
    lengths=st.lists(st.integers(4, 60), min_size=1, max_size=2),
    count=st.sampled_from([1, 1, 2, 4]),
    block=st.sampled_from([2, 3, 8]),
    topk=st.sampled_from([1, 2, 3, 50]),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    share=st.sampled_from(["none", "queries", "heads"]),
    rotate=st.booleans(),
    page_size=st.sampled_from([None, 4]),
    seed=st.integers(0, 2**31),
)
def test_the_rule_of_the_release(
    lengths, count, block, topk, heads, share, rotate, page_size, seed, backend
):
    """The rotary tables have the rows that topk + 2 blocks and the queries need, or the whole
    cache."""
    held = max(lengths)
    q, k, v = (t.detach() for t in inputs(backend, held, *heads, b=len(lengths), seed=seed))
    q = q[:, :count]
    n = ints(*lengths).to(q.device)
    caches = paged(k, v, page_size) if page_size else (k, v, None)
    room = caches[2].shape[1] * page_size if page_size else held
    rope = tables(min(room, (topk + 2) * block + count - 1), 4, q.device) if rotate else None
    got = tm.landmark_decode(
        q, *caches[:2], block_table=caches[2], seqlens_k=n, block=block, topk=topk, share=share,
        rope=rope, return_lse=True, backend=backend,
    )  # fmt: skip
    for b, length in enumerate(lengths):
        want = as_released(q[b], k[b, :length], v[b, :length], block, topk, share, rotate)
        close([t[b] for t in got], list(want))


@each_backend
@pytest.mark.parametrize("share", ["none", "queries"])
def test_gradients_are_those_of_the_rule(share, backend):
    q, k, v = inputs(backend, 41, b=1)
    rope = tables(8 * 4 + 2, 4, q.device)
    n = ints(41).to(q.device)
    got = tm.landmark_decode(
        q[:, :3], k, v, seqlens_k=n, block=8, topk=2, share=share, rope=rope, backend=backend
    )
    want = as_released(q[0, :3], k[0], v[0], 8, 2, share)[0][None]
    close(gradients([got], [q, k, v]), gradients([want], [q, k, v]), 2e-4)


@each_backend
@pytest.mark.parametrize("count", [1, 9])
def test_all_blocks_are_the_last_rows_of_the_whole(count, backend):
    q, k, v = (t.detach() for t in inputs(backend, 21, b=2))
    rope = tables(21, 4, q.device)
    n = ints(21, 21).to(q.device)
    got = tm.landmark_decode(
        q[:, -count:], k, v, seqlens_k=n, block=6, rope=rope, return_lse=True, backend=backend
    )
    at = span(0, 21, q)
    turned_q, turned_k = (turned(t.transpose(1, 2), at).transpose(1, 2) for t in (q, k))
    out, lse = tm.landmark_attention(
        turned_q, turned_k, v, block=6, return_lse=True, backend=backend
    )
    close(got, (out[:, -count:], lse[:, :, -count:]))


def a_model(x, chunks, attend):
    """Two attention layers that read a text [n, 16] in chunks, each with its own cache."""
    g = torch.Generator().manual_seed(5)
    weights = [
        [torch.randn(16, c, generator=g).to(x) / 4 for c in (32, 16, 24, 48)] for _ in range(2)
    ]
    caches = [(x.new_zeros(len(x), 2, 8), x.new_zeros(len(x), 2, 12)) for _ in weights]
    outs, at = [], 0
    for count in chunks:
        h = x[at : at + count]
        for (wq, wk, wv, wo), (k, v) in zip(weights, caches, strict=True):
            k[at : at + count] = (h @ wk).view(-1, 2, 8)
            v[at : at + count] = (h @ wv).view(-1, 2, 12)
            out = attend((h @ wq).view(-1, 4, 8), k, v, at + count)
            h = torch.tanh(h + out.reshape(count, 48) @ wo.reshape(16, 48).T)
        outs.append(h)
        at += count
    return torch.cat(outs)


@each_backend
def test_a_model_reads_a_prompt_in_chunks_and_goes_on(backend):
    """8 tokens at a time with blocks of 4, of which 1 is retrieved, then token by token: 6 blocks
    before the last one, and a table of 19 positions."""
    block, topk, chunks = 4, 1, [8] * 3 + [1] * 2
    x = torch.randn(26, 16, generator=torch.Generator().manual_seed(6))
    x = x.to(inputs(backend, 1)[0].device)
    rope = tables((topk + 2) * block + 7, 4, x.device)

    def attend(q, k, v, length):
        return tm.landmark_decode(
            q[None], k[None], v[None], seqlens_k=ints(length).to(q.device), block=block,
            topk=topk, rope=rope, backend=backend,
        )[0]  # fmt: skip

    def rule(q, k, v, length):
        return as_released(q, k[:length], v[:length], block, topk)[0]

    close(a_model(x, chunks, attend), a_model(x, chunks, rule), 2e-4)


@pytest.mark.parametrize("share", ["none", "queries", "heads"])
@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
def test_a_request_has_the_bits_that_it_has_alone(backend, share):
    q, k, v = (t.detach() for t in inputs(backend, 60, b=5))
    rope, n = tables(60, 4), ints(60, 17, 33, 48, 5)

    def result(requests):
        return tm.landmark_decode(
            q[requests, -4:], k[requests], v[requests], seqlens_k=n[requests], block=8, topk=2,
            share=share, rope=rope, return_lse=True, backend=backend,
        )  # fmt: skip

    whole = result(slice(None))
    for at in (slice(0, 1), slice(2, 3), slice(1, 4)):
        assert all(torch.equal(a, b[at]) for a, b in zip(result(at), whole, strict=True))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"share": "all"}, "share: must be 'none', 'queries' or 'heads'; got 'all'"),
        ({"interleaved": 1}, "interleaved: must be a bool; got 1"),
        ({"rope": torch.zeros(9, 4)}, "rope: must be \\(cos, sin\\); got 'Tensor'"),
        ({"rope": tables(18, 4)},
         r"rope: must have shape \[positions, pairs\], 19 positions or more, 1 to 4 pairs; got"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(edit, message):
    q, k, v = (t.detach() for t in inputs("cpu", 40))
    arguments = {"seqlens_k": ints(40, 40), "block": 4, "topk": 2, **edit}
    with pytest.raises(tm.InputError, match=rf"^tokenmill\.landmark_decode: {message}"):
        tm.landmark_decode(q[:, :4], k, v, **arguments)


@each_backend
@pytest.mark.parametrize(("count", "held"), [(0, 6), (3, 0)])
def test_nothing_to_see_or_to_ask(count, held, backend):
    q, k, v = (t.detach() for t in inputs(backend, 6))
    n = ints(held, held).to(q.device)
    out, lse = tm.landmark_decode(
        q[:, :count], k[:, :held], v[:, :held], seqlens_k=n, block=2, return_lse=True,
        backend=backend,
    )  # fmt: skip
    assert out.shape == (2, count, 4, 12) and lse.shape == (2, 4, count)
    assert not out.any() and (lse == -torch.inf).all()


def test_pairs_of_neighbours():
    q, k, v = (t.detach() for t in inputs("cpu", 40))
    options = {"seqlens_k": ints(40, 31), "block": 4, "topk": 2, "rope": tables(40, 4)}
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    want = tm.landmark_decode(q[:, :4], k, v, **options)
    got = tm.landmark_decode(q[:, :4, :, order], k[..., order], v, interleaved=True, **options)
    close(got, want)
