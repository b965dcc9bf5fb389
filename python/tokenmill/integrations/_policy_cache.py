"""A transformers cache whose layers attend through a policy."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .._check import as_int, check, check_version, fail
from .._transformers.attention import attention_forward
from .._transformers.masks import build_mask
from .._transformers.models import KEEP, POLICY, configs_of
from ..policies import Indexer, KVCache, Policy
from ..policies.cache import check_reads
from ..policies.policy import Keeping, check_float8_reader, check_reader

NAME = "integrations.transformers.apply_policy"
SLACK = 64  # slots of a new cache in addition to the prompt's

# The layer whose keys the model has just computed; its attention call follows.
_pending: ContextVar[PolicyLayer | None] = ContextVar("_pending", default=None)
_prompt_end: ContextVar[int | None] = ContextVar("_prompt_end", default=None)  # in columns
_generates: ContextVar[bool] = ContextVar("_generates", default=False)
_decodes: ContextVar[bool] = ContextVar("_decodes", default=False)


class _Offset(int):
    """Key offset of a PolicyLayer, which identifies its mask."""


class PolicyLayer(CacheLayerMixin):
    """Keys and values of one layer, in the cache of its policy."""

    is_sliding = False
    supports_early_init = False

    def __init__(
        self, recipe: Policy, number: int, previous: PolicyLayer | None, config: Any,
        cache_dtype: torch.dtype | None,
    ):  # fmt: skip
        super().__init__()
        self.recipe, self.number, self.previous = recipe, number, previous
        self.config, self.cache_dtype = config, cache_dtype
        self.is_croppable = isinstance(recipe, Keeping)
        self.policy: Policy | None = None
        self.columns = 0  # tokens so far, including padding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The policy is created by the first attention call, which knows the queries."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns only the new tokens: the policy holds the earlier ones."""
        found = self.config._attn_implementation
        rule = "must go to a model under the policy, as this attention knows no keys before"
        check(found == POLICY, NAME, "cache", rule, found)
        if _pending.get() is not None:
            _pending.set(None)
            rule = "must have layers that attend as their configuration says"
            fail(NAME, "model", rule, "keys to which no layer has attended")
        self.columns += key_states.shape[2]
        _pending.set(self)
        return key_states, value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None, scoring: dict[str, Any]
    ) -> Tensor:
        """[B, n, H, D] -> [B, n, H, Dv], where there [B, n] is True; 0 elsewhere. None: all
        True.
        """
        if self.policy is None:
            self._make(q, k, v, scoring)
        policy = self.policy
        assert policy is not None
        empty = policy.cache.longest == 0 or policy._waiting is not None
        keeps = isinstance(policy, Keeping)
        steps = _generates.get() or _decodes.get() or q.shape[1] == 1
        reads = _prompt_end.get() is not None or not steps
        if not empty and not (keeps and (reads or there is not None)):
            if there is not None:
                rule = "must be True for the tokens of a step"
                fail(NAME, "attention_mask", f"{rule} of policies.{type(policy).__name__}", False)
            self._make_room(q.shape[1])
            return policy.step(q, k, v)
        end = _prompt_end.get() or self.columns
        more = end > self.columns
        self._make_room(q.shape[1] + (0 if keeps else end - self.columns))
        if there is None:
            return policy.prefill(q, k, v, more=more)
        order = torch.argsort(~there, dim=1, stable=True)  # valid tokens first, in order
        row = torch.arange(len(order), device=order.device)[:, None]
        lengths = there.sum(1, dtype=torch.int32)
        packed = policy.prefill(*(x[row, order] for x in (q, k, v)), lengths=lengths, more=more)
        out = torch.empty_like(packed)
        out[row, order] = packed
        return out.masked_fill(~there[..., None, None], 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, _Offset(self.columns)

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.policy, self.columns = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        # Older versions of transformers pass the remaining length.
        back = -tokens_to_remove if tokens_to_remove <= 0 else self.columns - tokens_to_remove
        if back > 0 and self.policy is not None:
            self.policy.rewind(back)
            self.columns -= back

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.policy is not None:
            requests = self.policy.cache.requests
            self.policy.reorder(requests.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.policy is not None:
            requests = self.policy.cache.requests
            self.policy.reorder(requests[indices.to(requests.device)])

    def offload(self) -> None:
        fail(NAME, "cache_implementation", "must not be offloaded", "offloaded")

    def _make(self, q: Tensor, k: Tensor, v: Tensor, scoring: dict[str, Any]) -> None:
        recipe = self.recipe
        heads = recipe.cache_heads(k.shape[2], self.number)
        end = _prompt_end.get() or self.columns
        slots = [max(end, self.columns) + SLACK, heads]
        cache = KVCache(
            *(t.new_zeros(t.shape[0], *slots, t.shape[3], dtype=self.cache_dtype) for t in (k, v))
        )
        previous = None if self.previous is None else self.previous.policy
        self.policy = dataclasses.replace(
            recipe, cache=cache, layer=self.number, previous=previous, **scoring
        )
        self._max = recipe.slots(end)

    def _make_room(self, tokens: int) -> None:
        """Makes room before the policy adds tokens; the policy itself makes room in a cache of
        _max slots.
        """
        assert self.policy is not None
        cache = self.policy.cache
        wanted = cache.longest + tokens
        if self.policy._waiting is not None:
            wanted += self.policy._waiting.k.shape[1]
        if wanted > cache.capacity:
            wanted = max(wanted, cache.capacity * 3 // 2)
            if cache.longest > 0 and self._max is not None:
                wanted = min(wanted, self._max)
            if wanted > cache.capacity:
                self.policy.grow(wanted)


class PolicyCache(Cache):
    """The cache of a model under a policy: layers with full attention use the policy's cache,
    others their own.

    Args:
        config: configuration of the model; its DynamicCache determines the layers.
        recipes: the policy of each layer with full attention, without a cache.
        cache_dtype: as in :func:`apply_policy`.
    """

    def __init__(
        self, config: Any, recipes: Sequence[Policy], cache_dtype: torch.dtype | None = None
    ):
        layers = DynamicCache(config=config).layers
        of_policy: list[PolicyLayer] = []
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                number = len(of_policy)
                before = of_policy[-1] if of_policy else None
                of_policy.append(PolicyLayer(recipes[number], number, before, config, cache_dtype))
                layers[i] = of_policy[-1]
        super().__init__(layers=layers)
        self._config, self._of_policy = config, of_policy

    def copy(self) -> PolicyCache:
        """A copy from which another continuation of the same prompt can be read."""
        return copy.deepcopy(self, {id(self._config): self._config})

    @property
    def policies(self) -> list[Policy]:
        """Policies of the layers with full attention, available once they have read a token."""
        return [layer.policy for layer in self._of_policy if layer.policy is not None]


class AppliedPolicy:
    """A policy applied to a model, until `remove` or the end of a with statement.

    Attributes:
        cache: the newest cache created for the model, None before its first call; `cache.policies`
            has `kept` and `bytes_read` of each layer.
        cache_name: the argument of the model that takes a cache.
    """

    def __init__(
        self, model: Any, recipes: list[Policy], config: Any, cache_dtype: torch.dtype | None
    ):
        self.model, self._recipes, self._config = model, recipes, config
        self._cache_dtype = cache_dtype
        self.cache: PolicyCache | None = None
        self._parameters = [*inspect.signature(model.forward).parameters]
        self.cache_name = "cache" if "cache" in self._parameters else "past_key_values"
        self._configs = [(c, c._attn_implementation) for c in configs_of(model, config)]
        try:
            model.set_attn_implementation(POLICY)
            found = config._attn_implementation
            rule = "must have attention that transformers can replace"
            shown = f"{type(model).__name__} with {found}"
            check(found == POLICY, NAME, "model", rule, shown)
        except BaseException:
            self._restore()
            raise
        self._hook = model.register_forward_pre_hook(self._give_cache, with_kwargs=True)
        self._own = {n: vars(model)[n] for n in ("generate", "_prefill") if n in vars(model)}
        self._read_prompt: Any = getattr(model, "_prefill", None)
        if self._read_prompt is not None:
            marked = functools.partial(_marked, model.generate)
            model.generate = functools.update_wrapper(marked, model.generate)
            model._prefill = self._prefill
        vars(model)[KEEP] = self

    def __enter__(self) -> AppliedPolicy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model's own attention. A second call does nothing."""
        if vars(self.model).get(KEEP) is not self:
            return
        del vars(self.model)[KEEP]
        self._hook.remove()
        for name in ("generate", "_prefill"):
            vars(self.model).pop(name, None)
        vars(self.model).update(self._own)
        self._restore()

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """A context manager in which a call of the model with several tokens after a prompt is
        as many steps of decoding, as in generate(): to score a text under the policy.

        Example:
            >>> import torch, tokenmill as tm
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from tokenmill.integrations.transformers import apply_policy
            >>> config = LlamaConfig(
            ...     vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            ...     num_attention_heads=4, num_key_value_heads=2)
            >>> model = LlamaForCausalLM(config).eval()
            >>> prompt, text = torch.randint(50, (1, 40)), torch.randint(50, (1, 8))
            >>> with apply_policy(model, tm.policies.StreamingLLM(num_recent=12)) as applied:
            ...     with torch.no_grad(), applied.decoding():
            ...         _ = model(prompt)
            ...         logits = model(text, **{applied.cache_name: applied.cache}).logits
            >>> logits.shape, applied.cache.policies[0].kept.tolist()
            (torch.Size([1, 8, 50]), [16])
        """
        token = _decodes.set(True)
        try:
            yield
        finally:
            _decodes.reset(token)

    @contextlib.contextmanager
    def reading(self, tokens: int) -> Iterator[None]:
        """A context manager in which calls of the model read chunks of a prompt, as generate()
        does: a policy that evicts waits with its selection for the end of the prompt.

        Args:
            tokens: number of tokens of the prompt, padding included.

        Example:
            >>> import torch, tokenmill as tm
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from tokenmill.integrations.transformers import apply_policy
            >>> config = LlamaConfig(
            ...     vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            ...     num_attention_heads=4, num_key_value_heads=2)
            >>> model = LlamaForCausalLM(config).eval()
            >>> text, question = torch.randint(50, (1, 40)), torch.randint(50, (1, 8))
            >>> with apply_policy(model, tm.policies.SnapKV(budget=16, window=8)) as applied:
            ...     with torch.no_grad(), applied.reading(48):
            ...         _ = model(text)
            ...         _ = model(question, **{applied.cache_name: applied.cache})
            >>> applied.cache.policies[0].kept.tolist()
            [16]
        """
        tokens = as_int(NAME, "tokens", tokens)
        check(tokens >= 1, NAME, "tokens", "must be at least 1", tokens)
        token = _prompt_end.set(tokens)
        try:
            yield
        finally:
            _prompt_end.reset(token)

    def _restore(self) -> None:
        for config, implementation in self._configs:
            config._attn_implementation_internal = implementation

    def _give_cache(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before each call of the model: ensures that its cache is new, or a policy cache."""
        _pending.set(None)  # left over from a failed call
        by_place = dict(zip(self._parameters, args, strict=False))
        spellings = {self.cache_name, "past_key_values"}
        given = [by_place.get(self.cache_name), *(kwargs.get(name) for name in spellings)]
        given = [cache for cache in given if cache is not None]
        check(len(given) <= 1, NAME, self.cache_name, "must be given once", len(given))
        kwargs = {name: value for name, value in kwargs.items() if name not in spellings}
        uses = by_place.get("use_cache", kwargs.get("use_cache"))
        uses = getattr(self._config, "use_cache", True) if uses is None else uses
        cache = None
        if given or (uses and not model.training):
            cache = self._cache_for(given[0] if given else None)
        if self.cache_name in by_place:
            by_place[self.cache_name] = cache
            return (*by_place.values(), *args[len(by_place) :]), kwargs
        if cache is not None:
            kwargs[self.cache_name] = cache
        return args, kwargs

    def _cache_for(self, given: Any) -> PolicyCache:
        """The given cache, or a new one if none, or an empty cache of generate(), was given."""
        if not isinstance(given, PolicyCache):
            fresh = given is None
            if type(given) is DynamicCache and _generates.get():
                fresh = not given.offloading and given.get_seq_length() == 0
            rule = "must be None, or come from the model under a policy"
            check(fresh, NAME, self.cache_name, rule, type(given).__name__)
            cache = PolicyCache(self._config, self._recipes, self._cache_dtype)
            if any(getattr(layer, "record_past", False) for layer in getattr(given, "layers", ())):
                cache.activate_past_recording()
            given = cache
        self.cache = given
        return given

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any],
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """generate() reads a prompt, whole or in chunks; the layers must know its length."""
        if model_kwargs.get(self.cache_name) is None:  # use_cache=False
            return self._read_prompt(input_ids, generation_config, model_kwargs, *args, **kwargs)
        cache = self._cache_for(model_kwargs[self.cache_name])
        model_kwargs[self.cache_name] = cache
        mask = model_kwargs.get("attention_mask")
        end = cache.get_seq_length() + input_ids.shape[1] if mask is None else mask.shape[-1]
        with self.reading(end):
            return self._read_prompt(input_ids, generation_config, model_kwargs, *args, **kwargs)


def _marked(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = _generates.set(True)
    try:
        return generate(*args, **kwargs)
    finally:
        _generates.reset(token)


def apply_policy(
    model: Any,
    policy: Policy | Sequence[Policy],
    *,
    prefill: Policy | None = None,
    cache_dtype: torch.dtype | None = None,
) -> AppliedPolicy:
    """Generates with a policy: the layers of a model attend to the keys that it selects.

    Works with :meth:`generate` (greedy, sampling, beams, prompt lookup and other drafts, chunked
    prefill, padding on either side) and with calls of the model. Keys and values are stored once,
    by the policies. Layers with a window or a state keep their own attention and cache; the policy
    uses the scales, soft caps and sinks of the model.

    A call with several tokens after a prompt is a step within generate(), which has drafts, and
    within :meth:`AppliedPolicy.decoding`; otherwise it is the next chunk of the prompt, except for
    policies that evict, for which it is a step. Pass the cache of the last result to the next call;
    a cache of another class would not be filled, and is refused.

    Args:
        model: a decoder of transformers 5.24 or later (:class:`LlamaForCausalLM` and the like).
            Layers that read the keys of other layers (Gemma 3n, Gemma 4) are refused.
        policy: a policy without a cache, e.g. ``policies.Quest(budget=1024)``, copied for each
            layer; or one policy per layer with full attention.
        prefill: the policy whose attention prompts are read with, e.g. ``policies.HiP()`` or a
            window with sinks, ``policies.StreamingLLM(num_recent=1020)``: the `reader` of each
            policy. None: what each policy says.
        cache_dtype: torch.float8_e4m3fn: keys and values are kept in 8 bits, with a scale of 1 (see
            :class:`tokenmill.policies.KVCache`); all policies but HiP read them so. None: the dtype
            of the model.

    Returns:
        A context manager; `remove` is the same as leaving it. A cache created under the policy has
        the attribute `policies`.

    Raises:
        RuntimeError: naming argument, rule and value.

    Example:
        >>> import torch, tokenmill as tm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tokenmill.integrations.transformers import apply_policy
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> ids = torch.randint(50, (2, 40))
        >>> with apply_policy(model, tm.policies.SnapKV(budget=16, window=8)) as applied:
        ...     out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        >>> out.shape, applied.cache.policies[0].kept.tolist()
        (torch.Size([2, 44]), [19, 19])
    """
    check_version(NAME, "transformers", transformers.__version__, 5, 24)
    config = getattr(model, "config", None)
    decodes = hasattr(config, "get_text_config") and hasattr(model, "set_attn_implementation")
    rule = "must be a model of transformers"
    check(decodes, NAME, "model", rule, type(model).__name__)
    assert config is not None
    encoder = getattr(config, "is_encoder_decoder", False)
    check(not encoder, NAME, "model", "must be a decoder without an encoder", type(model).__name__)
    config = config.get_text_config(decoder=True)
    free = KEEP not in vars(model) and config._attn_implementation != POLICY
    check(free, NAME, "model", "must have no policy yet", type(model).__name__)
    shares = getattr(config, "num_kv_shared_layers", None)
    if not shares:
        shares = any("reuse" in str(m) for m in getattr(config, "kv_sharing_modes", None) or ())
    rule = "must have keys of its own in each layer"
    check(not shares, NAME, "model", rule, f"{type(model).__name__}, whose layers share keys")
    layers = [type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers]
    rule = "must have layers with full attention"
    check(any(layers), NAME, "model", rule, type(model).__name__)
    recipes = [policy] * sum(layers) if isinstance(policy, Policy) else policy
    several = isinstance(recipes, list | tuple) and all(isinstance(p, Policy) for p in recipes)
    rule = f"must be a policy, or one for each of {sum(layers)} layers with full attention"
    check(several, NAME, "policy", rule, policy)
    check(len(recipes) == sum(layers), NAME, "policy", rule, len(recipes))
    rule = "must be None or float8_e4m3fn"
    check(cache_dtype in (None, torch.float8_e4m3fn), NAME, "cache_dtype", rule, cache_dtype)
    for number, recipe in enumerate(recipes):
        recipe.cache_heads(0, number)  # raises if it has no heads for a layer
        if cache_dtype is not None:
            check_reads(NAME, "cache_dtype", cache_dtype, recipe.NOT_FLOAT8)
        if isinstance(recipe, Indexer) and recipe.indexer is None:
            fail(NAME, "policy", "must have an indexer, as the model gives no index", "Indexer()")
        rule = "must have no {}, as the model brings its own"
        for name in ("cache", "rope", "index_cache", "sink"):
            value = getattr(recipe, name, None)
            if value is not None:
                fail(NAME, "policy", rule.format(name), type(value).__name__)
    if prefill is not None:
        check_reader(NAME, "prefill", prefill)
        for recipe in recipes:
            rule = f"must be None, as the policy has a reader, {type(recipe.reader).__name__}"
            check(recipe.reader is None, NAME, "prefill", rule, type(prefill).__name__)
        recipes = [dataclasses.replace(recipe, reader=prefill) for recipe in recipes]
    for recipe in recipes:
        check_float8_reader(NAME, "cache_dtype", cache_dtype, recipe.reader)
    return AppliedPolicy(model, [*recipes], config, cache_dtype)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer, `[B, H, n, D]` -> `[B, n, H, Dv]`."""
    layer = _pending.get()
    _pending.set(None)
    if layer is None:
        options |= {"kind": "softmax", "backend": None}
        return attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    for name in (
        "position_bias", "head_mask", "layer_head_mask", "output_attentions", "sliding_window",
    ):  # fmt: skip
        if (given := options.get(name)) is not None and given is not False:
            fail(NAME, name, "must be None, as a policy has none", type(given).__name__)
    if attention_mask is not None and attention_mask.dim() != 2:
        fail(NAME, "attention_mask", "must have shape [B, S], of padding", attention_mask.shape)
    needs = any(x.requires_grad for x in (query, key, value)) and torch.is_grad_enabled()
    rule = "must need no gradient, as a policy has none: call the model in torch.no_grad()"
    check(not needs, NAME, "model", rule, needs)
    # Under autocast the rotary embedding gives queries and keys another dtype than values.
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    recipe, sink = layer.recipe, options.get("s_aux")
    scoring = {
        "scale": scaling if recipe.scale is None else recipe.scale,
        "softcap": recipe.softcap or options.get("softcap") or 0.0,
        "sink": None if sink is None else sink.detach(),
    }
    return layer.attend(q, k, v, attention_mask, scoring), None


def _build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    **options: Any,
) -> Tensor | None:
    """For a PolicyLayer [B, n], True for new tokens that are not padding, or None: all are. For
    other layers the result of build_mask.
    """
    if not isinstance(kv_offset, _Offset):
        return build_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **options)
    if not options.get("allow_is_causal_skip", True):
        fail(NAME, "attention_mask", "must be causal, but for padding", "another")
    padding = options.get("attention_mask")
    if padding is None:
        return None
    there = padding[:, int(kv_offset) : int(kv_offset) + q_length]
    there = torch.nn.functional.pad(there, (0, q_length - there.shape[1]), value=True)
    return None if bool(there.all()) else there


AttentionInterface.register(POLICY, _attend)
AttentionMaskInterface.register(POLICY, _build_mask)
