"""Shared code of linear attention: layouts, chunks of tokens, intra-chunk decay, feature maps.

Naming as in the attention kernels; t indexes tokens of a chunk, f features, c value columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import Self

from ..common import INTERPRETED, Rows, rounded, slice_of, span

# Arguments excluded from specialization: a new length does not recompile.
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
# Stand-ins for -inf: e^-128 is 0 in float32, and differences of sums over a chunk avoid inf - inf.
MIN_OF_TOKEN = tl.constexpr(-128.0)
MIN_OF_HEAD = tl.constexpr(-1e4)


class LogDecay(NamedTuple):
    """Log decay per head (seq is None) or per token. Strides in elements. The stride over sequences
    varies with their length and is a separate argument."""

    data: Tensor
    seq: int | None
    head: int


def log_decay_of(t: Tensor | None) -> tuple[LogDecay | None, int]:
    """LogDecay of [H], [B, S, H], [T, H] or, with contiguous channels, [B, S, H, D], and its stride
    over sequences."""
    if t is None:
        return None, 0
    head = -2 if t.dim() == 4 else -1
    seq = None if t.dim() == 1 else t.stride(head - 1)
    return LogDecay(t, seq, t.stride(head)), t.stride(0) if t.dim() >= 3 else 0


class States(NamedTuple):
    """States [N, H, F, C] with contiguous rows of each head."""

    data: Tensor
    sequence: int
    head: int


def states_of(t: Tensor | None) -> States | None:
    return None if t is None else States(t, t.stride(0), t.stride(1))


class Requests(NamedTuple):
    """Slots and kept tokens of a decode step's requests, int32 [B]; None: slot b, all tokens."""

    indices: Tensor | None
    accepted: Tensor | None


@triton.jit
def load_request(requests, i_b, tokens, slots):
    """Slot of request i_b (0 if it has none), whether it has one, tokens that its state keeps."""
    slot = i_b
    if requests.indices is not None:
        slot = tl.load(requests.indices + i_b).to(tl.int64)
    used = (slot >= 0) & (slot < slots)
    kept = tl.cast(tokens, tl.int64)
    if requests.accepted is not None:
        found = tl.load(requests.accepted + i_b).to(tl.int64)
        kept = tl.minimum(tl.maximum(found, 0), kept)
    return tl.where(used, slot, 0), used, kept


class Inputs(NamedTuple):
    """Tensors and scalars that the kernels read. Triton specializes integers in a tuple even if
    do_not_specialize names the tuple: LENGTHS are parameters."""

    q: Rows
    k: Rows
    v: Rows
    decay: LogDecay | None
    scale: float
    cu_seqlens: Tensor | None
    dout: Rows | None = None
    normalizer: Tensor | None = None
    delta: Tensor | None = None  # -(dout . out) / z


class Form(NamedTuple):
    """Compile-time choices, each a constexpr: Triton 3.6 cannot pass a tuple that is one constexpr
    to a device function."""

    MAP: tl.constexpr
    HEAD_DIM: tl.constexpr
    VALUE_DIM: tl.constexpr
    FEATURES: tl.constexpr
    COLUMNS: tl.constexpr  # of a state: VALUE_DIM, and one of the normalizer
    BLOCK_F: tl.constexpr
    BLOCK_V: tl.constexpr
    BLOCK_D: tl.constexpr | None = None
    BLOCK_T: tl.constexpr | None = None  # tokens per chunk
    PRECISION: tl.constexpr | None = None


def form_of(*choices: Any) -> Form:
    return Form(*map(tl.constexpr, choices))


class Chunk(NamedTuple):
    """BLOCK_T tokens of one sequence, of which count exist."""

    slot: Any
    batch: Any
    start: Any  # first token of the sequence, among all tokens
    length: Any  # length of the sequence
    first: Any  # first token of the chunk, in its sequence
    count: Any
    tokens: Any  # of all sequences of a batch entry or packing
    heads: Any
    first_row: Any  # row of head 0 in statistics [B, H, S] or packed [H, T]


class Remains(NamedTuple):
    """Log decay inside a chunk. Constant decay: slope per token. Gates: prefix sums up to each
    token as two floats, because the difference of two sums may be small compared with them."""

    slope: Any
    high: Any
    low: Any
    total: Any


class Layout:
    """What a record of packed or batched tokens says of sizes and layout."""

    _fields: tuple[str, ...]
    q: Tensor
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, a: Any) -> Self:
        """The call of a record of the forward or of the backward."""
        return cls(*(getattr(a, name) for name in cls._fields))

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def tokens(self) -> int:
        return self.q.shape[-3]

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    def new(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Allocates an output. Tokens outside all packed sequences, which no program writes, are
        0."""
        allocate = self.q.new_zeros if self.packed else self.q.new_empty
        return allocate(shape, dtype=dtype or self.q.dtype)

    def float32(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def rows(self, t: Tensor) -> Rows:
        return Rows(t, 0 if self.packed else t.stride(0), t.stride(-3), t.stride(-2))


@triton.jit
def first_slot(cu_seqlens, tokens, i_b, per_sequence, BLOCK_T: tl.constexpr):
    """First slot of a sequence. Chunks are numbered by slots, consecutive within a sequence. A
    packed sequence leaves at most one slot empty, so no prefix sum over chunk counts is needed."""
    if cu_seqlens is None:
        slot = i_b * per_sequence
    else:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_b), 0), tokens)
        slot = start // BLOCK_T + i_b
    return slot


@triton.jit
def chunk_of(
    i_slot, cu_seqlens, tokens, sequences, per_sequence, halvings, heads, BLOCK_T: tl.constexpr
):
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
    i_b = i_b.to(tl.int64)
    first_row = i_b - i_b
    if cu_seqlens is None:
        first_row += i_b * heads
    return Chunk(i_slot, i_b, start, length, first, count, tokens, heads, first_row)


@triton.jit
def program_of(
    i, inputs, tokens, sequences, per_sequence, halvings, heads, shares, tiles, form
):  # fmt: skip
    """Chunk, head and tile of program i; shares: heads, or key heads if a program handles a
    group."""
    i_slot = i // (tiles * shares)
    chunk = chunk_of(
        i_slot, inputs.cu_seqlens, tokens, sequences, per_sequence, halvings, heads, form.BLOCK_T
    )
    return chunk, i // tiles % shares, i % tiles


@triton.jit
def rows_of(rows, chunk, i_h):
    return slice_of(rows, chunk.batch, i_h, chunk.start, chunk.length)


@triton.jit
def state_of(states, chunk, i_h, form):
    """State of a chunk and head in [slots, H, F, C]."""
    i_state = tl.cast(chunk.slot, tl.int64) * chunk.heads + i_h
    return states + i_state * (form.FEATURES * form.COLUMNS)


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
            slope = tl.where(slope < MIN_OF_HEAD, MIN_OF_HEAD, slope)
            total = slope * chunk.count
        else:
            o_token = tl.cast(chunk.start + chunk.first, tl.int64) + o_t
            p_token = p_decay + chunk.batch * decay_batch + o_token * decay.seq
            b_x = tl.load(p_token, mask=o_t < chunk.count, other=0.0)
            b_x = tl.where(b_x < MIN_OF_TOKEN, MIN_OF_TOKEN, b_x).to(tl.float64)
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
    """Decay of the incoming state at each token: exp(sum of log decay up to and including t)."""
    b_x = tl.full(o_t.shape, 1.0, tl.float32)
    if remains.slope is not None:
        b_x = tl.exp(remains.slope * (o_t + 1))
    elif remains.high is not None:
        b_x = tl.exp(remains.high + remains.low)
    return b_x


@triton.jit
def to_end(remains, chunk, o_t):
    """Decay of each token up to the end of the chunk."""
    b_x = tl.full(o_t.shape, 1.0, tl.float32)
    if remains.slope is not None:
        b_x = tl.exp(remains.slope * tl.maximum(chunk.count - 1 - o_t, 0))
    elif remains.high is not None:
        b_rest = remains.total - remains.high.to(tl.float64) - remains.low.to(tl.float64)
        b_x = tl.exp(b_rest.to(tl.float32))
    return b_x


@triton.jit
def between(remains, o_t, KEYS_FIRST: tl.constexpr, STRICT: tl.constexpr):
    """Decay matrix from token j to token i: [i, j], or [j, i] if KEYS_FIRST. 0 where i < j."""
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
    """Operand in float32, rounded to tf32. Tensor cores truncate float32 to tf32, which would bias
    every product toward 0."""
    if b_x.dtype == tl.float32 and PRECISION == "tf32":
        b_x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [b_x], tl.int32, is_pure=True, pack=1
        ).to(tl.float32, bitcast=True)
    return b_x.to(tl.float32)


@triton.jit
def product(b_a, b_b, PRECISION: tl.constexpr):
    """A B with a float32 accumulator. Stored 16-bit operands are multiplied as they are; computed
    ones (features, weights, states) would lose range or precision in 16 bits and are multiplied in
    PRECISION: tf32, or tf32x3 for float32 inputs."""
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
    """[rows, columns] tile; rows beyond the sequence and columns beyond DIM are 0."""
    m_tile = (o_row < rows.length)[:, None] & (o_c < DIM)[None, :]
    p_tile = rows.data + o_row.to(tl.int64)[:, None] * rows.seq + o_c[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def store_tile(rows, o_row, o_c, b_x, DIM: tl.constexpr):
    m_tile = (o_row < rows.length)[:, None] & (o_c < DIM)[None, :]
    p_tile = rows.data + o_row.to(tl.int64)[:, None] * rows.seq + o_c[None, :]
    tl.store(p_tile, rounded(b_x, rows.data.dtype.element_ty), mask=m_tile)


@triton.jit
def load_state(p_state, o_f, o_c, form):
    """Tile of a state [FEATURES, COLUMNS], whose first VALUE_DIM columns belong to values."""
    m_tile = (o_f < form.FEATURES)[:, None] & (o_c < form.VALUE_DIM)[None, :]
    return tl.load(p_state + o_f[:, None] * form.COLUMNS + o_c[None, :], mask=m_tile, other=0.0)


@triton.jit
def load_normalizer(p_state, o_f, form):
    """Last column of a state: the sum of the keys."""
    p_column = p_state + o_f * form.COLUMNS + (form.COLUMNS - 1)
    return tl.load(p_column, mask=o_f < form.FEATURES, other=0.0)


@triton.jit
def statistic_pointers(data, chunk, i_h, o_t):
    """Pointers to the row statistics of a chunk, in [B, H, S] or packed [H, T]."""
    i_row = chunk.first_row + i_h
    return data + (i_row * chunk.tokens + chunk.start) + (chunk.first + o_t)


@triton.jit
def load_statistic(data, chunk, i_h, o_t, other):
    p_row = statistic_pointers(data, chunk, i_h, o_t)
    return tl.load(p_row, mask=o_t < chunk.count, other=other)


@triton.jit
def mapped(b_x, MAP: tl.constexpr):
    """Feature map phi(x); NaN stays NaN."""
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
    """phi(x), 0 beyond the sequence and DIM. taylor2: x itself."""
    b_x = load_tile(rows, o_row, o_c, DIM)
    if MAP != "taylor2":
        b_x = mapped(b_x, MAP)
    if MAP == "elu1":
        b_x = tl.where((o_row < rows.length)[:, None] & (o_c < DIM)[None, :], b_x, 0.0)
    return b_x


@triton.jit
def moment_of(o_f, DIM: tl.constexpr):
    """Elements (i, j) whose product is taylor2 feature f; -1 stands for the factor 1. Features are
    ordered 1, the elements, then the rows of the upper triangle; row i begins at i DIM - i (i - 1)
    / 2."""
    o_p = tl.minimum(tl.maximum(o_f - 1 - DIM, 0), DIM * (DIM + 1) // 2 - 1)
    # The tensor is the left operand: the interpreter has no constexpr minus tensor.
    b_root = tl.sqrt((o_p * -8 + (2 * DIM + 1) * (2 * DIM + 1)).to(tl.float32))
    o_i = ((b_root - (2 * DIM + 1)) * -0.5).to(tl.int32)
    o_i = tl.where(o_i * DIM - o_i * (o_i - 1) // 2 > o_p, o_i - 1, o_i)
    o_i = tl.where((o_i + 1) * DIM - (o_i + 1) * o_i // 2 <= o_p, o_i + 1, o_i)
    o_j = o_i + o_p - (o_i * DIM - o_i * (o_i - 1) // 2)
    return tl.where(o_f <= DIM, o_f - 1, o_i), tl.where(o_f <= DIM, -1, o_j)


@triton.jit
def factor_of_moment(o_i, o_j, scale):
    """Factor of a query feature: 1, scale for elements, scale^2 for products, halved for
    squares."""
    b_x = tl.where(o_i == o_j, 0.5 * scale * scale, scale * scale)
    return tl.where(o_i < 0, 1.0, tl.where(o_j < 0, scale, b_x))


@triton.jit
def load_element(rows, o_row, o_i, DIM: tl.constexpr):
    """Elements o_i of rows; 1 for index -1."""
    m_i = (o_i >= 0) & (o_i < DIM)
    b_x = load_tile(rows, o_row, tl.where(m_i, o_i, 0), DIM).to(tl.float32)
    return tl.where(m_i[None, :], b_x, 1.0)


@triton.jit
def load_features(rows, o_row, o_f, scale, QUERY: tl.constexpr, form):
    """phi(x) as multiplied with the state. Only taylor2 query features include the scale."""
    if form.MAP == "taylor2":
        o_i, o_j = moment_of(o_f, form.HEAD_DIM)
        b_x = load_element(rows, o_row, o_i, form.HEAD_DIM)
        b_x = b_x * load_element(rows, o_row, o_j, form.HEAD_DIM)
        if QUERY:
            b_x *= factor_of_moment(o_i, o_j, scale)[None, :]
        b_x = tl.where((o_row < rows.length)[:, None] & (o_f < form.FEATURES)[None, :], b_x, 0.0)
    else:
        b_x = load_mapped(rows, o_row, o_f, form.MAP, form.HEAD_DIM)
    return b_x


@triton.jit
def fold_moments(b_dx, rows, o_row, o_f, scale, QUERY: tl.constexpr, form):
    """Gradient of the elements of rows, from the gradient of their taylor2 features o_f."""
    o_i, o_j = moment_of(o_f, form.HEAD_DIM)
    if QUERY:
        b_dx *= factor_of_moment(o_i, o_j, scale)[None, :]
    m_f = (o_f < form.FEATURES)[:, None]
    o_d = tl.arange(0, form.BLOCK_D)[None, :]
    b_at_i = tl.where(m_f & (o_i[:, None] == o_d), 1.0, 0.0)
    b_at_j = tl.where(m_f & (o_j[:, None] == o_d), 1.0, 0.0)
    b_x = product(b_dx * load_element(rows, o_row, o_j, form.HEAD_DIM), b_at_i, form.PRECISION)
    b_y = product(b_dx * load_element(rows, o_row, o_i, form.HEAD_DIM), b_at_j, form.PRECISION)
    return b_x + b_y


@triton.jit
def products_of_features(x, y, o_row, form):
    """phi(X) phi(Y)^T of queries and keys, [BLOCK_T, BLOCK_T]."""
    b_xy = tl.zeros([form.BLOCK_T, form.BLOCK_T], tl.float32)
    for c in range(0, form.HEAD_DIM, form.BLOCK_D):
        o_c = c + tl.arange(0, form.BLOCK_D)
        b_x = load_mapped(x, o_row, o_c, form.MAP, form.HEAD_DIM)
        b_y = load_mapped(y, o_row, o_c, form.MAP, form.HEAD_DIM)
        b_xy += product(b_x, tl.trans(b_y), form.PRECISION)
    return b_xy


@triton.jit
def products_of_values(x, y, o_row, form):
    """X Y^T of values and output gradients, [BLOCK_T, BLOCK_T]."""
    b_xy = tl.zeros([form.BLOCK_T, form.BLOCK_T], tl.float32)
    for c in range(0, form.VALUE_DIM, form.BLOCK_V):
        o_c = c + tl.arange(0, form.BLOCK_V)
        b_x = load_tile(x, o_row, o_c, form.VALUE_DIM)
        b_y = load_tile(y, o_row, o_c, form.VALUE_DIM)
        b_xy += product(b_x, tl.trans(b_y), form.PRECISION)
    return b_xy


@triton.jit
def weights(b_qk, scale, MAP: tl.constexpr):
    """Weights of pairs of tokens, before decay."""
    b_u = b_qk * scale
    if MAP == "taylor2":
        b_u = 1.0 + b_u + 0.5 * b_u * b_u
    return b_u


@triton.jit
def scale_beside(scale, MAP: tl.constexpr):
    """Scale of query features that load_features leaves out."""
    if MAP == "taylor2":
        scale = 1.0
    return scale
