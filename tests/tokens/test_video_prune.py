"""video_prune against the released code of Efficient Video Sampling."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import device_of
from each import each_backend

import tokenmill as tm


def released(video, q):
    """vllm-project/vllm at 926c71f, vllm/multimodal/evs.py, for one video [T, N, C]: patches by 1 -
    cosine to the frame before, 255 in the first frame, the largest first and of equal ones the
    first; as many as the rate leaves, but a frame at least. The mask [T, N]."""
    frames, patches, _ = video.shape
    change = torch.full((frames, patches), 255.0)
    for t in range(1, frames):
        change[t] = 1 - torch.nn.functional.cosine_similarity(video[t], video[t - 1], dim=-1)
    order = change.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(frames * patches, dtype=torch.bool)
    mask[order[: max(patches, int(frames * patches * (1 - q)))]] = True
    return mask.view(frames, patches)


def positions(frames, height, width):
    """The same file: frame, row and column of each token [T H W, 3] (M-RoPE)."""
    axes = [torch.arange(n) for n in (frames, height, width)]
    return torch.stack([place.flatten() for place in torch.meshgrid(*axes, indexing="ij")], 1)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "q"),
    [((5, 6, 8), 0.5), ((7, 6, 8), 0.9), ((25, 4, 8), 0.9), ((3, 6, 8), 0.0), ((1, 6, 8), 0.5)],
)
def test_release(shape, q, dtype, backend):
    """Of 100 tokens q = 0.9 leaves 9, since 1 - 0.9 is below 0.1. The release computes in the dtype
    of the features; here 16-bit features are compared in float32."""
    g = torch.Generator().manual_seed(0)
    videos = torch.randn(2, *shape, generator=g).cumsum(1).to(dtype)
    tokens, indices, counts = tm.video_prune(videos.to(device_of(backend)), 1 - q, backend=backend)
    assert indices.dtype == counts.dtype == torch.int32
    place = positions(shape[0], 2, shape[1] // 2)
    for b, video in enumerate(videos):
        mask = released(video.float(), q)
        assert torch.equal(tokens[b].cpu(), video[mask])
        assert torch.equal(indices[b].cpu().long(), mask.flatten().nonzero()[:, 0])
        assert torch.equal(counts[b].cpu().long(), mask.sum(1))
        assert torch.equal(place[indices[b].cpu()], place[mask.flatten()])


@each_backend
def test_patches_that_do_not_change_tie_at_0(backend):
    """Whatever the rounding of norms: the first of them are kept, after every one that changes."""
    frame = torch.randn(40, 37, generator=torch.Generator().manual_seed(0))
    video = frame.repeat(1, 4, 1, 1)
    video[:, 2:, 30] += 1e-2
    video[:, 3, 20] *= -1
    found = tm.video_prune(video.to(device_of(backend)), 45 / 160, backend=backend)
    assert found[1][0, 40:].tolist() == [40, 41, 42, 110, 140]
    assert found[2].tolist() == [[40, 3, 1, 1]]


def test_frames_are_compared_a_few_at_a_time(monkeypatch):
    videos = torch.randn(2, 9, 6, 8).cumsum(1)
    whole = tm.video_prune(videos, 0.5)
    module = importlib.import_module("tokenmill.tokens.video_prune")
    for frames in (1, 3, 8):
        monkeypatch.setattr(module, "AT_ONCE", frames * 2 * 6 * 8)
        assert all(map(torch.equal, tm.video_prune(videos, 0.5), whole))


def test_scores_of_another_kind():
    """The text of the paper compares pixels: sums of their differences."""
    video = torch.randn(2, 4, 6, 8)
    pixels = torch.rand(2, 4, 6, 12)
    scores = torch.zeros(2, 4, 6)
    scores[:, 1:] = pixels.diff(dim=1).abs().sum(-1)
    scores[:, 0] = float("nan")
    tokens, indices, _ = tm.video_prune(video, 0.5, scores=scores)
    for b in range(2):
        later = scores[b, 1:].flatten().topk(6).indices.sort().values + 6
        assert indices[b].tolist() == [*range(6), *later.tolist()]
        assert torch.equal(tokens[b], video[b].flatten(0, 1)[indices[b]])


@each_backend
def test_what_is_not_finite_leaves_first(backend):
    video = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    video[:, 1, 2], video[:, 0, 1], video[:, 2, 3] = float("nan"), torch.inf, 0
    indices = tm.video_prune(video.to(device_of(backend)), 9 / 12, backend=backend)[1]
    # Patches 6 and 10 follow or are a NaN, 5 follows an infinity; 11, of zeros, differs from 7.
    assert indices.tolist() == [[0, 1, 2, 3, 4, 7, 8, 9, 11]]


@each_backend
def test_gradients(backend):
    video = torch.randn(1, 4, 5, 3, device=device_of(backend), requires_grad=True)
    tokens, indices, _ = tm.video_prune(video, 0.6, backend=backend)
    weight = torch.randn_like(tokens)
    (found,) = torch.autograd.grad(tokens, video, weight)
    wanted = torch.zeros_like(video).flatten(1, 2).index_copy(1, indices[0].long(), weight)
    assert torch.equal(found, wanted.view_as(video))


FRAMES = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"frames": FRAMES[0]}, "frames: must have 4 dimensions [B, T, N, C]; got 3"),
        ({"frames": FRAMES.long()}, "frames: must be float16, bfloat16 or float32; got int64"),
        ({"frames": FRAMES[:, :0]}, "frames: must have at least 1 frame; got 0"),
        ({"keep_rate": 0.0}, "keep_rate: must be above 0 and at most 1; got 0"),
        ({"keep_rate": float("nan")}, "keep_rate: must be above 0 and at most 1; got nan"),
        ({"scores": FRAMES[..., :3, 0]},
         "scores: must have shape [2, 3, 4], the tokens of frames; got [2, 3, 3]"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(given, says):
    with pytest.raises(RuntimeError) as info:
        tm.video_prune(**{"frames": FRAMES, "keep_rate": 0.5, **given})
    assert str(info.value) == f"tokenmill.video_prune: {says}"


def test_videos_without_patches_or_requests():
    for shape in ((2, 3, 0, 4), (0, 3, 4, 5)):
        tokens, indices, counts = tm.video_prune(torch.zeros(shape), 0.5)
        assert tokens.shape == (shape[0], shape[2] and 6, shape[3])
        assert counts.shape == (shape[0], 3) and indices.shape == tokens.shape[:2]
