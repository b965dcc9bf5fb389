"""Keywords of other libraries: the error names our keyword."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import tokenmill as tm
from tokenmill import _other_names
from tokenmill._other_names import ABSENT, RENAMED

Q = torch.randn(1, 8, 2, 8)
N = torch.tensor([8], dtype=torch.int32)
LISTS = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)
TOKENS = torch.randn(1, 6, 4)
# Functions with valid calls.
CALLS = {
    tm.attention: ((Q, Q, Q), {}),
    tm.sigmoid_attention: ((Q, Q, Q), {}),
    tm.attention_decode: ((Q[:, :1], Q, Q), {"seqlens_k": N}),
    tm.linear_attention: ((Q, Q, Q), {}),
    tm.lightning_attention: ((Q, Q, Q, torch.ones(2)), {}),
    tm.delta_attention: ((Q, Q, Q, Q[..., 0]), {}),
    tm.delta_attention_decode: ((Q, Q, Q, Q[..., 0], torch.zeros(1, 2, 8, 8)), {}),
    tm.causal_conv1d: ((TOKENS, torch.ones(4, 3)), {}),
    tm.causal_conv1d_decode: ((TOKENS, torch.zeros(1, 4, 2), torch.ones(4, 3)), {}),
    tm.linear_attention_decode: ((Q, Q, Q, torch.zeros(1, 2, 8, 8)), {}),
    tm.sparse_decode_attention: (
        (Q[:, :1], Q, Q, LISTS[0][0], LISTS[1][0]),
        {"seqlens_k": N},
    ),
    tm.block_sparse_attention: ((Q, Q, Q, *LISTS), {"block_q": 8, "block_k": 8}),
    tm.hip_attention: ((Q, Q, Q), {"budget": 8, "block_q": 8}),
    tm.moba_attention: ((Q, Q, Q), {"block": 4}),
    tm.native_sparse_attention: (
        (Q, Q, Q, torch.rand(1, 8, 2, 3)),
        {"block": 4, "stride": 2, "select_block": 4, "topk": 3},
    ),
    tm.merge_tokens: ((TOKENS, torch.tensor([[0, 0, 1, 1, 2, 2]]), 3), {}),
    tm.bipartite_match: ((TOKENS, 2), {}),
    tm.topk_select: ((torch.randn(2, 9), 3), {}),
}
HANDED_ON = {tm.sigmoid_attention: "attention", tm.lightning_attention: "linear_attention"}
each_function = pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)

# (function, its keyword elsewhere, expected error)
THEIRS = [
    (tm.attention, "is_causal", "is called causal here"),
    (tm.attention, "attn_mask", "is called bias here"),
    (tm.attention, "dropout_p", "there is no dropout of attention weights here"),
    (tm.attention, "enable_gqa", "is not needed: fewer heads in k and v"),
    (tm.attention, "scale_factor", "is called scale here"),
    (tm.attention, "softmax_scale", "is called scale here"),
    (tm.attention, "window_size", "is called window here"),
    (tm.attention, "deterministic", "has no meaning here: the same inputs give the same bits"),
    (tm.attention, "return_attn_probs", "the weights are never in memory"),
    (tm.attention, "cache_seqlens", "is called seqlens_k here"),
    (tm.attention_decode, "cache_seqlens", "is called seqlens_k here"),
    (tm.sparse_decode_attention, "cache_seqlens", "is called seqlens_k here"),
    (tm.attention, "sm_scale", "is called scale here"),
    (tm.attention, "logits_soft_cap", "is called softcap here"),
    (tm.attention, "pos_encoding_mode", "there is no RoPE inside"),
    (tm.sparse_decode_attention, "pos_encoding_mode", "is called pos_mode here"),
    (tm.attention, "attn_bias", "is called bias here"),
    (tm.attention, "p", "there is no dropout of attention weights here"),
    (tm.sigmoid_attention, "is_causal", "is called causal here"),
    (tm.linear_attention, "g", "is called log_decay here"),
    (tm.linear_attention, "u", "is called bonus here"),
    (tm.linear_attention, "gk", "is called log_decay here, with one number for each channel"),
    (tm.linear_attention, "output_final_state", "is called return_final_state here"),
    (tm.linear_attention, "head_first", "there is one layout"),
    (tm.linear_attention, "beta", "the delta rule is delta_attention"),
    (tm.delta_attention, "g", "is called log_decay here"),
    (tm.delta_attention, "use_qk_l2norm_in_kernel", "is called qk_l2norm here"),
    (tm.causal_conv1d, "initial_states", "is called initial_state here"),
    (tm.causal_conv1d_decode, "conv_state_indices", "is called state_indices here"),
    (
        tm.causal_conv1d_decode,
        "num_accepted_tokens",
        "is called accepted here, of the",
    ),
    (tm.lightning_attention, "output_final_state", "is called return_final_state here"),
    (tm.block_sparse_attention, "softmax_scale", "is called scale here"),
    (tm.hip_attention, "mask_k", "is called budget here"),
    (tm.moba_attention, "moba_topk", "is called topk here"),
    (tm.native_sparse_attention, "block_counts", "is called topk here"),
    (tm.merge_tokens, "mode", "is called reduce here"),
    (tm.bipartite_match, "class_token", "is called protect_first here"),
    (tm.topk_select, "largest", "the largest scores are taken"),
]


@pytest.mark.parametrize(
    ("function", "name", "rule"), THEIRS, ids=[f"{f.__name__}-{n}" for f, n, _ in THEIRS]
)
def test_a_name_of_another_library_is_answered_by_ours(function, name, rule):
    args, kwargs = CALLS[function]
    if name == "cache_seqlens":
        kwargs = {}  # our keyword is replaced by theirs
    op = HANDED_ON.get(function, function.__name__)
    with pytest.raises(
        tm.InputError, match=rf"^tokenmill\.{op}: {name}: {rule}.*; got 1$"
    ) as error:
        function(*args, **kwargs, **{name: 1})
    assert isinstance(error.value, TypeError)


@each_function
def test_other_names_are_refused_and_not_shown(function):
    args, kwargs = CALLS[function]
    function(*args, **kwargs)
    parameters = inspect.signature(function).parameters
    assert "other" not in parameters
    op = HANDED_ON.get(function, function.__name__)
    with pytest.raises(TypeError, match=rf"^tokenmill\.{op}: nosuch: is not an argument; got 'x'$"):
        function(*args, **kwargs, nosuch="x")
    with pytest.raises(TypeError, match=r"backed: is not an argument \(did you mean 'backend'\?\)"):
        function(*args, **kwargs, backed="cpu")


@pytest.mark.parametrize(
    "name", [name for name, spec in tm.registry.ops().items() if hasattr(spec.function, "keywords")]
)
def test_every_operator_that_gets_keywords_by_name_refuses_others(name):
    spec = tm.registry.get(name)
    args, kwargs = spec.samples[0].make(torch.float32, torch.Generator().manual_seed(0))
    assert spec.function.keywords >= kwargs.keys()
    with pytest.raises(TypeError, match=rf"^tokenmill\.{name}: nosuch: is not an argument; got 1$"):
        spec.function(*args, **kwargs, nosuch=1)


def test_the_table_tells_the_truth():
    """For each renamed keyword some function has our name and not theirs, and no function has a
    keyword that the table calls absent, but delta_attention, which it names."""
    own = {f: set(inspect.signature(f).parameters) for f in CALLS}
    for theirs, (ours, _) in RENAMED.items():
        for name in ours:
            assert any(name in names and theirs not in names for names in own.values()), theirs
    assert {n for n in ABSENT for names in own.values() if n in names} == {"beta"}


@pytest.mark.parametrize("function", [tm.attention_decode, tm.sparse_decode_attention])
def test_what_is_required_stays_required(function):
    args, _ = CALLS[function]
    assert inspect.signature(function).parameters["seqlens_k"].default is inspect.Parameter.empty
    with pytest.raises(tm.InputError, match=r": seqlens_k: must be a tensor; got nothing$"):
        function(*args)


def test_explain_names_ours():
    said = tm.explain("attention", Q, Q, Q, is_causal=True).error
    assert said.startswith("tokenmill.attention: is_causal: is called causal here")


PAGE = Path(__file__).resolve().parent.parent / "docs" / "coming-from.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documents are not beside the tests")
def test_the_page_for_newcomers_names_what_the_errors_name():
    """A row `theirs` -> `ours` of the page's tables matches the error of some function."""
    own = [tuple(inspect.signature(f).parameters) for f in CALLS]
    seen = 0
    for theirs, ours in re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", PAGE.read_text(), re.MULTILINE):
        if theirs != ours:
            said = {_other_names.rule_of(theirs, names) for names in own if ours in names}
            assert any(rule.startswith(f"is called {ours} here") for rule in said), theirs
            seen += 1
    for theirs in re.findall(r"^\| `(\w+)` \| (?:none|not needed|always)", PAGE.read_text(), re.M):
        assert theirs in _other_names.ABSENT, theirs
        seen += 1
    assert seen > 15
