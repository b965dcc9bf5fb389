"""best_match: for each row of one set, the row of another with the largest product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import Autocast
from ..check import check, check_bool, check_device_of, check_tensor, fail, show
from ..dispatch import call
from ..edits import set_argument, set_options
from ..library import TorchOp, register
from ..reference.tokens import best_match as reference
from ..registry import Malformed, OpSpec, Sample, register_op
from .rules import check_tokens

OP = "best_match"
MAX_CHANNELS = 4096


def best_match(
    a: Tensor, b: Tensor, *, normalize: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""For each row of a, the row of b with the largest product:

    .. math::
       \mathrm{index}_i = \operatorname{argmax}_j \, a_i \cdot b_j, \qquad
       \mathrm{score}_i = \max_j \, a_i \cdot b_j

    Ties go to the first row. The matrix of all products is never in memory. A product that is
    NaN counts as -inf; a row whose products all do has index 0 and score -inf.

    Args:
        a: ``[B, Na, C]`` float16, bfloat16 or float32 (float64 on the reference), any strides with
            a contiguous last dimension (``metric[:, ::2]``), C up to 4096.
        b: ``[B, Nb, C]`` in the dtype of a.
        normalize: the product of the rows divided by their Euclidean norms, as float32 has them: of
            a row whose norm is 0 every product is 0, of one whose norm is not finite NaN.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (index, score): int32 ``[B, Na]``, and float32 ``[B, Na]`` (float64 on the reference). With
        Nb = 0 they are -1 and -inf. Not differentiable. Sums are float32; where the two greatest
        products of a row differ by no more than the rounding of their sums, backends may differ.
        On a GPU the product of an infinity is NaN in float32, whose products are sums of three.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 Na Nb C operations for each sequence; reads a once and b, on a CPU, once for a few
    hundred rows of a. Extra memory does not depend on Na Nb.

    Paper: ToMe (Bolya et al. 2023), section 3.

    Example:
        >>> import torch, tokenmill as tm
        >>> metric = torch.randn(2, 197, 64)
        >>> index, score = tm.best_match(metric[:, ::2], metric[:, 1::2], normalize=True)
        >>> index.shape, bool((score.abs() <= 1.00001).all())
        (torch.Size([2, 99]), True)
    """
    index, score = call(SPEC, lower(a, b, normalize=normalize), backend)
    return index, score


def lower(a: Tensor, b: Tensor, *, normalize: bool = False) -> tuple[Any, ...]:
    check_tensor(OP, "a", a)
    check_tensor(OP, "b", b)
    check_bool(OP, "normalize", normalize)
    return a, b, normalize


# csrc/tokens/best_match/host.cpp has the same rules in the same order and words.
def _check(a: Tensor, b: Tensor, normalize: bool, *, float64: bool = False) -> None:
    check_tokens(OP, "a", a, float64=float64)
    check_tokens(OP, "b", b, float64=float64)
    if b.dtype != a.dtype:
        fail(OP, "b", f"must have the dtype of a, {show(a.dtype)}", b.dtype)
    check_device_of(OP, "b", b, "a", a)
    batch, _, channels = a.shape
    rule = f"must have 1 to {MAX_CHANNELS} channels"
    check(1 <= channels <= MAX_CHANNELS, OP, "a", rule, channels)
    if b.shape[0] != batch:
        fail(OP, "b", f"must have the batch size of a, {batch}", b.shape[0])
    if b.shape[2] != channels:
        fail(OP, "b", f"must have the channels of a, {channels}", b.shape[2])


def _fake(a: Tensor, b: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    shape = a.shape[:2]
    return a.new_empty(shape, dtype=torch.int32), a.new_empty(shape, dtype=torch.float32)


def _plain(a: Tensor, b: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    if normalize:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    return reference.best_products(a @ b.transpose(1, 2))


def _flops(a: Tensor, b: Tensor, normalize: bool) -> float:
    return 2.0 * a.numel() * b.shape[1]


def _whole_numbers(batch: int, rows: int, partners: int, channels: int) -> Any:
    """Small ones, exact in every dtype and in tf32: many products are equal."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a, b = (
            torch.randint(-2, 3, (batch, n, channels), generator=g).to(dtype)
            for n in (rows, partners)
        )
        return (a, b), {}

    return make


def _separate(batch: int, rows: int, partners: int, channels: int, change: Any = None) -> Any:
    """Rows of b are unlike each other, and each row of a is nearly one of them at another length.
    Both are views of one tensor."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        signs = torch.randint(0, 2, (batch, partners, channels), generator=g) * 2.0 - 1
        signs[:, :, :partners] += 2 * torch.eye(partners, min(partners, channels))
        own = torch.randint(0, partners, (batch, rows), generator=g)
        lengths = torch.rand(batch, max(rows, partners), 1, generator=g) + 0.5
        near = signs.gather(1, own[..., None].expand(-1, -1, channels))
        near = near + 0.1 * torch.randn(near.shape, generator=g)
        tokens = torch.zeros(batch, 2 * max(rows, partners), channels)
        tokens[:, : 2 * rows : 2] = near * lengths[:, :rows]
        tokens[:, 1 : 2 * partners : 2] = signs * lengths[:, :partners]
        if change:
            change(tokens)
        tokens = tokens.to(dtype)
        return (tokens[:, : 2 * rows : 2], tokens[:, 1 : 2 * partners : 2]), {"normalize": True}

    return make


def _hostile(tokens: Tensor) -> None:
    """Of a: rows of zeros, NaN and inf. Of b the same, and further a row of inf."""
    tokens[0, 2:4] = 0
    tokens[0, 6:8] = torch.nan
    tokens[0, 10, 1] = torch.inf
    tokens[0, 13, 2] = -torch.inf


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(promote=("a", "b")),
        check=_check,
        fake=_fake,
        triton="tokens.best_match:best_match",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="tokens",
        function=best_match,
        lower=lower,
        reference=reference.best_match,
        plain=_plain,
        forward=FORWARD,
        backward=None,
        samples=(
            Sample("ties", _whole_numbers(2, 37, 70, 12)),
            Sample("normalized", _separate(2, 21, 25, 40)),
            Sample("not finite", _separate(1, 9, 12, 33, _hostile)),
            Sample("one channel", _whole_numbers(2, 5, 3, 1)),
            Sample("many channels", _whole_numbers(1, 3, 67, 301)),
            Sample("no partners", _whole_numbers(2, 3, 0, 8)),
            Sample("no rows", _whole_numbers(2, 0, 3, 8)),
        ),
        # Edits of the first sample.
        malformed=(
            Malformed("rank", "a: must have 3 dimensions [B, N, C]; got 2",
                      set_argument(0, lambda t: t[0])),
            Malformed("dtype", "a: must be float16, bfloat16 or float32; got int32",
                      set_argument(0, torch.Tensor.int)),
            Malformed("layout", "b: must have a contiguous last dimension",
                      set_argument(1, lambda t: t.mT.contiguous().mT)),
            Malformed("other dtype", "b: must have the dtype of a, float32; got float16",
                      set_argument(1, torch.Tensor.half)),
            Malformed("no channels", "a: must have 1 to 4096 channels; got 0",
                      set_argument(0, lambda t: t[:, :, :0])),
            Malformed("batch", "b: must have the batch size of a, 2; got 1",
                      set_argument(1, lambda t: t[:1])),
            Malformed("channels", "b: must have the channels of a, 12; got 11",
                      set_argument(1, lambda t: t[:, :, 1:])),
            Malformed("normalize", "normalize: must be a bool; got 1",
                      set_options(normalize=1)),
        ),
        differentiable=(),
        paper="ToMe (Bolya et al. 2023)",
        flops=_flops,
    )
)  # fmt: skip
