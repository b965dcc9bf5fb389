"""Model types of transformers under register(): logits, padding, batches and generate() equal their
own eager attention. With --full 44 types, else 12."""

from __future__ import annotations

import functools

import pytest
import torch
from tier import FULL

transformers = pytest.importorskip("transformers", minversion="5.24")
integration = pytest.importorskip("tokenmill.integrations.transformers")
import tiny_models as tiny  # noqa: E402

TOKENS = 9
# Four rows; each is in the batch with all others.
ROWS = ("1" * 9, "1" * 6 + "000", "000" + "1" * 6, "110011101")
PADDING = {
    "none": (ROWS[0],) * 3,
    "right": (ROWS[0], ROWS[1], "1" + "0" * 8),
    "left": (ROWS[0], ROWS[2], "0" * 8 + "1"),
    "mixed": ROWS,
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def types(table):
    return [name for name in table if FULL or name in tiny.DAILY]


def mask_of(rows):
    return torch.tensor([[int(bit) for bit in row] for row in rows])


def sees_a_key(mask, kind):
    """Mask [B, S] of queries that see a key, also in layers with a window. For other queries, eager
    attention gives a mean over masked keys, ours 0."""
    seen = mask.cumsum(1)
    if "sliding_window" in tiny.DECODERS.get(kind, {}):
        seen = seen - torch.nn.functional.pad(seen, (tiny.WINDOW, 0))[:, : mask.shape[1]]
    return seen > 0


def ids_of(rows, tokens=TOKENS):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, tiny.VOCABULARY - 2, (rows, tokens), generator=generator)


def under(model, name, **inputs):
    """The first result of a model with the named attention, which must be the one that runs."""
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture
def name(monkeypatch):
    """An attention that counts its calls, so that no model can silently fall back."""
    calls = []
    real = integration.attention_forward

    @functools.wraps(real)
    def count(*args, **options):
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(integration, "attention_forward", count)
    yield integration.register()
    assert calls, "no layer called the attention that was registered"


def test_enough_types_are_here():
    tables = (tiny.DECODERS, tiny.ENCODERS, tiny.VISION, tiny.SEQ2SEQ)
    assert sum(map(len, tables)) >= 40
    assert len([name for table in tables for name in table if name in tiny.DAILY]) == 12


@pytest.mark.parametrize("kind", types(tiny.DECODERS))
def test_a_decoder_reads_a_prompt_as_eager_does(kind, name):
    """Every row that sees a key is compared, including padding after the text."""
    model = tiny.decoder(kind)
    for rows in PADDING.values():
        mask = mask_of(rows)
        inputs = {"input_ids": ids_of(len(mask)), "attention_mask": mask}
        found, expected = under(model, name, **inputs), under(model, "eager", **inputs)
        sees = sees_a_key(mask, kind)
        torch.testing.assert_close(found[sees], expected[sees], **CLOSE)


@pytest.mark.parametrize("kind", types(tiny.DECODERS))
def test_a_row_does_not_depend_on_its_batch(kind, name):
    """This includes padding: next to rows with other padding and with holes, or in a batch of
    one."""
    model, ids, mask = tiny.decoder(kind), ids_of(len(ROWS)), mask_of(ROWS)
    together = under(model, name, input_ids=ids, attention_mask=mask)
    for row in range(len(ROWS)):
        one = slice(row, row + 1)
        alone = under(model, name, input_ids=ids[one], attention_mask=mask[one])
        torch.testing.assert_close(together[one], alone, **CLOSE)


@pytest.mark.parametrize("kind", types(tiny.DECODERS))
def test_generation_with_either_cache_is_that_of_eager(kind, name):
    model, ids, mask = tiny.decoder(kind), ids_of(2, 7), mask_of(("1" * 7, "000" + "1" * 4))
    options = {
        "attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "disable_compile": True,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **options)
    model.set_attn_implementation(name)
    for cache in ("dynamic", "static"):
        found = model.generate(ids, cache_implementation=cache, **options)
        assert torch.equal(found.sequences, expected.sequences), cache
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE, msg=cache)


@pytest.mark.parametrize("kind", types(tiny.ENCODERS))
def test_an_encoder_is_that_of_eager_and_each_row_its_own(kind, name):
    model, ids, mask = tiny.encoder(kind), ids_of(len(ROWS)), mask_of(ROWS)
    for rows in PADDING.values():
        inputs = {"input_ids": ids[: len(rows)], "attention_mask": mask_of(rows)}
        found, expected = under(model, name, **inputs), under(model, "eager", **inputs)
        sees = mask_of(rows) > (0 if "local_attention" in tiny.ENCODERS[kind] else -1)
        torch.testing.assert_close(found[sees], expected[sees], **CLOSE)
    for row in range(len(ROWS)):
        one = slice(row, row + 1)
        alone = under(model, name, input_ids=ids[one], attention_mask=mask[one])
        torch.testing.assert_close(found[one], alone, **CLOSE)


@pytest.mark.parametrize("kind", types(tiny.VISION))
def test_a_vision_model_is_that_of_eager(kind, name):
    model, images = tiny.vision(kind), torch.randn(2, 3, 16, 16)
    found = under(model, name, pixel_values=images)
    torch.testing.assert_close(found, under(model, "eager", pixel_values=images), **CLOSE)


def encoder_inputs(kind, mask):
    if kind == "Whisper":  # takes audio, without a mask for it
        generator = torch.Generator().manual_seed(2)
        return {"input_features": torch.randn(len(mask), 8, 32, generator=generator)}
    return {"input_ids": ids_of(len(mask)), "attention_mask": mask}


@pytest.mark.parametrize("kind", types(tiny.SEQ2SEQ))
def test_an_encoder_with_a_decoder_is_that_of_eager(kind, name):
    """Both have padding, and cross-attention has the padding of the encoder."""
    model = tiny.seq2seq(kind)
    for rows in PADDING.values():
        mask = mask_of(rows)
        inputs = encoder_inputs(kind, mask)
        inputs |= {"decoder_input_ids": ids_of(len(mask)).flip(1), "decoder_attention_mask": mask}
        found, expected = under(model, name, **inputs), under(model, "eager", **inputs)
        sees = sees_a_key(mask, kind)
        torch.testing.assert_close(found[sees], expected[sees], **CLOSE)
        for row in range(len(mask)):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            torch.testing.assert_close(found[row : row + 1], under(model, name, **one), **CLOSE)


@pytest.mark.parametrize("kind", types(tiny.SEQ2SEQ))
def test_an_encoder_with_a_decoder_generates_with_either_cache(kind, name):
    model, mask = tiny.seq2seq(kind), mask_of((ROWS[0], ROWS[1]))
    options = encoder_inputs(kind, mask) | {
        "max_new_tokens": 5, "do_sample": False, "disable_compile": True,
    }  # fmt: skip
    model.set_attn_implementation("eager")
    expected = model.generate(**options)
    model.set_attn_implementation(name)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(cache_implementation=cache, **options), expected), cache


@pytest.mark.parametrize("kind", ["Llama", "GptOss", "Bert", "T5"])
def test_weights_that_are_asked_for_are_those_of_eager(kind, name):
    """output_attentions=True: the call runs as eager does, and the next one on kernels again."""
    table = {"Bert": tiny.encoder, "T5": tiny.seq2seq}
    model, mask = table.get(kind, tiny.decoder)(kind), mask_of(PADDING["right"])
    inputs = {"input_ids": ids_of(3), "attention_mask": mask}
    if kind == "T5":
        inputs |= {"decoder_input_ids": ids_of(3).flip(1)}
    plain = under(model, name, **inputs)
    results = []
    for implementation in (name, "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(**inputs, output_attentions=True))
    found, expected = results
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    torch.testing.assert_close(found[0], plain, **CLOSE)
    fields = [field for field in expected if "attentions" in field and expected[field]]
    assert len(fields) == (3 if kind == "T5" else 1)
    for field in fields:
        assert len(found[field]) == 2
        torch.testing.assert_close(found[field], expected[field], **CLOSE)
    assert torch.equal(under(model, name, **inputs), plain)
