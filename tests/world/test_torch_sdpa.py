"""PyTorch's own rules of scaled_dot_product_attention, with integrations.sdpa enabled.

The scope follows test/test_transformers.py of pytorch/pytorch: layouts, masks, causality, groups of
heads, scales, gradients, modules of torch.nn, and contexts that choose a backend. Expected results
come from PyTorch's plain composition (SDPBackend.MATH); whether a call is ours or stays PyTorch's
is part of each case.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tokenmill as tm
from tokenmill.integrations import sdpa as ours

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="states what a CPU takes")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make(*shape, keys=None, heads_k=None, value_dim=None, dtype=torch.float32):
    """Returns q [B, H, Sq, D], k and v."""
    b, h, sq, d = shape
    sizes = [(b, h, sq, d), (b, heads_k or h, keys or sq, d)]
    sizes.append((*sizes[1][:3], value_dim or d))
    return [torch.randn(size, dtype=dtype) for size in sizes]


def results(tensors, grad=True, **options):
    """Output, and the gradients of all differentiable inputs."""
    leaves = [x.detach().requires_grad_(grad) for x in tensors]
    out = sdpa(*leaves, **options)
    if not grad:
        return [out]
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def check(tensors, served=2, close=CLOSE, grad=True, **options):
    """Compares ours with PyTorch's composition; served: expected number of our calls, forward and
    backward."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = results(tensors, grad, **options)
    with ours.enable() as route:
        found = results(tensors, grad, **options)
    assert route.served == served, (route.served, route.passed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)
    return found


SHAPES = [
    (1, 1, 1, 1), (2, 3, 1, 8), (1, 2, 17, 3), (3, 1, 33, 16), (2, 4, 65, 40), (1, 2, 130, 64),
    (1, 1, 7, 96), (1, 2, 20, 128), (1, 1, 5, 256),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_causality(shape):
    for keys in {shape[2], shape[2] + 3, 2 * shape[2] + 64}:
        tensors = make(*shape, keys=keys)
        for causal, scale in itertools.product((False, True), (None, 0.3)):
            check(tensors, is_causal=causal, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_as_good_as_those_of_the_composition(dtype):
    for shape, causal in itertools.product([(2, 2, 33, 16), (1, 2, 70, 64)], (False, True)):
        tensors = make(*shape, dtype=dtype)
        with sdpa_kernel(SDPBackend.MATH):
            oracle = results([x.double() for x in tensors], is_causal=causal)
            plain = results(tensors, is_causal=causal)
        with ours.enable() as route:
            found = results(tensors, is_causal=causal)
        assert route.served == 2
        tm.testing.assert_accurate(found[0], oracle[0], plain[0])
        for one, wanted, other in zip(found[1:], oracle[1:], plain[1:], strict=True):
            tm.testing.assert_accurate(one, wanted, other, gradient=True)


MASK_SHAPES = [
    (9, 12), (1, 12), (9, 1), (1, 1), (1, 1, 9, 12), (2, 1, 9, 12), (1, 4, 9, 12), (2, 4, 9, 12),
    (2, 1, 1, 12), (2, 4, 9, 1), (1, 4, 1, 12),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "float", "minus infinity"])
def test_masks_of_all_shapes(kind):
    tensors = make(2, 4, 9, 16, keys=12)
    for shape in MASK_SHAPES:
        visible = torch.rand(shape) < 0.7
        mask = {
            "bool": visible,
            "float": torch.randn(shape),
            "minus infinity": torch.where(visible, torch.randn(shape), -torch.inf),
        }[kind]
        check(tensors, attn_mask=mask)
        check(tensors, attn_mask=mask.expand(2, 4, 9, 12))
        check(tensors, attn_mask=mask.mT.contiguous().mT)


def test_rows_that_see_nothing_are_zero_and_have_no_gradient():
    tensors = make(2, 2, 9, 16)
    visible = torch.rand(9, 9) < 0.7
    visible[[0, 4, 8]] = False
    for mask in (visible, torch.where(visible, 0.0, -torch.inf)):
        out, dq, *rest = check(tensors, attn_mask=mask)
        assert not out[:, :, [0, 4, 8]].any() and not dq[:, :, [0, 4, 8]].any()
        assert all(x.isfinite().all() for x in rest)
    nothing = torch.zeros(9, 9, dtype=torch.bool)
    assert not any(x.any() for x in check(tensors, attn_mask=nothing))


def test_the_smallest_number_hides_as_well():
    """Masks that models build hold finfo.min instead of -inf."""
    tensors = make(1, 2, 9, 16)
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    check(tensors, attn_mask=torch.where(visible, 0.0, torch.finfo(torch.float32).min))


@pytest.mark.parametrize(("upper_left", "served"), [(True, 2), (False, 2)])
def test_causal_biases_of_torch(upper_left, served):
    make_bias = causal_upper_left if upper_left else causal_lower_right
    for rows, keys in ((9, 9), (9, 14)):
        check(make(2, 2, rows, 16, keys=keys), served, attn_mask=make_bias(rows, keys))


def test_groups_of_heads():
    for heads, causal in itertools.product((1, 2, 4), (False, True)):
        tensors = make(2, 4, 11, 16, keys=13, heads_k=heads)
        check(tensors, enable_gqa=True, is_causal=causal)
        check(tensors, enable_gqa=True, attn_mask=torch.rand(2, 1, 11, 13) < 0.8)


LAYOUTS = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads before batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: nn.functional.pad(x, (3, 5, 1, 0, 0, 2))[:, :-2, 1:, 3:-5],
    "every other token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    q, k, v = make(2, 3, 10, 16, keys=12)
    change = LAYOUTS[layout]
    for changed in ((change(q), k, v), (q, change(k), change(v)), tuple(map(change, (q, k, v)))):
        check(changed, is_causal=True)


def test_expanded_keys_and_one_tensor_for_all():
    q = torch.randn(2, 3, 10, 16)
    one = torch.randn(1, 1, 12, 16)
    check((q, one.expand(2, 3, 12, 16), one.expand(2, 3, 12, 16)))
    with sdpa_kernel(SDPBackend.MATH):
        leaf = q.clone().requires_grad_()
        (expected,) = torch.autograd.grad(sdpa(leaf, leaf, leaf).square().sum(), leaf)
    with ours.enable() as route:
        leaf = q.clone().requires_grad_()
        (found,) = torch.autograd.grad(sdpa(leaf, leaf, leaf).square().sum(), leaf)
    assert route.served == 2
    torch.testing.assert_close(found, expected, **CLOSE)


def test_only_some_inputs_have_gradients():
    q, k, v = make(1, 2, 9, 16)
    for chosen in ((0,), (1,), (2,), (0, 2)):
        grads = []
        for context in (sdpa_kernel(SDPBackend.MATH), ours.enable()):
            with context:
                given = [x.clone().requires_grad_(i in chosen) for i, x in enumerate((q, k, v))]
                out = sdpa(*given, is_causal=True)
                grads.append(torch.autograd.grad(out.square().sum(), [given[i] for i in chosen]))
        torch.testing.assert_close(*grads, **CLOSE)


# Calls that PyTorch gives to its composition instead of a flash kernel, and calls that it never
# reaches.
ELSEWHERE = {
    "three dimensions": (lambda: [x[0] for x in make(1, 2, 9, 16)], {}),
    "five dimensions": (lambda: [x[None] for x in make(1, 2, 9, 16)], {}),
    "other values": (lambda: make(1, 2, 9, 16, value_dim=8), {}),
    "columns apart": (lambda: [x.mT.contiguous().mT for x in make(1, 2, 9, 16)], {}),
    "no rows": (lambda: [torch.randn(1, 2, 0, 16), *make(1, 2, 9, 16)[1:]], {}),
    "no batch": (lambda: [torch.randn(0, 2, 9, 16)] * 3, {}),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_does_not_reach_a_flash_kernel_stays_with_pytorch(case):
    build, options = ELSEWHERE[case]
    tensors = build()
    served = 0
    if case == "three dimensions":  # torch 2.15 takes them
        flash = torch._fused_sdp_choice(*tensors) == SDPBackend.FLASH_ATTENTION.value
        served = 2 if flash else 0
    check(tensors, served=served, **options)


def test_a_mask_with_a_gradient_stays_with_pytorch():
    tensors, mask = make(1, 2, 9, 16), torch.randn(9, 9)
    grads = []
    for context in (sdpa_kernel(SDPBackend.MATH), ours.enable()):
        with context as route:
            learned = mask.clone().requires_grad_()
            out = sdpa(*tensors, attn_mask=learned)
            grads.append(torch.autograd.grad(out.square().sum(), learned)[0])
    assert route.served == 0
    torch.testing.assert_close(*grads, **CLOSE)


def test_double_precision_and_its_second_derivative_stay_with_pytorch():
    tensors = [x.double().requires_grad_() for x in make(1, 1, 4, 3)]
    with warnings.catch_warnings(), ours.enable() as route:
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(lambda *x: sdpa(*x, is_causal=True), tensors)
    assert route.served == 0 and route.passed
    with sdpa_kernel(SDPBackend.MATH), ours.enable():
        assert torch.autograd.gradgradcheck(lambda *x: sdpa(*x, is_causal=True), tensors)


def test_dropout_stays_with_pytorch_and_is_drawn_as_before():
    tensors, out = make(1, 2, 9, 16), []
    for enabled in (False, True):
        torch.manual_seed(1)
        with ours.enable() if enabled else sdpa_kernel(SDPBackend.MATH) as route:
            out.append(sdpa(*tensors, dropout_p=0.5))
    assert route.served == 0 and torch.equal(*out)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"attn_mask": torch.zeros(9, 9, dtype=torch.int32)}, None, "dtype"),
        ({"attn_mask": torch.zeros(8, 9)}, None, None),
        ({}, lambda q, k, v: (q, k.half(), v), "dtype"),
        ({}, lambda q, k, v: (q, k[..., :8], v), None),
        ({}, lambda q, k, v: (q[0, 0, 0], k, v), None),
    ],
    ids=["integers", "mask", "dtypes", "width", "one dimension"],
)
def test_malformed_calls_are_refused_as_before(options, change, message):
    tensors = make(1, 2, 9, 16)
    if change is not None:
        tensors = change(*tensors)
    said = []
    for enabled in (False, True):
        with ours.enable() if enabled else sdpa_kernel(SDPBackend.MATH):
            with pytest.raises((RuntimeError, ValueError), match=message) as caught:
                sdpa(*tensors, **options)
            said.append(type(caught.value))
    assert said[0] == said[1]


def test_a_mask_beside_causality_hides_as_well():
    """The composition refuses it, PyTorch's flash kernel accepts it in some versions of torch."""
    tensors, mask = make(1, 2, 9, 16), torch.randn(9, 9)
    below = torch.ones(9, 9, dtype=torch.bool).tril()
    both_hide = mask.masked_fill(~below, -torch.inf)
    expected = results(tensors, attn_mask=both_hide)
    refused = []
    for enabled in (False, True):
        with ours.enable() if enabled else torch.enable_grad():
            try:
                found = results(tensors, attn_mask=mask, is_causal=True)
            except RuntimeError as error:
                assert "Explicit attn_mask should not be set when is_causal=True" in str(error)
                refused.append(enabled)
                continue
        torch.testing.assert_close(found, expected, **CLOSE)
    assert refused in ([], [False, True])


def test_contexts_choose_the_backend():
    q, k, v = make(1, 2, 9, 16)
    with ours.enable() as route:
        with sdpa_kernel(SDPBackend.MATH):
            plain = sdpa(q, k, v)
        assert route.served == 0
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.testing.assert_close(sdpa(q, k, v), plain, **CLOSE)
        assert route.served == 1
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            sdpa(q, k, v)
        assert route.served == 2
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="No"):
            sdpa(q, k, v, dropout_p=0.5)
        with sdpa_kernel(SDPBackend.MATH), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            sdpa(q, k, v)
        sdpa(q, k, v)
    assert route.served == 4 and not route.passed


def test_modes_without_gradients_and_under_autocast():
    q, k, v = make(1, 2, 9, 16)
    with sdpa_kernel(SDPBackend.MATH):
        plain = sdpa(q, k, v)
    with ours.enable() as route:
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                torch.testing.assert_close(sdpa(q, k, v), plain, **CLOSE)
        with torch.autocast("cpu", torch.bfloat16):
            out = sdpa(q, k, v)
    assert route.served == 3 and out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain, rtol=0, atol=0.02)


def test_vmap_and_gradients_of_each_sample():
    q, k, v = (torch.randn(3, 1, 2, 9, 16) for _ in range(3))

    def loss(*x):
        return sdpa(*x, is_causal=True).square().sum()

    found = []
    for context in (sdpa_kernel(SDPBackend.MATH), ours.enable()):
        with context, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap has no rule for a kernel
            grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
            found.append((torch.func.vmap(sdpa)(q, k, v), *grads))
    torch.testing.assert_close(*found, **CLOSE)


# Modules of torch.nn


def both(module, *args, train=True, **options):
    """(outputs and gradients of the composition, the same under enable(), the route)."""
    found = []
    for context in (sdpa_kernel(SDPBackend.MATH), ours.enable()):
        with context as route:
            module.train(train).zero_grad()
            with torch.set_grad_enabled(train):
                out = module(*args, **options)
            out = out if isinstance(out, torch.Tensor) else out[0]
            parts = [out.detach()]
            if train:
                out.square().sum().backward()
                parts += [p.grad.clone() for p in module.parameters() if p.grad is not None]
            found.append(parts)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    return route


PADDED = torch.arange(9) >= torch.tensor([[9], [6]])
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDED},
    "float padding": {"key_padding_mask": torch.zeros(2, 9).masked_fill(PADDED, -torch.inf)},
    "causal": {"attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(1), "is_causal": True},
    "bool": {"attn_mask": torch.arange(81).view(9, 9) % 4 == 1},
    "float": {"attn_mask": torch.linspace(-2, 2, 81).view(9, 9)},
    "of each head": {"attn_mask": torch.linspace(-2, 2, 648).view(8, 9, 9)},
    "both": {"attn_mask": torch.arange(81).view(9, 9) % 4 == 1, "key_padding_mask": PADDED},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_multihead_attention(masks, train):
    x = torch.randn(2, 9, 32)
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    route = both(module, x, x, x, need_weights=False, train=train, **MASKS[masks])
    # eval() has a fused path that calls no attention operator, and takes boolean masks.
    fused = not any(mask.is_floating_point() for mask in MASKS[masks].values() if mask is not True)
    assert route.served == (2 if train else 0 if fused else 1)
    route = both(module, x, x, x, need_weights=True, train=train, **MASKS[masks])
    assert route.served == 0  # weights are requested


@pytest.mark.parametrize(
    "options",
    [
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 12, "vdim": 20},
        {"bias": False},
        {"batch_first": False},
    ],
    ids=str,
)
def test_other_forms_of_multihead_attention(options):
    q, k, v = torch.randn(2, 9, 32), torch.randn(2, 11, 32), torch.randn(2, 11, 32)
    if "kdim" in options:
        k, v = torch.randn(2, 11, 12), torch.randn(2, 11, 20)
    if options.get("batch_first") is False:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    module = nn.MultiheadAttention(32, 4, **{"batch_first": True, **options})
    assert both(module, q, k, v, need_weights=False).served == 2
    # The fused path of eval() needs queries, keys and values in one tensor; these are separate.
    assert both(module, q, k, v, need_weights=False, train=False).served == 1


def test_without_the_fused_path_eval_goes_through_too():
    x, module = torch.randn(2, 9, 32), nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    assert both(module, x, train=False).served == 0
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert both(module, x, train=False).served == 1
        assert both(module, x, train=False, src_key_padding_mask=PADDED).served == 1
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoders_and_decoders(norm_first):
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    source, target = torch.randn(2, 9, 32), torch.randn(2, 7, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    layer = nn.TransformerEncoderLayer(32, 4, 48, **options)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert both(encoder, source, src_key_padding_mask=PADDED).served == 4
    assert both(encoder, source, train=False, src_key_padding_mask=PADDED).served in (0, 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, **options), 2)
    masks = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": PADDED}
    assert both(decoder, target, source, **masks).served == 8
    assert both(decoder, target, source, train=False, **masks).served == 4
    model = nn.Transformer(32, 4, 1, 1, 48, **options)
    assert both(model, source, target, tgt_mask=causal).served == 6
