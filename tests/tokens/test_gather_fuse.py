"""gather_fuse: its definition in plain steps, and memory that it must not read."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

NAN = float("nan")


@st.composite
def calls(draw):
    """x of small integers and weights in eighths: float32 sums are exact in any order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, patches = draw(st.integers(1, 2)), draw(st.integers(0, 90))
    prefix = draw(st.integers(0, 2))
    channels = draw(st.sampled_from([1, 3, 8, 16, 40, 136, 530]))
    kept = draw(st.integers(0, patches))
    rest = draw(st.integers(0, patches - kept))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    x = torch.randint(-4, 5, (batch, prefix + patches, channels), generator=generator).to(dtype)
    order = torch.rand(batch, patches, generator=generator).argsort(1)
    keep, others = order[:, :kept], order[:, kept : kept + rest]
    if draw(st.booleans()):
        keep = torch.where(torch.rand(keep.shape, generator=generator) < 0.2, -1, keep)
        others = torch.where(torch.rand(others.shape, generator=generator) < 0.2, -1, others)
    weight = torch.randint(0, 9, (batch, patches), generator=generator) / 8
    if draw(st.booleans()):
        weight[0] = 0
    return (x, keep.int(), others.int(), weight), {
        "prefix": prefix,
        "normalize": draw(st.booleans()),
    }


def by_definition(x, keep, rest, weight, prefix, normalize):
    rows = []
    for b in range(len(x)):
        patches = x[b, prefix:]
        kept = [patches[j] if j >= 0 else torch.zeros_like(x[b, 0]) for j in keep[b].tolist()]
        named = [j for j in rest[b].tolist() if j >= 0]
        f = sum((weight[b, j] * patches[j].float() for j in named), torch.zeros(x.shape[2]))
        total = weight[b, named].sum()
        if normalize:
            f = f / total if total != 0 else torch.zeros_like(f)
        rows.append(torch.stack([*x[b, :prefix], *kept, f.to(x.dtype)]))
    return torch.stack(rows)


def check(call, backend):
    args, options = call
    if args[0].shape[1] == 0:
        return
    wanted = by_definition(*args, **options)
    device = device_of(backend)
    found = tm.gather_fuse(*(a.to(device) for a in args), **options, backend=backend).cpu()
    if options["normalize"]:  # a quotient may round differently
        torch.testing.assert_close(found[:, -1], wanted[:, -1])
        found, wanted = found[:, :-1], wanted[:, :-1]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
@examples(30)
@given(call=calls())
def test_definition_on_every_instruction_set(call, backend, isa):
    check(call, backend)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "cpu"])
@examples(20)
@given(call=calls())
def test_definition(call, backend):
    check(call, backend)


@each_backend
@examples(15)
@given(call=calls())
def test_gradients_go_where_rows_come_from(call, backend):
    (x, keep, rest, weight), options = call
    prefix, normalize = options["prefix"], options["normalize"]
    x, weight = x.float(), weight.float()
    device = device_of(backend)
    a, w = (t.to(device).requires_grad_() for t in (x, weight))
    out = tm.gather_fuse(a, keep.to(device), rest.to(device), w, **options, backend=backend)
    dout = torch.randint(-3, 4, out.shape).float()
    out.backward(dout.to(device))
    dx, dw = torch.zeros_like(x), torch.zeros_like(weight)
    dx[:, :prefix] = dout[:, :prefix]
    for b in range(len(x)):
        total = weight[b, rest[b][rest[b] >= 0].long()].sum() if normalize else torch.tensor(1.0)
        for k, j in enumerate(keep[b].tolist()):
            if j >= 0:
                dx[b, prefix + j] = dout[b, prefix + k]
        for j in rest[b].tolist():
            if j >= 0 and total != 0:
                f = out[b, -1].detach().cpu() if normalize else 0
                dx[b, prefix + j] = weight[b, j] / total * dout[b, -1]
                dw[b, j] = (x[b, prefix + j] - f) @ dout[b, -1] / total
    torch.testing.assert_close(a.grad.cpu(), dx)
    torch.testing.assert_close(w.grad.cpu(), dw, atol=1e-3, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_what_no_list_names_does_not_matter(normalize, backend):
    device = device_of(backend)
    x = torch.randn(1, 9, 16, device=device)
    weight = torch.rand(1, 8, device=device)
    keep, rest = (torch.tensor(i, device=device) for i in ([[5, -1]], [[2, -1, 7]]))
    wanted = tm.gather_fuse(x, keep, rest, weight, normalize=normalize, backend=backend)
    for j in (0, 1, 3, 4, 6):
        x[0, 1 + j] = NAN
        weight[0, j] = NAN
    weight[0, 5] = NAN  # weight of a kept patch
    x.requires_grad_()
    found = tm.gather_fuse(x, keep, rest, weight, normalize=normalize, backend=backend)
    assert torch.equal(found, wanted)
    found.sum().backward()
    dropped = torch.tensor([0, 1, 3, 4, 6], device=device) + 1
    assert not x.grad[0, dropped].any()


@each_backend
def test_normalized_weights_keep_a_constant(backend):
    device = device_of(backend)
    x = torch.full((2, 33, 8), 3.0, device=device)
    keep, rest = torch.arange(32, device=device).repeat(2, 1).split([10, 22], 1)
    weight = torch.rand(2, 32, device=device)
    found = tm.gather_fuse(x, keep, rest, weight, normalize=True, backend=backend)
    torch.testing.assert_close(found, torch.full_like(found, 3.0))


@each_backend
def test_a_long_sum_keeps_its_digits(backend):
    """One row of 2^12 and many of 2^-12, which a single float32 chain would round off."""
    device = device_of(backend)
    rows = 2**13
    x = torch.full((1, rows, 4), 2.0**-12, device=device)
    x[0, 0] = 2.0**12
    rest = torch.arange(rows, device=device)[None]
    weight = torch.ones(1, rows, device=device)
    found = tm.gather_fuse(x, rest[:, :0], rest, weight, prefix=0, backend=backend)
    assert abs(found[0, 0, 0].item() - (2.0**12 + (rows - 1) * 2.0**-12)) < 2**-5


@each_backend
def test_out_is_written_and_returned(backend):
    """Rows have gaps between them, and nothing around them is written."""
    device = device_of(backend)
    x, weight = torch.randn(2, 9, 8, device=device), torch.rand(2, 8, device=device)
    order = torch.rand(2, 8, device=device).argsort(1).int()
    call = x, order[:, :3], order[:, 3:7], weight
    want = tm.gather_fuse(*call, backend=backend)
    around = torch.full((2, 7, 12), 7.0, device=device)
    out = around[:, 1:6, 4:]
    assert tm.gather_fuse(*call, out=out, backend=backend) is out
    assert torch.equal(out, want)
    assert (around == 7).sum() == around.numel() - out.numel()
    with pytest.raises(RuntimeError, match="out: must not share memory with x"):
        tm.gather_fuse(*call, out=x[:, 4:], backend=backend)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="x: must not require a gradient, as the call writes"):
        tm.gather_fuse(*call, out=out, backend=backend)
