"""Shared device code of the attention kernels: addressing, masks, scores and weights.

Prefixes in kernels: p_ pointers, b_ tiles of values, i_ indices, o_ offsets, m_ masks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._call.library import triton_interpreted


def _accept_none() -> None:
    """None in tuples for Triton 3.6, which torch 2.10 and 2.11 require. Its compiler makes tensors
    of the members of a tuple that a device function returns, and types of the members of every new
    tuple, and has neither for None. Later versions keep None."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    from triton.language import core, semantic

    to_tensor, type_of = semantic.TritonSemantic.to_tensor, core._type_for_tuple_values

    def to_tensor_or_none(self: Any, x: Any, check_type: bool = True) -> Any:
        none = x is None or (isinstance(x, core.constexpr) and x.value is None)
        return x if none else to_tensor(self, x, check_type)

    def type_with_none(values: Any, fields: Any = None) -> Any:
        return type_of([core.constexpr(x) if x is None else x for x in values], fields)

    semantic.TritonSemantic.to_tensor = to_tensor_or_none
    core._type_for_tuple_values = type_with_none


_accept_none()

# True if @triton.jit made interpreted kernels when this module was imported.
INTERPRETED = tl.constexpr(triton_interpreted())
LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
SOFTMAX = tl.constexpr("softmax")  # defaults; Triton 3.6 takes no plain string as a default
NONE = tl.constexpr("none")
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
# A float32 of this magnitude or above rounds to inf as a tf32 operand of tl.dot.
TF32_INF = tl.constexpr(2.0**128 - 2.0**116)
X_BITS = tl.constexpr(15)  # maps have at most 2^15 pixels along Y and X
X_MASK = tl.constexpr(2**15 - 1)
# Tile of the recomputation pass: keys per step and value columns. Small, to save registers.
STEP = tl.constexpr(16)
STEP_COLUMNS = tl.constexpr(32)

# Registers per thread for kernels that recompute NaN rows: ptxas may choose fewer, and spill.
MAX_REGISTERS = 255


class Rows(NamedTuple):
    """[B, S, H, D] with a contiguous last dimension; strides in elements. Packed sequences are
    concatenated along seq, with batch = 0. For a map [B, Y, X, H, D] the rows are pixels: seq is
    the step from x to x + 1, line the step from y to y + 1, and pixel (y, x) has row number y
    2^X_BITS + x."""

    data: Tensor
    batch: int
    seq: int
    head: int
    line: int | None = None


class Window(NamedTuple):
    """Sliding window: keys to the left and right of a query's own position; None: no limit."""

    left: int | None
    right: int | None


class Terms(NamedTuple):
    """Terms between q.k and the score map; None if a call does not have one.

    z is in bits (weight = 2^z). It is in nats if a bias or slope may bring z to the float32
    maximum, where multiplying by log2(e) would overflow, and for kinds whose weight is z itself or
    a power of it. scale is the softmax scale; factor, softcap and constant are in the unit of z:
    z = factor q.k or softcap tanh(factor q.k), plus constant.
    """

    scale: float
    factor: float
    softcap: float | None
    constant: float
    neg_log_n: int  # flag; an int, since the interpreter of Triton 3.6 takes no bool
    score_bias: Tensor | None  # [H] or [B, H]
    score_bias_batch: int
    slopes: Tensor | None  # [H] or [B, H]
    slopes_batch: int
    post_decay: int | None  # 1: slopes decay the weights and leave z unchanged
    chebyshev: int | None  # grid width, if slopes apply to Chebyshev distance
    manhattan: int | None
    grid_window: int | None
    bias: Tensor | None  # strides 0 where broadcast
    bias_batch: int
    bias_head: int
    bias_q: int
    bias_k: int


class CuSeqlens(NamedTuple):
    """Sequence bounds in packed tensors, [B + 1]; None: batched."""

    q: Tensor | None
    k: Tensor | None


class Lengths(NamedTuple):
    """Lengths of a call. A kernel takes them one by one, because Triton specializes kernels on the
    integers in a tuple, and passes them on together."""

    tokens_q: Any
    tokens_k: Any
    longest_q: Any
    longest_k: Any
    heads: Any
    group: Any  # query heads per KV head
    blocks: Any = None  # blocks of rows of a sequence


# Arguments excluded from specialization: a new length does not recompile.
LENGTHS = list(Lengths._fields)


class Choices(NamedTuple):
    """Compile-time choices of a kernel. Each is a tl.constexpr: Triton makes other members of a
    tuple run-time values."""

    KIND: Any
    NORMALIZE: Any
    FAST: Any
    RANGES: Any  # mask ranges per query
    PAGE_SIZE: Any
    HEAD_DIM: Any
    VALUE_DIM: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any
    BLOCK_V: Any


class Sequence(NamedTuple):
    """Token ranges of one sequence in the packed or batched tensors."""

    q_start: Any
    q_length: Any
    k_start: Any
    k_length: Any
    diagonal: Any  # position of query 0 among the keys


class Block(NamedTuple):
    """Rows first .. last of one head of one sequence, which starts at row start of the tensor."""

    i_b: Any
    i_h: Any
    first: Any
    last: Any
    start: Any


class Head(NamedTuple):
    """Score terms of one head of one sequence. Softmax is invariant to a term that all scores
    share: such a term is kept in shift, added to lse only, so that scores keep their precision."""

    constant: Any
    shift: Any  # nats
    slope: Any
    bias: Any  # offset
    log2e: Any  # bits per unit of z


class Slice(NamedTuple):
    """Rows of one head of one sequence."""

    data: Any
    seq: Any
    length: Any
    line: Any = None


@triton.jit
def program(blocks, heads):
    """Block, head and batch indices of this program."""
    i = tl.program_id(0)
    i_bh = i // blocks
    return i % blocks, i_bh % heads, (i_bh // heads).to(tl.int64)


@triton.jit
def span(cu_seqlens, tokens, longest, i_b):
    """Start and length of sequence i_b, clamped to the tensor."""
    start = tokens - tokens
    length = longest
    if cu_seqlens is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_b), 0), tokens)
        end = tl.maximum(tl.minimum(tl.load(cu_seqlens + i_b + 1), tokens), start)
        length = tl.minimum(end - start, longest)
    return start, length


@triton.jit
def sequence_of(cu_seqlens, lengths, i_b):
    q_start, q_length = span(cu_seqlens.q, lengths.tokens_q, lengths.longest_q, i_b)
    k_start, k_length = span(cu_seqlens.k, lengths.tokens_k, lengths.longest_k, i_b)
    return Sequence(q_start, q_length, k_start, k_length, k_length - q_length)


@triton.jit
def query_block(cu_seqlens, lengths, heads, BLOCK: tl.constexpr):
    """The block of queries of this program. Blocks are in reversed order: under a causal mask the
    last queries have most keys, so they start first."""
    i_block, i_h, i_b = program(lengths.blocks, heads)
    sequence = sequence_of(cu_seqlens, lengths, i_b)
    first = (lengths.blocks - 1 - i_block) * BLOCK
    last = tl.minimum(first + BLOCK, sequence.q_length) - 1
    return Block(i_b, i_h, first, last, sequence.q_start), sequence


@triton.jit
def key_block(cu_seqlens, lengths, heads, BLOCK: tl.constexpr):
    """The block of keys of this program."""
    i_block, i_h, i_b = program(lengths.blocks, heads)
    sequence = sequence_of(cu_seqlens, lengths, i_b)
    first = i_block * BLOCK
    last = tl.minimum(first + BLOCK, sequence.k_length) - 1
    return Block(i_b, i_h, first, last, sequence.k_start), sequence


@triton.jit
def head_of(terms, i_b, i_h, k_length, KIND: tl.constexpr = SOFTMAX):
    log2e = 1.0
    if terms.bias is not None or terms.slopes is not None:
        log2e = LOG2E
    if KIND != "softmax" and KIND != "sigmoid":
        log2e = LOG2E
    constant = terms.constant
    if terms.score_bias is not None:
        p_score_bias = terms.score_bias + i_b * terms.score_bias_batch + i_h
        constant += tl.load(p_score_bias) * (LOG2E / log2e)
    # Not a branch: constant may be a scalar while k_length has one value per row.
    constant -= terms.neg_log_n * (tl.log2(tl.maximum(k_length, 1).to(tl.float32)) / log2e)
    shift = 0.0
    # softmax: move the finite shared term from z to lse
    if KIND == "softmax":
        finite = tl.where(tl.abs(constant) <= FLOAT_MAX, constant, 0.0)
        constant -= finite
        shift = finite * (log2e / LOG2E)
    slope = 0.0
    if terms.slopes is not None:
        slope = tl.load(terms.slopes + i_b * terms.slopes_batch + i_h)
    bias = i_b * terms.bias_batch + tl.cast(i_h, tl.int64) * terms.bias_head
    return Head(constant, shift, slope, bias, log2e)


@triton.jit
def slice_of(rows, i_b, i_h, start, length):
    offset = (
        i_b * rows.batch + tl.cast(i_h, tl.int64) * rows.head + tl.cast(start, tl.int64) * rows.seq
    )
    return Slice(rows.data + offset, rows.seq, length, rows.line)


@triton.jit
def statistics_of(cu_seqlens, i_b, i_h, heads, tokens, start):
    """Row offset of a head of a sequence in statistics [B, H, S] or packed [H, T]."""
    i_row = tl.cast(i_h, tl.int64)
    if cu_seqlens is None:
        i_row += i_b * heads
    return i_row * tokens + start


@triton.jit
def row_offsets(rows, o_row):
    if rows.line is None:
        o_first = o_row.to(tl.int64) * rows.seq
    else:
        o_y = (o_row >> X_BITS).to(tl.int64)
        o_x = (o_row & X_MASK).to(tl.int64)
        o_first = o_y * rows.line + o_x * rows.seq
    return o_first


@triton.jit
def row_pointers(rows, i_b, o_i, o_h):
    """Pointers to rows o_i of heads o_h."""
    return rows.data + i_b * rows.batch + row_offsets(rows, o_i) + o_h.to(tl.int64) * rows.head


@triton.jit
def load_tile(p_row, m_row, DIM: tl.constexpr, BLOCK: tl.constexpr, first_col=0):
    """[rows, BLOCK] tile; masked rows and columns beyond DIM are 0."""
    o_col = first_col + tl.arange(0, BLOCK)
    m_tile = m_row[:, None] & (o_col < DIM)[None, :]
    return tl.load(p_row[:, None] + o_col[None, :], mask=m_tile, other=0.0)


@triton.jit
def load_rows(rows, o_row, DIM: tl.constexpr, BLOCK: tl.constexpr, first_col=0):
    """[rows, BLOCK] tile; rows beyond the sequence and columns beyond DIM are 0."""
    p_row = rows.data + row_offsets(rows, o_row)
    return load_tile(p_row, o_row < rows.length, DIM, BLOCK, first_col)


@triton.jit
def rounded(b_x, dtype: tl.constexpr):
    """b_x in dtype, rounded to nearest even; the interpreter would truncate a float32 to
    bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16 and b_x.dtype == tl.float32:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16 << 16
        b_x = tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)
    return b_x.to(dtype)


@triton.jit
def store_tile(p_row, m_row, b_x, DIM: tl.constexpr, first_col=0):
    o_col = first_col + tl.arange(0, b_x.shape[1])
    m_tile = m_row[:, None] & (o_col < DIM)[None, :]
    p_tile = p_row[:, None] + o_col[None, :]
    tl.store(p_tile, rounded(b_x, p_row.dtype.element_ty), mask=m_tile)


@triton.jit
def store_rows(rows, o_row, b_x, DIM: tl.constexpr):
    p_row = rows.data + row_offsets(rows, o_row)
    store_tile(p_row, o_row < rows.length, b_x, DIM)


@triton.jit
def visible_parts(first, last, diagonal, left, right, length, BLOCK: tl.constexpr):
    """Ends of three runs of whole column tiles that rows first..last see. Tiles of part 1 need no
    mask; parts 0 (empty without left) and 2 do. Row i sees columns i + diagonal - left to i +
    diagonal + right."""
    begin = 0
    full_begin = 0
    end = length
    full_end = length
    if right is not None:
        end = tl.maximum(tl.minimum(last + diagonal + right + 1, length), 0)
        full_end = tl.maximum(tl.minimum(first + diagonal + right + 1, length), 0)
    if left is not None:
        begin = tl.maximum(first + diagonal - left, 0) // BLOCK * BLOCK
        end = tl.maximum(end, begin)
        full_begin = tl.cdiv(tl.maximum(last + diagonal - left, 0), BLOCK) * BLOCK
        full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def lower_bound(p_list, b_begin, b_end, b_min, halvings):
    """Index of the first entry >= b_least among entries b_begin .. b_end - 1 of an ascending list,
    b_end if there is none; halvings: bit width of the maximum count."""
    b_low = b_begin
    b_high = b_end
    for _ in range(halvings):
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        m_below = tl.load(p_list + b_middle, mask=m_open, other=0) < b_min
        b_low = tl.where(m_open & m_below, b_middle + 1, b_low)
        b_high = tl.where(m_open & (m_below == 0), b_middle, b_high)
    return b_low


@triton.jit
def inside(o_i, o_j, sequence):
    return (o_i < sequence.q_length) & (o_j < sequence.k_length)


@triton.jit
def visible(o_i, o_j, sequence, window):
    m_tile = inside(o_i, o_j, sequence)
    if window.left is not None:
        m_tile = m_tile & (o_j >= o_i + (sequence.diagonal - window.left))
    if window.right is not None:
        m_tile = m_tile & (o_j <= o_i + (sequence.diagonal + window.right))
    return m_tile


@triton.jit
def dot(b_a, b_b):
    """b_a b_b with b_a rounded to the dtype of b_b and a float32 accumulator."""
    b_a = rounded(b_a, b_b.dtype)
    if INTERPRETED:  # the interpreter would multiply the raw bits of bfloat16 operands
        b_product = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    elif b_b.dtype == tl.float32:  # plain tf32 would round operands to 11 bits
        b_product = tl.dot(b_a, b_b, input_precision="tf32x3")
    else:
        b_product = tl.dot(b_a, b_b, input_precision="ieee")
    return b_product


@triton.jit
def rows_of_nan(b_x):
    """Rows whose sum is NaN, including rows that hold infinities of both signs."""
    b_sum = tl.sum(b_x, 1)
    return b_sum != b_sum


@triton.jit
def split_values(b_v, m_seen):
    """Splits values [up to 1024, N] for a product P V: V with non-finite entries set to 0, and the
    contribution of those entries to each row that sees them. A zero weight does not mask an entry:
    0 * inf = NaN."""
    b_wide = b_v.to(tl.float32)
    m_finite = tl.abs(b_wide) < TF32_INF
    # Count +inf, -inf and NaN in one product, as base-2^11 digits, exact in any dtype.
    b_digit = tl.where(b_wide <= -TF32_INF, 1.0, 2.0**11)
    b_digit = tl.where(b_wide >= TF32_INF, 2.0**-11, b_digit)
    b_digit = tl.where(m_finite, 0.0, b_digit).to(b_v.dtype)
    b_count = dot(tl.where(m_seen, 1.0, 0.0), b_digit)
    b_rest = tl.where(b_count > tl.floor(b_count), INF, 0.0) + tl.where(b_count >= 1.0, -INF, 0.0)
    b_rest = tl.where(b_count >= 2.0**11, float("nan"), b_rest)
    return tl.where(m_finite, b_v, 0.0).to(b_v.dtype), b_rest


@triton.jit
def tanh(b_x):
    """tanh with relative error below 3e-7: an odd polynomial near 0, where 1 - 2 / (1 + e^2x)
    cancels."""
    b_u = b_x * b_x
    b_p = -0.005852168625 * b_u + 0.02075362886
    b_p = b_p * b_u - 0.0537687047
    b_p = b_p * b_u + 0.1333168896
    b_p = b_p * b_u - 0.3333328326
    b_p = b_p * b_u + 0.9999999975
    return tl.where(b_u < 0.36, b_p * b_x, 1.0 - 2.0 / (1.0 + tl.exp2(b_x * (2 * LOG2E))))


@triton.jit
def distance(o_i, o_j, terms, sequence):
    if terms.chebyshev is not None:
        b_dy = tl.abs(o_i // terms.chebyshev - o_j // terms.chebyshev)
        b_dx = tl.abs(o_i % terms.chebyshev - o_j % terms.chebyshev)
        b_distance = tl.maximum(b_dy, b_dx)
    elif terms.manhattan is not None:
        b_dy = tl.abs(o_i // terms.manhattan - o_j // terms.manhattan)
        b_distance = b_dy + tl.abs(o_i % terms.manhattan - o_j % terms.manhattan)
    else:
        b_distance = tl.abs(o_i + sequence.diagonal - o_j)
    return b_distance.to(tl.float32)


@triton.jit
def scores(b_qk, o_i, o_j, terms, head, sequence):
    """Scores z of queries o_i and keys o_j, which broadcast to the shape of b_qk."""
    # z = factor Q K^T, softcapped: softcap tanh(factor Q K^T)
    b_z = b_qk * terms.factor
    if terms.softcap is not None:
        b_z = tanh(b_z) * terms.softcap
    if terms.bias is not None:
        o_bias = o_i.to(tl.int64) * terms.bias_q + o_j.to(tl.int64) * terms.bias_k
        m_bias = inside(o_i, o_j, sequence)
        b_z += tl.load(terms.bias + head.bias + o_bias, mask=m_bias, other=0.0).to(tl.float32)
        # Clamp +inf to the largest finite score; NaN fails the comparison and passes.
        b_z = tl.where(b_z > FLOAT_MAX, FLOAT_MAX, b_z)
    # z -= slope |i - j|
    if terms.slopes is not None and terms.post_decay is None:
        b_distance = distance(o_i, o_j, terms, sequence)
        b_z -= head.slope * b_distance
        if terms.grid_window is not None:
            b_z = tl.where(b_distance > terms.grid_window, -INF, b_z)
    return b_z + head.constant


@triton.jit
def fade_of(o_i, o_j, terms, head, sequence):
    """Decay applied to softmax weights after the row sum, or None."""
    b_fade = None
    if terms.post_decay is not None:
        b_distance = distance(o_i, o_j, terms, sequence)
        b_fade = tl.exp2(b_distance * (head.slope * -LOG2E))
        if terms.grid_window is not None:
            b_fade = tl.where(b_distance > terms.grid_window, 0.0, b_fade)
    return b_fade


FAR = 2**30  # exceeds any sequence: sums of positions and window ends fit in 32 bits


def window_of(left: int, right: int) -> Window:
    return Window(*(None if w < 0 else min(w, FAR) for w in (left, right)))


def terms_of(
    scale: float,
    softcap: float,
    score_bias_value: float,
    score_bias_neg_log_n: bool,
    score_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None = None,
    kind: str = "softmax",
    grid_width: int = 0,
    grid_distance: str = "chebyshev",
    grid_window: int = -1,
    post_decay: bool = False,
) -> Terms:
    nats = bias is not None or alibi_slopes is not None or kind not in ("softmax", "sigmoid")
    unit = 1.0 if nats else LOG2E.value
    return Terms(
        scale,
        scale / softcap if softcap else scale * unit,
        softcap * unit if softcap else None,
        score_bias_value * unit,
        int(score_bias_neg_log_n),
        score_bias,
        _batch_stride(score_bias),
        alibi_slopes,
        _batch_stride(alibi_slopes),
        1 if post_decay else None,
        grid_width if grid_width > 0 and grid_distance == "chebyshev" else None,
        grid_width if grid_width > 0 and grid_distance == "manhattan" else None,
        grid_window if grid_width > 0 and grid_window >= 0 else None,
        bias,
        *_broadcast_strides(bias),
    )


def _batch_stride(t: Tensor | None) -> int:
    """Batch stride of [H] (0) or [B, H]."""
    return t.stride(0) if t is not None and t.dim() == 2 else 0


def _broadcast_strides(t: Tensor | None) -> tuple[int, ...]:
    if t is None:
        return 0, 0, 0, 0
    return tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))


def choices_of(**choices: Any) -> Choices:
    return Choices(**{name: tl.constexpr(value) for name, value in choices.items()})


def architecture(t: Tensor) -> int:
    """Compute capability of the tensor's device, 80 for 8.0."""
    with torch.cuda.device_of(t):
        return int(triton.runtime.driver.active.get_current_target().arch)


def launch(kernel: Any, programs: int, anchor: Tensor, *args: Any, **options: Any) -> None:
    """Launches on the device of anchor. Fused multiply-add is on explicitly, because Triton's
    default varies by version."""
    if programs > 0:
        with torch.cuda.device_of(anchor):
            kernel[(programs,)](*args, **options, enable_fp_fusion=True)
