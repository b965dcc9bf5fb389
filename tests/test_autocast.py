"""torch.autocast casts the arguments of an operator as the registry says, on every call path."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import backends, device_of
from torch.nn.functional import scaled_dot_product_attention

import tokenmill as tm
from tokenmill import _explain, registry
from tokenmill._call import autocast as casting

HALF = torch.bfloat16
SPECS = [spec for spec in registry.ops().values() if spec.forward.autocast]
CAST = [spec for spec in SPECS if spec.forward.autocast.lower]
PROMOTED = [spec for spec in SPECS if spec.forward.autocast.promote]


def each(specs):
    return pytest.mark.parametrize("spec", specs, ids=[spec.name for spec in specs])


def autocast(device="cpu", **options):
    return torch.autocast(device, dtype=HALF, **options)


def draw(spec, sample=None, device="cpu"):
    """Float32 arguments by name, by default of the sample with the most arguments that are cast."""
    signature = list(inspect.signature(spec.function).parameters)
    drawn = []
    for s in spec.samples if sample is None else [spec.samples[sample]]:
        args, kwargs = s.make(torch.float32, torch.Generator().manual_seed(0))
        drawn.append({**dict(zip(signature, args, strict=False)), **kwargs})
    given = max(drawn, key=lambda given: len(lowered_names(spec) & given.keys()))
    return {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in given.items()}


def lowered_names(spec):
    """Public names of arguments that are cast to half precision."""
    public, schema = list(inspect.signature(spec.function).parameters), spec.forward.arguments
    return {n if n in public else public[schema.index(n)] for n in spec.forward.autocast.lower}


def halve(spec, given):
    names = lowered_names(spec) - {*spec.forward.autocast.wide}  # float32 here
    return {n: t.to(HALF) if n in names and t is not None else t for n, t in given.items()}


def by_hand(spec, given):
    """Expected autocast result for float32 arguments; caches and their queries are not cast."""
    rule = spec.forward.autocast
    if rule.cache and (not rule.paged or given.get("block_table") is not None):
        return dict(given)
    return halve(spec, given)


def run(spec, given, backend=None):
    function = tm.testing.without_side_effects(spec, spec.function)
    result = function(**given, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def leaves(spec, given):
    return {
        n: t.requires_grad_() if n in spec.differentiable and isinstance(t, torch.Tensor) else t
        for n, t in given.items()
    }


def test_the_rules_are_those_of_sdpa_and_cat():
    """float16 and bfloat16 are cast too, float64 is not; rows become the widest dtype."""
    q = torch.randn(1, 3, 2, 8)
    mask = torch.zeros(3, 3)
    with autocast():
        for tensors in ((q, q, q), (q, q.half(), q.to(HALF)), (q.half(),) * 3, (q.double(),) * 3):
            bias = mask.to(tensors[0].dtype)
            turned = (t.transpose(1, 2) for t in tensors)
            wanted = scaled_dot_product_attention(*turned, attn_mask=bias)
            assert tm.attention(*tensors, bias=bias).dtype == wanted.dtype
        y, indices = q[0, :2, 0].to(HALF), torch.tensor([2, 0], dtype=torch.int32)
        base = torch.cat([q[0, :, 0], y])
        wanted = base.index_copy(0, indices.long(), y)
        assert torch.equal(tm.scatter_tokens(y[None], indices[None], base[None])[0], wanted)
    with pytest.raises(RuntimeError, match="k: must have the dtype of q, float32; got bfloat16"):
        tm.attention(q, q.to(HALF), q)


@pytest.mark.parametrize(
    ("spec", "backend"),
    [
        pytest.param(spec, b, id=f"{spec.name}-{b}")
        for spec in CAST
        for b in backends("reference")
        if _explain.able(spec, spec.samples[0], b)
    ],
)
def test_results_are_those_of_arguments_cast_by_hand(spec, backend):
    device = device_of(backend)
    for sample in (0, None) if backend in ("cpu", "reference") else (0,):
        given = draw(spec, sample, device)
        wanted = run(spec, by_hand(spec, given), backend)
        with autocast(device):
            same(run(spec, given, backend), wanted)
            assert tm.explain(spec.name, **given, backend=backend).error is None
            with autocast(device, enabled=False):
                inside = run(spec, given, backend)
        same(inside, run(spec, given, backend))


@each([spec for spec in CAST if spec.differentiable])
def test_gradients_have_the_dtype_of_the_leaves(spec):
    given, halved = leaves(spec, draw(spec)), leaves(spec, draw(spec))
    with autocast():
        out = run(spec, given)[0]
    wanted = run(spec, by_hand(spec, halved))[0]
    cotangent = torch.randn(out.shape).to(out.dtype)
    out.backward(cotangent)
    wanted.backward(cotangent)
    for name, t in given.items():
        if isinstance(t, torch.Tensor) and t.requires_grad:
            assert t.grad.dtype == torch.float32
            assert torch.equal(t.grad, halved[name].grad)


@each(CAST)
def test_torch_ops_cast_alike(spec):
    given = draw(spec)
    wanted = run(spec, by_hand(spec, given))
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(spec.forward.qualname, key)
    lowered = spec.lower(**given)
    written = [lowered[spec.forward.arguments.index(n)] for n in spec.forward.written]
    with autocast():
        found = spec.forward.run("tokenmill", lowered)
    found = found if isinstance(found, tuple) else (found,)
    # A public function may round the result of its operator: additive_attention does.
    first = found[0].to(wanted[0].dtype)
    same([first, *written], [wanted[0], *wanted[len(wanted) - len(written) :]])


COMPILED = ("attention", "bilevel_routing_attention", "hip_block_select", "kv_block_scores")


@each([spec for spec in CAST if spec.name in COMPILED])
def test_compiled_graphs_cast_alike(spec):
    given = draw(spec)

    def inside(given):
        with autocast():
            return spec.function(**given)

    torch._dynamo.reset()
    found = torch.compile(inside, fullgraph=True, backend="aot_eager")(given)
    same(*(x if isinstance(x, tuple) else (x,) for x in (found, inside(given))))


@each(CAST)
def test_mixed_dtypes_are_accepted(spec):
    """Layers under autocast return half precision together with float32 tensors."""
    given = draw(spec)
    rule = spec.forward.autocast
    first = rule.cache if rule.cache and not rule.paged else next(iter(given))
    given[first] = given[first].to(HALF)
    if first == "k_cache":
        given["v_cache"] = given["v_cache"].to(HALF)
    wanted = run(spec, halve(spec, given))
    with pytest.raises(RuntimeError, match=r"must (have the dtype of [qx]|be bfloat16)"):
        run(spec, given)
    with autocast():
        same(run(spec, given), wanted)


@each(PROMOTED)
def test_rows_are_promoted(spec):
    given = draw(spec)
    names = [n for n in spec.forward.autocast.promote if isinstance(given.get(n), torch.Tensor)]
    given[names[-1]] = given[names[-1]].to(HALF)
    wide = given | {names[-1]: given[names[-1]].float()}
    with autocast():
        same(run(spec, given), run(spec, wide))


@pytest.mark.parametrize(
    "function",
    [tm.landmark_attention, tm.core_context_attention, tm.hip_attention, tm.moba_attention],
    ids=lambda f: f.__name__,
)
def test_functions_made_of_operators(function):
    """Their own sums and products equal the call by hand, too."""
    q, k, v = torch.randn(3, 2, 70, 2, 16, generator=torch.Generator().manual_seed(0))
    wanted = function(*(t.to(HALF) for t in (q, k, v)))
    with autocast():
        same([function(q, k.to(HALF), v)], [wanted])
    with autocast(), pytest.raises(TypeError):
        function(q, k, v, 1, q=q)


def test_a_cache_is_read_as_it_is():
    q, k, v = torch.randn(3, 2, 64, 2, 16, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([64, 60], dtype=torch.int32)
    table = torch.arange(2, dtype=torch.int32)[:, None]
    q = q[:, :1]
    paged = {"seqlens_k": lengths, "block_table": table, "budget": 16, "num_recent": 16}
    for function, options in (
        (tm.landmark_decode, {"seqlens_k": lengths, "block": 16}),
        (tm.landmark_decode, {"seqlens_k": lengths, "block_table": table, "block": 16}),
        (tm.attention_decode, {"seqlens_k": lengths}),
        (tm.hip_attention, paged),
    ):
        for dtype in (torch.float32, HALF):
            keys, values = k.to(dtype), v.to(dtype)
            wanted = function(q.to(dtype), keys, values, **options)
            with autocast():
                same([function(q, keys, values, **options)], [wanted])


def test_a_call_with_out_casts_nothing():
    q = torch.randn(1, 5, 2, 8)
    out = torch.empty(1, 5, 2, 8)
    wanted = tm.linear_attention(q, q, q)
    with autocast():
        tm.linear_attention(q, q, q, out=out)
    assert torch.equal(out, wanted)


def test_other_devices_do_not_matter():
    q = torch.randn(1, 5, 2, 8)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert tm.attention(q, q, q).dtype == torch.float32
        assert casting.device_of((None, q)) is None
    finally:
        torch.set_autocast_enabled("cuda", False)
