"""policies.at_budget: the keys that a step attends to, counted, are the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import InputError, policies

KV_HEADS, LAYERS = 2, 5
# Values five times as wide as keys: a key and its value have other bytes than keys and boxes.
KEYS_OF = {"D": 8, "Dv": 40}
EVICTING = (policies.StreamingLLM, policies.H2O, policies.Keyformer, policies.SnapKV)
SELECTING = (policies.TokenSelect, policies.Quest, policies.HiP, policies.TidalDecode)


def attended(policy, length, steps=1):
    """Keys that a step attends to, averaged over layers, heads and steps."""
    caches = [
        policies.KVCache(*(torch.zeros(1, length + steps, KV_HEADS, d) for d in KEYS_OF.values()))
        for _ in range(LAYERS)
    ]
    fields = {k: v for k, v in vars(policy).items() if k in type(policy).__dataclass_fields__}
    for name in ("cache", "layer", "previous"):
        fields.pop(name)
    layers = policies.stack(type(policy), caches, **fields)
    g = torch.Generator().manual_seed(0)

    def draw(tokens):
        return (
            torch.randn(1, tokens, heads, d, generator=g)
            for heads, d in ((4, 8), (KV_HEADS, 8), (KV_HEADS, 40))
        )

    found = 0.0
    for layer in layers:
        layer.prefill(*draw(length))
        for _ in range(steps):
            layer.step(*draw(1))
            token = layer.cache.token_bytes
            for read in layer._reads:
                if read.size in (token, token // KV_HEADS):  # attention read it, not a selection
                    found += read.counted().float().mean().item()  # mean over per-head lists
    return found / LAYERS / steps


@pytest.mark.parametrize("policy", EVICTING, ids=lambda p: p.__name__)
@settings(max_examples=8, deadline=None)
@given(keys=st.integers(16, 150), length=st.integers(160, 300))
def test_policies_that_evict_keep_the_budget(policy, keys, length):
    found = attended(policies.at_budget(policy, keys, length=length, layers=LAYERS), length)
    assert keys <= found <= keys + 1  # SnapKV and H2O count the new token beside the budget


@pytest.mark.parametrize("policy", SELECTING, ids=lambda p: p.__name__)
@settings(max_examples=8, deadline=None)
@given(share=st.floats(0.0, 1.0), length=st.integers(160, 300))
def test_policies_that_select_attend_to_the_budget(policy, share, length):
    options = {policies.Quest: {"dense_layers": 1, "page": 4}, policies.HiP: {"dense_layers": 1}}
    chosen = options.get(policy, {})
    if policy is policies.TidalDecode:
        chosen = {"first": 1, "correction": 3}
    dense = {policies.TokenSelect: 0, policies.TidalDecode: 3}.get(policy, 1)
    least = -(-(dense * length + (LAYERS - dense) * 40) // LAYERS)
    keys = int(least + share * (length - 20 - least))
    found = attended(
        policies.at_budget(policy, keys, length=length, layers=LAYERS, **chosen), length
    )
    # Quest rounds down to pages, of which the newest is not full; full layers see the new token.
    assert keys - 8 <= found <= keys + 2


def test_full_steps_of_recycled_attention_count():
    policy = policies.at_budget(
        policies.RecycledAttention, 100, length=300, layers=LAYERS, stride=10
    )
    assert abs(attended(policy, 300, steps=20) - 100) < 5


@pytest.mark.parametrize(
    ("policy", "keys", "text"),
    [
        (policies.Quest, 40, "keys: must be at least 135 for Quest with 2 full layers of 5 at 300"),
        (policies.RazorAttention, 64, "a policy with a budget; got 'RazorAttention'"),
        (policies.Policy, 64, "policy: must be a policy with a budget; got 'Policy'"),
        (policies.H2O, 8, "keys: must be at least 16; got 8"),
        (policies.H2O, 2.5, "keys"),
        ("H2O", 64, "policy: must be a policy with a budget; got 'H2O'"),
        (policies.RecycledAttention, 20, "keys: must be at least 32 for a full step in 50"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_kept_is_an_error(policy, keys, text):
    with pytest.raises(InputError, match=r"tokenmill\.policies\.at_budget: ") as error:
        policies.at_budget(policy, keys, length=300, layers=LAYERS)
    assert text in str(error.value)


def test_full_attention_has_no_budget_and_options_win():
    full = policies.at_budget(policies.FullAttention, 64, length=300, layers=LAYERS)
    assert isinstance(full, policies.FullAttention)
    chosen = policies.at_budget(policies.SnapKV, 64, length=300, layers=LAYERS, window=8, kernel=13)
    assert (chosen.budget, chosen.window, chosen.kernel) == (64, 8, 13)
