"""Valid calls of policies: a prompt, and the steps after it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fuzz.compositions import TABLE, Draw, Make, given_by, int32, samples_of
from fuzz.targets import Arguments, Target
from tokenmill import policies


def _prompt(r: Draw) -> Arguments:
    new = {f"step_{name}": t for name, t in r.qkv(1).items()}
    given = {f"prompt_{name}": t for name, t in r.qkv(13).items()}
    return {**given, "lengths": int32(13, 6), **new}


def _dense(r: Draw, **options: Any) -> Arguments:
    return {**r.cache(24), **_prompt(r), **options}


def _paged(r: Draw, **options: Any) -> Arguments:
    pages = {"k_cache": r(8, 8, 2, 16), "v_cache": r(8, 8, 2, 16)}
    table = torch.tensor(TABLE, dtype=torch.int32)
    return {**pages, "block_table": table, **_prompt(r), **options}


def _float8(r: Draw, **options: Any) -> Arguments:
    """Pages in float8, with one scale of all keys and one of each head for values."""
    given = _paged(r, **options)
    given |= {name: given[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    return {**given, "k_scale": torch.tensor([0.3]), "v_scale": torch.tensor([0.5, 2.0])}


def _both(**options: Any) -> tuple[Make, ...]:
    return (lambda r: _dense(r, **options), lambda r: _paged(r, **options))


def _indexer(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An indexer for queries and keys of any shape."""
    return q[..., :8], k.sum(2)[..., :8], q.sum(3)


_RAZOR = {"retrieval": (0,), "num_sink": 1, "local": 6, "slack": 3}
POLICIES: dict[type[policies.Policy], tuple[Make, ...]] = {
    policies.FullAttention: (_float8, *_both(), *_both(padding="left")),
    policies.TokenSelect: (
        *_both(k=4, num_sink=2, num_recent=3),
        lambda r: _dense(
            r,
            k=4,
            num_sink=2,
            num_recent=3,
            chunk=4,
            kernel_size=3,
            rope=(r(10, 8).float(), r(10, 8).float()),
        ),
    ),
    policies.TidalDecode: (
        *_both(budget=5, layer=2),
        lambda r: _dense(r, budget=5, layer=2, lists="key", keep_newest=False),
    ),
    policies.Quest: (
        *_both(budget=12, page=4, dense_layers=0),
        lambda r: _float8(r, budget=12, page=4, dense_layers=0),
        *_both(budget=12, page=4, reader=policies.StreamingLLM(num_sink=2, num_recent=4)),
    ),
    policies.HiP: (
        *_both(budget=4, block_q=4, num_sink=2, num_recent=3, refresh_interval=2, dense_layers=0),
        lambda r: _dense(r, budget=4, num_recent=3, refresh_interval=1, layer=3, lists="key"),
    ),
    policies.Indexer: (
        *_both(topk=4, indexer=_indexer),
        lambda r: _dense(r, topk=4, indexer=_indexer, index_cache=r(2, 24, 8)),
    ),
    policies.RecycledAttention: (
        *_both(budget=5, stride=2),
        *_both(budget=5, threshold=0.5),
    ),
    policies.RefreshKV: (
        *_both(budget=5, stride=2, kernel=3),
        *_both(budget=0.4, stride=1, threshold=None),
    ),
    policies.StreamingLLM: (
        *_both(num_sink=2, num_recent=6),
        lambda r: _dense(r, num_sink=2, num_recent=6, rope=(r(13, 8).float(), r(13, 8).float())),
    ),
    policies.H2O: (*_both(heavy=3, recent=3), *_both(heavy=3, recent=3, more=True)),
    policies.Keyformer: (*_both(budget=6, recent=3), *_both(released=True)),
    policies.SnapKV: (
        *_both(budget=8, window=4),
        *_both(budget=8, window=4, more=True),
        lambda r: _float8(r, budget=8, window=4),
        *_both(
            budget=8,
            window=4,
            reader=policies.HiP(budget=4, num_recent=3, refresh_interval=2, dense_layers=0),
        ),
    ),
    policies.RazorAttention: (  # the cache holds one of two KV heads
        lambda r: _dense(r, **_RAZOR, **r.cache(24, hk=1)),
        lambda r: _paged(r, **_RAZOR, k_cache=r(8, 8, 1, 16), v_cache=r(8, 8, 1, 16)),
        lambda r: _dense(r, **_RAZOR, **r.cache(24, hk=1), compensation="single"),
    ),
}


def policy_targets() -> list[Target]:
    found = []
    for method, makes in POLICIES.items():
        options = tuple(f.name for f in dataclasses.fields(method) if f.name != "cache")

        def run(
            arguments: Arguments,
            backend: str | None,
            method: Any = method,
            options: tuple[str, ...] = options,
        ) -> Any:
            cache = policies.KVCache(
                arguments["k_cache"], arguments["v_cache"], arguments.get("block_table"),
                k_scale=arguments.get("k_scale"), v_scale=arguments.get("v_scale"),
            )  # fmt: skip
            chosen = {k: v for k, v in arguments.items() if k in options}
            policy = method(cache, **{"backend": backend, **chosen})
            prompt = (arguments[f"prompt_{name}"] for name in "qkv")
            how = {name: arguments[name] for name in ("more", "padding") if name in arguments}
            outs = [policy.prefill(*prompt, lengths=arguments.get("lengths"), **how)]
            if arguments.get("more"):
                policy.prefill(*(arguments[f"step_{name}"] for name in "qkv"))
            for call in ("step", "step", "extend", "correct"):
                if hasattr(policy, call):
                    new = (arguments[f"step_{name}"] for name in "qkv")
                    outs.append(getattr(policy, call)(*new))
            return [*outs[1:], policy.kept]  # rows past the lengths are undefined

        name = f"policies.{method.__name__}"
        known = (*_INPUTS, *options)
        written = ("k_cache", "v_cache", "k_scale", "v_scale", "index_cache")
        found.append(Target(name, run, samples_of(makes), given_by, known, written))
    return found


_INPUTS = (
    "k_cache", "v_cache", "k_scale", "v_scale", "block_table", "prompt_q", "prompt_k", "prompt_v",
    "lengths", "padding", "more", "step_q", "step_k", "step_v",
)  # fmt: skip
