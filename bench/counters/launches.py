"""Number of kernel launches per operator for one request, and CTAs per launch: `python -m tokenmill
bench --launches [op ...]`. An SM without a CTA is idle."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch
from torch import Tensor

import tokenmill as tm
from tokenmill import _cli, _emulator, _info
from tokenmill._call import library
from tokenmill._version import __version__
from tokenmill.dense.attention_decode_cases import decode_call
from tokenmill.sparse.sparse_decode_attention_cases import sparse_call

from ..progress import progress
from ..results import Results

Call = Callable[[], object]
H, HK, D = 32, 8, 128  # shape of decode calls
MULTIPROCESSORS = 132  # SMs of the machine's device


def _draw(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _some(count: int, of: int, *lists: int) -> Tensor:
    """Ascending random int32 numbers below `of`, [*lists, count]."""
    drawn = torch.rand(*lists, of, generator=torch.Generator().manual_seed(1))
    return drawn.argsort(-1)[..., :count].sort(-1).values.int()


def _counts(indices: Tensor) -> Tensor:
    return torch.full(indices.shape[:-1], indices.shape[-1], dtype=torch.int32)


def _made(function: Any, make: Any) -> object:
    args, options = make(torch.bfloat16, torch.Generator().manual_seed(0))
    return function(*args, **options)


def _column_scores() -> object:
    q = _draw(1, 1024, 8, 64)
    return tm.attention_column_scores(q, q, causal=True)


def _row_scores() -> object:
    return tm.attention_row_scores(_draw(1, 1, H, D), _draw(1, 8192, HK, D))


def _linear() -> object:
    q = _draw(1, 2048, 8, 64)
    return tm.linear_attention(q, q, q, log_decay=-tm.lightning_slopes(8))


def _linear_step() -> object:
    q, state = _draw(1, 1, 8, D), _draw(1, 8, D, D, dtype=torch.float32)
    return tm.linear_attention_decode(q, q, q, state, log_decay=-tm.lightning_slopes(8))


def _delta() -> object:
    q, beta = _draw(1, 2048, 8, D), torch.full((1, 2048, 8), 0.5)
    return tm.delta_attention(q, q, q, beta, log_decay=-beta, qk_l2norm=True)


def _delta_step() -> object:
    q, state = _draw(1, 1, 8, D), _draw(1, 8, D, D, dtype=torch.float32)
    return tm.delta_attention_decode(q, q, q, torch.ones(1, 1, 8), state, qk_l2norm=True)


def _conv() -> object:
    return tm.causal_conv1d(_draw(1, 2048, 1024), _draw(1024, 4), activation="silu")


def _conv_step() -> object:
    x, state = _draw(1, 1024), _draw(1, 1024, 4)
    return tm.causal_conv1d_decode(x, state, _draw(1024, 4), activation="silu")


def _titans() -> object:
    q = torch.nn.functional.normalize(_draw(1, 512, 8, 64).float(), dim=-1).half()
    gates = (torch.full((1, 512, 8), x) for x in (0.01, 0.5, 0.01))
    alpha, eta, theta = gates
    return tm.titans_memory(q, q, q, alpha=alpha, eta=eta, theta=theta, chunk_size=64)


def _pool_update() -> object:
    k, length = _draw(1, 8192, HK, D), torch.tensor([8192], dtype=torch.int32)
    pooled = _draw(1, 512, HK, D)
    return tm.block_pool_keys_update(k, pooled, block=16, start=length - 1, lengths=length)


def _compact() -> object:
    k, v, keep = _draw(1, 4096, HK, D), _draw(1, 4096, HK, D), _some(2048, 4096, 1)
    return tm.kv_cache_compact(k, v, keep, _counts(keep))


def _append() -> object:
    k, v, new = _draw(1, 4096, HK, D), _draw(1, 4096, HK, D), _draw(256, HK, D)
    return tm.kv_cache_append(k, v, new, new, torch.arange(256))


def _index() -> object:
    return tm.indexer_topk_select(_draw(1, 1, 64, D), _draw(1, 131072, D), _draw(1, 1, 64), 2048)


def _merge() -> object:
    outs, lses = _draw(8, 1, 1, H, D), _draw(8, 1, H, 1, dtype=torch.float32)
    return tm.merge_attention_states(outs, lses)


def _regions() -> object:
    x = _draw(1, 56, 56, 2, 32)
    return tm.bilevel_routing_attention(x, x, x, region_size=8, topk=4)


def _blocks() -> object:
    q, indices = _draw(1, 2048, 8, 64), _some(8, 32, 1, 8, 32)
    return tm.block_sparse_attention(
        q, q, q, indices, _counts(indices), block_q=64, block_k=64, causal=False
    )


def _latent() -> object:
    q, k = _draw(1, 1, 16, 576), _draw(1, 8192, 1, 576)
    indices = _some(2048, 8192, 1, 1, 1)
    return tm.block_sparse_attention(
        q, k, k[..., :512], indices, _counts(indices), block_q=1, block_k=1
    )


def _search(queries: int) -> object:
    q, k = _draw(1, queries, H, D), _draw(1, 8192, HK, D)
    return tm.hip_block_select(q, k, budget=512, head_reduce="group_max")


def _lists() -> object:
    indices = _some(32, 256, 1, 8, 64)
    return tm.transpose_block_list(indices, _counts(indices), 256)


def _landmarks() -> object:
    q = _draw(1, 1024, 8, 64)
    return tm.landmark_attention(q, q, q, block=64)


def _match() -> object:
    x = _draw(1, 4096, 64)
    return tm.best_match(x[:, ::2], x[:, 1::2], normalize=True)


def _fuse() -> object:
    keep = _some(400, 576, 1)
    rest = torch.tensor([sorted(set(range(576)) - set(keep[0].tolist()))], dtype=torch.int32)
    return tm.gather_fuse(_draw(1, 577, 768), keep, rest, torch.rand(1, 576))


def _reconstruct() -> object:
    x, c = _draw(1, 1024, 256), _draw(1, 256, 256)
    return tm.reconstruct_tokens(x, c, c, k=3, tau=0.01)


def _segments() -> object:
    offsets = torch.arange(0, 4097, 8, dtype=torch.int32)
    return tm.segment_reduce(_draw(4096, 256), offsets, reduce="sum")


# Calls of one request per operator: description, and call.
CALLS: dict[str, dict[str, Call]] = {
    "attention": {
        "2048 tokens, H=8": lambda: tm.attention(*[_draw(1, 2048, 8, 64)] * 3, causal=True)
    },
    "additive_attention": {
        "1 x 4096": lambda: tm.additive_attention(_draw(1, 1, 128), _draw(1, 4096, 128), _draw(128))
    },
    "attention_column_scores": {"1024 tokens, H=8": _column_scores},
    "attention_decode": {
        "8192 keys": lambda: _made(
            tm.attention_decode, decode_call((8192,), 1, H, HK, D, D, None, 8192)
        ),
        "a chunk of 256 in pages, 2048 keys": lambda: _made(
            tm.attention_decode, decode_call((2048,), 1, H, HK, D, D, 16, 2048, (256,))
        ),
    },
    "attention_row_scores": {"8192 keys": _row_scores},
    "kv_block_scores": {
        "8192 keys": lambda: tm.kv_block_scores(
            _draw(1, 1, H, D), _draw(1, 8192, HK, D), scoring="dot"
        )
    },
    "linear_attention": {"2048 tokens, H=8": _linear},
    "linear_attention_decode": {"a token, H=8": _linear_step},
    "delta_attention": {"2048 tokens, H=8": _delta},
    "delta_attention_decode": {"a token, H=8": _delta_step},
    "causal_conv1d": {"2048 tokens, 1024 channels": _conv},
    "causal_conv1d_decode": {"a token, 1024 channels": _conv_step},
    "sparse_decode_attention": {
        "512 of 8192 keys": lambda: _made(
            tm.sparse_decode_attention,
            sparse_call((8192,), h=H, hk=HK, d=D, dv=D, capacity=8192, lists=HK, entries=512),
        )
    },
    "titans_memory": {"512 tokens, H=8": _titans},
    "topk_select": {"1 x 131072, k=2048": lambda: tm.topk_select(_draw(1, 131072), 2048)},
    "block_pool_keys": {
        "8192 keys": lambda: tm.block_pool_keys(_draw(1, 8192, HK, D), 16, mode="minmax")
    },
    "block_pool_keys_update": {"a token": _pool_update},
    "indexer_topk_select": {"a token, 131072 keys": _index},
    "kv_cache_append": {"256 tokens": _append},
    "kv_cache_compact": {"2048 of 4096 keys": _compact},
    "merge_attention_states": {"8 parts of a token": _merge},
    "query_similarity_gate": {
        "a token": lambda: tm.query_similarity_gate(_draw(1, 1, H, D), _draw(1, 1, H, D))
    },
    "bilevel_routing_attention": {"map of 56 x 56, H=2": _regions},
    "block_sparse_attention": {
        "2048 tokens, H=8": _blocks,
        "a token, 2048 of 8192 latent keys": _latent,
    },
    "hip_block_select": {"a token": lambda: _search(1), "512 tokens": lambda: _search(512)},
    "landmark_attention": {"1024 tokens, H=8": _landmarks},
    "transpose_block_list": {"64 x 256 blocks, H=8": _lists},
    "best_match": {"2048 of 2048": _match},
    "cluster_tokens": {
        "56 x 56 to 14 x 14": lambda: tm.cluster_tokens(_draw(1, 56, 56, 64), 14, iters=1, tau=0.01)
    },
    "gather_fuse": {"577 x 768": _fuse},
    "gather_tokens": {
        "400 of 577 x 768": lambda: tm.gather_tokens(_draw(1, 577, 768), _some(400, 577, 1))
    },
    "local_pool": {"56 x 56 x 64": lambda: tm.local_pool(_draw(1, 56, 56, 64), 3, mode="avg")},
    "mask_partition": {"1 x 8192": lambda: tm.mask_partition(_draw(1, 8192) > 0)},
    "reconstruct_tokens": {"1024 of 256": _reconstruct},
    "scatter_tokens": {
        "400 of 577 x 768": lambda: tm.scatter_tokens(
            _draw(1, 400, 768), _some(400, 577, 1), _draw(1, 577, 768)
        )
    },
    "segment_reduce": {"4096 rows, 512 segments": _segments},
    "topk_partition": {
        "1 x 577": lambda: tm.topk_partition(_draw(1, 577, dtype=torch.float32), 288)
    },
}


def blocks_of(call: Call) -> list[int]:
    """Number of CTAs of each launch."""
    with tm.testing.emulated_cuda(), _emulator.counting() as launches:
        call()
    return [math.prod(launch["grid"]) for launch in launches]


def run(options: argparse.Namespace, stdout: TextIO) -> int:
    if not library.emulated_built():
        raise _cli.UsageError("--launches: needs a development build (TOKENMILL_PTXVM=1)")
    chosen = [
        (op, title, call)
        for op, calls in CALLS.items()
        if op in options.ops or not options.ops
        for title, call in calls.items()
        if options.filter.search(title)
    ]
    if options.list:
        print("\n".join(f"{op}: {title}" for op, title, _ in chosen))
        return 0
    results = Results(options.json, stdout)
    results.begin(
        {
            "tokenmill": __version__,
            "cuda": _info.build_info().get("cuda_version", ""),
            "date": time.strftime("%Y-%m-%d"),
            "multiprocessors": MULTIPROCESSORS,
        }
    )
    print(f"{'call':<60} blocks of each launch")
    with progress(len(chosen), "counting") as advance:
        for op, title, call in chosen:
            blocks = blocks_of(call)
            advance(done=True)
            results.add({"op": op, "case": title, "blocks": blocks})
            print(f"{f'{op}, {title}':<60} {', '.join(map(str, blocks))}", flush=True)
    results.end()
    return 0
