"""Random tiny models of transformers that generate under a policy."""

from __future__ import annotations

import copy
import doctest
import functools
import gc
import inspect
import weakref
from types import SimpleNamespace

import pytest
import torch

from tokenmill import policies

transformers = pytest.importorskip("transformers", minversion="5.24")
integration = pytest.importorskip("tokenmill.integrations.transformers")
_pages = pytest.importorskip("tokenmill._transformers.pages")
apply_policy = integration.apply_policy

PLAIN = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "initializer_range": 0.2,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SIZES = PLAIN | {"head_dim": 8}
WINDOW = SIZES | {"sliding_window": 4}
ONE_WIDE = ["sliding_attention", "full_attention"]
NEW = 5


def gpt_oss():
    config = transformers.GptOssConfig(
        **WINDOW, layer_types=ONE_WIDE, num_local_experts=2, num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**PLAIN)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=None)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**WINDOW, layer_types=ONE_WIDE, attn_logit_softcapping=1.5)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**WINDOW, layer_types=ONE_WIDE)
    ),
    "gpt_oss": gpt_oss,
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**PLAIN)),
}


def index(q, k):
    """An indexer of one head, the first head of the layer."""
    return q[:, :, :1], k[:, :, 0], torch.ones(*q.shape[:2], 1)


RECIPES = [
    policies.FullAttention(),
    policies.TokenSelect(k=4, num_sink=1, num_recent=3, chunk=4),
    policies.TidalDecode(budget=6, first=0, correction=5),
    policies.Quest(budget=6, page=2, dense_layers=1),
    policies.HiP(budget=4, block_q=4, num_sink=1, num_recent=4, refresh_interval=2, dense_layers=1),
    policies.Indexer(topk=5, indexer=index),
    policies.RecycledAttention(budget=6, stride=2),
    policies.RefreshKV(budget=6, stride=2, kernel=3),
    policies.StreamingLLM(num_sink=2, num_recent=6),
    policies.H2O(heavy=4, recent=4),
    policies.Keyformer(budget=8, recent=3),
    policies.SnapKV(budget=8, window=3, kernel=3),
    policies.RazorAttention(retrieval=(), num_sink=1, local=6, slack=2),
]
NAMES = [type(recipe).__name__ for recipe in RECIPES]
FLOAT8 = ("FullAttention", "Quest", "SnapKV")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return MODELS["llama"]().eval()


def prompts():
    """Prompts of 17 and 12 tokens, the second padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (2, 17), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


def generate(model, ids, mask=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "output_scores": True} | options
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.scores, 1)


def assert_alike(actual, expected):
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_full_attention_is_the_model(name):
    model, (ids, mask) = MODELS[name]().eval(), prompts()
    model.set_attn_implementation("eager")
    for options in ({}, {"num_beams": 2}):
        expected = generate(model, ids, mask, **options)
        with apply_policy(model, policies.FullAttention()) as applied:
            assert_alike(generate(model, ids, mask, **options), expected)
        assert model.config._attn_implementation == "eager"
        wide = 1 if name in ("gemma2", "gemma3", "gpt_oss") else 2
        assert len(applied.cache.policies) == wide
    assert_alike(generate(model, ids, mask, num_beams=2), expected)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    "recipe",
    [
        policies.TokenSelect(k=64, num_sink=0, num_recent=1, threshold=2.0),
        policies.TidalDecode(budget=64, first=0),
        policies.Quest(budget=64, page=2, dense_layers=0),
        policies.HiP(budget=64, num_recent=4, refresh_interval=1, dense_layers=0),
        policies.Indexer(topk=64, indexer=index),
        policies.RecycledAttention(budget=64, stride=1),
        policies.RefreshKV(budget=64),
        policies.StreamingLLM(num_recent=64),
        policies.H2O(heavy=64),
        policies.Keyformer(budget=64),
        policies.SnapKV(budget=64, window=3),
        policies.RazorAttention(retrieval=(0,)),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_caps_and_sinks_are_those_of_the_model(name, recipe):
    """A budget for all keys gives full attention, including what the model does to its logits."""
    model, (ids, mask) = MODELS[name]().eval(), prompts()
    model.set_attn_implementation("eager")
    expected = generate(model, ids, mask, max_new_tokens=3)
    with apply_policy(model, recipe):
        assert_alike(generate(model, ids, mask, max_new_tokens=3), expected)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_rows_chunks_and_beams(recipe, llama, monkeypatch):
    """Padding, chunks of prompts, beams and a growing cache do not change a row."""
    ids, mask = prompts()
    fixed = isinstance(recipe, policies.HiP | policies.TokenSelect)  # chunks from the first token
    noisy = isinstance(recipe, policies.Keyformer)  # the noise depends on a request's number
    with apply_policy(llama, recipe) as applied:
        together = generate(llama, ids, mask)
        if isinstance(recipe, policies.StreamingLLM | policies.SnapKV | policies.H2O):
            assert all(policy.kept.max() < 16 for policy in applied.cache.policies)
        for b in (0,) if noisy else (0, 1):
            alone = generate(llama, ids[b : b + 1, 5 * b :])
            assert_alike([x[b : b + 1] for x in together], alone)
        if fixed:
            ids, mask = ids[:1], mask[:1]
            together = [x[:1] for x in together]
        assert_alike(generate(llama, ids, mask, prefill_chunk_size=8), together)
        monkeypatch.setattr("tokenmill.integrations._policy_cache.SLACK", 0)
        assert_alike(generate(llama, ids, mask), together)
        if noisy:
            return
        options = {"num_beams": 3, "max_new_tokens": NEW, "output_scores": True}
        out = llama.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        for b in range(len(ids)):
            found = followed(llama, ids[b : b + 1, 5 * b :], out.sequences[b, ids.shape[1] :])
            torch.testing.assert_close(out.sequences_scores[b] * NEW, found, rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_prompt_is_read_with_a_window_and_sinks(name):
    """Logits are those of the model with a complete mask: its prompt's rows in the window, and the
    rows of steps over all keys."""
    model, ids, prompt = MODELS[name]().eval(), prompts()[0], 12
    i, j = torch.arange(17)[:, None], torch.arange(17)
    visible = (j <= i) & ((i >= prompt) | (j < 2) | (j > i - 5))
    full = torch.zeros(17, 17).masked_fill(~visible, torch.finfo(torch.float32).min)
    own = full.clone()  # of layers with a window of their own, which have no policy
    own[:] = torch.zeros(17, 17).masked_fill((j > i) | (j <= i - 4), own.min())
    masks = {"full_attention": full[None, None], "sliding_attention": own[None, None]}
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=masks if name != "llama" else full[None, None]).logits
    reader = policies.StreamingLLM(num_sink=2, num_recent=5)
    steps = policies.Quest(budget=64, page=2, dense_layers=0)
    with apply_policy(model, steps, prefill=reader) as applied:
        for chunks in ((12,), (7, 5)):
            found, cache = [], {}
            for part in ids[:, :prompt].split(chunks, 1):
                found.append(model(part, use_cache=True, **cache).logits)
                cache = {"cache": applied.cache}
            for t in range(prompt, 17):
                found.append(model(ids[:, t : t + 1], **cache).logits)
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=2e-5)
        assert all(type(p) is policies.Quest for p in applied.cache.policies)


@pytest.mark.parametrize(
    "recipe",
    [policies.Quest(budget=6, page=2, dense_layers=1), policies.SnapKV(budget=8, window=3)],
    ids=lambda recipe: type(recipe).__name__,
)
def test_generation_with_a_reader(recipe, llama):
    """Padding and chunks of prompts do not change a row; the reader changes it."""
    ids, mask = prompts()
    for prefill in (
        policies.StreamingLLM(num_sink=2, num_recent=5),
        policies.HiP(budget=4, block_q=4, num_sink=1, num_recent=4, refresh_interval=2,
                     dense_layers=1),
    ):  # fmt: skip
        with apply_policy(llama, recipe) as applied:
            plain = generate(llama, ids)
        with apply_policy(llama, recipe, prefill=prefill) as applied:
            together = generate(llama, ids, mask)
            for b in (0, 1):
                alone = generate(llama, ids[b : b + 1, 5 * b :])
                assert_alike([x[b : b + 1] for x in together], alone)
            assert_alike(generate(llama, ids[:1], prefill_chunk_size=8), [x[:1] for x in together])
            read = [policy._reader for policy in applied.cache.policies]
        assert [(type(r), r.layer) for r in read] == [(type(prefill), 0), (type(prefill), 1)]
        assert (plain[1][0] - together[1][0]).abs().max() > 1e-3


@torch.no_grad()
def followed(model, ids, tokens):
    """The log probability of tokens after a prompt, one step at a time."""
    out, total = model(ids, use_cache=True), 0.0
    for token in tokens:
        total = total + out.logits[0, -1].log_softmax(-1)[token]
        out = model(token.view(1, 1), cache=out.cache, use_cache=True)
    return total


class Rounding(policies.KVCache):
    """A cache that rounds tokens to float8 and keeps them in their dtype."""

    def fill(self, k, v, lengths=None):
        super().fill(*(x.to(torch.float8_e4m3fn).to(x) for x in (k, v)), lengths)

    def extend(self, k, v, lengths=None):
        super().extend(*(x.to(torch.float8_e4m3fn).to(x) for x in (k, v)), lengths)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if type(r).__name__ in FLOAT8])
def test_a_cache_in_float8(recipe, llama, monkeypatch):
    """Tokens, scores and beams are of a cache that holds the same numbers in float32."""
    ids, mask = prompts()
    monkeypatch.setattr("tokenmill.integrations._policy_cache.SLACK", 0)

    def found(cache_dtype):
        with apply_policy(llama, recipe, cache_dtype=cache_dtype) as applied:
            whole = generate(llama, ids, mask)
            held = sum(policy.bytes_held for policy in applied.cache.policies)
            beams = llama.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=NEW)
        return whole, beams, held

    ours = found(torch.float8_e4m3fn)
    monkeypatch.setattr("tokenmill.integrations._policy_cache.KVCache", Rounding)
    theirs = found(None)
    assert_alike(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert 4 * ours[2] == theirs[2]


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_calls_of_the_model(recipe, llama):
    """Prompts padded on the right and with a hole, then a second prompt of several tokens."""
    ids, _ = prompts()
    rows = torch.tensor([[1] * 17, [1] * 6 + [0] * 3 + [1] * 6 + [0] * 2])
    place = (rows.cumsum(1) - 1).clamp(min=0)
    more, then = ids[:, :3], 3 + place.max(1, keepdim=True).values - 2
    with apply_policy(llama, recipe):
        out = llama(ids, attention_mask=rows, position_ids=place, use_cache=True)
        full = torch.cat([rows, torch.ones(2, 3, dtype=rows.dtype)], 1)
        second = llama(
            more, attention_mask=full, position_ids=then + torch.arange(3), cache=out.cache
        )
        for b in (0,) if isinstance(recipe, policies.Keyformer) else (0, 1):
            own = rows[b].bool()
            alone = llama(ids[b : b + 1, own], use_cache=True)
            torch.testing.assert_close(out.logits[b, own], alone.logits[0], rtol=0, atol=2e-5)
            alone = llama(more[b : b + 1], cache=alone.cache)
            torch.testing.assert_close(second.logits[b], alone.logits[0], rtol=0, atol=2e-5)


@torch.no_grad()
def test_every_way_to_give_the_cache(llama):
    """The cache may be passed under either name, or by position."""
    ids, names = prompts()[0], [*inspect.signature(llama.forward).parameters]
    assert names.index("cache") == 3
    with apply_policy(llama, policies.FullAttention()) as applied:
        whole = llama(ids, use_cache=True).logits
        for spelling in ("cache", "past_key_values", None):
            out = llama(ids[:, :9])
            cache, logits = out.cache, [out.logits]
            for t in range(9, 17):
                step = (ids[:, t : t + 1], None, None)
                if spelling is None:
                    out = llama(*step, cache)
                else:
                    out = llama(*step, **{spelling: getattr(out, spelling)})
                assert out.cache is cache is applied.cache
                logits.append(out.logits)
            torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=2e-5)
        rule = r"^tokenmill.integrations.transformers.apply_policy: cache: "
        for others in ((None, None, cache), (None, None, None)):
            named = {} if others[2] is cache else {"cache": cache}
            with pytest.raises(RuntimeError, match=rule + "must be given once; got 2"):
                llama(ids, *others[: 3 - len(named)], past_key_values=cache, **named)
        with pytest.raises(RuntimeError, match=rule + "must be None, or come from the model under"):
            llama(ids, cache=transformers.DynamicCache())  # would stay empty


def test_drafts_and_second_turns(llama):
    ids = prompts()[0][:1].repeat(1, 2)
    expected = generate(llama, ids)
    with apply_policy(llama, policies.FullAttention()) as applied:
        drafted = llama.generate(
            ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3
        )
        assert torch.equal(drafted[:, ids.shape[1] :], expected[0])
        generate(llama, ids[:, :9], max_new_tokens=2)
        cache = applied.cache
        seen = cache.get_seq_length()
        cache.crop(10 - seen)
        cache.crop(9)
        assert_alike(generate(llama, ids, cache=cache), expected)
    hybrid = MODELS["gemma3"]().eval()
    expected = generate(hybrid, ids)
    with apply_policy(hybrid, policies.Indexer(topk=64, indexer=index)):
        drafted = hybrid.generate(
            ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(drafted[:, ids.shape[1] :], expected[0])
    evicting = policies.StreamingLLM(num_sink=1, num_recent=8)
    with apply_policy(llama, [evicting, policies.Quest(budget=6, page=2)]) as applied:
        with pytest.raises(ValueError, match="can be cropped"):
            llama.generate(ids, max_new_tokens=NEW, prompt_lookup_num_tokens=3)
        generate(llama, ids[:, :9], max_new_tokens=2)
        generate(llama, ids, cache=applied.cache)
        assert [p.kept.item() for p in applied.cache.policies] == [9, ids.shape[1] + NEW - 1]


def test_autocast_and_a_function_instead_of_a_context(llama):
    ids, mask = prompts()
    applied = apply_policy(llama, policies.Quest(budget=6, page=2))
    with torch.autocast("cpu", torch.bfloat16):
        generate(llama, ids, mask)
    assert applied.cache.policies[0].cache.k.dtype == torch.bfloat16
    applied.remove()
    applied.remove()
    assert llama.config._attn_implementation == "sdpa"
    assert not {"generate", "_prefill"} & {*vars(llama)}


def test_what_cannot_be_is_refused(llama):
    ids, mask = prompts()
    rule = r"^tokenmill.integrations.transformers.apply_policy: "
    empty = policies.KVCache(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    for model, policy, words in (
        (torch.nn.Identity(), RECIPES[0], r"model: must be a model of transformers; got 'Iden"),
        (llama, "Quest", r"policy: must be a policy, or one for each of 2 layers with full atte"),
        (llama, RECIPES[:1], r"policy: must be a policy, or one for each of 2 layers .*; got 1"),
        (
            llama,
            policies.FullAttention(empty),
            r"policy: must have no cache, as the model brings its own; got 'KVCache'",
        ),
        (llama, policies.Indexer(), r"policy: must have an indexer, as the model gives no index"),
        (
            transformers.MistralForCausalLM(transformers.MistralConfig(**WINDOW)),
            RECIPES[0],
            r"model: must have layers with full attention; got 'MistralForCausalLM'",
        ),
    ):
        with pytest.raises(RuntimeError, match=rule + words):
            apply_policy(model, policy)
    for recipe, dtype, words in (
        (RECIPES[0], torch.bfloat16, r"must be None or float8_e4m3fn; got bfloat16"),
        (
            policies.HiP(),
            torch.float8_e4m3fn,
            r"must be in the dtype of the model, as hip_atten",
        ),
    ):
        with pytest.raises(RuntimeError, match=rule + "cache_dtype: " + words):
            apply_policy(llama, recipe, cache_dtype=dtype)
    hip = policies.HiP()
    for policy, prefill, words in (
        (RECIPES[0], policies.Quest(), "must be FullAttention, HiP, StreamingLLM or .*'Quest'"),
        (RECIPES[0], "HiP", "must be FullAttention, HiP, StreamingLLM or TokenSelect.*'HiP'"),
        (RECIPES[0], policies.HiP(layer=2), "must leave layer to the policy .*; got 2"),
        (
            policies.Quest(reader=hip),
            hip,
            "must be None, as the policy has a reader, .*; got 'HiP'",
        ),
    ):
        with pytest.raises(RuntimeError, match=rule + "prefill: " + words):
            apply_policy(llama, policy, prefill=prefill)
    for family in ("Gemma3n", "Gemma4"):
        config = getattr(transformers, f"{family}TextConfig")(num_hidden_layers=4)
        config.num_kv_shared_layers = 2
        stub = SimpleNamespace(config=config, set_attn_implementation=None)
        with pytest.raises(RuntimeError, match=rule + r"model: must have keys of its own in each"):
            apply_policy(stub, RECIPES[0])
    with apply_policy(llama, policies.SnapKV(budget=8, window=3)):
        with pytest.raises(RuntimeError, match=rule + r"model: must have no policy yet; got"):
            apply_policy(llama, RECIPES[0])
        with pytest.raises(RuntimeError, match=rule + r"model: must need no gradient, as a policy"):
            llama(ids)
        with torch.no_grad():
            cache = llama(ids).cache
            late = torch.cat([mask, torch.tensor([[1], [0]])], 1)
            with pytest.raises(RuntimeError, match=rule + r"attention_mask: must be True for the"):
                llama(ids[:, :1], attention_mask=late, cache=cache)
            with pytest.raises(RuntimeError, match=rule + r"attention_mask: must have shape"):
                llama(ids, attention_mask=torch.ones(2, 1, 17, 17))
        words = r"cache: must be None, or come from the model under a policy; got 'StaticCache'"
        with pytest.raises(RuntimeError, match=rule + words):
            generate(llama, ids, cache_implementation="static")
        assert llama(ids, use_cache=False).logits.requires_grad  # the model's own attention
    words = r"cache: must go to a model under the policy, as this attention .*; got 'sdpa'"
    with pytest.raises(RuntimeError, match=rule + words):
        llama(ids[:, :1], cache=cache)
    with pytest.raises(RuntimeError, match=r"policies.Quest: cache: must be given to a policy"):
        policies.Quest().prefill(*torch.zeros(3, 1, 1, 1, 1))
    with pytest.raises(RuntimeError, match=r"policies.KVCache: slots: cannot grow in pages"):
        paged = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.zeros(1, 1).int()
        policies.KVCache(*paged).grow(2)
    with pytest.raises(
        RuntimeError, match=r"policies.KVCache: requests: cannot be reordered in pa"
    ):
        policies.KVCache(*paged).reorder(torch.zeros(2).long())


@torch.no_grad()
def test_copies_and_what_a_model_had_before():
    """A deep copy has its own policy; instance attributes are restored."""
    model, ids = MODELS["llama"]().eval(), prompts()[0]
    model.generate = own = functools.partial(type(model).generate, model)
    dead = weakref.ref(model.model)
    applied = apply_policy(model, policies.FullAttention())
    before = generate(model, ids)
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    changed = generate(twin, ids)
    assert not torch.equal(changed[1], before[1])
    assert_alike(generate(model, ids), before)
    fresh = MODELS["llama"]().eval()
    fresh.load_state_dict(twin.state_dict())
    assert_alike(generate(fresh, ids), changed)
    applied.remove()
    assert model.generate is own and vars(twin)["_tokenmill_policy"].model is twin
    apply_policy(model, policies.FullAttention())
    del model, own, applied
    gc.collect()
    assert dead() is None  # no reference to the model remains


@torch.no_grad()
def test_attention_that_never_comes(monkeypatch):
    """A layer attends to its own pending keys of a policy, or the call raises and drops them."""
    rule = r"^tokenmill.integrations.transformers.apply_policy: model: "
    bloom = transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)
    bloom = transformers.BloomForCausalLM(bloom)
    before = bloom.config._attn_implementation
    with pytest.raises(RuntimeError, match=rule + "must have attention that transformers can repl"):
        apply_policy(bloom, policies.FullAttention())
    assert bloom.config._attn_implementation == before
    model, ids = MODELS["llama"]().eval(), prompts()[0]
    attention = model.model.layers[0].self_attn
    with apply_policy(model, policies.FullAttention()):
        expected = model(ids).logits
        with monkeypatch.context() as m:
            update = integration.PolicyCache.update

            def fails(*args, **kwargs):
                update(*args, **kwargs)
                raise KeyboardInterrupt

            m.setattr(integration.PolicyCache, "update", fails)
            with pytest.raises(KeyboardInterrupt):
                model(ids)
        assert torch.equal(model(ids).logits, expected)
        own = attention.config
        attention.config = copy.copy(own)
        attention.config._attn_implementation_internal = "eager"
        with pytest.raises(RuntimeError, match=rule + "must have layers that attend as their conf"):
            model(ids)
        attention.config = own
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("name", "pages", "size"),
    [("llama", True, 4), ("llama", True, 6), ("llama", False, 4), ("gemma2", True, 4),
     ("gpt_oss", True, 4)],
)  # fmt: skip
def test_continuous_batching(name, pages, size, monkeypatch):
    """Requests of different lengths, in pages and chunks, match separate requests."""
    in_place = []
    attend = _pages.attention
    monkeypatch.setattr(
        _pages, "attention", lambda *a, **o: in_place.append(o["window"]) or attend(*a, **o)
    )
    model, prompts = MODELS[name]().eval(), [[5, 9, 2], [*range(1, 24)], [7] * 9]
    model.set_attn_implementation("eager")
    alone = [generate(model, torch.tensor([prompt]))[0][0].tolist() for prompt in prompts]
    with integration.continuous_batching(model, pages=pages):
        found = model.generate_batch(
            prompts,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NEW, do_sample=False, eos_token_id=-1
            ),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                num_blocks=16, max_batch_tokens=16, page_size=size
            ),
            progress_bar=False,
        )
    assert [result.generated_tokens for result in found.values()] == alone
    # Layers with a window gather, as do pages whose size is not a power of two.
    assert set(in_place) == ({(-1, 0)} if pages and size == 4 else set())
    assert not model._forward_pre_hooks
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "function", [apply_policy, integration.continuous_batching, integration.watch_attention]
)
def test_its_example_runs(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs={})
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0
