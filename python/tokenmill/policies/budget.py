"""One meaning of a budget for all policies: the keys that a step attends to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._check import as_int, check, fail
from .evicting import H2O, Keyformer, SnapKV, StreamingLLM
from .hip import HiP
from .indexer import Indexer
from .policy import FullAttention, Policy
from .refresh import RefreshKV
from .selecting import Quest, RecycledAttention, TidalDecode
from .voting import TokenSelect

NAME = "policies.at_budget"
Options = dict[str, Any]


def at_budget(
    policy: type[Policy], keys: int, *, length: int, layers: int, **options: Any
) -> Policy:
    """A policy whose steps attend to `keys` keys, averaged over layers and heads.

    Sink, recent and selected keys count, and layers or steps with full attention count with all
    keys. Not counted is what a selection reads (boxes of pages, keys that are scored), which
    :attr:`Policy.bytes_read` has, nor tokens after a prompt that are kept beside the budget
    (SnapKV).

    Args:
        policy: a class of this module. FullAttention ignores the budget.
        keys: the budget, at least 16.
        length: tokens in the cache.
        layers: layers of the model with full attention.
        options: fields of the policy in place of those that are chosen here.

    Returns:
        A policy without a cache, for :func:`tokenmill.integrations.transformers.apply_policy`.

    Raises:
        RuntimeError: naming argument, rule and value, where full layers or steps exceed the budget
            already, and for RazorAttention, whose heads differ (:meth:`RazorAttention.profile`).

    Example:
        >>> from tokenmill import policies
        >>> policy = policies.at_budget(policies.Quest, 512, length=4096, layers=30)
        >>> policy.budget, policy.dense_layers  # (28 * 256 + 2 * 4096) / 30 = 512
        (256, 2)
    """
    keys, length, layers = (
        as_int(NAME, name, value)
        for name, value in (("keys", keys), ("length", length), ("layers", layers))
    )
    check(keys >= 16, NAME, "keys", "must be at least 16", keys)
    check(length >= 1, NAME, "length", "must be at least 1", length)
    check(layers >= 1, NAME, "layers", "must be at least 1", layers)
    if policy is FullAttention:
        return policy(**options)
    fit = FITS.get(policy)
    if fit is None:
        fail(NAME, "policy", "must be a policy with a budget", getattr(policy, "__name__", policy))
    found = fit(policy(**options), keys, length, layers)
    return policy(**(found | options))


def sparse_keys(policy: Any, keys: int, length: int, layers: int, full: int, least: int) -> int:
    """Keys of the layers that do not attend to all, where `full` layers do."""
    full = min(full, layers)
    if full == layers:
        return length
    found = (keys * layers - full * length) // (layers - full)
    smallest = -(-(full * length + (layers - full) * least) // layers)
    rule = f"must be at least {smallest} for {type(policy).__name__} with {full} full layers"
    check(found >= least, NAME, "keys", f"{rule} of {layers} at {length} tokens", keys)
    return found


def fit_streaming(policy: Any, keys: int, length: int, layers: int) -> Options:
    return {"num_recent": keys - policy.num_sink}


def fit_h2o(policy: Any, keys: int, length: int, layers: int) -> Options:
    return {"heavy": keys // 2, "recent": keys - keys // 2}


def fit_kept(policy: Any, keys: int, length: int, layers: int) -> Options:
    return {"budget": keys}


def fit_snapkv(policy: Any, keys: int, length: int, layers: int) -> Options:
    return {"budget": keys, "window": min(policy.window, keys // 2)}


def fit_indexer(policy: Any, keys: int, length: int, layers: int) -> Options:
    return {"topk": keys}


def fit_token_select(policy: Any, keys: int, length: int, layers: int) -> Options:
    sink, recent = min(policy.num_sink, keys // 8), min(policy.num_recent, keys // 4)
    return {"num_sink": sink, "num_recent": recent, "k": keys - sink - recent}


def fit_quest(policy: Any, keys: int, length: int, layers: int) -> Options:
    page = policy.page
    least = 3 * page
    each = sparse_keys(policy, keys, length, layers, policy.dense_layers, least)
    return {"budget": each // page * page}


def fit_hip(policy: Any, keys: int, length: int, layers: int) -> Options:
    each = sparse_keys(policy, keys, length, layers, policy.dense_layers, 16)
    sink, recent = min(policy.num_sink, each // 8), min(policy.num_recent, each // 2)
    listed = (each - sink - recent) // policy.block_k * policy.block_k
    refresh = min(policy.refresh_interval, recent)
    return {
        "num_sink": sink, "num_recent": recent, "budget": listed, "refresh_interval": refresh
    }  # fmt: skip


def fit_tidal(policy: Any, keys: int, length: int, layers: int) -> Options:
    full = policy.first + 1 + (policy.first < policy.correction < layers)
    newest = int(policy.keep_newest)
    return {"budget": sparse_keys(policy, keys, length, layers, full, 1 + newest) - newest}


def fit_recycled(policy: Any, keys: int, length: int, layers: int) -> Options:
    """Every stride-th step is full; the others attend to the newer tokens too, stride / 2 on
    average."""
    stride = policy.stride
    if stride == 1:
        return {}
    found = (keys * stride - length) // (stride - 1) - stride // 2
    smallest = -(-(length + (stride - 1) * (1 + stride // 2)) // stride)
    rule = f"must be at least {smallest} for a full step in {stride} at {length} tokens"
    check(found >= 1, NAME, "keys", rule, keys)
    return {"budget": found}


FITS: dict[type[Policy], Callable[[Any, int, int, int], Options]] = {
    StreamingLLM: fit_streaming,
    H2O: fit_h2o,
    Keyformer: fit_kept,
    RefreshKV: fit_kept,  # without full steps, whose number the queries decide
    SnapKV: fit_snapkv,
    Indexer: fit_indexer,
    TokenSelect: fit_token_select,
    Quest: fit_quest,
    HiP: fit_hip,
    TidalDecode: fit_tidal,
    RecycledAttention: fit_recycled,
}
