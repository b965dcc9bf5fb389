"""The CUDA kernel of a call on any chip: needs neither a GPU nor CUDA kernels in the build."""

from __future__ import annotations

import pytest
import torch

import tokenmill as tm
from tokenmill import _knobs, registry
from tokenmill.__main__ import main
from tokenmill._call import choose

DENSE = "csrc/dense/attention"
DECODE = "csrc/dense/attention_decode"
SPARSE = "csrc/sparse/block_sparse_attention"
LINEAR = "csrc/linear/linear_attention"
OTHER_CHIPS = {"sm_80": 80, "8.0": 80, "sm_100": 100, "12.0": 120, "sm_120": 120}


def draw(*shape, dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def lengths(*n):
    return torch.tensor(n, dtype=torch.int32)


Q = draw(1, 64, 2, 64)
ONE = draw(1, 1, 2, 64)
WIDE = draw(1, 64, 2, 128)
LISTS = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)
# Operator, arguments, options: kernels on compute capability 9.0, and on others.
CALLS = {
    "attention": ("attention", (Q, Q, Q), {}, f"{DENSE}/kernel_sm90", DENSE),
    "decode": (
        "attention_decode", (ONE, Q, Q), {"seqlens_k": lengths(50)}, f"{DECODE}/kernel_sm90", DECODE
    ),
    "cached": (
        "attention", (Q, Q, Q), {"seqlens_k": lengths(64)}, f"{DENSE}/kernel_sm90", DECODE
    ),
    "packed requests": (
        "attention", (Q[0], Q, Q), {"seqlens_k": lengths(64), "cu_seqlens_q": lengths(0, 64)},
        f"{DENSE}/kernel_sm90 and {DECODE} for requests with fewer than 32 queries", DECODE,
    ),
    "lists": (
        "block_sparse_attention", (Q, Q, Q, *LISTS), {"block_q": 64, "block_k": 64},
        f"{SPARSE}/kernel_sm90", SPARSE,
    ),
    "linear": ("linear_attention", (WIDE, WIDE, WIDE), {}, f"{LINEAR}/kernel_sm90", LINEAR),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_each_table_answers_for_each_chip(name):
    op, args, options, on_90, on_others = CALLS[name]
    for device in ("sm_90", "sm_90a", "9.0"):
        assert tm.explain(op, *args, device=device, **options).kernel == f"{on_90}, float16"
    for device, capability in OTHER_CHIPS.items():
        answer = tm.explain(op, *args, device=device, **options)
        assert answer.kernel == f"{on_others}, float16" and answer.backend == "cuda"
        assert all(
            why[0] == f"device: must be sm_90; got sm_{capability}"
            for why in answer.against.values()
        )
        assert answer.against and not answer.knobs


def test_all_rules_that_a_call_breaks_are_listed():
    wide = draw(1, 20, 2, 80, dtype=torch.float32)
    answer = tm.explain("attention", wide, wide, wide, kind="relu", device="sm_90")
    assert answer.kernel == f"{DENSE}, float32"
    assert answer.against == {
        f"{DENSE}/kernel_sm90": [
            "q: must be float16 or bfloat16; got float32",
            "q: must have head_dim 64, 96, 128, 192 or 256; got 80",
            "kind: must be 'softmax' or 'sigmoid'; got relu",
            "q: must have 32 tokens for each sequence; got 20",
        ]
    }
    assert f"not {DENSE}/kernel_sm90: q: must be float16 or bfloat16; got float32; q: " in str(
        answer
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale": -1.0}, "scale: must be 2^-126 or more in float32; got -1.0"),
        ({"scale": 1e-46}, "scale: must be 2^-126 or more in float32; got 1e-46"),
        ({"softcap": 3e38}, "softcap: must be below 1e38 and at most 2^64 scale; got 3e+38"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes: must be None; got a tensor"),
        (
            {"kind": "sigmoid", "normalize": "sum"},
            "normalize: must be 'none'; got sum",
        ),
    ],
)
def test_values_are_shown_as_they_were_given(options, reason):
    answer = tm.explain("attention", Q, Q, Q, device="9.0", **options)
    assert answer.against == {f"{DENSE}/kernel_sm90": [reason]}


def test_layouts_are_known():
    padded = torch.empty(1, 64, 2, 68, dtype=Q.dtype)[..., :64]
    shifted = torch.empty(Q.numel() + 1, dtype=Q.dtype)[1:].view(Q.shape)
    strides = "must have strides that are multiples of 8, of 64 or more; got (8704, 136, 68, 1)"
    start = "must start at a multiple of 16 bytes; got 2 bytes past one"
    for args, options, reason in (
        ((Q, Q, padded), {}, f"v: {strides}"),
        ((shifted, Q, Q), {}, f"q: {start}"),
        ((Q, Q, Q), {"out": padded}, f"out: {strides}"),
        ((Q, Q, Q), {"out": shifted}, f"out: {start}"),
    ):
        answer = tm.explain("attention", *args, device="sm_90", **options)
        assert answer.against == {f"{DENSE}/kernel_sm90": [reason]}


def test_a_call_that_needs_a_gradient_has_two_kernels():
    q = Q.clone().requires_grad_()
    answer = tm.explain("attention", q, Q, Q, device="sm_90")
    assert answer.kernel == f"{DENSE}/kernel_sm90 and kernel_backward_sm90, float16"
    assert not answer.against
    bias = torch.zeros(2, requires_grad=True)
    answer = tm.explain(
        "attention", Q, Q, Q, kind="sigmoid", score_bias=bias, softcap=3.0, device="sm_90"
    )
    assert answer.kernel == f"{DENSE}/kernel_sm90 and {DENSE}'s backward, float16"
    reason = "score_bias: must not require a gradient with a softcap; got a tensor that does"
    assert answer.against == {f"{DENSE}/kernel_backward_sm90": [reason]}
    assert tm.explain("attention", q, Q, Q, device="sm_80").kernel == f"{DENSE}, float16"


def test_knobs_count():
    names = ["attention.sm90", "attention.sm90_section", "attention.sm90_grid"]
    assert [*tm.explain("attention", Q, Q, Q, device="sm_90").knobs] == names
    with _knobs.override(attention__sm90=0):
        answer = tm.explain("attention", Q, Q, Q, device="sm_90")
    assert answer.kernel == f"{DENSE}, float16"
    assert answer.against == {f"{DENSE}/kernel_sm90": ["attention.sm90: must be 1; got 0"]}
    assert answer.knobs == {"attention.sm90": "0 (tuned; standard 1)"}
    many = draw(1, 32, 256, 64)
    few = many[:, :, :4]
    keys, options = draw(1, 64, 1, 64), {"seqlens_k": lengths(50), "device": "sm_90"}
    answer = tm.explain("attention_decode", many, keys, keys, **options)
    assert answer.kernel == f"{DENSE}/kernel_sm90, float16"
    answer = tm.explain("attention_decode", few, keys, keys, **options)
    assert answer.kernel == f"{DECODE}, float16"
    assert answer.against == {
        f"{DENSE}/kernel_sm90": ["q: must have 256 tiles of 64 rows; got 4"],
        f"{DECODE}/kernel_sm90": [
            "q: must have at most 64 queries times heads of a KV head, or what the forward asks; "
            "got 128"
        ],
    }
    assert [*answer.knobs] == ["attention_decode.sm90_tiles"]


def test_tensors_need_no_memory():
    q = torch.empty(64, 2, 64, dtype=torch.float16, device="meta")
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    for end, kernel in ((ends, f"{DENSE}/kernel_sm90"), (torch.empty_like(ends[:0]), None)):
        options = {"cu_seqlens_q": end, "cu_seqlens_k": end, "device": "sm_90"}
        answer = tm.explain("attention", q, q, q, **options)
        if kernel:
            assert answer.kernel == f"{kernel}, float16"
        else:
            assert "must have 1 dimension of at least 1 element" in answer.error
    short = {"cu_seqlens_q": torch.empty(4, dtype=torch.int32, device="meta")}
    short["cu_seqlens_k"] = short["cu_seqlens_q"]
    answer = tm.explain("attention", q, q, q, device="sm_90", **short)
    assert answer.against == {
        f"{DENSE}/kernel_sm90": ["q: must have 32 tokens for each sequence; got 64"]
    }


@pytest.mark.parametrize("op", registry.ops())
def test_each_sample_has_a_kernel(op):
    spec = registry.get(op)
    # Without its correction the delta rule is linear attention with decays per channel.
    others = {"linear_attention": ("delta_attention",)}.get(op, ())
    folders = tuple(f"csrc/{spec.family}/{name}, " for name in (op, *others))
    for sample in spec.samples:
        args, kwargs = sample.make(torch.float16, torch.Generator().manual_seed(0))
        answer = tm.explain(op, *args, device="sm_120", **kwargs)
        if choose.unsupported(spec, "cuda", spec.lower(*args, **kwargs)):
            assert "'cuda' cannot run this call" in answer.error
        else:
            assert answer.kernel.startswith(folders), sample.name
            assert answer.backend == "cuda" and not answer.knobs


def test_calls_that_cuda_does_not_run_are_errors():
    q = Q.double()
    answer = tm.explain("attention", q, q, q, device="sm_90")
    assert answer.backend is None
    assert answer.error == (
        "tokenmill.attention: backend: 'cuda' cannot run this call: "
        "float64 runs only on the reference backend"
    )
    answer = tm.explain("attention", Q, Q[..., :32], Q, device="sm_90")
    assert "k: must have the head dimension of q, 64; got 32" in answer.error


@pytest.mark.parametrize("device", ["cuda", "sm_75", "sm90", "9", "sm_", "", 90])
def test_unknown_chips_are_refused(device):
    rule = "tokenmill.explain: device: must be a chip of compute capability 8.0 or later, as "
    with pytest.raises(ValueError, match=rule):
        tm.explain("attention", Q, Q, Q, device=device)


def test_a_chip_has_no_other_backend():
    with pytest.raises(ValueError, match="backend: must be 'cuda' or None with a device; got"):
        tm.explain("attention", Q, Q, Q, device="sm_90", backend="cpu")


def test_the_command_answers_for_a_chip(capsys):
    assert main(["explain", "attention", "--dtype", "float16", "--chip", "sm_90"]) == 0
    assert f"cuda ({DENSE}" in capsys.readouterr().out
    assert main(["explain", "attention", "--chip", "sm_12"]) == 2
    assert "device: must be a chip of compute capability 8.0 or later" in capsys.readouterr().err
