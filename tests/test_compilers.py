"""Inductor and AOTInductor, once, on a module that holds every operator."""

from __future__ import annotations

import torch

import tokenmill as tm
from tokenmill import registry
from tokenmill._call import library


class Everything(torch.nn.Module):
    """Calls each operator of the registry."""

    def forward(self, x):
        softmax, lse = tm.attention(x, x, x, causal=True, return_lse=True)
        other, other_lse = tm.attention(x, x, x, window=(3, 3), return_lse=True)
        merged, _ = tm.merge_attention_states(
            torch.stack([softmax, other]), torch.stack([lse, other_lse])
        )
        linear, state = tm.linear_attention(
            tm.sigmoid_attention(merged, x, x.relu()), x, x, return_final_state=True
        )
        token, slots = x.detach()[:, -1:], state.detach().clone()
        following = tm.linear_attention_decode(token, token, token, slots)
        indices, _ = tm.topk_select(linear[0, -1].detach(), 3)
        kept = linear[0, -1].gather(1, indices.long()).mean()
        cached = decode_from_cache(token, x.detach()) + attend_to_blocks(linear, x)
        cached = cached + move_tokens(x.flatten(2)).unflatten(2, (4, 16))
        words = x.flatten(2)
        cached = cached + tm.additive_attention(words, words[:, ::2], words.mean((0, 1))).mean()
        gate = x.mean(-1).sigmoid()
        memory = tm.titans_memory(x, x, x, alpha=gate, eta=gate, theta=gate / 16, chunk_size=4)
        memory = memory + tm.delta_attention(x, x, x, gate, qk_l2norm=True)
        memory = memory + tm.delta_attention_decode(
            *(token,) * 3, gate.detach()[:, -1:], slots, qk_l2norm=True
        )
        cached = cached + convolve(x.flatten(2)).unflatten(2, (4, 16))
        cached = cached + memory + tm.landmark_attention(x, x, x, block=4)
        # The mean: the sum of the slots is so large that its rounding shows in the sine.
        return (linear + following + kept + slots.mean()).sin() + cached


def convolve(x):
    """A short convolution, and its next token."""
    taps = x[0, :4].T
    out, inputs = tm.causal_conv1d(x, taps, activation="silu", return_final_state=True)
    following = inputs.detach().clone(), taps.detach()
    return out + tm.causal_conv1d_decode(x.detach()[:, -1:], *following)


def decode_from_cache(q, k):
    """A step with the operators on caches."""
    lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32)
    pooled = tm.block_pool_keys(k, 4)
    tm.block_pool_keys_update(k, pooled, 4, start=lengths - 1)
    blocks = tm.kv_block_scores(q, pooled, block_k=4)
    columns = tm.attention_column_scores(k, k, causal=True)
    rows = tm.attention_row_scores(q, k)
    again = tm.query_similarity_gate(q, q, 0.5)
    keep, counts = tm.topk_select(rows, 6)
    lists = keep[:, None], counts[:, None]
    listed, _ = tm.sparse_decode_attention(q, k, k, *lists, seqlens_k=lengths, num_recent=2)
    kept = k.clone(), k.clone()
    lengths = tm.kv_cache_compact(*kept, keep, counts)
    new, slots = q[:, 0], torch.arange(k.shape[0]) * k.shape[1] + lengths
    angles = torch.linspace(0, 6, 12 * 8).view(12, 8)
    rope = angles.cos(), angles.sin(), lengths
    turned = tm.kv_cache_append(*kept, new, new, slots, q=new, rope=rope)
    narrow = [torch.zeros(k.shape, dtype=torch.float8_e4m3fn) for _ in range(2)]
    scale = torch.zeros(k.shape[:3])
    tm.kv_cache_append(*narrow, new, new, slots, k_scale=scale)
    index = {"k_scale": scale[:, :, 0]}
    found, _ = tm.indexer_topk_select(q, narrow[0][:, :, 0], q.mean(-1), 3, **index)
    scores = blocks.mean() + columns.mean() + rows.mean() + again.float().mean() + scale.mean()
    scores = scores + found.float().mean()
    return tm.attention_decode(turned[:, None], *kept, seqlens_k=lengths + 1) + listed + scores


def attend_to_blocks(q, k):
    """The operators on lists of blocks and regions."""
    lists = tm.hip_block_select(q, k, budget=4, block_q=4, num_sink=1, num_recent=2)
    offsets, rows = tm.transpose_block_list(*lists, 6)
    sizes = {"block_q": 4, "block_k": 2, "num_sink": 1, "num_recent": 2}
    out = tm.block_sparse_attention(q, k, k, *lists, causal=True, **sizes)
    maps = (t.unflatten(1, (3, 4)) for t in (q, k, k))
    out = out + tm.bilevel_routing_attention(*maps, regions=(1, 2), topk=1).flatten(1, 2)
    return out + offsets.float().mean() + rows.float().mean()


def move_tokens(x):
    """The operators on tokens."""
    level = x.mean(2)
    keep, rest = tm.topk_partition(level, 7)
    fused = tm.gather_fuse(x, keep, rest, level.sigmoid(), prefix=0)
    indices, ends, _ = tm.mask_partition(level > 0)
    packed = tm.gather_tokens(x, indices)
    sums = tm.segment_reduce(packed, ends)
    partner, score = tm.best_match(x[:, ::2], x[:, 1::2])
    halves, _ = tm.merge_tokens(x, torch.cat([partner, partner], 1), 6)
    clusters, _, _ = tm.cluster_tokens(x.unflatten(1, (3, 4)), (2, 2), tau=0.1, window=3)
    clusters = clusters.flatten(1, 2)
    spread, _, _ = tm.reconstruct_tokens(x.detach(), clusters.detach(), clusters, k=2, tau=0.1)
    x = x + spread
    moved = fused.mean() + sums.mean() + halves.mean() + score.mean()
    return tm.local_pool(tm.scatter_tokens(packed, indices, x), 3) + moved


X = torch.linspace(-2, 2, 2 * 12 * 4 * 16).view(2, 12, 4, 16)


def test_the_module_holds_every_operator():
    exported = torch.export.export(Everything(), (X,))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {f"{library.NAMESPACE}.{name}.default" for name in registry.ops()} <= targets


def test_inductor_forward_and_backward():
    torch._dynamo.reset()
    module, x = Everything(), X.clone().requires_grad_()
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    (want,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(got, want)


def test_aot_inductor_package(tmp_path):
    module = Everything()
    with torch.no_grad():
        exported = torch.export.export(module, (X,))
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "module.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(X), module(X))
