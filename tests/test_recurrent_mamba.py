"""patch() of language models with Mamba-2 layers, held against the models' own layers."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
from tokenmill.integrations.transformers import patch, unpatch  # noqa: E402

COMMON = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 12, "mamba_n_groups": 2,
    "mamba_chunk_size": 16, "mamba_expand": 2,
}  # fmt: skip
MODELS = {
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 12, "n_groups": 2, "chunk_size": 16},
    "Bamba": {**ATTENTION, **MAMBA, "attn_layer_indices": [1], "z_loss_coefficient": 0.0},
    "GraniteMoeHybrid": {
        **ATTENTION, **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
        "shared_intermediate_size": 48,
    },
    "NemotronH": {
        **ATTENTION, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 12,
        "n_groups": 2, "chunk_size": 16, "layers_block_type": ["mamba", "attention"],
        "head_dim": 16,
    },
    "FalconH1": {**ATTENTION, **MAMBA, "mamba_d_ssm": 64, "head_dim": 16},
    "Zamba2": {
        **ATTENTION, "mamba_d_state": 12, "mamba_expand": 2, "mamba_headdim": 8,
        "n_mamba_heads": 8, "mamba_ngroups": 2, "chunk_size": 16, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 2,
        "attention_head_dim": 32, "adapter_rank": 4,
    },
}  # fmt: skip
each_model = pytest.mark.parametrize("name", MODELS)


def make(name):
    """A model with random weights, and its patched copy."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **MODELS[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, weight in model.named_parameters():
        if key.endswith(("dt_bias", "conv1d.bias", ".D")):
            torch.nn.init.normal_(weight, 0.5, 0.3)
        elif key.endswith("A_log"):
            torch.nn.init.uniform_(weight, 0, 1)
        elif key.endswith(("in_proj.weight", "out_proj.weight")):
            torch.nn.init.normal_(weight, 0, 0.2)
    patched = copy.deepcopy(model)
    assert patch(patched)
    return model, patched


def tokens(batch, length, seed=1):
    return torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@each_model
def test_logits_and_gradients_are_the_models_own(name):
    model, patched = make(name)
    ids = tokens(2, 45)
    losses = [m(ids, labels=ids, use_cache=False) for m in (model, patched)]
    torch.testing.assert_close(losses[1].logits, losses[0].logits, atol=2e-5, rtol=1e-4)
    for found in losses:
        found.loss.backward()
    for (key, a), b in zip(model.named_parameters(), patched.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, atol=2e-5, rtol=1e-3, msg=key)


def states(cache):
    for layer in cache.layers:
        if getattr(layer, "recurrent_states", None):
            yield layer.recurrent_states[0], layer.conv_states[0]


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
                ids[:, start:end], attention_mask=mask[:, :end], use_cache=True,
                cache=cache,
            )  # fmt: skip
            cache, start = out.past_key_values, end
            logits.append(out.logits[:, -1])
        results.append([torch.stack(logits, 1), *(t for pair in states(cache) for t in pair)])
    assert len(results[0]) > 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


@each_model
@torch.no_grad()
def test_generate_says_the_same(name):
    model, patched = make(name)
    ids = tokens(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(patched.generate(ids, **options), model.generate(ids, **options))


@torch.no_grad()
def test_packed_sequences_are_kept_apart():
    model, patched = make("Mamba2")
    parts = tokens(1, 5), tokens(1, 2, 2), tokens(1, 11, 3)
    offsets = torch.tensor([0, 5, 7, 18], dtype=torch.int32)
    index = torch.cat([torch.full(p.shape, i) for i, p in enumerate(parts)], 1).int()
    want = torch.cat([model(p, use_cache=False).logits for p in parts], 1)
    for how in ({"cu_seq_lens_q": offsets}, {"seq_idx": index}):
        found = patched(torch.cat(parts, 1), use_cache=False, **how).logits
        torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)


def test_training_and_unpatching():
    model, patched = make("Mamba2")
    ids = tokens(2, 20)
    wanted, found = (m.train()(ids, labels=ids, use_cache=False).loss for m in (model, patched))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    unpatch(patched)
    assert all("forward" not in vars(m) for m in patched.modules())
