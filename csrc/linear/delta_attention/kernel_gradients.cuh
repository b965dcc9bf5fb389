// Backward. With dS' the gradient of the state after a chunk, a chunk has (kernel_chunk.cuh)
//
//   dU = M^T dO + k_end dS'     dY = X^T dU     dZ = dU + N^T dY
//   dv = dY                     dbeta_i = dZ_i . y_i
//   dM = dO U^T                 dN = dY U^T
//   dq_in = dO S^T              dk_in = dY S^T  dk_end = U dS'^T
//   dS = e^(G_n) dS' + q_in^T dO + k_in^T dY
//
// Without the correction dv = dU, and the products with dY are not taken.
#pragma once
#include "linear/delta_attention/kernel.cuh"

namespace tokenmill::cuda::delta_attention {

// dbeta of these columns: sums of dZ y over them.
template <typename SweepT>
__device__ __forceinline__ void store_dbeta(SweepT& sweep, const DeltaAttentionParams& p,
                                            const Scratch& scratch, float (&dz)[1][4],
                                            int64_t tokens) {
  SweepShared& s = sweep.s;
  const int lane = threadIdx.x % kWarpSize;
  float sums[2] = {};
  const float* const y = sweep.row_of(scratch.y);
  int e = 0;
  each_element(dz[0], [&](float x, int r, int c) {
    const int t = sweep.warp_row + r;
    const int64_t column = sweep.first + sweep.warp_column + c;
    if (t < sweep.place.n && column < p.value_dim)
      sums[e / 2] = fmaf(x, y[t * p.heads * p.value_dim + column], sums[e / 2]);
    ++e;
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(sums[half]);
    if (lane % 4 == 0) s.sums[sweep.warp_row + lane / 4 + 8 * half][sweep.warp_column / 8] = sum;
  }
  __syncthreads();
  const int t = threadIdx.x;
  if (t >= sweep.place.n) return;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kColumns / 8; ++w) sum += s.sums[t][w];
  const int64_t row = sweep.slice * tokens + sweep.place.row(p) + t;
  scratch.dbeta[row * p.heads + sweep.place.h] = sum;
}

template <typename T, bool kPerChannel, bool kCorrects>
__global__ void __launch_bounds__(kThreads, kPerChannel ? 1 : kBlocksOfMultiprocessor)
    delta_gradients_kernel(const __grid_constant__ DeltaAttentionBackwardParams p,
                           const __grid_constant__ Scratch scratch, int64_t tokens) {
  extern __shared__ float4 shared[];
  const DeltaAttentionParams& f = p.forward;
  Sweep<T, kPerChannel> sweep(f, scratch, shared);
  SweepShared& s = sweep.s;
  const int column = sweep.warp_column, row = sweep.warp_row;
  sweep.load_state(p.dfinal);
  for (int64_t i = sweep.chunks(); i-- > 0;) {
    sweep.begin(i);
#pragma unroll
    for (int which = 0; which < pair_matrices(kCorrects); ++which) sweep.load_matrix(which);
    sweep.template load<T>(s.x, p.dout);
    sweep.keep_state(scratch.dstates);
    __syncthreads();
    if (threadIdx.x < kTokens) s.end[threadIdx.x] = s.f.key[threadIdx.x] * s.f.stay[threadIdx.x];
    // dU = M^T dO + k_end dS'
    float du[1][4] = {}, dy[1][4] = {};
    for (int64_t d = 0; d < f.head_dim; d += kChannels) {
      sweep.load_leaving(d);
      sweep.multiply_state(du, s.k, d);
    }
    float dout[1][4];
    sweep.each(dout, [&](float& x, int, int at) { x = s.x[at]; });
    bool finite = sweep.all_finite(dout);
    multiply_pairs<true>(du, s.pairs[kOfQueries], row, s.x + column, finite);
    sweep.each(du, [&](float x, int, int at) { s.y[at] = x; });
    if constexpr (kCorrects) {
      finite = sweep.all_finite(du);
      // dY = X^T dU
      multiply_pairs<true>(dy, s.pairs[kInverse], row, s.y + column, finite);
      sweep.each(dy, [&](float x, int, int at) { s.z[at] = x; });
      finite = sweep.all_finite(dy);
      // dZ = dU + N^T dY
      multiply_pairs<true>(du, s.pairs[kOfKeys], row, s.z + column, finite);
      store_dbeta(sweep, f, scratch, du, tokens);
      store_columns(sweep.row_of(scratch.dy), f.heads * f.value_dim, s.z, kColumnStep, kColumns,
                    sweep.place.n, sweep.first, f.value_dim);
    } else {
      __syncthreads();
    }
    sweep.template store<T>(p.dv, kCorrects ? s.z : s.y);
    // dS = e^(G_n) dS' + q_in^T dO + k_in^T dY
    __syncthreads();
    if (threadIdx.x < kTokens) {
      s.f.query[threadIdx.x] *= f.scale * s.f.enter[threadIdx.x];
      s.f.key[threadIdx.x] *= -s.f.enter[threadIdx.x];
    }
    for (int64_t d = 0; d < f.head_dim; d += kChannels) {
      sweep.load_entering(d, true, kCorrects);
      sweep.update_state(d, [&](float (&acc)[1][4], int channel) {
        multiply<true, false>(acc, s.q + channel, kKeyStep, s.x + column, kColumnStep, kTokens);
        if constexpr (kCorrects)
          multiply<true, false>(acc, s.k + channel, kKeyStep, s.z + column, kColumnStep, kTokens);
      });
    }
  }
  __syncthreads();
  if (p.dinitial.data) sweep.store_state(sweep.state_of(p.dinitial));
}

}  // namespace tokenmill::cuda::delta_attention
