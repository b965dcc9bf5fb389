"""Kernel of each call of each integration: a call that loses its kernel fails here."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from explained_calls import cuda_kernels, kernels, recorded
from test_vllm import custom, load  # noqa: F401 a fixture

from tokenmill import _explain
from tokenmill.integrations import sdpa

PROMPT = 300  # min keys from which a step is attention to a cache
FORWARD, DECODE = "dense/attention", "dense/attention_decode"


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers", minversion="5.24")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=256, intermediate_size=64, num_hidden_layers=1, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().half()


def padding(kind):
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    if kind == "left":
        mask[1, :50] = 0
    elif kind == "right":
        mask[1, -50:] = 0
    elif kind == "hole":
        mask[1, 100:150] = 0
    return mask


def calls_of_llama(model, backend, mask, cache=None, steps=0):
    """Kernels of a prompt, and of the last of some steps of generate()."""
    from tokenmill.integrations.transformers import register

    model.set_attn_implementation(register(f"tokenmill_{backend}_kernels", backend=backend))
    ids = torch.ones_like(mask)
    with recorded() as calls, torch.no_grad():
        if not steps:
            model(ids, attention_mask=mask)
            return calls
        model.generate(
            ids, attention_mask=mask, max_new_tokens=1 + steps, do_sample=False, pad_token_id=0,
            cache_implementation=cache, disable_compile=True,
        )  # fmt: skip
    assert len(calls) == 1 + steps
    return calls[-1:]


# Padding: kernels on compute capability 9.0. A CPU has one call each.
PROMPTS = {
    "none": [f"{FORWARD}/kernel_sm90"],
    "left": [f"{FORWARD}/kernel_sm90"],
    "right": [f"{FORWARD}/kernel_sm90"] * 2,
    "hole": [f"{FORWARD} (not kernel_sm90: mask_q_spans)"],
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_of_transformers(kind, llama):
    calls = calls_of_llama(llama, "cpu", padding(kind))
    assert kernels(calls) == [FORWARD]
    assert not calls[0].packed and calls[0].options.get("bias") is None


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_of_transformers_on_cuda(kind, llama):
    calls = calls_of_llama(llama, "emulated", padding(kind))
    assert cuda_kernels(calls) == PROMPTS[kind]
    assert all(call.packed == (kind in ("left", "right")) for call in calls)
    assert cuda_kernels(calls, sm90=False) == [FORWARD] * len(calls)


# (Cache, padding): kernel on a CPU, kernel on compute capability 9.0
STEPS = {
    ("dynamic", "none"): (FORWARD, f"{DECODE}/kernel_sm90"),
    ("dynamic", "left"): (DECODE, f"{DECODE} (not kernel_sm90: mask_q_spans)"),
    ("dynamic", "hole"): (DECODE, f"{DECODE} (not kernel_sm90: mask_q_spans)"),
    ("static", "none"): (DECODE, f"{DECODE} (not kernel_sm90: mask_q_spans)"),
    ("static", "left"): (DECODE, f"{DECODE} (not kernel_sm90: mask_q_spans)"),
}


@pytest.mark.parametrize(("cache", "kind"), STEPS)
def test_steps_of_generate(cache, kind, llama):
    calls = calls_of_llama(llama, "cpu", padding(kind), cache, 2)
    assert kernels(calls) == [STEPS[cache, kind][0]]


@pytest.mark.parametrize(("cache", "kind"), STEPS)
def test_steps_of_generate_on_cuda(cache, kind, llama):
    calls = calls_of_llama(llama, "emulated", padding(kind), cache, 2)
    assert cuda_kernels(calls) == [STEPS[cache, kind][1]]
    assert not calls[0].packed


# Queries per request: whether the call is packed, and its kernel on compute capability 9.0
BOTH = f"{FORWARD}/kernel_sm90 and csrc/{DECODE} for requests with fewer than 32 queries"
VLLM = {
    "prefill": ([200], True, BOTH),
    "prompts": ([40, 60], True, BOTH),
    "decode": ([1, 1, 1], False, f"{DECODE}/kernel_sm90"),
    "one request": ([1], False, f"{DECODE}/kernel_sm90"),
    "speculative": ([4, 4], False, f"{DECODE}/kernel_sm90"),
    "a chunk and decode": ([48, 1, 1], True, BOTH),
    "mixed drafts": ([4, 1], True, f"{DECODE} (not kernel_sm90: q)"),
}


@pytest.mark.parametrize("step", VLLM)
def test_steps_of_vllm(step, custom):  # noqa: F811
    vllm_step(step, custom)


def vllm_step(step, member):
    counts, packed, kernel = VLLM[step]
    backend = load(member)
    heads, kv_heads, dim, page = 8, 2, 64, 64
    impl = backend.get_impl_cls()(heads, dim, 0.125, kv_heads)
    tokens, requests = sum(counts), len(counts)
    cache = torch.zeros(backend.get_kv_cache_shape(16, page, kv_heads, dim), dtype=torch.float16)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    common = SimpleNamespace(
        query_start_loc=starts, num_reqs=requests, num_actual_tokens=tokens,
        max_query_len=max(counts), causal=True, slot_mapping=torch.arange(tokens),
        seq_lens=torch.full((requests,), 256, dtype=torch.int32),
        block_table_tensor=torch.arange(4 * requests, dtype=torch.int32).view(requests, 4),
    )  # fmt: skip
    builder = backend.get_builder_cls()(None, ["0"], None, torch.device("cpu"))
    metadata = builder.build(0, common)
    q = torch.randn(tokens, heads, dim, dtype=torch.float16)
    k = torch.randn(tokens, kv_heads, dim, dtype=torch.float16)
    with recorded() as calls:
        impl.forward(None, q, k, k, cache, metadata, torch.empty(tokens, heads * dim).half())
    assert kernels(calls) == [DECODE]
    assert calls[0].packed == packed
    if not packed:
        assert calls[0].args[0].shape == (requests, counts[0], heads, dim)
    assert cuda_kernels(calls) == [kernel]


def test_a_batch_invariant_engine_has_packed_steps(custom, monkeypatch):  # noqa: F811
    """Packed calls have the same bits in any batch."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setitem(VLLM, "decode", ([1, 1, 1], True, f"{DECODE} (not kernel_sm90: q)"))
    vllm_step("decode", custom)


def test_scaled_dot_product_attention(monkeypatch):
    """The forward and backward kernels that run are those that explain names."""
    ran = []
    real = sdpa.below_autograd

    def note(op, namespace, arguments):
        ran.append((op.name, namespace))
        return real(op, namespace, arguments)

    monkeypatch.setattr(sdpa, "below_autograd", note)
    q = torch.randn(1, 2, 64, 64, requires_grad=True)
    mask = torch.zeros(64, 64)
    with sdpa.enable() as route:
        for options in ({}, {"is_causal": True}, {"attn_mask": mask}):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, **options).sum().backward()
    assert route.served == 6 and not route.passed
    both = [("attention_out", "tokenmill"), ("attention_backward", "tokenmill")]
    assert ran == both * 3
    x = q.detach().half()
    with mock.patch.object(_explain, "_current_capability", lambda *call: 90):
        for causal in (False, True):
            lowered = sdpa._Call(x, x, x, 0.0, causal, None, None)._lower()
            name = _explain.kernel_name(sdpa.SPEC, "emulated", lowered)
            assert name.startswith(f"csrc/{FORWARD}/kernel_sm90 in")


TOKENS = ["tokens/best_match", "tokens/topk_partition"]  # kernels of bipartite_match
MERGE = ["sparse/transpose_block_list", "tokens/segment_reduce"]
VIT = {
    "merge": ({"merge": 4}, [FORWARD, *TOKENS, *MERGE]),
    "keep": (
        {"keep_rate": 0.5, "layers": [0]},
        [FORWARD, "select/attention_row_scores", "tokens/topk_partition", "tokens/gather_fuse"],
    ),
}


@pytest.mark.parametrize("how", VIT)
def test_vision_transformers_of_timm(how):
    pytest.importorskip("timm")
    from timm.models import VisionTransformer

    from tokenmill.integrations import timm

    options, wanted = VIT[how]
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=1, num_heads=1).eval()
    timm.patch(model, **options)
    with recorded() as calls, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert kernels(calls) == wanted
    assert cuda_kernels(calls, sm90=False) == wanted


def test_image_models_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from tokenmill.integrations.diffusers import patch

    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=4,
    ).eval()  # fmt: skip
    patch(model)
    with recorded() as calls, torch.no_grad():
        model(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([2]))
    wanted = [*TOKENS, *MERGE, "tokens/gather_tokens"]
    assert kernels(calls) == wanted
    assert cuda_kernels(calls, sm90=False) == wanted
