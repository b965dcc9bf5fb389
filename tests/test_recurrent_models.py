"""patch() of language models with a delta rule, held against the models' own layers."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
from tokenmill.integrations.transformers import patch, unpatch  # noqa: E402

COMMON = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
RULE = {"linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2}
GROUPED = {"head_dim": 16, "linear_num_value_heads": 4}
LATENT = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "linear_head_dim": 8, "linear_num_heads": 2, "moe_intermediate_size": 16,
    "num_local_experts": 2, "num_experts_per_tok": 1, "mlp_layer_types": ["dense", "dense"],
}  # fmt: skip
MODELS = {
    "Qwen3Next": {**RULE, **GROUPED, "num_experts": 0, "mlp_only_layers": [0, 1]},
    "Qwen3_5Text": {**RULE, **GROUPED},
    "OlmoHybrid": {**RULE, "linear_num_value_heads": 2},
    "KimiLinear": LATENT,
}
each_model = pytest.mark.parametrize("name", MODELS)


def make(name):
    """A model with random weights, and its patched copy."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **MODELS[name]})
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    patched = copy.deepcopy(model)
    assert len(patch(patched)) == 1
    return model, patched


def tokens(batch, length, seed=1):
    return torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@each_model
def test_logits_and_gradients_are_the_models_own(name):
    model, patched = make(name)
    ids = tokens(2, 70)
    losses = [m(ids, labels=ids, use_cache=False) for m in (model, patched)]
    torch.testing.assert_close(losses[1].logits, losses[0].logits, atol=2e-5, rtol=1e-4)
    for found in losses:
        found.loss.backward()
    for (key, a), b in zip(model.named_parameters(), patched.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, atol=2e-5, rtol=1e-3, msg=key)


@each_model
@torch.no_grad()
def test_generation_goes_on_from_the_same_cache(name):
    """A prompt with padding on the left, a second piece of several tokens, single steps."""
    model, patched = make(name)
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :7] = 0
    ends = 10, 14, 15, 16, 17
    results = []
    for each in (model, patched):
        cache, logits, start = None, [], 0
        for end in ends:
            out = each(
                ids[:, start:end], attention_mask=mask[:, :end], cache=cache,
                use_cache=True,
            )  # fmt: skip
            cache, start = out.past_key_values, end
            logits.append(out.logits[:, -1])
        layer = cache.layers[0]
        results.append([torch.stack(logits, 1), layer.recurrent_states[0], layer.conv_states[0]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


@each_model
@torch.no_grad()
def test_generate_says_the_same(name):
    model, patched = make(name)
    ids = tokens(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(patched.generate(ids, **options), model.generate(ids, **options))


@each_model
@torch.no_grad()
def test_tokens_are_taken_back(name):
    """A cache that records its states, as assisted decoding asks it to."""
    model, patched = make(name)
    ids = tokens(1, 40)
    results = []
    for each in (model, patched):
        cache, logits, end = transformers.DynamicCache(config=each.config), [], 0
        for layer in cache.layers:
            if hasattr(layer, "recurrent_states"):
                layer.activate_past_recording(4)
        for count, back in ((10, 0), (4, -3), (1, 0), (1, 0), (1, -2), (5, -1), (1, 0)):
            out = each(ids[:, end : end + count], cache=cache, use_cache=True)
            logits.append(out.logits[:, -1])
            end += count + back
            if back:
                cache.crop(back)
        results.append(torch.stack(logits, 1))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)


@each_model
@torch.no_grad()
def test_packed_sequences_are_kept_apart(name):
    """The models' own layers refuse these without other packages, or mix the sequences."""
    model, patched = make(name)
    parts = tokens(1, 5), tokens(1, 2, 2), tokens(1, 11, 3)
    ids = torch.cat(parts, 1)
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    index = torch.cat([torch.full(p.shape, i) for i, p in enumerate(parts)], 1).int()
    offsets = torch.tensor([0, 5, 7, 18], dtype=torch.int32)
    want = torch.cat([model(p, use_cache=False).logits for p in parts], 1)
    with pytest.raises(ValueError, match="packed sequences apart"):
        model(ids, position_ids=positions, seq_idx=index, use_cache=False)
    for how in ({"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}, {"seq_idx": index}):
        found = patched(ids, position_ids=positions, use_cache=False, **how).logits
        torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_half_precision_models():
    model, patched = make("Qwen3Next")
    model, patched = model.bfloat16(), patched.bfloat16()
    ids = tokens(1, 40)
    exact = copy.deepcopy(model).float()(ids).logits
    errors = [(m(ids).logits.float() - exact).abs().mean() for m in (model, patched)]
    assert errors[1] <= 1.1 * errors[0]
    assert torch.isfinite(patched.generate(ids[:, :5], max_new_tokens=3, do_sample=False)).all()


@each_model
@torch.no_grad()
def test_gated_norms_have_their_bits_by_blocks(name, monkeypatch):
    """Blocks of two or three rows, the last one cut."""
    model, patched = make(name)
    own, ours = (
        next(m for m in each.modules() if "NormGated" in type(m).__name__)
        for each in (model, patched)
    )
    assert "forward" in vars(ours)
    width = len(own.weight)
    monkeypatch.setattr("tokenmill.nn._blocks.ELEMENTS", 3 * width // torch.get_num_threads())
    for dtype in (torch.float32, torch.bfloat16):
        x, gate = torch.randn(2, 5, 7, 2 * width).to(dtype).chunk(2, -1)
        assert torch.equal(ours.to(dtype)(x, gate), own.to(dtype)(x, gate))
        flat = x.flatten(0, -2), gate.flatten(0, -2)
        assert torch.equal(ours(*flat), own(*flat))
        assert torch.equal(ours(x[:0], gate[:0]), own(x[:0], gate[:0]))
    with torch.enable_grad():
        assert ours(x, gate).requires_grad


def test_other_models_keep_their_own_layers():
    model, patched = make("Qwen3Next")
    assert "forward" not in vars(model.model.layers[0].linear_attn)
    with pytest.raises(RuntimeError, match="must not be patched yet"):
        patch(patched)
    again = copy.deepcopy(patched)
    unpatch(patched)
    assert "forward" not in vars(patched.model.layers[0].linear_attn)
    assert "forward" not in vars(patched.model.layers[0].linear_attn.norm)
    own = vars(again.model.layers[0].linear_attn)["forward"]
    assert own.__self__ is again.model.layers[0].linear_attn
    unpatch(again)
    with pytest.raises(RuntimeError, match="must be patched"):
        unpatch(again)


def test_a_layer_with_a_wrapper_is_refused():
    model, _ = make("Qwen3Next")
    layer = model.model.layers[0].linear_attn
    layer.forward = layer.forward
    with pytest.raises(RuntimeError, match="must have blocks with the forward of their class"):
        patch(model)
