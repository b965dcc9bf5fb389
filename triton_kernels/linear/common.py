"""What the kernels of linear attention share: chunks of tokens, decay inside a chunk, features.

Names as in the kernels of attention; t counts tokens of a chunk, f features, c columns of values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRETED, rounded, span, statistics_of

# Arguments by which no kernel is specialised: a new length compiles nothing.
LENGTHS = [
    "decay_batch",
    "tokens",
    "sequences",
    "per_sequence",
    "halvings",
    "heads",
    "group",
    "tiles",
    "programs",
]
# Stand for -inf: e^-128 is 0 in float32, and no difference of sums over a chunk is inf - inf.
LEAST_OF_TOKEN = tl.constexpr(-128.0)
LEAST_OF_HEAD = tl.constexpr(-1e4)


class LogDecay(NamedTuple):
    """Of each head (seq is None) or of each token. Strides in elements; that of sequences varies
    with their length and is an argument of its own."""

    data: Tensor
    seq: int | None
    head: int


def log_decay_of(t: Tensor | None) -> tuple[LogDecay | None, int]:
    """Of [H], [B, S, H] or [T, H]; and the stride of sequences."""
    if t is None:
        return None, 0
    seq = None if t.dim() == 1 else t.stride(-2)
    return LogDecay(t, seq, t.stride(-1)), t.stride(0) if t.dim() == 3 else 0


class States(NamedTuple):
    """[N, H, F, C], the rows of a head without gaps."""

    data: Tensor
    sequence: int
    head: int


class Chunk(NamedTuple):
    """BLOCK_T tokens of one sequence, of which count exist."""

    batch: Any
    index: Any
    start: Any  # of the sequence, among all tokens
    length: Any  # of the sequence
    first: Any  # token of the sequence
    count: Any


class Remains(NamedTuple):
    """Logarithms of what remains of a state inside a chunk. Of constants: slope of a token. Of
    gates: their sums up to each token, in two floats, for the difference of two sums may be small
    beside them."""

    slope: Any
    high: Any
    low: Any
    total: Any


@triton.jit
def first_slot(cu_seqlens, tokens, i_b, per_sequence, BLOCK_T: tl.constexpr):
    """Chunks are numbered by slots, a run of them for each sequence. Packed sequences leave at most
    one slot each without a chunk: nothing has to be counted on the way."""
    if cu_seqlens is None:
        slot = i_b * per_sequence
    else:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_b), 0), tokens)
        slot = start // BLOCK_T + i_b
    return slot


@triton.jit
def chunk_of(i_slot, cu_seqlens, tokens, sequences, per_sequence, halvings, BLOCK_T: tl.constexpr):
    if cu_seqlens is None:
        i_b = i_slot // per_sequence
        index = i_slot % per_sequence
    else:
        i_b = i_slot - i_slot
        last = i_b + sequences - 1
        for _ in range(halvings):
            middle = (i_b + last + 1) // 2
            m_after = first_slot(cu_seqlens, tokens, middle, per_sequence, BLOCK_T) <= i_slot
            i_b = tl.where(m_after, middle, i_b)
            last = tl.where(m_after, last, middle - 1)
        index = i_slot - first_slot(cu_seqlens, tokens, i_b, per_sequence, BLOCK_T)
    start, length = span(cu_seqlens, tokens, tokens, i_b)
    first = index * BLOCK_T
    count = tl.where(first < 0, 0, tl.minimum(length - first, BLOCK_T))
    return Chunk(i_b.to(tl.int64), index, start, length, first, count)


@triton.jit
def remains_of(decay, decay_batch, chunk, i_h, o_t):
    slope = None
    b_high = None
    b_low = None
    total = None
    if decay is not None:
        p_decay = decay.data + tl.cast(i_h, tl.int64) * decay.head
        if decay.seq is None:
            slope = tl.load(p_decay)
            slope = tl.where(slope < LEAST_OF_HEAD, LEAST_OF_HEAD, slope)
            total = slope * chunk.count
        else:
            o_token = tl.cast(chunk.start + chunk.first, tl.int64) + o_t
            p_token = p_decay + chunk.batch * decay_batch + o_token * decay.seq
            b_x = tl.load(p_token, mask=o_t < chunk.count, other=0.0)
            b_x = tl.where(b_x < LEAST_OF_TOKEN, LEAST_OF_TOKEN, b_x).to(tl.float64)
            b_sum = tl.cumsum(b_x, 0)
            total = tl.sum(b_x, 0)
            b_high = b_sum.to(tl.float32)
            b_low = (b_sum - b_high.to(tl.float64)).to(tl.float32)
    return Remains(slope, b_high, b_low, total)


@triton.jit
def factor_of_chunk(remains):
    return tl.exp(remains.total.to(tl.float32))


@triton.jit
def from_start(remains, o_t):
    """What remains of the state before the chunk at each token."""
    b_x = tl.full(o_t.shape, 1.0, tl.float32)
    if remains.slope is not None:
        b_x = tl.exp(remains.slope * (o_t + 1))
    elif remains.high is not None:
        b_x = tl.exp(remains.high + remains.low)
    return b_x


@triton.jit
def to_end(remains, chunk, o_t):
    """What remains of each token after the chunk."""
    b_x = tl.full(o_t.shape, 1.0, tl.float32)
    if remains.slope is not None:
        b_x = tl.exp(remains.slope * tl.maximum(chunk.count - 1 - o_t, 0))
    elif remains.high is not None:
        b_rest = remains.total - remains.high.to(tl.float64) - remains.low.to(tl.float64)
        b_x = tl.exp(b_rest.to(tl.float32))
    return b_x


@triton.jit
def between(remains, o_t, KEYS_FIRST: tl.constexpr, STRICT: tl.constexpr):
    """What remains of token j at token i: [i, j], KEYS_FIRST [j, i]. 0 where i < j."""
    o_i = o_t[:, None]
    o_j = o_t[None, :]
    if KEYS_FIRST:
        o_i = o_t[None, :]
        o_j = o_t[:, None]
    m_seen = o_i >= o_j
    if STRICT:
        m_seen = o_i > o_j
    b_x = tl.where(m_seen, 1.0, 0.0)
    if remains.slope is not None:
        b_x = tl.where(m_seen, tl.exp(remains.slope * tl.where(m_seen, o_i - o_j, 0)), 0.0)
    elif remains.high is not None:
        b_z = remains.high[:, None] - remains.high[None, :]
        b_z += remains.low[:, None] - remains.low[None, :]
        if KEYS_FIRST:
            b_z = -b_z
        b_x = tl.where(m_seen, tl.exp(tl.where(m_seen, b_z, 0.0)), 0.0)
    return b_x


@triton.jit
def operand(b_x, PRECISION: tl.constexpr):
    """In float32. Tensor cores cut a float32 to tf32, which would make every product smaller."""
    if b_x.dtype == tl.float32 and PRECISION == "tf32":
        b_x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [b_x], tl.int32, is_pure=True, pack=1
        ).to(tl.float32, bitcast=True)
    return b_x.to(tl.float32)


@triton.jit
def product(b_a, b_b, PRECISION: tl.constexpr):
    """Accumulated in float32. Stored 16-bit operands are multiplied as they are; whatever was
    computed (features, weights, states) would lose range or digits in 16 bits, and is multiplied in
    PRECISION: tf32, for float32 inputs tf32x3."""
    if INTERPRETED:
        b_product = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    elif b_a.dtype == b_b.dtype and b_a.dtype != tl.float32:
        b_product = tl.dot(b_a, b_b, input_precision="ieee")
    else:
        b_a = operand(b_a, PRECISION)
        b_b = operand(b_b, PRECISION)
        b_product = tl.dot(b_a, b_b, input_precision=PRECISION)
    return b_product


@triton.jit
def load_tile(rows, o_row, o_c, DIM: tl.constexpr):
    """Rows beyond the sequence and columns beyond DIM are 0."""
    m_tile = (o_row < rows.length)[:, None] & (o_c < DIM)[None, :]
    p_tile = rows.data + o_row.to(tl.int64)[:, None] * rows.seq + o_c[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def store_tile(rows, o_row, o_c, b_x, DIM: tl.constexpr):
    m_tile = (o_row < rows.length)[:, None] & (o_c < DIM)[None, :]
    p_tile = rows.data + o_row.to(tl.int64)[:, None] * rows.seq + o_c[None, :]
    tl.store(p_tile, rounded(b_x, rows.data.dtype.element_ty), mask=m_tile)


@triton.jit
def load_state(p_state, o_f, o_c, FEATURES: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a state [FEATURES, COLUMNS], of whose columns the first DIM belong to values."""
    m_tile = (o_f < FEATURES)[:, None] & (o_c < DIM)[None, :]
    return tl.load(p_state + o_f[:, None] * COLUMNS + o_c[None, :], mask=m_tile, other=0.0)


@triton.jit
def load_normalizer(p_state, o_f, FEATURES: tl.constexpr, COLUMNS: tl.constexpr):
    """The last column of a state: the sum of the keys."""
    return tl.load(p_state + o_f * COLUMNS + (COLUMNS - 1), mask=o_f < FEATURES, other=0.0)


@triton.jit
def load_statistic(data, cu_seqlens, chunk, i_h, heads, tokens, o_t, other):
    """Of [B, H, S], packed [H, T]."""
    o_row = statistics_of(cu_seqlens, chunk.batch, i_h, heads, tokens, chunk.start)
    return tl.load(data + o_row + chunk.first + o_t, mask=o_t < chunk.count, other=other)


@triton.jit
def mapped(b_x, MAP: tl.constexpr):
    """NaN stays NaN."""
    if MAP != "identity":
        b_x = b_x.to(tl.float32)
    if MAP == "elu1":
        b_x = tl.where(b_x > 0.0, b_x + 1.0, tl.exp(b_x))
    elif MAP == "relu":
        b_x = tl.where(b_x <= 0.0, 0.0, b_x)
    elif MAP == "silu":
        b_x = b_x / (1.0 + tl.exp(-b_x))
    return b_x


@triton.jit
def derivative(b_x, MAP: tl.constexpr):
    b_x = b_x.to(tl.float32)
    b_d = tl.full(b_x.shape, 1.0, tl.float32)
    if MAP == "elu1":
        b_d = tl.where(b_x > 0.0, 1.0, tl.exp(b_x))
    elif MAP == "relu":
        b_d = tl.where(b_x <= 0.0, 0.0, 1.0)
    elif MAP == "silu":
        b_s = 1.0 / (1.0 + tl.exp(-b_x))
        b_d = b_s * (1.0 + b_x * (1.0 - b_s))
    return b_d


@triton.jit
def load_mapped(rows, o_row, o_c, MAP: tl.constexpr, DIM: tl.constexpr):
    """mapped, but 0 beyond the sequence and DIM. For taylor2 the stored values."""
    b_x = load_tile(rows, o_row, o_c, DIM)
    if MAP != "taylor2":
        b_x = mapped(b_x, MAP)
    if MAP == "elu1":
        b_x = tl.where((o_row < rows.length)[:, None] & (o_c < DIM)[None, :], b_x, 0.0)
    return b_x


@triton.jit
def moment_of(o_f, DIM: tl.constexpr):
    """taylor2: feature f is the product of elements i and j of a row; -1 stands for 1. After 1 and
    the elements come the rows of the upper triangle; row i begins at i DIM - i (i - 1) / 2."""
    o_p = tl.minimum(tl.maximum(o_f - 1 - DIM, 0), DIM * (DIM + 1) // 2 - 1)
    b_root = tl.sqrt(((2 * DIM + 1) * (2 * DIM + 1) - 8 * o_p).to(tl.float32))
    o_i = ((2 * DIM + 1 - b_root) * 0.5).to(tl.int32)
    o_i = tl.where(o_i * DIM - o_i * (o_i - 1) // 2 > o_p, o_i - 1, o_i)
    o_i = tl.where((o_i + 1) * DIM - (o_i + 1) * o_i // 2 <= o_p, o_i + 1, o_i)
    o_j = o_i + o_p - (o_i * DIM - o_i * (o_i - 1) // 2)
    return tl.where(o_f <= DIM, o_f - 1, o_i), tl.where(o_f <= DIM, -1, o_j)


@triton.jit
def factor_of_moment(o_i, o_j, scale):
    """Of the query's features: 1, scale, and for products scale^2, halved for squares."""
    b_x = tl.where(o_i == o_j, 0.5 * scale * scale, scale * scale)
    return tl.where(o_i < 0, 1.0, tl.where(o_j < 0, scale, b_x))


@triton.jit
def load_element(rows, o_row, o_i, DIM: tl.constexpr):
    """Elements o_i of rows; 1 for -1."""
    m_i = (o_i >= 0) & (o_i < DIM)
    b_x = load_tile(rows, o_row, tl.where(m_i, o_i, 0), DIM).to(tl.float32)
    return tl.where(m_i[None, :], b_x, 1.0)


@triton.jit
def load_features(
    rows,
    o_row,
    o_f,
    scale,
    QUERY: tl.constexpr,
    MAP: tl.constexpr,
    DIM: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """What meets the state. Only the query of taylor2 has the scale in it."""
    if MAP == "taylor2":
        o_i, o_j = moment_of(o_f, DIM)
        b_x = load_element(rows, o_row, o_i, DIM) * load_element(rows, o_row, o_j, DIM)
        if QUERY:
            b_x *= factor_of_moment(o_i, o_j, scale)[None, :]
        b_x = tl.where((o_row < rows.length)[:, None] & (o_f < FEATURES)[None, :], b_x, 0.0)
    else:
        b_x = load_mapped(rows, o_row, o_f, MAP, DIM)
    return b_x


@triton.jit
def fold_moments(
    b_dx,
    rows,
    o_row,
    o_f,
    scale,
    PRECISION: tl.constexpr,
    QUERY: tl.constexpr,
    DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the elements of rows from that of their moments o_f."""
    o_i, o_j = moment_of(o_f, DIM)
    if QUERY:
        b_dx *= factor_of_moment(o_i, o_j, scale)[None, :]
    m_f = (o_f < FEATURES)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_at_i = tl.where(m_f & (o_i[:, None] == o_d), 1.0, 0.0)
    b_at_j = tl.where(m_f & (o_j[:, None] == o_d), 1.0, 0.0)
    b_x = product(b_dx * load_element(rows, o_row, o_j, DIM), b_at_i, PRECISION)
    return b_x + product(b_dx * load_element(rows, o_row, o_i, DIM), b_at_j, PRECISION)


@triton.jit
def products_of_rows(
    x,
    y,
    o_row,
    MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BLOCK_T, BLOCK_T]: rows of x times rows of y, both mapped."""
    b_xy = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for c in range(0, DIM, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        b_x = load_mapped(x, o_row, o_c, MAP, DIM)
        b_y = load_mapped(y, o_row, o_c, MAP, DIM)
        b_xy += product(b_x, tl.trans(b_y), PRECISION)
    return b_xy


@triton.jit
def weights(b_qk, scale, MAP: tl.constexpr):
    """Of pairs of tokens, before decay."""
    b_u = b_qk * scale
    if MAP == "taylor2":
        b_u = 1.0 + b_u + 0.5 * b_u * b_u
    return b_u


@triton.jit
def scale_beside(scale, MAP: tl.constexpr):
    """The scale of a query's features that is not in them."""
    if MAP == "taylor2":
        scale = 1.0
    return scale
