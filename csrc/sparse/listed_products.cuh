// One warp of the forward of attention over lists: S = Q K^T for a step of keys, softmax,
// and O += P V. The mask is supplied by the caller.
#pragma once
#include "attention/masked_values.cuh"
#include "attention/online_softmax.cuh"
#include "attention/qk.cuh"
#include "attention/stage_addresses.cuh"
#include "attention/tile_shape.cuh"
#include "cuda/load_tile.cuh"

namespace tokenmill::cuda {

// A warp owns 32 rows with Q in registers, or 16 with Q in shared memory if rows are wide; two
// warps share 256 columns of float32, whose accumulators leave no room in one warp. Q takes half of
// the shared memory left by the stages, so that CTAs fit the 99 KiB of smaller GPUs.
template <typename T, int kBucket>
struct ListedShape : ForwardShape<T, kBucket> {
  using Base = ForwardShape<T, kBucket>;
  static constexpr bool kWide = Base::kRowBytes > 256;
  static constexpr bool kQueryInRegisters = !kWide;
  static constexpr int kStepKeys = kWide ? kMmaDepth<T> : Base::kStepKeys;
  static constexpr int kMaskedKeys = kStepKeys < 16 ? kStepKeys : 16;  // per step with masks
  static_assert(Base::kRowTiles == (kWide ? 1 : 2));

  static constexpr int kColumnWarps = Base::kRowBytes > 512 ? 2 : 1;
  static constexpr int kMaxRowWarps = kWide ? 32768 / (16 * Base::kRowBytes) : 4;
  static constexpr int kMinRowWarps = kColumnWarps > 1 ? kMaxRowWarps : 1;
  static constexpr int kMaxThreads = kMaxRowWarps * kColumnWarps * kWarpSize;
  // Minimum CTAs per SM; 0: ptxas decides. For wide float32 rows ptxas would aim higher and spill.
  static constexpr int kMinBlocks = kWide && Base::kFloat ? 1 : 0;
};

template <typename T, int kBucket>
class ListedProducts {
 public:
  using Shape = ListedShape<T, kBucket>;
  using Addresses = StageAddresses<Shape, !Shape::kFloat && kBucket == 128>;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kColumns = kBucket / Shape::kColumnWarps;  // columns of V
  static constexpr int kTiles = kColumns / 8;

  static __device__ int row_warp() { return threadIdx.x / kWarpSize % row_warps(); }
  static __device__ int first_column() {
    return Shape::kColumnWarps > 1 ? threadIdx.x / kWarpSize / row_warps() * kColumns : 0;
  }

  // Addresses within a stage.
  static __device__ __forceinline__ Addresses addresses(uint32_t stage) {
    Addresses at(stage);
    if constexpr (Shape::kColumnWarps > 1) {
      static_assert(kColumns * sizeof(T) % (8 * kChunkBytes) == 0);
#pragma unroll
      for (uint32_t& x : at.value)
        x += first_column() * static_cast<int>(sizeof(T)), opt_barrier(x);
    }
    return at;
  }

 protected:
  static constexpr int kDepth = kMmaDepth<T>;

  __device__ ListedProducts() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        out_[m][n][0] = out_[m][n][1] = out_[m][n][2] = out_[m][n][3] = 0;
      // With these values the first weights of a row overflow, which triggers the update of
      // row_max.
      neg_row_max_[m][0] = neg_row_max_[m][1] = kFloatMax;
      sum_[m][0] = sum_[m][1] = 0;
    }
  }

  // Loads `columns` elements of each row from global memory; aligned: these are whole chunks. Row l
  // of the warp is at `row` of lane l.
  __device__ __forceinline__ void load_queries(const T* row, int columns, bool aligned) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const T* from = reinterpret_cast<const T*>(
          __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(row), 8 * r + lane / 4));
#pragma unroll
      for (int j = 0; j < Shape::kSlices; ++j) {
        const int column = (4 * j + lane % 4) * (kChunkBytes / static_cast<int>(sizeof(T)));
        uint32_t (&words)[4] = q_[r / 2][j].words[r % 2];
        if (aligned) {
          uint4 x{0, 0, 0, 0};
          if (column < columns) x = *reinterpret_cast<const uint4*>(from + column);
          words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
        } else {
          load_elements(words, from, column, columns);
        }
      }
    }
  }

  // Q in shared memory; `queries` is the address of the CTA's rows.
  __device__ __forceinline__ void find_queries(uint32_t queries) {
    query_.find(queries + row_warp() * 16 * Shape::kRowBytes, threadIdx.x % kWarpSize);
  }

  // One step of keys: rows of kCount tiles from kFirst on against kKeys keys from kOffset on at
  // `at`. score_mod(s) is applied to S; afterwards exponents are s times factor, and -inf masks a
  // pair. It returns true if any pair is masked; sees(half, key) tells which, null: no pair can be.
  // `positive` is always positive, which the compiler cannot know.
  template <int kFirst, int kCount, int kKeys, int kOffset, typename ScoreMod, typename Sees>
  __device__ __forceinline__ void add_step(const Addresses& at, float factor, int positive,
                                           const ScoreMod& score_mod, const Sees& sees) {
    float s[kCount][kKeys / 8][4];
    // S = Q K^T
    multiply_keys<kFirst, kOffset>(s, at);
    const bool cut = score_mod(s);
    Fragment<T, 4> p[kCount][kKeys / kDepth];
    // online softmax: P = 2^(factor S - row_max), rescale O where row_max grows
    if constexpr (kUpdatesFirst) {
      constexpr int kMask = ((1 << kCount) - 1) << kFirst;
      int update = empty_ & kMask;
      empty_ &= ~kMask;
      float sums[kCount][2];
#pragma unroll 1
      for (;;) {
        if (update) update_row_max<kFirst, true>(s, factor, neg_row_max_, sum_, out_);
        if (!exponentiate<kFirst>(s, factor, neg_row_max_, p, sums) || update) break;
        update = 1;
        opt_barrier(update);
      }
#pragma unroll
      for (int m = 0; m < kCount; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) sum_[kFirst + m][h] += sums[m][h];
    } else {
      softmax_weights<kFirst, true>(s, factor, neg_row_max_, sum_, out_, p);
    }
    const auto before = [&](auto pair) {
      if constexpr (kBucket == 128 && pair == kColumns / 32) end_block<kOffset + 1>(positive);
    };
    if constexpr (!std::is_same_v<Sees, std::nullptr_t>) {
      if (cut && !all_finite<T, kKeys, kTiles>(at)) {
        multiply_seen_values<T, kFirst, kKeys>(out_, p, at, before, sees);
        // O += P V, without masked pairs, whose V may be Inf or NaN
        return;
      }
    }
    multiply_values<T, kFirst, kOffset>(out_, p, at, before);
    // O += P V
  }

  float out_[kRowTiles][kTiles][4];
  float neg_row_max_[kRowTiles][2], sum_[kRowTiles][2];  // for rows g, g + 8; sums of this lane

 private:
  static __device__ int row_warps() {
    return Shape::kColumnWarps > 1 ? Shape::kMaxRowWarps : Shape::kMaxThreads / kWarpSize;
  }

  template <int kFirst, int kOffset, int kCount, int kKeyTiles>
  __device__ __forceinline__ void multiply_keys(float (&s)[kCount][kKeyTiles][4],
                                                const Addresses& at) const {
    if constexpr (Shape::kQueryInRegisters)
      multiply_held<T, Shape::kSlices, kOffset>(s, at,
                                                [&](int m, auto j) { return q_[kFirst + m][j]; });
    else
      multiply_shared<T, kOffset>(s, at, query_);
  }

  // With many keys in the first step, its row_max is updated first, so that the weights are not
  // computed twice.
  static constexpr bool kUpdatesFirst = Shape::kStepKeys > 16;
  int empty_ = (1 << kRowTiles) - 1;  // bit mask of row tiles that have seen no key
  SharedQueries<Shape> query_;
  QuerySlice q_[kRowTiles][Shape::kQueryInRegisters ? Shape::kSlices : 1];
};

}  // namespace tokenmill::cuda
