"""local_pool: windows by definition, ties, NaN and masks."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, each_kernel
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

NAN, INF = float("nan"), float("inf")


@st.composite
def calls(draw):
    """Draws maps of small integers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    channels = draw(st.sampled_from([1, 3, 8, 20, 72, 130]))
    batch = draw(st.integers(1, 2))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    x = torch.randint(-4, 5, (batch, height, width, channels), generator=generator).to(dtype)
    kernel = tuple(draw(st.sampled_from([1, 3, 5])) for _ in range(2))
    options = {
        "dilation": tuple(draw(st.sampled_from([0, 1, 1, 2, 70])) for _ in range(2)),
        "mode": draw(st.sampled_from(["avg", "max"])),
        "count_include_pad": draw(st.booleans()),
        "subtract_input": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["mask"] = torch.rand(x.shape[:3], generator=generator) < 0.6
    return x, kernel, options


def windows(shape, kernel, dilation, mask):
    """(token, its taps in row-major order) for every token."""
    batch, height, width = shape[:3]
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                offsets = [
                    (dilation[0] * (i - kernel[0] // 2), dilation[1] * (j - kernel[1] // 2))
                    for i in range(kernel[0])
                    for j in range(kernel[1])
                ]
                taps = [(b, y + dy, x + dx) for dy, dx in offsets]
                taps = [t for t in taps if 0 <= t[1] < height and 0 <= t[2] < width]
                yield (b, y, x), [t for t in taps if mask is None or bool(mask[t])]


def by_definition(x, kernel, options):
    found = torch.zeros(x.shape)
    for at, taps in windows(x.shape, kernel, options["dilation"], options.get("mask")):
        if taps:
            values = torch.stack([x[t].float() for t in taps])
            if options["mode"] == "max":
                found[at] = values.amax(0)
            else:
                divisor = kernel[0] * kernel[1] if options["count_include_pad"] else len(taps)
                found[at] = values.sum(0) / divisor
    if options["subtract_input"]:
        found -= x.float()
    return found.to(x.dtype)


def call(x, kernel, options, backend):
    device = device_of(backend)
    there = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    return tm.local_pool(x.to(device), kernel, **there, backend=backend)


def check(drawn, backend):
    x, kernel, options = drawn
    found = call(x, kernel, options, backend).cpu()
    wanted = by_definition(x, kernel, options)
    if x.dtype == torch.float32 or options["mode"] == "max":
        assert torch.equal(found, wanted)
    else:  # the reference rounds the mean before it subtracts
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.03)


@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
@examples(30)
@given(drawn=calls())
def test_definition_on_every_instruction_set(drawn, backend, isa):
    check(drawn, backend)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "cpu"])
@examples(20)
@given(drawn=calls())
def test_definition(drawn, backend):
    check(drawn, backend)


@each_backend
@examples(20)
@given(drawn=calls())
def test_gradient_by_definition(drawn, backend):
    """Many maxima are equal: the first tap has the whole gradient."""
    x, kernel, options = drawn
    x = x.float()
    a = x.to(device_of(backend)).requires_grad_()
    out = call(a, kernel, options, backend)
    dout = torch.randint(-3, 4, x.shape).float()
    out.backward(dout.to(a.device))
    wanted = -dout if options["subtract_input"] else torch.zeros_like(dout)
    for at, taps in windows(x.shape, kernel, options["dilation"], options.get("mask")):
        if not taps:
            continue
        if options["mode"] == "max":
            values = torch.stack([x[t] for t in taps])
            first = (values == values.amax(0)).int().argmax(0)
            for i, t in enumerate(taps):
                wanted[t] += dout[at] * (first == i)
        else:
            divisor = kernel[0] * kernel[1] if options["count_include_pad"] else len(taps)
            for t in taps:
                wanted[t] += dout[at] / divisor
    torch.testing.assert_close(a.grad.cpu(), wanted)


@pytest.mark.skipif("cpu" not in backends(), reason="of the CPU kernels")
@pytest.mark.parametrize("isa", tm.testing.cpu_isas(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [3, (1, 5), (3, 1)])
def test_gradient_of_a_maximum_in_the_order_of_the_elements(kernel, dtype, isa):
    """Zeros of either sign are equal, NaN of either sign is the maximum, and the first one wins."""
    g = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, -0.0, 1, -1, 2, -2, 6e-8, -6e-8, 1e-39, -1e-39, torch.inf,
                           -torch.inf, torch.nan, -torch.nan])  # fmt: skip
    for maximum in (len(values), 10, 4):  # NaN is rare, absent, and many are equal
        drawn = torch.randint(0, maximum, (2, 9, 11, 37), generator=g)
        x = values[drawn].to(dtype)
        dout = torch.randint(-3, 4, x.shape, generator=g).to(dtype)
        mask = torch.rand(x.shape[:3], generator=g) < 0.9
        found = []
        for backend in ("cpu", "reference"):
            leaf = x.clone().requires_grad_()
            out = tm.local_pool(leaf, kernel, mode="max", mask=mask, subtract_input=maximum == 4,
                                backend=backend)  # fmt: skip
            found.append(torch.autograd.grad(out, leaf, dout)[0])
        assert torch.equal(*found)


@each_backend
def test_nan_wins_and_the_first_has_the_gradient(backend):
    device = device_of(backend)
    for channels in (1, 16, 37):
        values = torch.tensor([INF, NAN, -INF, NAN, 1.0, 2.0, 2.0, -INF, -INF, -INF])
        x = values.to(device).view(1, 10, 1).repeat(1, 1, channels).requires_grad_()
        out = tm.local_pool(x, 3, mode="max", backend=backend)
        wanted = [NAN, NAN, NAN, NAN, NAN, 2.0, 2.0, 2.0, -INF, -INF]
        column = torch.tensor(wanted).to(device).view(1, 10, 1).expand_as(out)
        assert torch.equal(out.nan_to_num(99, 100, -100), column.nan_to_num(99, 100, -100))
        (out.nan_to_num(0) * 0 + out).backward(torch.ones_like(out))
        grad = x.grad[0, :, 0].tolist()
        # Windows 0 to 2 take the NaN at 1, windows 3 and 4 the NaN at 3, windows 5 and 6 the 2 at
        # 5, window 7 the 2 at 6, windows 8 and 9 the first of equals.
        assert grad == [0.0, 3.0, 0.0, 2.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.0]


@each_backend
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_masked_tokens_are_in_no_window(mode, backend):
    device = device_of(backend)
    x = torch.randn(1, 4, 5, 8, device=device)
    mask = torch.rand(1, 4, 5, device=device) < 0.5
    wanted = tm.local_pool(x, 3, mode=mode, mask=mask, backend=backend)
    x[~mask] = NAN
    x.requires_grad_()
    found = tm.local_pool(x, 3, mode=mode, mask=mask, backend=backend)
    assert torch.equal(found, wanted)
    found.backward(torch.ones_like(found))
    assert not x.grad[~mask].any()
    empty = torch.zeros_like(mask)
    assert not tm.local_pool(x, 3, mode=mode, mask=empty, backend=backend).any()


@each_backend
def test_a_sequence_is_a_map_of_one_line(backend):
    device = device_of(backend)
    x = torch.randn(2, 11, 8, device=device)
    mask = torch.rand(2, 11, device=device) < 0.7
    options = {"dilation": 2, "mask": mask}
    found = tm.local_pool(x, 5, **options, backend=backend)
    options["mask"] = mask[:, None]
    options["dilation"] = (1, 2)
    assert torch.equal(found, tm.local_pool(x[:, None], (1, 5), **options, backend=backend)[:, 0])
    with pytest.raises(RuntimeError, match="kernel: must be an integer"):
        tm.local_pool(x, (1, 5), backend=backend)


@each_kernel
def test_agrees_with_pooling_channels_first(backend):
    x = torch.randn(2, 9, 8, 24, device=device_of(backend))
    first = x.permute(0, 3, 1, 2)
    mean = torch.nn.functional.avg_pool2d(first, 3, 1, 1, count_include_pad=False) - first
    found = tm.local_pool(x, 3, subtract_input=True, backend=backend)
    torch.testing.assert_close(found, mean.permute(0, 2, 3, 1))
    maximum = torch.nn.functional.max_pool2d(first, 5, 1, 2)
    found = tm.local_pool(x, 5, mode="max", backend=backend)
    assert torch.equal(found, maximum.permute(0, 2, 3, 1))


@pytest.mark.parametrize("backend", [b for b in backends() if b != "triton"])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(
    ("shape", "kernel", "dilation", "masked"),
    [
        ((1, 19, 37, 40), 3, 1, False),
        ((1, 19, 37, 40), (3, 5), (2, 1), True),
        ((2, 1, 300, 16), (1, 3), 1, False),
        ((1, 40, 40, 8), 3, 6, True),
    ],
)
def test_maps_of_several_tiles(shape, kernel, dilation, masked, mode, backend):
    """Integers: a maximum and its gradient are exact."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    x, dout = (torch.randint(-9, 10, shape, generator=generator).float() for _ in range(2))
    mask = torch.rand(shape[:3], generator=generator) < 0.7 if masked else None

    def run(name, device):
        leaf = x.to(device).requires_grad_()
        taken = mask if mask is None else mask.to(device)
        out = tm.local_pool(leaf, kernel, dilation=dilation, mode=mode, mask=taken,
                            subtract_input=True, backend=name)  # fmt: skip
        return out.detach().cpu(), torch.autograd.grad(out, leaf, dout.to(device))[0].cpu()

    for got, want in zip(run(backend, device), run("reference", "cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0 if mode == "max" else 1e-5)
