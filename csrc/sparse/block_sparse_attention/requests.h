// Calls of the CPU kernels: each packed request is a separate call. Free of torch.
#pragma once
#include "cpu/isa.h"
#include "sparse/block_sparse_attention/mass.h"

namespace tokenmill {

// Calls that have batch, heads, head dimensions and dtype in common.
struct BlockSparseCalls {
  const BlockSparseMass* each;
  int64_t count;
};
struct BlockSparseBackwardCalls {
  const BlockSparseBackwardParams* each;
  int64_t count;
};

namespace block_sparse_attention {

// Offsets of a packed request's tokens and lists within all requests.
struct RequestPlace {
  int64_t b;
  int64_t query, queries;
  int64_t key, keys;  // packed keys
  int64_t list_row, list_rows;

  RequestPlace(const BlockSparseParams& d, int64_t b) : b(b), key(0), keys(d.attention.seqlen_k) {
    const AttentionParams& p = d.attention;
    query = p.cu_seqlens_q[b];
    queries = p.cu_seqlens_q[b + 1] - query;
    if (p.cu_seqlens_k) {
      key = p.cu_seqlens_k[b];
      keys = p.cu_seqlens_k[b + 1] - key;
    }
    list_row = (query >> d.log2_block_q) + b;
    list_rows = ceil_div(queries, int64_t{1} << d.log2_block_q);
  }

  Rows of_queries(const Rows& rows, DType t) const { return behind(rows, t, query * rows.seq); }
  Rows of_keys(const Rows& rows, DType t) const {
    return behind(rows, t, b * rows.batch + key * rows.seq);
  }

 private:
  static Rows behind(Rows rows, DType t, int64_t elements) {
    rows.data = static_cast<char*>(rows.data) + elements * (t == DType::float32 ? 4 : 2);
    return rows;
  }
};

inline void cut_to(const RequestPlace& at, BlockSparseParams& d) {
  AttentionParams& p = d.attention;
  p.batch = 1;
  p.cu_seqlens_q = p.cu_seqlens_k = nullptr;
  p.seqlen_q = at.queries;
  p.seqlen_k = at.keys;
  p.q = at.of_queries(p.q, p.dtype);
  p.out = at.of_queries(p.out, p.dtype);
  p.lse += at.query;
  if (d.pages.table) {
    d.pages.table += at.b * d.pages.stride;
  } else {
    p.k = at.of_keys(p.k, p.dtype);
    p.v = at.of_keys(p.v, p.dtype);
  }
  if (d.lengths) d.lengths += at.b;
  d.list.indices += at.list_row * d.list.indices_row;
  d.list.counts += at.list_row * d.list.counts_row;
  d.list.rows = at.list_rows;
}

inline BlockSparseMass request_of(BlockSparseMass d, int64_t b) {
  const RequestPlace at(d, b);
  cut_to(at, d);
  if (d.mass) d.mass += at.list_row * d.list.entries;
  return d;
}

inline BlockSparseBackwardParams request_of(BlockSparseBackwardParams g, int64_t b) {
  const RequestPlace at(g.forward, b);
  const DType t = g.forward.attention.dtype;
  if (g.dlse) g.dlse += at.query;
  if (g.dsink) g.dsink += b * g.forward.attention.heads;
  if (g.delta) g.delta += at.query;
  cut_to(at, g.forward);
  g.dout = at.of_queries(g.dout, t);
  g.dq = at.of_queries(g.dq, t);
  g.dk = at.of_keys(g.dk, t);
  g.dv = at.of_keys(g.dv, t);
  return g;
}

}  // namespace block_sparse_attention
}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(block_sparse_attention_forward, BlockSparseCalls)
TOKENMILL_CPU_KERNEL(block_sparse_attention_pages, BlockSparseCalls)
TOKENMILL_CPU_KERNEL(block_sparse_attention_pages_mass, BlockSparseCalls)
TOKENMILL_CPU_KERNEL(block_sparse_attention_mass, BlockSparseCalls)
TOKENMILL_CPU_KERNEL(block_sparse_attention_backward, BlockSparseBackwardCalls)
