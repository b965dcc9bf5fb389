// Gradients of the normalized rows of q and k, of beta and log_decay, of each chunk and value head,
// from the states before the chunks and their gradients after them; then of q and k. Chunks are
// independent here. log_decay of token t is in all weights from a j < t (or the state before) to an
// i >= t (or the state after): its gradient is the sum of these weights times their gradients.
#pragma once
#include <cstddef>

#include "linear/delta_attention/kernel_gradients.cuh"

namespace tokenmill::cuda::delta_attention {

constexpr int kBlockTile = kBlock * kKeyStep;

// Tiles of 64 columns of v while the products with the states are taken; then tiles of 64 channels.
union ChunkTiles {
  struct {
    float dout[kKeyTile], dy[kKeyTile], u[kKeyTile];
    float state[2 * kKeyTile], dstate[2 * kKeyTile];  // [kChannels][kKeyStep]
  } columns;
  struct {
    float dq[kKeyTile], dk[kKeyTile], dk_end[kKeyTile];
    float q[kKeyTile], k[kKeyTile];
    float dk_later[kKeyTile];  // of keys, from later tokens
    // Per channel: log2 of the decays; weights of rows of the second block from its first token,
    // and of the first to its last; rows times these weights.
    float gates[kKeyTile], weights[kKeyTile];
    float q_block[kBlockTile], k_block[kBlockTile], k_early[kBlockTile];
  } channels;
};

struct ChunkShared {
  float dm[kPairTile], dn[kPairTile];
  RowFactors f;
  float crossing[kChannels];               // gradient of e^(G_n), by channel
  float entered[kTokens], ended[kTokens];  // weights times gradients from and to the states
  float crossings[kTokens], all;           // of pairs; of the state before and the state after
  alignas(16) ChunkTiles tiles;
};

constexpr int64_t chunk_bytes(bool per_channel) {
  return offsetof(ChunkShared, tiles) +
         (per_channel ? sizeof(ChunkTiles) : sizeof(ChunkTiles::columns));
}

template <typename T, bool kPerChannel, bool kCorrects>
class ChunkGradients {
 public:
  __device__ ChunkGradients(const DeltaAttentionBackwardParams& p, const Scratch& scratch,
                            const Place& place, ChunkShared& s)
      : p_(p), f_(p.forward), scratch_(scratch), place_(place), s(s) {
    const int warp = threadIdx.x / kWarpSize;
    row_ = warp / 4 * 16;
    pair_column_ = warp % 4 * 8;
    channel_ = warp % 4 * 16;
    own_ = place.slot * f_.heads + place.h;
  }

  __device__ __forceinline__ void run(int64_t tokens) {
    load_factors(s.f, scratch_.factors_of(place_.slot, f_.heads, place_.h));
    if (threadIdx.x < kTokens) s.entered[threadIdx.x] = s.ended[threadIdx.x] = 0;
    if (threadIdx.x == 0) s.all = 0;
    if constexpr (kCorrects) store_dbeta(tokens);
#pragma unroll 1
    for (int64_t d = 0; d < f_.head_dim; d += kChannels) {
      multiply_states(d);
      load_channels(d);
      if constexpr (kPerChannel)
        add_pairs_per_channel(d);
      else
        add_pairs(d);
    }
    if (!kPerChannel && p_.dlog_decay.data) store_ddecay();
  }

 private:
  __device__ __forceinline__ const float* row_of(const float* rows, int64_t width) const {
    return rows + (place_.row(f_) * f_.heads + place_.h) * width;
  }

  // The parts of the slices of columns, in their order.
  __device__ __forceinline__ void store_dbeta(int64_t tokens) const {
    const int t = threadIdx.x;
    if (t >= place_.n) return;
    const int64_t slices = (f_.value_dim + kColumns - 1) / kColumns;
    float sum = 0;
    for (int64_t i = 0; i < slices; ++i)
      sum += scratch_.dbeta[(i * tokens + place_.row(f_) + t) * f_.heads + place_.h];
    *place_.gate(p_.dbeta, t) = sum;
  }

  __device__ __forceinline__ void load_state(float* to, const float* states, int64_t d, int64_t c) {
    const float* const own = states + own_ * f_.head_dim * f_.value_dim;
#pragma unroll 2
    for (int i = threadIdx.x; i < kChannels * kChannels; i += kThreads) {
      const int r = i / kChannels, x = i % kChannels;
      const bool exists = d + r < f_.head_dim && c + x < f_.value_dim;
      to[r * kKeyStep + x] = exists ? own[(d + r) * f_.value_dim + c + x] : 0;
    }
  }

  // dq_in, dk_in and dk_end of the channels from d on; dM and dN with the first of them.
  __device__ __forceinline__ void multiply_states(int64_t d) {
    auto& tiles = s.tiles.columns;
    float dq[2][4] = {}, dk[2][4] = {}, end[2][4] = {}, dm[1][4] = {}, dn[1][4] = {};
    float crossing = 0;
    const int64_t seq = f_.heads * f_.value_dim;
    const float* const of_channel = tiles.state + channel_ * kKeyStep;
#pragma unroll 1
    for (int64_t c = 0; c < f_.value_dim; c += kChannels) {
      __syncthreads();
      load_columns(tiles.dout, kKeyStep, kChannels,
                   p_.dout.data ? place_.at<T>(p_.dout, place_.h) : nullptr, p_.dout.seq, place_.n,
                   c, f_.value_dim);
      if constexpr (kCorrects) {
        load_columns(tiles.dy, kKeyStep, kChannels, row_of(scratch_.dy, f_.value_dim), seq,
                     place_.n, c, f_.value_dim);
        load_columns(tiles.u, kKeyStep, kChannels, row_of(scratch_.y, f_.value_dim), seq, place_.n,
                     c, f_.value_dim, s.f.beta);
      } else {
        load_columns(tiles.u, kKeyStep, kChannels, place_.at<T>(f_.v, place_.h), f_.v.seq, place_.n,
                     c, f_.value_dim);
      }
      load_state(tiles.state, scratch_.states, d, c);
      load_state(tiles.dstate, scratch_.dstates, d, c);
      __syncthreads();
      const int row = row_ * kKeyStep;
      multiply<false, true>(dq, tiles.dout + row, kKeyStep, of_channel, kKeyStep, kChannels);
      if constexpr (kCorrects)
        multiply<false, true>(dk, tiles.dy + row, kKeyStep, of_channel, kKeyStep, kChannels);
      multiply<false, true>(end, tiles.u + row, kKeyStep, of_channel + 2 * kKeyTile, kKeyStep,
                            kChannels);
      if (d == 0 && pair_column_ <= row_ + 8) {
        const float* const u = tiles.u + pair_column_ * kKeyStep;
        multiply<false, true>(dm, tiles.dout + row, kKeyStep, u, kKeyStep, kChannels);
        if constexpr (kCorrects)
          multiply<false, true>(dn, tiles.dy + row, kKeyStep, u, kKeyStep, kChannels);
      }
      // Four threads a channel.
      const int at = threadIdx.x / 4 * kKeyStep + threadIdx.x % 4;
      for (int x = 0; x < kChannels; x += 4)
        crossing = fmaf(tiles.state[at + x], tiles.dstate[at + x], crossing);
    }
    __syncthreads();
    crossing = quad_sum(crossing);
    if (threadIdx.x % 4 == 0) s.crossing[threadIdx.x / 4] = crossing;
    if (d == 0) {
      each_element(dm[0], [&](float x, int r, int c) {
        s.dm[(row_ + r) * kPairStep + pair_column_ + c] = x;
      });
      if constexpr (kCorrects)
        each_element(dn[0], [&](float x, int r, int c) {
          s.dn[(row_ + r) * kPairStep + pair_column_ + c] = x;
        });
    }
    store_tiles(dq, s.tiles.channels.dq);
    store_tiles(dk, s.tiles.channels.dk);
    store_tiles(end, s.tiles.channels.dk_end);
  }

  __device__ __forceinline__ void store_tiles(float (&x)[2][4], float* to) const {
#pragma unroll
    for (int t = 0; t < 2; ++t)
      each_element(x[t], [&](float y, int r, int c) {
        to[(row_ + r) * kKeyStep + channel_ + 8 * t + c] = y;
      });
  }
  __device__ __forceinline__ void load_tiles(float (&x)[2][4], const float* from) const {
#pragma unroll
    for (int t = 0; t < 2; ++t)
      each_element(x[t], [&](float& y, int r, int c) {
        y = from[(row_ + r) * kKeyStep + channel_ + 8 * t + c];
      });
  }

  __device__ __forceinline__ void load_channels(int64_t d) {
    auto& tiles = s.tiles.channels;
    load_keys(tiles.q, place_.at<T>(f_.q, place_.key_head), f_.q.seq, place_.n, f_.head_dim, d,
              s.f.query, nullptr, scratch_.vectors);
    load_keys(tiles.k, place_.at<T>(f_.k, place_.key_head), f_.k.seq, place_.n, f_.head_dim, d,
              s.f.key, nullptr, scratch_.vectors);
    __syncthreads();
  }

  // Stores rows of a gradient of the normalized q or k.
  __device__ __forceinline__ void store_rows(float* rows, const float* from, int64_t d) const {
    store_columns(const_cast<float*>(row_of(rows, f_.head_dim)), f_.heads * f_.head_dim, from,
                  kKeyStep, kChannels, place_.n, d, f_.head_dim);
  }

  // Decays per head, or none: dM and dN get the weights of their pairs.
  __device__ __forceinline__ void weigh_pairs() {
    const float* const m = scratch_.pairs_of(place_.slot, f_.heads, place_.h, kOfQueries);
    const float* const n = scratch_.pairs_of(place_.slot, f_.heads, place_.h, kOfKeys);
    const int lane = threadIdx.x % kWarpSize;
    double sum = 0;
    if (lane < place_.n && f_.log_decay.data)
      sum = log2_decay(*place_.gate(f_.log_decay, lane), kMinTokenDecay);
#pragma unroll
    for (int by = 1; by < kWarpSize; by *= 2) {
      const double before = __shfl_up_sync(kFullWarp, sum, by);
      if (lane >= by) sum += before;
    }
    // A warp takes row i, a lane column j. `later` of lane j: pairs from a token before j.
    for (int i = threadIdx.x / kWarpSize; i < kTokens; i += kWarps) {
      const double own = __shfl_sync(kFullWarp, sum, i);
      const int at = i * kPairStep + lane, pair = i * kTokens + lane;
      const float weight = lane > i ? 0 : lane == i ? 1 : exp2_exact(own - sum);
      const float dm = s.dm[at], dn = s.dn[at];
      const bool hidden = weight == 0;
      float cross = hidden || lane == i ? 0 : m[pair] * dm + n[pair] * dn;
      s.dm[at] = hidden ? 0 : f_.scale * weight * dm;
      s.dn[at] = hidden || lane == i ? 0 : -weight * dn;
      // Sums over j < t, kept by row.
#pragma unroll
      for (int by = 1; by < kWarpSize; by *= 2) {
        const float before = __shfl_up_sync(kFullWarp, cross, by);
        if (lane >= by) cross += before;
      }
      s.tiles.channels.dk_later[i * kKeyStep + lane] = cross;
    }
    __syncthreads();
    if (threadIdx.x < kTokens) {
      const int t = threadIdx.x;
      float of_token = 0;
      for (int i = t; i < kTokens && t > 0; ++i)
        of_token += s.tiles.channels.dk_later[i * kKeyStep + t - 1];
      s.crossings[t] = of_token;
    }
    __syncthreads();
  }

  // Gradients with decays per head, or none.
  __device__ __forceinline__ void add_pairs(int64_t d) {
    auto& tiles = s.tiles.channels;
    const int lane = threadIdx.x % kWarpSize;
    if (d == 0) weigh_pairs();
    for (int t = threadIdx.x / kWarpSize; t < kTokens; t += kWarps) {
      float entered = 0, ended = 0;
#pragma unroll
      for (int c = lane; c < kChannels; c += kWarpSize) {
        const int at = t * kKeyStep + c;
        const float dq = f_.scale * s.f.enter[t] * tiles.dq[at], dk = -s.f.enter[t] * tiles.dk[at],
                    end = s.f.stay[t] * tiles.dk_end[at];
        entered = fmaf(tiles.q[at], dq, fmaf(tiles.k[at], dk, entered));
        ended = fmaf(tiles.k[at], end, ended);
        tiles.dq[at] = dq;
        tiles.dk[at] = dk + end;
      }
      entered = warp_sum(entered);
      ended = warp_sum(ended);
      if (lane == 0) s.entered[t] += entered, s.ended[t] += ended;
    }
    if (threadIdx.x == 0)
      for (int c = 0; c < kChannels; ++c) s.all = fmaf(s.f.total[0], s.crossing[c], s.all);
    __syncthreads();
    float dq[2][4], dk[2][4];
    load_tiles(dq, tiles.dq);
    load_tiles(dk, tiles.dk);
    const float *const keys = tiles.k + channel_, *const queries = tiles.q + channel_;
    const float *const dm = s.dm + row_ * kPairStep, *const dn = s.dn + row_ * kPairStep;
    multiply<false, false>(dq, dm, kPairStep, keys, kKeyStep, kTokens);
    multiply<false, false>(dk, dn, kPairStep, keys, kKeyStep, kTokens);
    multiply<true, false>(dk, s.dm + row_, kPairStep, queries, kKeyStep, kTokens);
    multiply<true, false>(dk, s.dn + row_, kPairStep, keys, kKeyStep, kTokens);
    store_tiles(dq, tiles.dq);  // tiles of the warp only
    store_tiles(dk, tiles.dk);
    __syncthreads();
    store_rows(scratch_.dq, tiles.dq, d);
    store_rows(scratch_.dk, tiles.dk, d);
  }

  __device__ __forceinline__ void store_ddecay() const {
    const int t = threadIdx.x;
    if (t >= place_.n) return;
    float sum = s.crossings[t] + s.all;
    for (int i = t; i < place_.n; ++i) sum += s.entered[i];
    for (int j = 0; j < t; ++j) sum += s.ended[j];
    *place_.gate(p_.dlog_decay, t) = sum;
  }

  // Gradients with decays per channel, which multiply inside the products of pairs.
  __device__ __forceinline__ void add_pairs_per_channel(int64_t d) {
    const int channel = threadIdx.x % kChannels, task = threadIdx.x / kChannels;
    begin_channels(d);
    __syncthreads();
    if (task < 2) decay_block(channel, task);
    __syncthreads();
    multiply_blocks();
    __syncthreads();
    if (task < 2)
      add_earlier(channel, task % 2 * kBlock);
    else
      add_later(channel, task % 2 * kBlock);
    __syncthreads();
    if (p_.dlog_decay.data && threadIdx.x < kChannels && d + channel < f_.head_dim)
      store_ddecay_of(channel, d);
    __syncthreads();
    store_channels(d);
  }

  __device__ __forceinline__ void begin_channels(int64_t d) {
    auto& tiles = s.tiles.channels;
    const float* const gates = f_.log_decay.data + place_.b * f_.log_decay.batch +
                               place_.token * f_.log_decay.seq + place_.h * f_.log_decay.head;
    const int64_t of_channels = own_ * kTokens * f_.head_dim;
    for (int i = threadIdx.x; i < kTokens * kChannels; i += kThreads) {
      const int t = i / kChannels, c = i % kChannels, at = t * kKeyStep + c;
      const bool exists = t < place_.n && d + c < f_.head_dim;
      const int64_t factor = of_channels + t * f_.head_dim + d + c;
      const float x = exists ? gates[t * f_.log_decay.seq + d + c] : 0;
      const float enter = exists ? scratch_.enters[factor] : 0;
      const float stay = exists ? scratch_.stays[factor] : 0;
      tiles.gates[at] = kLog2e * (x < kMinTokenDecay ? kMinTokenDecay : x);
      tiles.dq[at] *= f_.scale * enter;
      tiles.dk[at] *= -enter;
      tiles.dk_end[at] *= stay;
      tiles.dk_later[at] = 0;
    }
    if (d > 0) return;
    for (int i = threadIdx.x; i < kTokens * kTokens; i += kThreads) {
      const int row = i / kTokens, column = i % kTokens, at = row * kPairStep + column;
      s.dm[at] = column <= row ? f_.scale * s.dm[at] : 0;
      if constexpr (kCorrects) s.dn[at] = column < row ? -s.dn[at] : 0;
    }
  }

  __device__ __forceinline__ void decay_block(int c, int block) {
    auto& tiles = s.tiles.channels;
    float sum = 0;
    if (block == 0) {
      for (int j = kBlock; j-- > 0;) {
        const float weight = exp2_approx(sum);
        tiles.weights[j * kKeyStep + c] = weight;
        tiles.k_early[j * kKeyStep + c] = weight * tiles.k[j * kKeyStep + c];
        sum += tiles.gates[j * kKeyStep + c];
      }
      return;
    }
    for (int i = 0; i < kBlock; ++i) {
      const int at = (kBlock + i) * kKeyStep + c;
      sum += tiles.gates[at];
      const float weight = exp2_approx(sum);
      tiles.weights[at] = weight;
      tiles.q_block[i * kKeyStep + c] = weight * tiles.q[at];
      if constexpr (kCorrects) tiles.k_block[i * kKeyStep + c] = weight * tiles.k[at];
    }
  }

  // Pairs of a token of the second block and one of the first. A warp owns 8 channels.
  __device__ __forceinline__ void multiply_blocks() {
    auto& tiles = s.tiles.channels;
    const int column = threadIdx.x / kWarpSize * 8, later = kBlock * kPairStep;
    float dq[1][4] = {}, dk[1][4] = {}, dk_later[1][4] = {};
    const float* const keys = tiles.k_early + column;
    multiply<false, false>(dq, s.dm + later, kPairStep, keys, kKeyStep, kBlock);
    multiply<true, false>(dk_later, s.dm + later, kPairStep, tiles.q_block + column, kKeyStep,
                          kBlock);
    if constexpr (kCorrects) {
      multiply<false, false>(dk, s.dn + later, kPairStep, keys, kKeyStep, kBlock);
      multiply<true, false>(dk_later, s.dn + later, kPairStep, tiles.k_block + column, kKeyStep,
                            kBlock);
    }
    const auto add = [&](float* to, float (&x)[1][4], int row) {
      each_element(x[0], [&](float y, int r, int c) {
        const int at = (row + r) * kKeyStep + column + c;
        to[at] = fmaf(tiles.weights[at], y, to[at]);
      });
    };
    add(tiles.dq, dq, kBlock);
    if constexpr (kCorrects) add(tiles.dk, dk, kBlock);
    add(tiles.dk_later, dk_later, 0);
  }

  // dq and dk of the tokens of a block, from earlier keys of it.
  __device__ __forceinline__ void add_earlier(int c, int first) {
    auto& tiles = s.tiles.channels;
#pragma unroll 1
    for (int i = first + 1; i < first + kBlock; ++i) {
      float sum = 0, dq = 0, dk = 0;
      for (int j = i; j-- > first;) {
        sum += tiles.gates[(j + 1) * kKeyStep + c];
        const float key = tiles.k[j * kKeyStep + c] * exp2_approx(sum);
        dq = fmaf(s.dm[i * kPairStep + j], key, dq);
        if constexpr (kCorrects) dk = fmaf(s.dn[i * kPairStep + j], key, dk);
      }
      tiles.dq[i * kKeyStep + c] += dq;
      if constexpr (kCorrects) tiles.dk[i * kKeyStep + c] += dk;
    }
  }

  // dk of the tokens of a block, from later tokens of it.
  __device__ __forceinline__ void add_later(int c, int first) {
    auto& tiles = s.tiles.channels;
#pragma unroll 1
    for (int j = first; j < first + kBlock; ++j) {
      float sum = 0, dk = 0;
      for (int i = j + 1; i < first + kBlock; ++i) {
        sum += tiles.gates[i * kKeyStep + c];
        float of_row = s.dm[i * kPairStep + j] * tiles.q[i * kKeyStep + c];
        if constexpr (kCorrects) of_row += s.dn[i * kPairStep + j] * tiles.k[i * kKeyStep + c];
        dk = fmaf(exp2_approx(sum), of_row, dk);
      }
      tiles.dk_later[j * kKeyStep + c] += dk;
    }
  }

  // Sums over the rows that a pair ends in, less those that it begins in.
  __device__ __forceinline__ void store_ddecay_of(int c, int64_t d) {
    auto& tiles = s.tiles.channels;
    const float total = scratch_.enters[(own_ * kTokens + kTokens - 1) * f_.head_dim + d + c];
    float after = total * s.crossing[c], pairs = 0;
    for (int t = 0; t < kTokens; ++t) {
      tiles.weights[t * kKeyStep + c] = after;
      after = fmaf(tiles.k[t * kKeyStep + c], tiles.dk_end[t * kKeyStep + c], after);
    }
    for (int t = place_.n; t-- > 0;) {
      const int at = t * kKeyStep + c;
      const float q = tiles.q[at], k = tiles.k[at];
      pairs += fmaf(q, tiles.dq[at], k * tiles.dk[at]) - k * tiles.dk_later[at];
      place_.gate(p_.dlog_decay, t)[d + c] = tiles.weights[at] + pairs;
    }
  }

  __device__ __forceinline__ void store_channels(int64_t d) {
    auto& tiles = s.tiles.channels;
    for (int i = threadIdx.x; i < kTokens * kChannels; i += kThreads) {
      const int t = i / kChannels, at = t * kKeyStep + i % kChannels;
      const float own = s.dm[t * kPairStep + t];
      tiles.dq[at] = fmaf(own, tiles.k[at], tiles.dq[at]);
      tiles.dk[at] = fmaf(own, tiles.q[at], tiles.dk[at] + (tiles.dk_later[at] + tiles.dk_end[at]));
    }
    __syncthreads();
    store_rows(scratch_.dq, tiles.dq, d);
    store_rows(scratch_.dk, tiles.dk, d);
  }

  const DeltaAttentionBackwardParams& p_;
  const DeltaAttentionParams& f_;
  const Scratch& scratch_;
  const Place& place_;
  ChunkShared& s;
  int row_, pair_column_, channel_;
  int64_t own_;
};

template <typename T, bool kPerChannel, bool kCorrects>
__global__ void __launch_bounds__(kThreads, kPerChannel ? 1 : kBlocksOfMultiprocessor)
    delta_chunk_kernel(const __grid_constant__ DeltaAttentionBackwardParams p,
                       const __grid_constant__ Scratch scratch, int64_t tokens) {
  extern __shared__ float4 shared[];
  const DeltaAttentionParams& f = p.forward;
  const auto clear_gate = [](const LooseRows& rows, const TokenGates& g, int64_t h, int64_t width) {
    if (g.data) rows.fill(g.data + h * g.head, g.seq, width, 0);
  };
  const Place place = place_of_block(f, [&](const LooseRows& rows, int64_t h) {
    rows.fill(rows_at<T>(p.dv, 0, 0, h), p.dv.seq, f.value_dim, 0);
    rows.fill(scratch.dq + h * f.head_dim, f.heads * f.head_dim, f.head_dim, 0);
    rows.fill(scratch.dk + h * f.head_dim, f.heads * f.head_dim, f.head_dim, 0);
    clear_gate(rows, p.dbeta, h, 1);
    clear_gate(rows, p.dlog_decay, h, f.per_channel ? f.head_dim : 1);
  });
  if (place.n == 0) return;
  ChunkGradients<T, kPerChannel, kCorrects>(p, scratch, place,
                                            *reinterpret_cast<ChunkShared*>(shared))
      .run(tokens);
}

// Gradient of a row of q or k from that of the normalized row, summed over its value heads: dx of
// x r with r = (|x|^2 + epsilon)^-1/2.
template <typename T>
__device__ __forceinline__ void finish_row(const DeltaAttentionParams& f, const Rows& x,
                                           const Rows& dx, const float* gradients, int64_t b,
                                           int64_t t, int64_t key_head) {
  constexpr int kEach = 256 / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t group = f.heads / f.key_heads;
  const T* const row = rows_at<T>(x, b, t, key_head);
  float value[kEach], sum[kEach], squares = 0, along = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int64_t d = lane + e * kWarpSize;
    value[e] = sum[e] = 0;
    if (d >= f.head_dim) continue;
    for (int64_t h = 0; h < group; ++h) sum[e] += gradients[h * f.head_dim + d];
    if (!f.l2norm) continue;
    value[e] = static_cast<float>(row[d]);
    squares = fmaf(value[e], value[e], squares);
    along = fmaf(value[e], sum[e], along);
  }
  if (f.l2norm) {
    const float r = 1 / sqrtf(warp_sum(squares) + kL2NormEpsilon);
    along = warp_sum(along) * r * r;
#pragma unroll
    for (int e = 0; e < kEach; ++e) sum[e] = (sum[e] - along * value[e]) * r;
  }
  T* const to = rows_at<T>(dx, b, t, key_head);
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    if (lane + e * kWarpSize < f.head_dim) to[lane + e * kWarpSize] = static_cast<T>(sum[e]);
}

// dq and dk, a warp for each token and head of them.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksOfMultiprocessor)
    delta_finish_kernel(const __grid_constant__ DeltaAttentionBackwardParams p,
                        const __grid_constant__ Scratch scratch, int64_t tokens) {
  const DeltaAttentionParams& f = p.forward;
  const int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (item >= tokens * f.key_heads) return;
  const int64_t row = item / f.key_heads, key_head = item % f.key_heads;
  const int64_t b = f.cu_seqlens ? 0 : row / f.seqlen, t = row - b * f.seqlen;
  const int64_t group = f.heads / f.key_heads;
  const int64_t at = (row * f.heads + key_head * group) * f.head_dim;
  finish_row<T>(f, f.q, p.dq, scratch.dq + at, b, t, key_head);
  finish_row<T>(f, f.k, p.dk, scratch.dk + at, b, t, key_head);
}

}  // namespace tokenmill::cuda::delta_attention
