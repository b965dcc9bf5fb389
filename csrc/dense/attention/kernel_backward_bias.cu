// dbias of a broadcast bias: a CTA owns a tile of it and sums dS, in a fixed order, over the
// sequences, heads, queries or keys that share it. S and dP are recomputed.
#include "attention/backward_shape.cuh"
#include "cuda/launch.cuh"
#include "dense/attention/launch.cuh"

namespace tokenmill::cuda {

constexpr int kBiasRows = 32, kBiasColumns = 16, kBiasThreads = 2 * kWarpSize;

template <typename T, int kDim>
constexpr int bias_shared_bytes() {
  return 2 * (kBiasRows + kBiasColumns) * kDim * static_cast<int>(sizeof(T));
}

// out = (16 rows at `left`) (16 rows at `right`)^T
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_tiles(float (&out)[2][4], uint32_t left, uint32_t right,
                                               int lane) {
#pragma unroll
  for (int k = 0; k < Tile::kRowBytes / 32; ++k) {
    uint32_t a[4], b[4];
    ldmatrix(a, left + Tile::offset(lane % 16, 2 * k + lane / 16));
    ldmatrix(b, right + Tile::offset(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
    const auto rows = make_fragment<T>(a[0], a[1], a[2], a[3]);
    mma(out[0], rows, make_fragment<T>(b[0], b[1]));
    mma(out[1], rows, make_fragment<T>(b[2], b[3]));
  }
}

// CTAs per SM: with more ptxas spills.
template <typename T, int kDim>
constexpr int kBiasBlocks = sizeof(T) == 4 && kDim > 128 ? 4 : 6;

template <typename T, int kDim>
__global__ void __launch_bounds__(kBiasThreads, kBiasBlocks<T, kDim>)
    bias_kernel(const __grid_constant__ BackwardArgs args, int64_t row_tiles,
                int64_t column_tiles) {
  using Tile = SharedTile<kDim* static_cast<int>(sizeof(T)), Swizzle::plain>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float sums[kBiasRows][kBiasColumns + 1];
  const AttentionBackwardParams& bp = args.p;
  const AttentionParams& p = bp.forward;
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp_row = thread / kWarpSize * 16;
  const uint32_t q = shared_address(shared), dout = q + kBiasRows * Tile::kRowBytes;
  const uint32_t k = dout + kBiasRows * Tile::kRowBytes, v = k + kBiasColumns * Tile::kRowBytes;
  const int64_t bias_heads = bp.dbias_head ? p.heads : 1;
  const int64_t tile = blockIdx.x % (row_tiles * column_tiles);
  const int64_t bh = blockIdx.x / (row_tiles * column_tiles);
  const int64_t own_head = bh % bias_heads, own_batch = bh / bias_heads;
  const int own_row = static_cast<int>(tile / column_tiles) * kBiasRows;
  const int own_column = static_cast<int>(tile % column_tiles) * kBiasColumns;
  const int64_t heads = bp.dbias_head ? 1 : p.heads, batches = bp.dbias_batch ? 1 : p.batch;

  const bool masked = p.mask.any();
  float sum[2][4] = {};
  int rows = 0, columns = 0;
  for (int64_t b = own_batch; b < own_batch + batches; ++b) {
    const Sequence s = sequence_of(p, b);
    const MaskBand band = MaskBand::of(p, s);
    rows = max(rows, static_cast<int>(min(p.bias_rows, static_cast<int64_t>(s.q_length))));
    columns = max(columns, static_cast<int>(min(p.bias_columns, static_cast<int64_t>(s.k_length))));
    if (own_row >= s.q_length || own_column >= s.k_length) continue;
    for (int64_t h = own_head; h < own_head + heads; ++h) {
      const BackwardScoreMod<Mode::general, false> score_mod(p, b, h);
      const int64_t kv_head = h / (p.heads / p.kv_heads);
      const int row_end = bp.dbias_q ? min(own_row + kBiasRows, s.q_length) : s.q_length;
      for (int row = own_row; row < row_end; row += kBiasRows) {
        const int seen_begin = band.begin(row) / kBiasColumns * kBiasColumns;
        const int seen_end = band.end(min(row + kBiasRows, s.q_length) - 1);
        const int begin = bp.dbias_k ? own_column : seen_begin;
        const int end = bp.dbias_k ? min(own_column + kBiasColumns, seen_end) : seen_end;
        for (int column = begin; column < end; column += kBiasColumns) {
          if (column + kBiasColumns <= seen_begin) continue;
          if (masked && !any_sees(p.mask, args.bounds, b, static_cast<int>(h), 1, s, row, kBiasRows,
                                  column, kBiasColumns))
            continue;
          const auto load = [&]<int kRows>(Index<kRows>, uint32_t to, const Rows& from,
                                           int64_t start, int64_t head, int first, int length,
                                           int64_t dim) {
            copy_rows<kRows, Tile>(to, rows_at<const T>(from, b, start + first, head), from.seq,
                                   length - first, static_cast<int>(dim), args.vectors, thread,
                                   kBiasThreads);
          };
          __syncthreads();
          load(Index<kBiasRows>{}, q, p.q, s.q_start, h, row, s.q_length, p.head_dim);
          load(Index<kBiasRows>{}, dout, bp.dout, s.q_start, h, row, s.q_length, p.value_dim);
          load(Index<kBiasColumns>{}, k, p.k, s.k_start, kv_head, column, s.k_length, p.head_dim);
          load(Index<kBiasColumns>{}, v, p.v, s.k_start, kv_head, column, s.k_length, p.value_dim);
          cp_async_commit();
          cp_async_wait<0>();
          __syncthreads();
          // S = Q K^T, dP = dO V^T
          float qk[2][4] = {}, dp[2][4] = {};
          multiply_tiles<T, Tile>(qk, q + warp_row * Tile::kRowBytes, k, lane);
          multiply_tiles<T, Tile>(dp, dout + warp_row * Tile::kRowBytes, v, lane);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int query = row + warp_row + i / 2 * 8 + lane / 4;
            if (query >= s.q_length) continue;
            float statistic = 1, minus_delta = 0;
            if (has_backward_statistics(p)) {
              statistic = lse_at(p, bp.minus_lse, b, s.q_start, h)[query];
              minus_delta = lse_at(p, bp.minus_delta, b, s.q_start, h)[query];
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              const int key = column + 8 * n + lane % 4 * 2 + i % 2;
              if (key < band.begin(query) || key >= band.end(query)) continue;
              if (masked && !HeadMask{p.mask, args.bounds, b, h, s}.sees(query, key)) continue;
              const Weight w = score_mod.apply_map(qk[n][i], 0, query, key, statistic);
              if (p.post_decay) {
                const float fade = score_mod.mod.fade(score_mod.distance(query, key));
                sum[n][i] += score_mod.faded(w.slope, fade, dp[n][i], minus_delta).dz;
              } else {
                sum[n][i] += w.slope * (dp[n][i] + minus_delta);
              }
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[warp_row + i / 2 * 8 + lane / 4][8 * n + lane % 4 * 2 + i % 2] = sum[n][i];
  __syncthreads();
  float* to = bp.dbias + own_batch * bp.dbias_batch + own_head * bp.dbias_head;
  const int wide = bp.dbias_k ? kBiasColumns : 1, high = bp.dbias_q ? kBiasRows : 1;
  for (int at = thread; at < wide * high; at += kBiasThreads) {
    const int i = at / wide, j = at % wide;
    if (own_row + i >= rows || own_column + j >= columns) continue;
    float total = 0;
    for (int m = 0; m < (bp.dbias_q ? 1 : kBiasRows); ++m)
      for (int n = 0; n < (bp.dbias_k ? 1 : kBiasColumns); ++n) total += sums[i + m][j + n];
    to[(own_row + i) * bp.dbias_q + (own_column + j) * bp.dbias_k] = total;
  }
}

template <typename T>
const char* launch_bias(const BackwardArgs& args, cudaStream_t stream) {
  const AttentionBackwardParams& bp = args.p;
  const AttentionParams& p = bp.forward;
  const int64_t row_tiles = bp.dbias_q ? ceil_div(p.bias_rows, kBiasRows) : 1;
  const int64_t column_tiles = bp.dbias_k ? ceil_div(p.bias_columns, kBiasColumns) : 1;
  const int64_t blocks =
      row_tiles * column_tiles * (bp.dbias_head ? p.heads : 1) * (bp.dbias_batch ? p.batch : 1);
  const auto launch_dim = [&]<int kDim>(Index<kDim>) {
    return launch<bias_kernel<T, kDim>>(blocks, kBiasThreads, bias_shared_bytes<T, kDim>(), stream,
                                        args, row_tiles, column_tiles);
  };
  const int64_t dim = args.largest_dim();
  return dim <= 64    ? launch_dim(Index<64>{})
         : dim <= 128 ? launch_dim(Index<128>{})
                      : launch_dim(Index<256>{});
}

template const char* launch_bias<TOKENMILL_ELEMENT>(const BackwardArgs&, cudaStream_t);

}  // namespace tokenmill::cuda
