// sm_90a main loop of the forwards: what a consumer warpgroup makes of the tiles of K and V that
// the producer warp loads.
//
//   S = Q K^T    P = 2^(factor S - row_max) or sigmoid(scale S + bias)    O += P V
//
// In unmasked tiles Q K^T of tile j + 1 and P V of tile j run under the softmax of tile j + 1.
#pragma once
#include "attention/masked_values_sm90.cuh"
#include "cuda/arch/sm90/mbarrier.cuh"

namespace tokenmill::cuda {

// Keys begin .. end - 1, counted from the first key of a tile.
struct KeySpan {
  int begin, end;
};

// Where keys come from: base of the iterators over the key tiles that 64 rows may see. An iterator
// also has
//   is_left()               there is a tile
//   next(number)            goes to the next tile, which is tile `number` of the pipeline
//   sees_any(), sees_all()  some row sees some key of the tile; all rows see all keys
//   seen()                  keys that all rows see
//   bounds(own)             columns that the thread's two rows see, counted from column `own`
//   end()                   end of the keys that some row sees, for tiles of more than 64 keys
struct Sm90Tiles {
  // True if `next` waits for K of the tile, with which the mask of the tile comes.
  static constexpr bool kWaitsForKeys = false;
  // Some row of the warp exists. A warp without rows only takes part in the products.
  static __device__ bool has_rows() { return true; }
  // Some row may not see a value that was loaded and not cleared.
  static __device__ bool hides_values() { return true; }
  // Clears values that were loaded and that no row sees. A fence follows the stores.
  static __device__ void clear_values(uint32_t) {}
};

// Pipeline of a consumer warpgroup, and O [64, kColumns] in its registers. Shared memory holds the
// stages k and v, their mbarriers k_full, k_empty, v_full and v_empty, and `finite_values`, memory
// for kFiniteKeys values made finite; kFiniteInKeys: it is the K stage of the same tile.
template <typename T, typename Shape, typename Shared, typename ScoreMap>
class Sm90Mainloop {
 public:
  static constexpr int kKeys = Shape::kTileKeys, kColumns = Shape::kColumns;

  __device__ Sm90Mainloop(Shared& shared, const Sm90Scores& scores, int warpgroup)
      : shared_(shared), scores_(scores), warpgroup_(warpgroup) {}

  // O = P V over all tiles. queries: shared-memory address of Q.
  template <typename Tiles>
  __device__ __forceinline__ void run(Tiles& tiles, uint32_t queries, ScoreMap& weights) {
    queries_ = queries;
#pragma unroll
    for (float& o : o_) o = 0;
#pragma unroll 1
    while (tiles.is_left()) {
      if (!tiles.sees_any())
        skip_tile(tiles);
      else if (tiles.sees_all())
        mainloop_unmasked(tiles, weights);
      else
        mainloop_masked(tiles, weights);
    }
  }

  __device__ const float (&o() const)[kColumns / 2] { return o_; }

 private:
  template <typename Tiles>
  __device__ __forceinline__ void skip_tile(Tiles& tiles) {
    const Stage<Shape> stage(number_);
    if constexpr (!Tiles::kWaitsForKeys) shared_.k_full[stage.index].wait(stage.parity);
    release(shared_.k_empty[stage.index]);
    shared_.v_full[stage.index].wait(stage.parity);
    release(shared_.v_empty[stage.index]);
    tiles.next(++number_);
  }

  // Unmasked tiles from the current one on, as many as follow each other.
  template <typename Tiles>
  __device__ __forceinline__ void mainloop_unmasked(Tiles& tiles, ScoreMap& weights) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 4] = {};
    // S = Q K^T and P = f(S) of the first tile
    multiply_keys<Tiles>(s, number_);
    finish_keys<0>(s, number_);
    if (tiles.has_rows()) {
      scores_.cap(s);
      weights.apply_map(s);
      weights.rescale(o_);
      pack_weights(p, s, weights);
    }
#pragma unroll 1
    for (tiles.next(number_ + 1); tiles.sees_all(); tiles.next(++number_ + 1)) {
      // Issue S_next = Q K_next^T and O += P V, then compute P_next = f(S_next) under them
      multiply_keys<Tiles>(s, number_ + 1);
      multiply_values(p, number_);
      finish_keys<1>(s, number_ + 1);
      if (tiles.has_rows()) {
        scores_.cap(s);
        weights.apply_map(s);
      }
      finish_values(number_);
      if (tiles.has_rows()) {
        weights.rescale(o_);
        pack_weights(p, s, weights);
      }
    }
    // O += P V of the last tile
    multiply_values(p, number_);
    finish_values(number_);
    ++number_;
  }

  // A tile cut by a mask or by the end of the keys.
  template <typename Tiles>
  __device__ __forceinline__ void mainloop_masked(Tiles& tiles, ScoreMap& weights) {
    if constexpr (kKeys > 64)
      if (tiles.end() <= 64) return masked_tile<64>(tiles, weights);
    masked_tile<kKeys>(tiles, weights);
  }

  // Such a tile, whose rows see keys only in the first kSeen.
  template <int kSeen, typename Tiles>
  __device__ __forceinline__ void masked_tile(Tiles& tiles, ScoreMap& weights) {
    float s[kSeen / 2];
    uint32_t p[kSeen / 4] = {};
    const Stage<Shape> stage(number_);
    // S = Q K^T
    multiply_keys<Tiles>(s, number_);
    wait_for_product<0>(s);
    if (!Shared::kFiniteInKeys) release(shared_.k_empty[stage.index]);
    // P = f(S), 0 where masked
    const KeySpan seen = tiles.seen();
    if (tiles.has_rows()) {
      scores_.cap(s);
      tiles.bounds(2 * static_cast<int>(threadIdx.x % 4)).hide(s, seen.begin > 0, seen.end < kSeen);
      weights.apply_map(s);
      weights.rescale(o_);
      pack_weights(p, s, weights);
    }
    // O += P V, without products of masked pairs: 0 times Inf or NaN would be NaN
    shared_.v_full[stage.index].wait(stage.parity);
    const uint32_t values = shared_address(shared_.v[stage.index]);
    tiles.clear_values(values);
    const bool infinite = tiles.hides_values() &&
                          has_nonfinite<T, kColumns, kKeys, kSeen>(values, seen.begin, seen.end);
    if (any_in_warpgroup(warpgroup_, infinite))
      multiply_seen_values<T, kKeys, Shared::kFiniteKeys>(
          o_, p, values, shared_address(shared_.finite_values(warpgroup_, stage.index)), warpgroup_,
          tiles.bounds(0));
    else
      start_pv<T, kKeys>(o_, p, values);
    // V was read through the generic proxy, and the next TMA copy overwrites it
    fence_stores();
    if (Shared::kFiniteInKeys) release(shared_.k_empty[stage.index]);
    finish_values(number_);
    tiles.next(++number_);
  }

  // S = Q K^T
  template <typename Tiles, int kCount>
  __device__ __forceinline__ void multiply_keys(float (&s)[kCount], unsigned number) {
    const Stage<Shape> stage(number);
    if constexpr (!Tiles::kWaitsForKeys) shared_.k_full[stage.index].wait(stage.parity);
    start_qk<T, Shape::kHeadDim, kKeys>(s, queries_, shared_address(shared_.k[stage.index]));
  }
  template <int kPending, int kCount>
  __device__ __forceinline__ void finish_keys(float (&s)[kCount], unsigned number) {
    wait_for_product<kPending>(s);
    release(shared_.k_empty[Stage<Shape>(number).index]);
  }
  // O += P V
  __device__ __forceinline__ void multiply_values(const uint32_t (&p)[kKeys / 4], unsigned number) {
    const Stage<Shape> stage(number);
    shared_.v_full[stage.index].wait(stage.parity);
    start_pv<T, kKeys>(o_, p, shared_address(shared_.v[stage.index]));
  }
  __device__ __forceinline__ void finish_values(unsigned number) {
    wait_for_product<0>(o_);
    release(shared_.v_empty[Stage<Shape>(number).index]);
  }

  Shared& shared_;
  const Sm90Scores& scores_;
  int warpgroup_;
  uint32_t queries_;
  unsigned number_ = 0;  // index of the next key tile
  float o_[kColumns / 2];
};

}  // namespace tokenmill::cuda
