"""visual_select against the released code of VisionZip and FastV, on matrices of weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import device_of
from each import each_backend, each_kernel

import tokenmill as tm
from tokenmill.testing import assert_accurate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "vlm.md"


def draw(backend, tokens, heads=3, kv_heads=3, batch=2, dim=8, channels=6, seed=0):
    """Features that are a part of wider rows, queries, and keys."""
    g = torch.Generator().manual_seed(seed)
    shapes = (2 * channels,), (heads, dim), (kv_heads, dim)
    x, q, k = (torch.randn(batch, tokens, *s, generator=g).to(device_of(backend)) for s in shapes)
    return x[..., :channels], q, k


def weights_of(q, k, causal=False):
    """The whole matrix of weights [B, H, N, N]."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    z = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if causal:
        z = z.masked_fill(torch.ones_like(z, dtype=torch.bool).triu(1), -torch.inf)
    return z.softmax(-1)


def merged(x, metric, rest, contextual):
    """dvlab-research/VisionZip at 3151f6d, visionzip/clip_encoder.py, for one image: targets at
    even steps among the tokens that are not dominant, every other token to the target of the
    largest cosine, and each target plus the mean of what went to it. The rows, and the targets."""
    unit = metric[rest] / metric[rest].norm(dim=-1, keepdim=True)
    step = max(1, len(rest) // contextual)
    targets = list(range(0, len(rest), step))[:contextual]
    others = [i for i in range(len(rest)) if i not in targets]
    goes = [targets[int((unit[targets] @ unit[i]).argmax())] for i in others]
    rows = []
    for t in targets:
        members = [rest[i] for i, to in zip(others, goes, strict=True) if to == t]
        rows.append(x[rest[t]] + x[members].sum(0) / max(len(members), 1))
    return rows, [rest[t] for t in targets]


def visionzip(x, scores, metric, dominant, contextual):
    """The same file: the class token and the dominant patches in the order of the image, and then
    the contextual tokens. scores: row 0 of the weights, without the class token, summed over the
    heads. metric: the outputs of k_proj, averaged over the heads (utils.py). dominant does not
    count the class token, the argument of main.py does."""
    tokens, indices = [], []
    for b in range(len(x)):
        top = [0, *sorted((scores[b].topk(dominant).indices + 1).tolist())]
        rest = [n for n in range(x.shape[1]) if n not in top]
        rows, targets = merged(x[b], metric[b], rest, contextual)
        tokens.append(torch.stack([*x[b, top], *rows]))
        indices.append(top + targets)
    return torch.stack(tokens), torch.tensor(indices)


@each_backend
@pytest.mark.parametrize(
    ("tokens", "dominant", "contextual"), [(25, 5, 4), (24, 3, 7), (12, 4, 6), (12, 4, 7)]
)
def test_visionzip(tokens, dominant, contextual, backend):
    """24 - 5 = 20 others are 4 groups; 20 are 7 groups of 2 and a tail; 7 are 6 and a tail; 7 are
    targets only."""
    x, q, k = draw(backend, tokens)
    scores = weights_of(q, k)[:, :, 0, 1:].sum(1)
    want, places = visionzip(x, scores, k.mean(2), dominant, contextual)
    got, indices = tm.visual_select(
        x, dominant, q=q[:, :1], k=k, image=(1, tokens), merge=contextual, backend=backend
    )
    assert indices.dtype == torch.int32
    assert torch.equal(indices.cpu().long(), places)
    assert torch.equal(got[:, : 1 + dominant], want[:, : 1 + dominant])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("tokens", [14, 20])
def test_a_tower_without_a_class_token(tokens, backend):
    """VisionZip's dominant patches are then those that receive most on average (section 3.2 of the
    text); 14 and 20 queries take two operators. Keys have fewer heads than queries."""
    x, q, k = draw(backend, tokens, heads=4, kv_heads=2)
    received = weights_of(q, k).mean((1, 2))
    top = received.topk(5).indices.sort().values
    want = x.gather(1, top[..., None].expand(-1, -1, x.shape[2]))
    got, indices = tm.visual_select(x, 5, q=q, k=k, backend=backend)
    assert torch.equal(indices.long(), top) and torch.equal(got, want)


def fastv(x, weights, begin, length, keep):
    """pkunlp-icler/FastV at d165972, modeling_llama.py: the last row of the weights, averaged over
    heads, at the image tokens; the best are kept, with all other tokens, in their order. Positions
    are those places. It reads the first request for all; here each has its own."""
    tokens, places = [], []
    for b in range(len(x)):
        row = weights[b].mean(0)[-1][begin : begin + length]
        best = row.topk(keep).indices.cpu() + begin
        outside = torch.arange(begin), torch.arange(begin + length, x.shape[1])
        at = torch.cat([outside[0], best, outside[1]]).sort().values
        tokens.append(x[b][at.to(x.device)])
        places.append(at)
    return torch.stack(tokens), torch.stack(places)


@each_backend
def test_fastv(backend):
    begin, length, keep = 5, 16, round(16 * (1 - 0.75))
    x, q, k = draw(backend, 30, heads=4, kv_heads=2)
    k[:, 22:] *= 4  # text that earlier rows do not see
    weights = weights_of(q, k, causal=True)
    want, places = fastv(x, weights, begin, length, keep)
    image = (begin, begin + length)
    got, indices = tm.visual_select(x, keep, q=q[:, -1:], k=k, image=image, backend=backend)
    assert torch.equal(indices.cpu().long(), places) and torch.equal(got, want)

    # Section 4 of the text has the mean over all queries, here that of the text and of all.
    for rows in (9, 30):
        received = weights[:, :, -rows:].mean((1, 2))[:, begin : begin + length]
        top = received.topk(keep).indices.sort().values + begin
        _, indices = tm.visual_select(
            x, keep, q=q[:, -rows:], k=k, image=image, causal=True, backend=backend
        )
        assert torch.equal(indices[:, begin : begin + keep].long(), top)


def test_merged_tokens_stand_between_the_image_and_the_text():
    x, q, k = draw("cpu", 20)
    got, indices = tm.visual_select(x, 4, q=q[:, -1:], k=k, image=(3, 15), merge=2)
    whole, rows = tm.visual_select(x[:, :15], 4, image=(3, 15), merge=2, metric=k.mean(2)[:, :15],
                                   scores=weights_of(q, k).mean(1)[:, -1, 3:15])  # fmt: skip
    assert torch.equal(indices[:, :9], rows) and torch.equal(got[:, :9], whole)
    assert torch.equal(got[:, 9:], x[:, 15:])
    assert indices[:, 9:].tolist() == 2 * [list(range(15, 20))]


@each_backend
def test_ties_and_ends(backend):
    x, _, _ = draw(backend, 9)
    same = x.new_zeros(2, 7)
    same[1, 4] = 1
    _, indices = tm.visual_select(x, 3, scores=same, image=(1, 8), backend=backend)
    assert indices.tolist() == [[0, 1, 2, 3, 8], [0, 1, 2, 5, 8]]
    equal = torch.ones_like(x)  # every cosine is the same: all go to the first target
    got, indices = tm.visual_select(
        x, 0, scores=same, image=(1, 8), merge=3, metric=equal, backend=backend
    )
    assert indices.tolist() == 2 * [[0, 1, 3, 5, 8]]
    torch.testing.assert_close(got[:, 1], x[:, 1] + x[:, [2, 4, 6, 7]].mean(1))
    assert torch.equal(got[:, [0, 2, 3, 4]], x[:, [0, 3, 5, 8]])
    for keep, merge in ((7, 0), (3, 4), (0, 7)):
        got, indices = tm.visual_select(
            x, keep, scores=same, image=(1, 8), merge=merge, metric=equal, backend=backend
        )
        assert torch.equal(got, x.gather(1, indices[..., None].long().expand(-1, -1, 6)))
        assert indices.sort().values.tolist() == 2 * [list(range(9))]
    got, indices = tm.visual_select(x, 0, scores=same[:, :0], image=(4, 4), backend=backend)
    assert torch.equal(got, x) and indices.tolist() == 2 * [list(range(9))]


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_keep_the_error_budget(dtype, backend):
    """Scores and cosines of whole numbers do not depend on the precision."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 31, 16, generator=g).to(dtype)
    scores = torch.stack([torch.randperm(30, generator=g) for _ in range(2)]).to(dtype)
    metric = torch.nn.functional.one_hot(torch.randint(4, (2, 31), generator=g), 4).to(dtype)
    plain, _ = visionzip(x, scores, metric, 6, 5)
    exact, _ = visionzip(x.double(), scores.double(), metric.double(), 6, 5)
    given = {"scores": scores, "metric": metric}
    given = {name: t.to(device_of(backend)) for name, t in given.items()}
    got, _ = tm.visual_select(
        x.to(device_of(backend)), 6, **given, image=(1, 31), merge=5, backend=backend
    )
    assert got.dtype == dtype
    assert_accurate(got, exact, plain)


@each_backend
def test_what_is_not_finite_stays_where_it_is(backend):
    """NaN scores rank last. A NaN key attracts nothing and goes to the first target; the release
    sends everything to a target with a NaN. A dropped NaN reaches no result."""
    nan = float("nan")
    x, _, _ = draw(backend, 8)
    x[:, 6] = nan
    scores = torch.tensor([[5.0, nan, 4, -torch.inf, 3, 0, 0, 1]] * 2, device=x.device)
    _, indices = tm.visual_select(x, 7, scores=scores, backend=backend)
    assert indices.tolist() == 2 * [[0, 1, 2, 4, 5, 6, 7]]
    got, _ = tm.visual_select(x, 4, scores=scores, backend=backend)
    assert bool(got.isfinite().all())

    metric = torch.eye(8, device=x.device).expand(2, -1, -1).clone()
    metric[:, 3] = metric[:, 6]
    metric[:, 5, 0], metric[:, 1] = nan, metric[:, 3]
    x[:, 6] = 1
    got, indices = tm.visual_select(
        x, 4, scores=scores, merge=2, metric=metric, backend=backend
    )  # the rest is 1, 3, 5, 6, and the targets are 1 and 5
    assert indices[:, 4:].tolist() == 2 * [[1, 5]]
    torch.testing.assert_close(got[:, 4], x[:, 1] + x[:, [3, 6]].mean(1))
    assert torch.equal(got[:, 5], x[:, 5])


@each_backend
def test_gradients_of_features(backend):
    x, q, k = (t.contiguous().requires_grad_() for t in draw(backend, 13))
    given = {"q": q[:, :1], "k": k, "image": (1, 13), "merge": 3}
    got, _ = tm.visual_select(x, 4, **given, backend=backend)
    scores = weights_of(q, k)[:, :, 0, 1:].sum(1)
    want, _ = visionzip(x, scores.detach(), k.detach().mean(2), 4, 3)
    cotangent = torch.randn_like(want)
    found, wanted = (torch.autograd.grad(y, x, cotangent)[0] for y in (got, want))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(got.sum(), (q, k), allow_unused=True) == (None, None)


@pytest.fixture
def page():
    """What docs/vlm.md defines for LLaVA, and a tiny one whose patches differ."""
    pytest.importorskip("transformers", minversion="5.24")
    if not PAGE.exists():
        pytest.skip("the documents are not beside the tests")
    *_, block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    has = {"torch": torch, "tm": tm}
    exec(block, has)
    model = has["LlavaForConditionalGeneration"](has["config"]).eval()
    for name, weight in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight.data.mul_(20)
    return has, model


@torch.no_grad()
def test_visionzip_in_llava(page):
    has, model = page
    images, tower = torch.randn(2, 3, 56, 56), model.model.vision_tower
    seen = has["record"](tower.encoder.layers[-2].self_attn)
    tower.set_attn_implementation("eager")
    found = tower(images, output_attentions=True, output_hidden_states=True)
    rows = found.attentions[-2][:, :, 0, 1:].sum(1)
    metric = seen["k_proj"].mean(2)
    want, _ = visionzip(found.hidden_states[-2], rows, metric, 6, 3)
    tower.set_attn_implementation("sdpa")
    has["visionzip"](model, dominant=7, contextual=3)
    projected = model.model.get_image_features(images).pooler_output
    plain = model.model.multi_modal_projector
    plain._forward_pre_hooks.clear()
    torch.testing.assert_close(torch.stack(projected), plain(want), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fastv_in_llava_is_its_form_with_a_mask(page):
    """The released code also masks the dropped tokens in the layers after, instead of dropping
    them. The rows that stay are the same."""
    has, model = page
    prompt = torch.tensor([[1, 5, *[99] * 17, 7, 8, 9]])
    given = {"input_ids": prompt, "pixel_values": torch.randn(1, 3, 56, 56), "use_cache": False}
    decoder = model.model.language_model
    decoder.set_attn_implementation("eager")
    weights = model(**given, output_attentions=True).attentions[1]
    decoder.set_attn_implementation("sdpa")
    _, places = fastv(torch.zeros(1, 22, 1), weights, 2, 17, 5)
    visible = torch.ones(22, 22, dtype=torch.bool).tril()
    visible[:, [n for n in range(22) if n not in places]] = False
    visible.fill_diagonal_(True)  # no row is empty

    def mask(layer, args, named):
        return args, {**named, "attention_mask": visible[None, None]}

    hooks = [m.register_forward_pre_hook(mask, with_kwargs=True) for m in decoder.layers[2:]]
    want = model(**given).logits[:, places[0]]
    for hook in hooks:
        hook.remove()
    has["fastv"](model, before=2, keep=5, image=(2, 19))
    torch.testing.assert_close(model(**given).logits, want, rtol=1e-4, atol=1e-5)


X, Q = torch.zeros(2, 9, 4), torch.zeros(2, 9, 2, 8)
SCORES = torch.zeros(2, 9)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "scores: must be given without q, or q without them; got None"),
        ({"scores": SCORES, "q": Q, "k": Q}, "scores: must be given without q, or q without them"),
        ({"q": Q}, "k: must be given with q; got None"),
        ({"q": Q, "k": Q[:, 1:]},
         "k: must have shape [2, 9, Hk, D], a key for each row of x; got [2, 8, 2, 8]"),
        ({"q": Q.half(), "k": Q}, "k: must have the dtype of q, float16; got float32"),
        ({"scores": SCORES[:, 1:]},
         "scores: must have shape [2, 9], a score for each image token; got [2, 8]"),
        ({"scores": SCORES.int()}, "scores: must be float16, bfloat16 or float32; got int32"),
        ({"x": X[0], "scores": SCORES}, "x: must have 3 dimensions [B, N, C]; got 2"),
        ({"scores": SCORES, "keep": 10},
         "keep: must be at most the number of image tokens, 9; got 10"),
        ({"scores": SCORES, "keep": -1}, "keep: must not be negative; got -1"),
        ({"scores": SCORES, "keep": 7, "merge": 3},
         "merge: must be at most the number of image tokens that are not kept, 2; got 3"),
        ({"scores": SCORES, "merge": 3},
         "metric: must be given with merge where k is None; got None"),
        ({"scores": SCORES, "merge": 3, "metric": X[:, 1:]},
         "metric: must have shape [2, 9, Dm]; got [2, 8, 4]"),
        ({"scores": SCORES, "image": (3, 10)},
         "image: must be 0 <= begin <= end <= 9; got [3, 10]"),
        ({"scores": SCORES, "image": 3}, "image: must be two ints (begin, end) or None; got 3"),
        ({"q": Q, "k": Q, "causal": 1}, "causal: must be a bool; got 1"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(given, says):
    with pytest.raises(RuntimeError) as info:
        tm.visual_select(**{"x": X, "keep": 4, **given})
    assert str(info.value).startswith(f"tokenmill.visual_select: {says}")
