"""A cache that grows in place gives the tokens and scores of DynamicCache."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from test_policy_models import MODELS, assert_alike, generate, prompts

transformers = pytest.importorskip("transformers", minversion="5.24")
integration = pytest.importorskip("tokenmill.integrations.transformers")
GrowingCache, DynamicCache = integration.GrowingCache, transformers.DynamicCache


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return MODELS["llama"]().eval()


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("llama", "sdpa"), ("gemma2", "tokenmill"), ("gpt_oss", "tokenmill")],
)
def test_generate(name, implementation, monkeypatch):
    """Layers of gemma2 and gpt_oss have windows of 4 tokens. Refused drafts are cropped."""
    monkeypatch.setattr("tokenmill._transformers.growing.LEAST_ROOM", 3)
    torch.manual_seed(0)
    model, (ids, mask) = MODELS[name]().eval(), prompts()
    integration.register("tokenmill")
    model.set_attn_implementation(implementation)
    for given, options in (
        ((ids, mask), {"max_new_tokens": 9}),
        ((ids, mask), {"num_beams": 3}),
        ((ids[:1].repeat(1, 2), None), {"prefill_chunk_size": 8}),
        ((ids[:1].repeat(1, 2), None), {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}),
    ):
        caches = [kind(config=model.config) for kind in (DynamicCache, GrowingCache)]
        want, found = (generate(model, *given, cache=cache, **options) for cache in caches)
        assert_alike(found, want)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_most_steps_move_nothing(name):
    """A buffer is full after 64 tokens, or an eighth of the tokens in it."""
    model, (ids, _) = MODELS[name]().eval(), prompts()
    cache = GrowingCache(model.config)
    model(ids, cache=cache)
    places: list[set[int]] = [set() for _ in cache.layers]
    for _ in range(70):
        model(ids[:, :1], cache=cache)
        for layer, seen in zip(cache.layers, places, strict=True):
            seen |= {x.untyped_storage().data_ptr() for x in (layer.keys, layer.values)}
    assert all(len(seen) == 4 for seen in places)
    assert cache.get_seq_length() == ids.shape[1] + 70


@torch.no_grad()
def test_rows_and_copies(llama):
    """Rows are repeated, selected, and taken back; a deep copy goes on by itself."""
    (ids, _), more = prompts(), torch.arange(1, 7).view(3, 2)
    results = []
    for cache in (DynamicCache(config=llama.config), GrowingCache()):
        llama(ids, cache=cache)
        llama(ids[:, :3], cache=cache)
        cache.crop(-2)
        twin = copy.deepcopy(cache)
        outs = [llama(ids[:, 2:5], cache=twin).logits, llama(ids[:, 3:6], cache=cache).logits]
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 2]))
        outs += [llama(more, cache=cache).logits, llama(ids[:, :2], cache=twin).logits]
        cache.reset()
        outs.append(llama(ids, cache=cache).logits)
        results.append(outs)
    for want, found in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5)


def test_gradients_and_inference_mode(llama):
    ids, _ = prompts()
    gradients = []
    for cache in (DynamicCache(config=llama.config), GrowingCache(llama.config)):
        with torch.inference_mode():
            for i in range(0, 9, 3):
                llama(ids[:, i : i + 3], cache=cache)
        with torch.no_grad():
            llama(ids[:, 9:12], cache=cache)
        logits = [llama(ids[:, i : i + 2], cache=cache).logits for i in (12, 14)]
        logits = torch.cat(logits, 1)
        parameters = [*llama.parameters()]
        gradients.append([logits, *torch.autograd.grad(logits.square().sum(), parameters)])
    for want, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, want)


def test_its_example_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(GrowingCache, globs={})
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0
