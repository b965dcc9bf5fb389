"""Random tiny models of transformers give the results of their own attention."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
import torch

import tokenmill as tm

transformers = pytest.importorskip("transformers", minversion="5.4")
integration = pytest.importorskip("tokenmill.integrations.transformers")
attention_module = pytest.importorskip("tokenmill._transformers.attention")
masks_module = pytest.importorskip("tokenmill._transformers.masks")
padding_module = pytest.importorskip("tokenmill._transformers.padding")

SMALL = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "initializer_range": 0.2,  # large enough for a mask, cap or sink to affect scores
}
CAUSAL = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
WINDOWED = CAUSAL | {"sliding_window": 4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


def bert(**options):
    config = transformers.BertConfig(
        **SMALL, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, **options
    )
    return transformers.BertModel(config)


def llama():
    return transformers.LlamaModel(transformers.LlamaConfig(**CAUSAL))


def mistral():
    return transformers.MistralModel(transformers.MistralConfig(**WINDOWED))


def gemma2():
    config = transformers.Gemma2Config(**WINDOWED, attn_logit_softcapping=1.5)
    return transformers.Gemma2Model(config)


def gpt_oss():
    model = transformers.GptOssModel(transformers.GptOssConfig(**WINDOWED, **EXPERTS))
    for layer in model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=6, dropout_rate=0.0
    )
    return transformers.T5Model(config)


def bart():
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 6), ("ffn_dim", 64))
    }
    return transformers.BartModel(
        transformers.BartConfig(vocab_size=40, d_model=48, init_std=0.2, dropout=0.0, **sizes)
    )


def qwen2():
    sizes = {name: value for name, value in CAUSAL.items() if name != "head_dim"}
    return transformers.Qwen2Model(transformers.Qwen2Config(**sizes))


def gpt2():
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "initializer_range": 0.2}
    without = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes, **without, **ids))


def vit():
    sizes = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=4))


MODELS = (bert, llama, mistral, gemma2, gpt_oss, t5, bart)
PADDING = {
    "none": None,
    "right": ("1" * 11, "1" * 7 + "0" * 4, "1" + "0" * 10),
    "left": ("0" * 5 + "1" * 6, "1" * 11, "0" * 9 + "11"),
    "hole": ("1" * 11, "11100111100", "1" * 8 + "000"),
}


def padding_mask(name):
    rows = PADDING[name]
    return None if rows is None else torch.tensor([[int(bit) for bit in row] for row in rows])


def run(model, implementation, ids, mask, cotangent):
    """Outputs at real tokens, and the gradients of all parameters."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    out = model(**inputs).last_hidden_state
    if mask is not None and not model.config.is_encoder_decoder:
        out = out * mask[..., None]
    out.backward(cotangent)
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def tokenmill():
    return integration.register()


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
def test_outputs_and_gradients_are_those_of_eager_attention(build, padding, tokenmill):
    model = build().train()
    ids, mask = torch.randint(40, (3, 11)), padding_mask(padding)
    cotangent = torch.randn(3, 11, 48)
    out, grads = run(model, tokenmill, ids, mask, cotangent)
    expected, expected_grads = run(model, "eager", ids, mask, cotangent)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected_grads.keys()
    # The gradient of a key bias is 0 except for rounding: all parameters share one scale.
    scale = max(grad.abs().max().item() for grad in expected_grads.values())
    for name, grad in grads.items():
        expected = expected_grads[name]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * scale, msg=name)


def train(model, implementation, inputs, dtype=None):
    """Output at real tokens, and gradients of its sum of squares."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = model(**inputs).last_hidden_state
    if "attention_mask" in inputs:
        out = out * inputs["attention_mask"][..., None]
    out.square().sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(build, torch.bfloat16) for build in (llama, qwen2, bert, gpt2, vit)]
    + [(llama, torch.float16)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_training_under_autocast_is_as_good_as_that_of_sdpa(build, dtype, tokenmill):
    """Queries and keys after rotary embedding are float32, other tensors are 16-bit."""
    model = build().train()
    inputs = {"input_ids": torch.randint(40, (3, 11)), "attention_mask": padding_mask("right")}
    if build is vit:
        inputs = {"pixel_values": torch.randn(3, 3, 16, 16)}
    found, plain = (train(model, name, inputs, dtype) for name in (tokenmill, "sdpa"))
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    oracle = train(model.double(), "eager", wide)
    tm.testing.assert_accurate(found[0].to(dtype), oracle[0], plain[0])
    scale = max(tm.testing.magnitude(grad) for grad in oracle[1].values())
    for name, wanted in oracle[1].items():
        grad, other = found[1][name], plain[1][name]
        assert grad.dtype == torch.float32
        allowed = tm.testing.budget(other, wanted, dtype, gradient=True, scale=scale)
        assert tm.testing.error(grad, wanted, scale) <= allowed, name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("padding", PADDING)
def test_any_backend_and_sixteen_bits(padding, backend):
    name = integration.register(f"tokenmill-{backend}", backend=backend)
    model = llama().eval()
    ids, mask = torch.randint(40, (3, 11)), padding_mask(padding)
    expected = run(model, "eager", ids, mask, torch.zeros(3, 11, 48))[0]
    model.to(torch.bfloat16)
    out = run(model, name, ids, mask, torch.zeros(3, 11, 48, dtype=torch.bfloat16))[0]
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.2)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("build", [transformers.LlamaForCausalLM, transformers.MistralForCausalLM])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generation_with_a_cache(padding, build, cache, tokenmill):
    options = WINDOWED if build is transformers.MistralForCausalLM else CAUSAL
    model = build(build.config_class(**options, eos_token_id=None, pad_token_id=0)).eval()
    ids, mask = torch.randint(1, 40, (3, 11)), padding_mask(padding)
    tokens = []
    for name in ("eager", tokenmill):
        model.set_attn_implementation(name)
        tokens.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids) if mask is None else mask,
                max_new_tokens=6,
                do_sample=False,
                cache_implementation=cache,
                disable_compile=True,
            )
        )
    assert torch.equal(*tokens)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_prefill_in_pieces(tokenmill):
    model = llama().eval()
    ids, mask = torch.randint(40, (3, 11)), padding_mask("left")
    model.set_attn_implementation(tokenmill)
    whole = model(ids, attention_mask=mask).last_hidden_state
    cache = transformers.DynamicCache()
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).last_hidden_state
        for a, b in ((0, 4), (4, 9), (9, 11))
    ]
    seen = mask[..., None]
    torch.testing.assert_close(torch.cat(parts, 1) * seen, whole * seen, rtol=1e-4, atol=1e-5)


def test_packed_sequences(tokenmill):
    model = llama().eval()
    model.set_attn_implementation(tokenmill)
    pieces = [torch.randint(40, (1, n)) for n in (3, 7, 1)]
    ends = torch.tensor([0, 3, 10, 11], dtype=torch.int32)
    packed = model(
        torch.cat(pieces, 1),
        position_ids=torch.cat([torch.arange(p.shape[1]) for p in pieces])[None],
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=7,
        max_length_k=7,
    ).last_hidden_state
    alone = torch.cat([model(p).last_hidden_state for p in pieces], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [bert, llama])
def test_sigmoid_counts_the_keys_that_are_not_padding(build):
    name = integration.register("tokenmill-sigmoid", kind="sigmoid")
    model = build().eval()
    model.set_attn_implementation(name)
    ids, mask = torch.randint(40, (3, 11)), padding_mask("right")
    together = model(ids, attention_mask=mask).last_hidden_state
    for row, n in zip(range(3), mask.sum(1).tolist(), strict=True):
        alone = model(ids[row : row + 1, :n]).last_hidden_state
        torch.testing.assert_close(together[row : row + 1, :n], alone, rtol=1e-4, atol=1e-5)
    softmax = run(model, "sdpa", ids, mask, torch.zeros(3, 11, 48))[0]
    assert (softmax - together * mask[..., None]).abs().max() > 0.01


def forward(q, k, v, mask=None, **options):
    layer = torch.nn.Identity()
    layer.is_causal = False
    return integration.attention_forward(
        layer, q, k, v, mask, **{"kind": "softmax", "backend": None} | options
    )[0]


@pytest.mark.parametrize("causal", [False, True])
def test_sliding_window_without_a_mask(causal):
    q, k, v = torch.randn(3, 2, 4, 11, 8)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    visible = (distance < 3) & (distance >= 0 if causal else distance > -3)
    actual = forward(q, k, v, sliding_window=3, is_causal=causal)
    torch.testing.assert_close(actual, forward(q, k, v, visible[None, None]))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_padded_keys_before_a_cached_piece(kind):
    """With fewer queries than keys, each row is as if its padding did not exist."""
    q, k, v = torch.randn(4, 2, 4, 8), torch.randn(4, 2, 11, 8), torch.randn(4, 2, 11, 8)
    padding = torch.arange(11) >= torch.tensor([0, 5, 9, 11])[:, None]
    together = forward(q, k, v, padding, is_causal=True, kind=kind)
    assert torch.equal(together[3], torch.zeros_like(together[3]))
    for row, begin in enumerate((0, 5, 9)):
        one = slice(row, row + 1)
        alone = forward(q[one], k[one, :, begin:], v[one, :, begin:], is_causal=True, kind=kind)
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_step_with_many_keys_runs_as_decode(padding, monkeypatch):
    """The newest tokens of rows with 700 keys, some of them padding, behave as with few keys."""
    place = torch.arange(700)
    mask = {
        "left": place >= torch.tensor([0, 300, 700])[:, None],
        "right": place < torch.tensor([700, 300, 0])[:, None],
    }[padding]
    k, v = torch.randn(2, 3, 2, 700, 16)
    q = torch.randn(3, 4, 1, 16)
    steps = [
        lambda options=options: forward(q, k, v, mask, is_causal=True, **options)
        for options in ({}, {"sliding_window": 40}, {"s_aux": torch.randn(4)}, {"softcap": 1.5})
    ]
    ran = []
    real = attention_module.decoded
    monkeypatch.setattr(attention_module, "decoded", lambda *a, **o: ran.append(1) or real(*a, **o))
    found = [step() for step in steps]
    assert len(ran) == len(steps)
    monkeypatch.setattr(attention_module, "_few_queries", lambda *arguments: False)
    torch.testing.assert_close(found, [step() for step in steps])


def test_autocast_casts_a_step_with_many_keys_too():
    """Rotary embedding leaves q and k in float32, while v is 16-bit."""
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = forward(q, k, v.bfloat16(), is_causal=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), forward(q, k, v, is_causal=True), rtol=0, atol=0.02)


def test_a_complete_mask_decides_alone():
    q, k, v = torch.randn(3, 2, 4, 11, 8)
    visible = torch.rand(2, 4, 11, 15) < 0.5
    scores = (q @ k.mT / 8**0.5).masked_fill(~visible[..., :11], -torch.inf)
    expected = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)
    for mask in (visible, torch.where(visible, 0.0, -torch.inf)):
        actual = forward(q, k, v, mask, is_causal=True, sliding_window=2)
        torch.testing.assert_close(actual, expected)


def test_views_are_passed_without_copies(monkeypatch):
    seen = []
    real = attention_module.attention

    def spy(*tensors, **options):
        seen.extend(tensors)
        return real(*tensors, **options)

    for module in (attention_module, padding_module):
        monkeypatch.setattr(module, "attention", spy)
    q, k, v = (x.transpose(1, 2) for x in torch.randn(2, 11, 3, 4, 8).unbind(2))
    padding = padding_mask("right")[:2].bool()
    for mask in (None, padding, padding[:, None, None].expand(2, 1, 11, 11)):
        forward(q, k, v, mask)
        pointers = [x.data_ptr() for x in seen]
        assert pointers == [x.data_ptr() for x in (q, k, v)]
        seen.clear()


def test_what_needs_the_weights_is_refused(tokenmill):
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    for option in ({"kind": "sigmoid"}, {"softcap": 2.0}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(RuntimeError, match=r"dropout: must be 0 with .*; got 0\.1"):
            forward(q, k, v, dropout=0.1, **option)
    with pytest.raises(RuntimeError, match="head_mask"):
        forward(q, k, v, head_mask=torch.ones(2))
    ends = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="output_attentions: must be False in packed sigmoid"):
        forward(q, k, v, kind="sigmoid", cu_seq_lens_q=ends, output_attentions=True)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(0, 3), slice(0, 1), slice(1, 2)], ids=str)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sq", [1, 4, 11])
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as on a GPU"])
def test_padding_hides_keys_and_nothing_else(sq, kind, rows, gpu, monkeypatch):
    """Padding is after the text, before it, around it and inside it: each query sees the unpadded
    keys up to its own position, whether it is padding or not, next to any other rows."""
    if gpu:  # as packed sequences, if each row has a single run
        monkeypatch.setattr(
            padding_module, "_packs", lambda q, k, v, p, *_: sq > 1 and p.shape.runs
        )
    bits = ("11111100000", "00011111111", "00111110000", "11001110100")
    mask = torch.tensor([[bit == "1" for bit in row] for row in bits])
    q, k, v = torch.randn(4, 4, sq, 8), torch.randn(4, 2, 11, 8), torch.randn(4, 2, 11, 8)
    options = {"kind": kind, "is_causal": True}
    found = forward(q[rows], k[rows], v[rows], mask[rows], **options)
    for row in range(4)[rows]:
        n = mask[row].sum().log() if kind == "sigmoid" else 0
        for i in range(sq):
            shown = mask[row, : 11 - sq + i + 1].nonzero().flatten()
            keys, values = (x[row, :, shown].repeat_interleave(2, 0) for x in (k, v))
            scores = torch.einsum("hd,hkd->hk", q[row, :, i], keys) / 8**0.5 - n
            weights = scores.sigmoid() if kind == "sigmoid" else scores.softmax(-1)
            expected = torch.einsum("hk,hkd->hd", weights, values)
            torch.testing.assert_close(found[row - rows.start, i], expected, rtol=1e-4, atol=1e-5)


def test_layers_share_what_is_known_of_a_mask(tokenmill, monkeypatch):
    """Each model call inspects a mask once and computes its sequences once."""
    cuts = []
    real = padding_module._ends
    monkeypatch.setattr(padding_module, "_ends", lambda *a: cuts.append(1) or real(*a))
    model = bert().eval()
    model.set_attn_implementation(tokenmill)
    model(torch.randint(40, (3, 11)), attention_mask=padding_mask("right"))
    assert len(cuts) == 1  # the model has two layers


def test_a_row_has_its_bits_beside_any_others():
    """On a CPU: single, next to rows with padding on either side, and next to rows with holes."""
    bits = ("11111111111", "11111100000", "00011111111", "11001110100")
    mask = torch.tensor([[bit == "1" for bit in row] for row in bits])
    q, k, v = torch.randn(4, 4, 11, 8), torch.randn(4, 2, 11, 8), torch.randn(4, 2, 11, 8)
    for causal in (True, False):
        alone = [
            forward(*(x[i : i + 1] for x in (q, k, v)), mask[i : i + 1], is_causal=causal)[0]
            for i in range(4)
        ]
        whole = forward(q[:1], k[:1], v[:1], None, is_causal=causal)[0]
        assert torch.equal(alone[0], whole)
        for rows in ([0, 1], [0, 2], [1, 2, 0], [3, 2, 1, 0]):
            together = forward(q[rows], k[rows], v[rows], mask[rows], is_causal=causal)
            for found, i in zip(together, rows, strict=True):
                assert torch.equal(found, alone[i])


def test_weights_of_any_mask():
    """output_attentions=True: the output comes from the kernels, and the weights reproduce it."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    padding = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
    ends_q, ends_k = torch.tensor([0, 2, 5]).int(), torch.tensor([0, 3, 7]).int()
    one = (q[:1], k[:1], v[:1])
    cases = [
        ((q, k, v), {"is_causal": True}),
        ((q, k, v), {"is_causal": True, "sliding_window": 3, "softcap": 1.5}),
        ((q, k, v, padding), {"is_causal": True, "s_aux": torch.randn(4)}),
        ((q, k, v, padding), {"is_causal": True, "kind": "sigmoid"}),
        ((q, k, v, torch.rand(2, 1, 5, 7) < 0.6), {"position_bias": torch.randn(1, 4, 5, 7)}),
        ((q, k, v, torch.randn(2, 1, 5, 7)), {"scaling": 0.3}),
        (one, {"is_causal": True, "cu_seq_lens_q": ends_q, "cu_seq_lens_k": ends_k}),
    ]
    layer = torch.nn.Identity()
    for tensors, options in cases:
        mask = tensors[3] if len(tensors) > 3 else None
        given = {"kind": "softmax", "backend": None, "is_causal": False} | options
        expected = integration.attention_forward(layer, *tensors[:3], mask, **given)[0]
        out, weights = integration.attention_forward(
            layer, *tensors[:3], mask, output_attentions=True, **given
        )
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        made = weights @ tensors[2].repeat_interleave(2, 1)
        torch.testing.assert_close(out, made.transpose(1, 2))


@pytest.mark.parametrize("padding", ["none", "right", "left", "hole"])
@pytest.mark.parametrize("build", [bert, llama, mistral, t5])
def test_dropout_is_that_of_sdpa(build, padding, tokenmill):
    """Kernels have no dropout: rows, gradients and random numbers are the same, and one warning
    appears."""
    model, ids, mask = build().train(), torch.randint(40, (3, 11)), padding_mask(padding)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    cotangent = torch.randn(3, 11, 48)
    attention_module._say_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        out, grads = run(model, tokenmill, ids, mask, cotangent)
    notices = [w for w in caught if "no kernel drops weights" in str(w.message)]
    torch.manual_seed(1)
    expected, expected_grads = run(model, "sdpa", ids, mask, cotangent)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
    assert len(notices) == 1


@pytest.mark.parametrize("library", ["transformers", "timm", "diffusers", "jax", "kvpress"])
def test_a_missing_library_names_its_extra(library, monkeypatch):
    for name in [*sys.modules]:
        if name.split(".")[0] == library:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"tokenmill.integrations.{library}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {library}: pip install 'tokenmill\["):
        importlib.import_module(f"tokenmill.integrations.{library}")


def test_dropout_of_packed_sequences():
    """Sequences of 4, 1 and 6 tokens, with queries for the last 2, 1 and 5, match separate
    calls."""
    ends_q, ends_k = torch.tensor([0, 2, 3, 8]).int(), torch.tensor([0, 4, 5, 11]).int()
    mask = masks_module.complete_mask(None, 8, 11, True, 3, ends_q, ends_k, torch.device("cpu"))
    for (q0, q1), (k0, k1) in zip(ends_q.unfold(0, 2, 1), ends_k.unfold(0, 2, 1), strict=True):
        sizes = int(q1 - q0), int(k1 - k0)
        alone = masks_module.complete_mask(None, *sizes, True, 3, None, None, torch.device("cpu"))
        assert torch.equal(mask[..., q0:q1, k0:k1], alone)
        assert mask[..., q0:q1, :].sum() == alone.sum()
