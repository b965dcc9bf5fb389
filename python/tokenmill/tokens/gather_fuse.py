"""gather_fuse: the kept tokens, and one fused token for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..check import as_int, check, check_bool, check_tensor
from ..dispatch import call
from ..edits import set_argument, set_options
from ..library import TorchOp, register
from ..lowering import widen
from ..reference.tokens import gather_fuse as reference
from ..registry import Malformed, OpSpec, Sample, register_op
from .moving import as_int32, contiguous_rows
from .rules import check_index_values, check_indices, check_like, check_out, check_tokens

OP = "gather_fuse"
BACKWARD_OP = OP + "_backward"


def gather_fuse(
    x: Tensor,
    keep: Tensor,
    rest: Tensor,
    weight: Tensor,
    *,
    prefix: int = 1,
    normalize: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Gathers the prefix tokens and the patches to keep, and fuses the rest into one token.

    With x = [prefix tokens; patches] the result is :math:`[prefix;\ x_{keep};\ f]` with
    :math:`f = \sum_{j \in rest} w_j x_j`, as a token reorganisation after an attention layer has
    it, in one pass. Kept rows are copied bit by bit; f is summed in float32.

    Args:
        x: ``[B, prefix + N, C]``, float16, bfloat16 or float32 (float64 on the reference), any
            strides with a contiguous last dimension.
        keep: ``[B, K]`` int32 or int64, patches 0 to N - 1 (patch j is token prefix + j); -1 gives
            a row of zeros.
        rest: ``[B, R]`` int32 or int64, the patches that f sums; -1 is left out. keep and rest
            together name no patch twice; what neither names is dropped.
        weight: ``[B, N]``, any float, computed with in float32.
        prefix: tokens in front (the class token) that are always kept.
        normalize: divide f by the sum of its weights, and let f be 0 where that is 0. False as in
            EViT, whose fused token is a sum.
        out: where to write the result: shape and dtype as returned, any strides with a contiguous
            last dimension, each element at an address of its own and none in another argument
            (parts of one tensor are apart). Needs no_grad or arguments without gradient.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        ``[B, prefix + K + 1, C]`` in the dtype of x. Differentiable in x and weight. Without
        patches in rest the last row is 0.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU an index out of range counts as -1,
            and of a patch named twice the last place (in keep, then rest) has the gradient.

    Complexity: reads (prefix + K + R)·C elements and writes (prefix + K + 1)·C for each sequence.

    Paper: EViT (Liang et al. 2022), section 3.2.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.tensor([[[9.0], [1.0], [2.0], [3.0]]])
        >>> weight = torch.tensor([[0.5, 0.25, 0.25]])
        >>> keep, rest = torch.tensor([[2]]), torch.tensor([[0, 1]])
        >>> tm.gather_fuse(x, keep, rest, weight).flatten().tolist()
        [9.0, 3.0, 1.0]
        >>> float(tm.gather_fuse(x, keep, rest, weight, normalize=True)[0, -1])
        1.3333333730697632
    """
    check_tensor(OP, "out", out, optional=True)
    lowered = lower(x, keep, rest, weight, prefix=prefix, normalize=normalize)
    result: Tensor = call(SPEC, lowered, backend, out)[0]
    return result


def lower(
    x: Tensor,
    keep: Tensor,
    rest: Tensor,
    weight: Tensor,
    *,
    prefix: int = 1,
    normalize: bool = False,
) -> tuple[Any, ...]:
    for name, t in (("x", x), ("keep", keep), ("rest", rest), ("weight", weight)):
        check_tensor(OP, name, t)
    prefix = as_int(OP, "prefix", prefix)
    check_bool(OP, "normalize", normalize)
    return x, as_int32(keep), as_int32(rest), widen(weight, x), prefix, normalize


# csrc/tokens/gather_fuse/host.cpp has the same rules in the same order and words.
def _check(
    x: Tensor,
    keep: Tensor,
    rest: Tensor,
    weight: Tensor,
    prefix: int,
    normalize: bool,
    *,
    float64: bool = False,
) -> None:
    check_tokens(OP, "x", x, float64=float64)
    batch, tokens = x.shape[:2]
    rule = f"must be 0 to the number of tokens, {tokens}"
    check(0 <= prefix <= tokens, OP, "prefix", rule, prefix)
    check_indices(OP, "keep", keep, batch, "x", x)
    check_indices(OP, "rest", rest, batch, "x", x)
    wide = torch.promote_types(x.dtype, torch.float32)
    check_like(OP, "weight", weight, [batch, tokens - prefix], wide, "x", x)


def _check_out(*arguments: Any, float64: bool = False) -> None:
    *lowered, out = arguments
    _check(*lowered, float64=float64)
    x, keep, rest, weight, prefix, _ = lowered
    shape = [x.shape[0], prefix + keep.shape[1] + 1, x.shape[2]]
    check_out(OP, out, shape, {"x": x, "keep": keep, "rest": rest, "weight": weight})


def _check_values(
    x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor, prefix: int, normalize: bool
) -> None:
    patches = x.shape[1] - prefix
    check_index_values(OP, "keep", keep, patches)
    check_index_values(OP, "rest", rest, patches)
    check_index_values(OP, "rest", torch.cat((keep, rest), 1), patches, repeats=False)


def _fake(
    x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor, prefix: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    out = x.new_empty((batch, prefix + keep.shape[1] + 1, channels))
    return out, x.new_empty((batch,), dtype=torch.float32)


def _check_backward(
    dout: Tensor,
    out: Tensor,
    weight_sum: Tensor,
    x: Tensor,
    keep: Tensor,
    rest: Tensor,
    weight: Tensor,
    prefix: int,
    normalize: bool,
) -> None:
    _check(x, keep, rest, weight, prefix, normalize)
    batch, _, channels = x.shape
    wanted = [batch, prefix + keep.shape[1] + 1, channels]
    check_like(OP, "dout", dout, wanted, x.dtype, "x", x)
    check_like(OP, "out", out, wanted, x.dtype, "x", x)
    check_like(OP, "weight_sum", weight_sum, [batch], torch.float32, "x", x)


def _fake_backward(
    dout: Tensor,
    out: Tensor,
    weight_sum: Tensor,
    x: Tensor,
    keep: Tensor,
    rest: Tensor,
    weight: Tensor,
    prefix: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, keep, rest, weight, prefix, normalize = inputs
    ctx.save_for_backward(*output, x, keep, rest, weight)
    ctx.prefix, ctx.normalize = prefix, normalize
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ops: Any, ctx: Any, dout: Tensor | None, _: Any) -> tuple[Any, ...]:
    out, weight_sum, x, keep, rest, weight = ctx.saved_tensors
    if dout is None:
        return None, None, None, None, None, None
    dx, dweight = ops.gather_fuse_backward(
        contiguous_rows(dout), out, weight_sum, x, keep, rest, weight, ctx.prefix, ctx.normalize
    )
    return dx, None, None, dweight, None, None


def _sample(shape: tuple[int, int, int], kept: int, dropped: int = 0, **options: Any) -> Any:
    """Of the patches the first in a random order are kept and the last are dropped."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        change = options.get("change")
        given = {name: value for name, value in options.items() if name != "change"}
        batch, tokens, _ = shape
        patches = tokens - int(given.get("prefix", 1))
        x = torch.randn(shape, generator=g).to(dtype)
        order = torch.rand(batch, patches, generator=g).argsort(1)
        keep, rest = order[:, :kept].int(), order[:, kept : patches - dropped].int()
        weight = torch.rand(batch, patches, generator=g)
        args = (x, keep, rest, weight.to(torch.promote_types(dtype, torch.float32)))
        return change(*args) if change else args, given

    return make


def _holes(x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """int64, entries of -1, and a sequence whose weights add up to 0."""
    keep, rest, weight = keep.long(), rest.long(), weight.clone()
    keep[0, 1] = rest[0, 2] = -1
    weight[1] = 0
    return x, keep, rest, weight


def _strided(x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x[..., 5:], keep, rest, weight[:, None].expand(-1, 2, -1)[:, 1].to(x.dtype)


FORWARD = register(
    TorchOp(
        OP,
        check=_check,
        fake=_fake,
        check_values=_check_values,
        triton="tokens.gather_fuse:gather_fuse",
        backward=_backward,
        setup_context=_setup_context,
    )
)
OUT = register(
    TorchOp(
        OP + "_out",
        check=_check_out,
        fake=lambda x, *others: x.new_empty(x.shape[:1], dtype=torch.float32),
        triton="tokens.gather_fuse:gather_fuse_out",
    )
)
BACKWARD = register(
    TorchOp(
        BACKWARD_OP,
        check=_check_backward,
        fake=_fake_backward,
        triton="tokens.gather_fuse:gather_fuse_backward",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="tokens",
        function=gather_fuse,
        lower=lower,
        reference=reference.gather_fuse,
        plain=reference.gather_fuse,
        forward=FORWARD,
        backward=BACKWARD,
        out=OUT,
        samples=(
            Sample("sum", _sample((2, 14, 24), 7)),
            Sample("normalized", _sample((2, 18, 16), 5, 3, normalize=True)),
            Sample("holes, no prefix", _sample((3, 13, 5), 4, prefix=0, change=_holes)),
            Sample(
                "zero weights",
                _sample((2, 12, 8), 3, prefix=2, normalize=True, change=_holes),
            ),
            Sample("strided, many rows", _sample((1, 151, 13), 9, change=_strided)),
            Sample("all kept", _sample((2, 6, 8), 5)),
            Sample("no patches", _sample((2, 1, 8), 0, normalize=True)),
        ),
        malformed=(
            Malformed(
                "rank",
                "x: must have 3 dimensions [B, N, C]; got 2",
                set_argument(0, lambda t: t[0]),
            ),
            Malformed(
                "dtype",
                "x: must be float16, bfloat16 or float32; got int32",
                set_argument(0, lambda t: t.int()),
            ),
            Malformed(
                "prefix",
                "prefix: must be 0 to the number of tokens, 14; got 15",
                set_options(prefix=15),
            ),
            Malformed(
                "batch of keep",
                "keep: must have shape [2, K]; got [1, 7]",
                set_argument(1, lambda t: t[:1]),
            ),
            Malformed(
                "dtype of rest",
                "rest: must be int32; got int16",
                set_argument(2, lambda t: t.short()),
            ),
            Malformed(
                "shape of weight",
                "weight: must have shape [2, 13]; got [2, 12]",
                set_argument(3, lambda t: t[:, 1:]),
            ),
            Malformed(
                "dtype of weight",
                "weight: must be float32; got int64",
                set_argument(3, lambda t: t.long()),
            ),
            Malformed(
                "shape of out",
                "out: must have shape [2, 9, 24]; got [2, 8, 24]",
                set_options(out=torch.zeros(2, 8, 24)),
            ),
            Malformed(
                "expanded out",
                "out: must have each element at an address of its own; strides; got [0, 24, 1]",
                set_options(out=torch.zeros(9, 24).expand(2, 9, 24)),
            ),
            Malformed(
                "out over x",
                "out: must not share memory with x; strides; got [336, 24, 1]",
                lambda a, k: k.update(out=a[0][:, 5:]),
            ),
            Malformed(
                "beyond the end",
                "keep: must be -1 to 12; got 13",
                set_argument(1, lambda t: torch.full_like(t, 13)),
                values=True,
            ),
            Malformed(
                "in both",
                "rest: must not name a token twice; got 3",
                lambda a, k: (
                    a.__setitem__(1, torch.tensor([[3], [4]])),
                    a.__setitem__(2, torch.tensor([[3], [5]])),
                )[0],
                values=True,
            ),
        ),
        differentiable=("x", "weight"),
        paper="EViT (Liang et al. 2022)",
        flops=lambda x, keep, rest, *others: 2.0 * rest.numel() * x.shape[2],
    )
)
