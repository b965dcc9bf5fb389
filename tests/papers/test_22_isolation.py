"""IR-Diffusion against its released code: hehuiguo/DreamStory at 91e1a4b,
src/DreamStory/attention_processor/DreamStoryScaledAttnProcessor.py."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from tensors import close, draw, every_backend, in_each_16_bits, same_gradients
from torch.nn.functional import interpolate

import tokenmill as tm
from tokenmill.testing import assert_accurate

GRID = HEIGHT, WIDTH = 4, 6
N, H, D, R = HEIGHT * WIDTH, 2, 16, 3
SHAPES = (1, N, H, D), (1, N, 1, D), (1, N, 1, 8), (1, R, N, 1, D), (1, R, N, 1, 8)


def scene():
    """Subjects 1 and 2 are in the picture, subject 3 is not; masks do not fill their boxes."""
    subjects = torch.zeros(GRID, dtype=torch.int32)
    subjects[0:3, 0:2], subjects[1:4, 3:6] = 1, 2
    subjects[0, 1] = subjects[3, 3] = 0
    masks = torch.zeros(R, *GRID, dtype=torch.bool)
    masks[0, 1:3, 1:5], masks[1, 0:2, 0:2], masks[2, 2:4, 2:4] = True, True, True
    masks[0, 1, 1] = False
    return subjects.view(1, N), masks.view(1, R, N)


def box(mask):
    rows, columns = mask.view(GRID).nonzero(as_tuple=True)
    return slice(int(rows.min()), int(rows.max()) + 1), slice(
        int(columns.min()), int(columns.max()) + 1
    )


def moved(values, mask, target, mode):
    """A map [N, C] of a reference, 0 outside its subject, with the subject's box resized onto the
    target box and 0 elsewhere."""
    source, aim = box(mask), box(target)
    picture = (values * mask[:, None]).view(*GRID, -1).permute(2, 0, 1)[None]
    size = [s.stop - s.start for s in aim]
    patch = interpolate(picture[:, :, source[0], source[1]], size, mode=mode)
    canvas = torch.zeros_like(picture)
    canvas[:, :, aim[0], aim[1]] = patch
    return canvas[0].permute(1, 2, 0).reshape(N, -1)


def released(q, k, v, k_ref, v_ref, subjects, masks, mode="nearest", referring=None):
    """Scores of queries with the keys of all references and of their own picture: -inf for
    reference tokens outside the subject, for queries outside it, and between two subjects of the
    picture."""
    own = [subjects[0] == r + 1 for r in range(R)]
    keys, values, shown = [], [], []
    for r in range(R):
        here = own[r].any()
        pair = [t[0, r].flatten(1) for t in (k_ref, v_ref)]
        if here:
            pair = [moved(t, masks[0, r], own[r], mode) for t in pair]
        at = moved(masks[0, r, :, None].to(q), masks[0, r], own[r], "nearest") > 0 if here else None
        rows = own[r] if referring is None else own[r] & referring[0]
        columns = at[:, 0] if here else masks[0, r]
        keys.append(pair[0])
        values.append(pair[1])
        shown.append(rows[:, None] & columns[None])
    apart = torch.ones(N, N, dtype=torch.bool, device=q.device)
    for i in range(R):
        for j in range(R):
            if i != j:
                apart &= ~(own[i][:, None] & own[j][None])
    keys.append(k[0, :, 0])
    values.append(v[0, :, 0])
    visible = torch.cat([*shown, apart], 1)
    z = torch.einsum("ihd,jd->hij", q[0], torch.cat(keys)) * D**-0.5
    p = z.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hij,jd->ihd", p, torch.cat(values))[None]


def inputs(backend, dtype=torch.float32):
    device = device_of(backend)
    subjects, masks = (t.to(device) for t in scene())
    return draw(backend, *SHAPES, dtype=dtype), subjects, masks


@every_backend
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_attention_of_the_picture_is_that_of_the_release(mode, backend):
    leaves, subjects, masks = inputs(backend)
    want = released(*leaves, subjects, masks, mode)
    got = tm.multi_subject_attention(*leaves, subjects, masks, GRID, mode=mode, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)


@every_backend
def test_some_queries_can_be_kept_from_the_references(backend):
    """The released code drops half of the queries of each subject in each layer."""
    leaves, subjects, masks = inputs(backend)
    referring = (torch.arange(N) % 2 == 0)[None].to(subjects.device)
    want = released(*leaves, subjects, masks, referring=referring)
    options = {"referring": referring, "backend": backend}
    close(tm.multi_subject_attention(*leaves, subjects, masks, GRID, **options), want)


@in_each_16_bits
def test_16_bits_keep_the_error_budget(backend, dtype):
    leaves, subjects, masks = inputs(backend, dtype)
    leaves = [t.detach() for t in leaves]
    got = tm.multi_subject_attention(*leaves, subjects, masks, GRID, mode="bilinear",
                                     backend=backend)  # fmt: skip
    wide = released(*(t.double() for t in leaves), subjects, masks, "bilinear")
    plain = released(*leaves, subjects, masks, "bilinear")
    assert_accurate(got, wide, plain)


def test_references_may_stay_in_their_place():
    leaves, subjects, masks = inputs("cpu")
    got = tm.multi_subject_attention(*leaves, subjects, masks, GRID, reposition=False)
    other = tm.multi_subject_attention(*leaves, subjects, masks, GRID)
    background = subjects[0] == 0
    close(got[:, background], other[:, background])
    assert not torch.allclose(got, other, atol=1e-2)
    # A reference at the position of its subject gives the same result either way.
    same = torch.stack([subjects[0] == r + 1 for r in range(R)])[None]
    a, b = (
        tm.multi_subject_attention(*leaves, subjects, same, GRID, reposition=r)
        for r in (False, True)
    )
    close(a, b)


@every_backend
def test_projections_may_come_before_the_resampling(backend):
    """The released code resizes hidden states and projects them; without a bias the order does not
    matter."""
    x, weight = draw(backend, (1, N, 12), (D, 12))
    source, target = (
        torch.tensor([b], dtype=torch.int32, device=x.device) for b in ([0, 1, 2, 5], [1, 0, 4, 6])
    )
    for mode in ("nearest", "bilinear"):
        options = {"mode": mode, "backend": backend}
        after = tm.reposition_tokens(x, source, target, GRID, **options) @ weight.T
        close(tm.reposition_tokens(x @ weight.T, source, target, GRID, **options), after)


@every_backend
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_boxes_are_resized_as_interpolate_does(mode, backend):
    """Boxes grow, shrink, or have one cell; each request has its own boxes."""
    (x,) = draw(backend, (3, N, 2, 4))
    source = torch.tensor([[0, 0, 4, 6], [1, 2, 3, 4], [2, 5, 3, 6]])
    target = torch.tensor([[1, 1, 3, 4], [0, 1, 4, 6], [0, 0, 2, 5]])
    want = []
    for b in range(3):
        top, left, bottom, right = source[b].tolist()
        y0, x0, y1, x1 = target[b].tolist()
        picture = x[b].flatten(1).view(*GRID, 8).permute(2, 0, 1)[None]
        canvas = torch.zeros_like(picture)
        canvas[:, :, y0:y1, x0:x1] = interpolate(
            picture[:, :, top:bottom, left:right], (y1 - y0, x1 - x0), mode=mode
        )
        want.append(canvas[0].permute(1, 2, 0).reshape(N, 2, 4))
    source, target = (t.to(device_of(backend)) for t in (source, target))
    got = tm.reposition_tokens(x, source, target, GRID, mode=mode, backend=backend)
    close(got, torch.stack(want))
    same_gradients(got, torch.stack(want), [x])


def test_every_size_is_resized_as_interpolate_does():
    """All line counts up to 48 are resized to all counts up to 48 by nearest cells, including 14 to
    46, where the float32 factor of interpolate and integer arithmetic differ."""
    for old in range(1, 49):
        line = torch.arange(48.0).view(1, 48, 1)
        source = torch.tensor([[0, 0, 1, old]] * 48)
        target = torch.tensor([[0, 0, 1, new] for new in range(1, 49)])
        got = tm.reposition_tokens(line.expand(48, -1, -1), source, target, (1, 48))
        for new in range(1, 49):
            want = interpolate(line[0, :old].T[None], new)[0, 0]
            assert torch.equal(got[new - 1, :new, 0], want), (old, new)


def test_boxes_hold_their_masks():
    subjects, masks = scene()
    found = tm.subject_boxes(torch.stack([subjects == r for r in range(1, 4)], 1), GRID)
    assert found.tolist() == [[[0, 0, 3, 2], [1, 3, 4, 6], [0, 0, 0, 0]]]
    assert tm.subject_boxes(masks, GRID).tolist() == [[[1, 1, 3, 5], [0, 0, 2, 2], [2, 2, 4, 4]]]


def test_cells_outside_of_the_grid_give_zeros():
    x = torch.ones(1, N, 1)
    far = torch.tensor([[-1, 4, 3, 9]])
    whole = torch.tensor([[0, 0, 4, 6]])
    none = torch.zeros(1, 4, dtype=torch.int32)
    assert tm.reposition_tokens(x, whole, far, GRID).sum() == 3 * 2
    assert tm.reposition_tokens(x, far, whole, GRID).view(GRID).bool().tolist()[0] == [False] * 6
    for mode in ("nearest", "bilinear"):
        assert not tm.reposition_tokens(x, none, whole, GRID, mode=mode).any()
        assert not tm.reposition_tokens(x, whole, none, GRID, mode=mode).any()


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"subjects": torch.full((1, N), 4)}, "subjects: must be 0 to 3; got 4"),
        ({"subjects": torch.zeros(1, N)}, "subjects: must be int32 or int64; got float32"),
        ({"ref_masks": torch.zeros(1, 2, N).bool()}, "ref_masks: must have shape .*; got"),
        ({"grid": (4, 5)}, "grid: must have height . width = 24, the tokens of q; got"),
        ({"k_ref": torch.zeros(1, R, 5, 1, D)}, "k_ref: must have the shape of k .*; got"),
        ({"referring": torch.zeros(1, 3).bool()}, "referring: must have shape .*; got"),
        ({"reposition": 1}, "reposition: must be a bool; got 1"),
    ],
)
def test_bad_input(edits, says):
    (q, k, v, k_ref, v_ref), subjects, masks = inputs("cpu")
    given = {"q": q, "k": k, "v": v, "k_ref": k_ref, "v_ref": v_ref, "subjects": subjects,
             "ref_masks": masks, "grid": GRID, **edits}  # fmt: skip
    with pytest.raises(RuntimeError, match=f"^tokenmill.multi_subject_attention: {says}"):
        tm.multi_subject_attention(**given)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"mode": "cubic"}, "mode: must be 'nearest' or 'bilinear'; got 'cubic'"),
        ({"grid": 4}, r"grid: must be two ints \(height, width\); got 4"),
        ({"source": torch.zeros(1, 4)}, "source: must be int32 or int64; got float32"),
        ({"target": torch.zeros(3, 4).int()}, "target: must have shape .*; got"),
        ({"xs": []}, "xs: must be a tensor or several; got"),
        ({"xs": torch.zeros(1, N)}, "xs: must have 3 or 4 dimensions .*; got 2"),
    ],
)
def test_bad_input_of_the_resampling(edits, says):
    box = torch.zeros(1, 4, dtype=torch.int32)
    given = {"xs": torch.zeros(1, N, 3), "source": box, "target": box, "grid": GRID, **edits}
    with pytest.raises(RuntimeError, match=f"^tokenmill.reposition_tokens: {says}"):
        tm.reposition_tokens(**given)
