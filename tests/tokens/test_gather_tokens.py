"""gather_tokens and scatter_tokens: every bit of every dtype, and each is the adjoint of the
other."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, each_kernel
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64]
SIZES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t):
    return t.view(SIZES[t.element_size()])


def any_bits(shape, dtype, generator):
    """Elements, many of which are NaN with some payload."""
    drawn = torch.randint(-(2**62), 2**62, (*shape, 1), generator=generator)
    return drawn.view(dtype)[..., 0].contiguous()


def laid_out(t, layout):
    """The same values [B, N, C] in another memory order."""
    if layout == "swapped":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "part":
        wide = t.new_zeros(t.shape[0], t.shape[1] + 1, t.shape[2] + 3)
        wide[:, 1:, 3:] = t
        return wide[:, 1:, 3:]
    return t


@st.composite
def rows_and_indices(draw, *, repeats):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    channels = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 24, 33, 128]))
    flat = draw(st.booleans())
    rows = batch * tokens if flat else tokens
    places = (draw(st.integers(0, rows)),) if flat else (batch, draw(st.integers(0, tokens)))
    if repeats:
        indices = torch.randint(-1, rows, places, generator=generator)
    else:
        order = torch.rand(*places[:-1], rows, generator=generator).argsort(-1)
        indices = order[..., : places[-1]]
        indices = torch.where(torch.rand(places, generator=generator) < 0.3, -1, indices)
    if draw(st.booleans()):
        indices = indices.int()
    layout = draw(st.sampled_from(["plain", "swapped", "part"]))
    return (batch, tokens, channels), indices, draw(st.sampled_from(DTYPES)), layout, generator


@each_backend
@examples(30)
@given(case=rows_and_indices(repeats=True))
def test_every_bit_is_copied(case, backend):
    shape, indices, dtype, layout, generator = case
    x = any_bits(shape, dtype, generator)
    device = device_of(backend)
    found = tm.gather_tokens(laid_out(x, layout).to(device), indices.to(device), backend=backend)
    rows = bits(x).flatten(0, 1) if indices.dim() == 1 else bits(x)
    for b in range(1 if indices.dim() == 1 else len(x)):
        of, ids, got = (
            (rows, indices, found) if indices.dim() == 1 else (rows[b], indices[b], found[b])
        )
        wanted = [of[i] if i >= 0 else torch.zeros_like(of[0]) for i in ids.tolist()]
        assert len(got) == len(wanted)
        for row, want in zip(bits(got.cpu()), wanted, strict=True):
            assert torch.equal(row, want)


@each_backend
@examples(30)
@given(case=rows_and_indices(repeats=False), based=st.booleans())
def test_scattered_rows_replace_those_of_the_base(case, based, backend):
    shape, indices, dtype, layout, generator = case
    y = any_bits((*indices.shape, shape[2]), dtype, generator)
    base = any_bits(shape, dtype, generator) if based else torch.zeros(shape, dtype=dtype)
    wanted = bits(base).clone()
    flat = wanted.view(-1, shape[2]) if indices.dim() == 1 else wanted
    named = indices >= 0
    if indices.dim() == 1:
        flat[indices[named].long()] = bits(y)[named]
    else:
        for b in range(len(indices)):
            flat[b, indices[b][named[b]].long()] = bits(y)[b][named[b]]
    device = device_of(backend)
    under = laid_out(base, layout).to(device) if based else shape[:2]
    y = laid_out(y, layout) if y.dim() == 3 else y
    found = tm.scatter_tokens(y.to(device), indices.to(device), under, backend=backend)
    assert torch.equal(bits(found.cpu()), wanted)


@each_backend
@examples(20)
@given(case=rows_and_indices(repeats=False))
def test_scatter_and_gather_are_adjoint(case, backend):
    """<scatter(y), z> = <y, gather(z)>, and scattering gathered rows changes nothing."""
    shape, indices, _, _, generator = case
    device = device_of(backend)
    z = torch.randint(-9, 10, shape, generator=generator).float().to(device)
    y = torch.randint(-9, 10, (*indices.shape, shape[2]), generator=generator).float().to(device)
    indices = indices.to(device)
    scattered = tm.scatter_tokens(y, indices, shape[:2], backend=backend)
    gathered = tm.gather_tokens(z, indices, backend=backend)
    assert torch.equal((scattered * z).sum(), (y * gathered).sum())
    assert torch.equal(tm.scatter_tokens(gathered, indices, z, backend=backend), z)


@each_backend
def test_one_index_gathers_tensors_of_any_shape(backend):
    device = device_of(backend)
    x = torch.randn(2, 9, 4, device=device)
    heads = torch.randn(2, 3, 9, 5, device=device).half().transpose(1, 2)
    scores = torch.randn(2, 9, device=device)
    ids = torch.arange(18, device=device).view(2, 9)
    index = torch.tensor([[3, 3, 0], [8, -1, 1]], device=device)
    found = tm.gather_tokens([x, heads, scores, ids], index, backend=backend)
    assert isinstance(found, tuple)
    for t, got in zip((x, heads, scores, ids), found, strict=True):
        assert got.dtype == t.dtype
        for b in range(2):
            for k, i in enumerate(index[b].tolist()):
                assert torch.equal(got[b, k], t[b, i] if i >= 0 else torch.zeros_like(t[b, 0]))
    flat = torch.tensor([12, 5], device=device)
    assert torch.equal(tm.gather_tokens(heads, flat, backend=backend), heads.flatten(0, 1)[flat])
    for t in (x[0], scores[0]):  # packed
        assert torch.equal(tm.gather_tokens(t, flat % 9, backend=backend), t[flat % 9])
    assert tm.gather_tokens((), index, backend=backend) == ()


@each_backend
def test_scatter_takes_tensors_of_any_shape(backend):
    device = device_of(backend)
    index = torch.tensor([[3, -1, 0], [4, 1, 2]], device=device)
    heads = torch.randn(2, 3, 2, 4, device=device)
    scores = torch.randn(2, 3, device=device)
    for y in (heads, scores):
        found = tm.scatter_tokens(y, index, 5, backend=backend)
        assert found.shape == (2, 5, *y.shape[2:])
        assert torch.equal(tm.gather_tokens(found, index, backend=backend)[1], y[1])
        base = torch.randn_like(found)
        assert torch.equal(tm.scatter_tokens(y, index, base, backend=backend)[0, 3], y[0, 0])
    flat = torch.tensor([6, 1], device=device)
    for y in (heads[0, :2], scores[0, :2], heads[0, :2, 0]):
        packed = tm.scatter_tokens(y, flat, 9, backend=backend)
        assert packed.shape == (9, *y.shape[1:])
        assert torch.equal(packed[flat], y)
        assert torch.equal(tm.scatter_tokens(y, flat, packed, backend=backend), packed)
        pairs = tm.scatter_tokens(y, flat, (3, 3), backend=backend)
        assert torch.equal(pairs.flatten(0, 1), packed)


@each_backend
def test_gradient_of_a_row_is_the_sum_over_its_copies(backend):
    device = device_of(backend)
    x = torch.randn(2, 4, 3, device=device, requires_grad=True)
    index = torch.tensor([[1, 1, -1, 0, 1], [3, 2, 2, 2, -1]], device=device)
    weight = torch.randint(-9, 10, (2, 5, 3), device=device).float()
    (tm.gather_tokens(x, index, backend=backend) * weight).sum().backward()
    wanted = torch.zeros(2, 4, 3)
    for b in range(2):
        for k, i in enumerate(index[b].tolist()):
            if i >= 0:
                wanted[b, i] += weight[b, k].cpu()
    assert torch.equal(x.grad.cpu(), wanted)


@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
def test_large_results_are_streamed_past_the_caches(backend, isa):
    """Streaming stores start at 8 MiB, in rows of whole cache lines."""
    x = torch.randn(2, 700, 2048)
    index = torch.rand(2, 700).argsort(1)[:, :600]
    found = tm.gather_tokens(x, index, backend=backend)
    rows = torch.arange(2)[:, None], index
    assert torch.equal(found, x[rows])
    base = torch.randn_like(x)
    wanted = base.index_put(rows, found)
    assert torch.equal(tm.scatter_tokens(found, index, base, backend=backend), wanted)
    fused = tm.gather_fuse(x, index, index[:, :0], torch.ones(2, 700), prefix=0, backend=backend)
    assert torch.equal(fused[:, :-1], found)


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_of_rows_of_one_token_the_last_is_taken(backend):
    device = device_of(backend)
    y = torch.arange(1.0, 5.0, device=device).view(1, 4, 1)
    index = torch.tensor([[2, 2, 0, 2]], device=device)
    found = tm.scatter_tokens(y, index, 3, backend=backend)
    assert found.flatten().tolist() == [3.0, 0.0, 4.0]


@each_kernel
def test_compiles_with_other_ranks(backend):
    device = device_of(backend)

    def move(scores, heads, index):
        picked = tm.gather_tokens((scores, heads), index, backend=backend)
        return tm.scatter_tokens(picked[1], index, heads, backend=backend), picked[0]

    args = torch.randn(2, 6), torch.randn(2, 6, 2, 4), torch.tensor([[4, 0, -1], [5, 1, 2]])
    args = tuple(a.to(device) for a in args)
    compiled = torch.compile(move, fullgraph=True, dynamic=True, backend="aot_eager")
    for found, want in zip(compiled(*args), move(*args), strict=True):
        assert torch.equal(found, want)


# --- writing into out ---------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("flat", [False, True])
def test_out_is_written_and_returned(backend, flat):
    """Rows of any shape have gaps between them, and nothing around them is written."""
    device = device_of(backend)
    index = torch.tensor([7, -1, 12, 7] if flat else [[3, 3, 0], [8, -1, 1]], device=device)
    xs = torch.randn(2, 9, 4), torch.randn(2, 9, 3, 5).half(), torch.randn(2, 9, 1)
    xs = [x.to(device) for x in (*xs, torch.randn(18) if flat else torch.randn(2, 9))]
    want = tm.gather_tokens(xs, index, backend=backend)
    around = [w.new_full((*w.shape[:-1], 2 * w.shape[-1] + 5), 7) for w in want]
    around[1] = around[1][..., : want[1].shape[-1]].contiguous()  # heads are one
    around[3] = around[3][..., : want[3].shape[-1]].contiguous()
    outs = [a[..., 2 : 2 + w.shape[-1]] if i % 2 == 0 else a
            for i, (a, w) in enumerate(zip(around, want, strict=True))]  # fmt: skip
    found = tm.gather_tokens(xs, index, out=outs, backend=backend)
    for a, o, f, w in zip(around, outs, found, want, strict=True):
        assert f is o and torch.equal(f, w)
        assert (a == 7).sum() == a.numel() - w.numel()
    assert tm.gather_tokens(xs[0], index, out=outs[0], backend=backend) is outs[0]


@each_backend
def test_out_has_no_gradient_and_no_input(backend):
    device = device_of(backend)
    x = torch.randn(2, 9, 4, device=device)
    index = torch.tensor([[3, 3, 0], [8, -1, 1]], device=device, dtype=torch.int32)
    out = torch.empty(2, 3, 4, device=device)
    with pytest.raises(RuntimeError, match="x: must not require a gradient, as the call writes"):
        tm.gather_tokens(x.clone().requires_grad_(), index, out=out, backend=backend)
    with pytest.raises(RuntimeError, match=r"out: must have shape \[2, 3, 4\]; got \[2, 3, 2, 2\]"):
        tm.gather_tokens(x, index, out=out.view(2, 3, 2, 2), backend=backend)
    with pytest.raises(RuntimeError, match="out: must have its last dimensions as one; strides"):
        heads = torch.empty(2, 3, 2, 4, device=device)[..., ::2]
        tm.gather_tokens(x.view(2, 9, 2, 2), index, out=heads, backend=backend)
    with pytest.raises(RuntimeError, match="out: must be 1 tensors; got "):
        tm.gather_tokens([x], index, out=[], backend=backend)
    both = torch.zeros(23, 4, device=device)
    place = both[17:].view(2, 3, 4)
    with pytest.raises(RuntimeError, match="out: must not share memory with x; strides; got"):
        tm.gather_tokens(both[:18].view(2, 9, 4), index, out=place, backend=backend)
    with pytest.raises(RuntimeError, match="out: must not share memory with indices; str"):
        tm.gather_tokens(index.repeat(1, 3), index, out=index, backend=backend)
    assert tm.explain("gather_tokens", x[..., 0], index, out=out[..., 0].clone()).error is None


@each_kernel
def test_out_compiles_as_one_graph(backend):
    device = device_of(backend)
    x, index = torch.randn(2, 9, 4, device=device), torch.tensor([[3, 0], [8, -1]], device=device)

    def run(x, index):
        out = torch.empty(2, 2, 4, device=x.device)
        return tm.gather_tokens(x, index, out=out, backend=backend) + 0

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, index), run(x, index))


@each_kernel
def test_gradients_take_indices_whose_rows_overlap(backend):
    """Tensors created like them do not keep their strides."""
    x = torch.randn(2, 4, 5, device=device_of(backend)).requires_grad_()
    indices = torch.tensor([0, 2, 2, 1], dtype=torch.int32, device=x.device)
    rows = indices.as_strided((2, 3), (1, 1))
    (dx,) = torch.autograd.grad(tm.gather_tokens(x, rows, backend=backend).sum(), x)
    assert dx[..., 0].tolist() == [[1, 0, 2, 0], [0, 1, 2, 0]]
    sums = tm.merge_tokens(torch.ones(2, 3, 1, device=x.device), rows, 4, reduce="sum")[0]
    assert sums[..., 0].tolist() == [[1, 0, 2, 0], [0, 1, 2, 0]]
