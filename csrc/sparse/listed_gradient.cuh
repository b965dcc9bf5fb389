// One warp of the backward: 16 or 32 rows of queries or keys, and the products that they take part
// in.
#pragma once
#include "attention/mask.cuh"
#include "attention/score_mod_backward.cuh"
#include "cuda/arch/ldmatrix.cuh"
#include "cuda/arch/mma_sm80.cuh"
#include "sparse/listed_keys.cuh"

namespace tokenmill::cuda {

// x is the operand of the scores (Q or K), y the other tensor (dO or V). A CTA owns rows of one
// side; rows of the other side stream past.
template <typename T, int kBucket, Side kSide>
struct GradientShape {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr bool kKeys = kSide == Side::keys;
  static constexpr int kRowBytes = kBucket * static_cast<int>(sizeof(T));
  using Tile = SharedTile<kRowBytes, Swizzle::plain>;

  static constexpr int kTileRows = kRowBytes <= 128 ? 64 : kRowBytes <= 256 ? 32 : 16;
  static constexpr int kTileBytes = kTileRows * kRowBytes;
  // Streamed queries come with minus lse and minus delta.
  static constexpr int kStatisticsBytes = kKeys ? 2 * kTileRows * 4 : 0;
  static constexpr int kStageBytes = 2 * kTileBytes + kStatisticsBytes;

  // Two warps share 256 columns of dK and dV, whose accumulators do not fit in one warp.
  static constexpr int kColumnWarps = kKeys && kBucket == 256 ? 2 : 1;
  static constexpr int kColumns = kBucket / kColumnWarps;
  // 16-row tiles per warp. The warp's rows are held in registers as operands where they fit.
  static constexpr int kRowTiles = !kKeys && kRowBytes <= 128 ? 2 : 1, kWarpRows = 16 * kRowTiles;
  static constexpr bool kLeftInRegisters = kRowBytes <= (kKeys ? 128 : 256);
  static constexpr int kMaxRowWarps = kRowBytes <= 128 ? 8 / kRowTiles : 32768 / (32 * kRowBytes);
  static constexpr int kMaxThreads = kMaxRowWarps * kColumnWarps * kWarpSize;

  static constexpr int kStep = kMmaDepth<T>;  // streamed rows per step
};

template <typename T, int kBucket, Side kSide, typename Shape_ = GradientShape<T, kBucket, kSide>>
class GradientWarp {
 public:
  using Shape = Shape_;
  using Tile = typename Shape::Tile;
  static constexpr bool kKeys = Shape::kKeys;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kBlocks = Shape::kColumns / 16;
  static constexpr int kStep = Shape::kStep, kStepTiles = kStep / 8;

  // `owned`: address of the CTA's rows in shared memory: x, then y.
  __device__ GradientWarp(const AttentionParams& p, float factor, int row_warps, uint32_t owned)
      : row_warp_(threadIdx.x / kWarpSize % row_warps),
        first_column_(threadIdx.x / kWarpSize / row_warps * Shape::kColumns),
        softcap_(p.softcap),
        scale_(p.scale),
        factor_(factor) {
    const int lane = threadIdx.x % kWarpSize;
    left_ = owned + first() * Shape::kRowBytes + Tile::offset(lane % 16, lane / 16);
    left_y_ = row_warps * Shape::kWarpRows * Shape::kRowBytes;
    rows_ = Tile::offset(lane % 8, lane / 8);
    columns_ = (Shape::kFloat ? Tile::offset(lane % 4 * 2, lane / 16) + lane / 4 % 4 * 4
                              : Tile::offset(lane % 16, lane / 16)) +
               first_column_ * static_cast<int>(sizeof(T));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          of_x_[m][i][j] = 0;
          if constexpr (kKeys) of_y_[m][i][j] = 0;
        }
  }

  // Loads the owned operands; the rows must have arrived in shared memory.
  __device__ __forceinline__ void load_left() {
    if constexpr (Shape::kLeftInRegisters)
      unroll<kRowTiles>([&](auto m) {
        unroll<kDepths>([&](auto k) {
          load_left<m, k>(x_[m][k], left_);
          load_left<m, k>(y_[m][k], left_ + left_y_);
        });
      });
  }

  // First row of this warp within the CTA.
  __device__ int first() const { return Shape::kWarpRows * row_warp_; }

  __device__ bool is_plain() const { return softcap_ <= 0; }

  // Row tiles kFirst ... kFirst + kCount - 1 against kStep streamed rows from `row` on of the tile
  // at `stage`. statistic(kind, m, n, i): minus lse in log2 units (0) or minus delta (1) for
  // element i of accumulator n of row tile m. kPlain: no mask and no softcap; else the mask is
  // sees(m, n, i).
  template <bool kPlain, int kFirst, int kCount, typename Statistic, typename Sees>
  __device__ __forceinline__ void add_step(uint32_t stage, int row, const Statistic& statistic,
                                           const Sees& sees) {
    const uint32_t x = stage + row * Shape::kRowBytes, y = x + Shape::kTileBytes;
    float s[kCount][kStepTiles][4], dp[kCount][kStepTiles][4];
#pragma unroll
    // dP accumulates from minus delta
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0, dp[m][n][i] = statistic(1, kFirst + m, n, i);
    // S = x x'^T, dP = y y'^T, x' and y' being the streamed rows
    multiply_rows<kFirst>(s, x_, left_, x + rows_);
    multiply_rows<kFirst>(dp, y_, left_ + left_y_, y + rows_);
    Fragment<T, 4> weights[kCount], slopes[kCount];
#pragma unroll
    // P = 2^(score_mod(S) - lse), dS = P (dP - delta)
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
        float w[4], ds[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float minus_lse = statistic(0, kFirst + m, n, i);
          float through = 1, exponent = fmaf(s[m][n][i], factor_, minus_lse);
          if (!kPlain && softcap_ > 0) {
            const Softcapped capped = softcap_with_slope(s[m][n][i] * scale_, softcap_);
            exponent = fmaf(capped.z, kLog2e, minus_lse);
            through = capped.slope;
          }
          const bool seen = kPlain || sees(kFirst + m, n, i);
          w[i] = seen ? exp2_approx(exponent) : 0;
          ds[i] = seen ? w[i] * dp[m][n][i] * through : 0;
        }
        if constexpr (kKeys) to_left(weights[m], n, w);
        to_left(slopes[m], n, ds);
      }
    // keys: dV += P dO, dK += dS Q; queries: dQ += dS K
    if constexpr (kKeys) accumulate<kFirst>(of_y_, weights, y + columns_);
    accumulate<kFirst>(of_x_, slopes, x + columns_);
  }

  // Stores the sums of rows r < rows of this warp to row_of(r), `dim` columns each.
  template <bool kOfX, typename RowOf>
  __device__ __forceinline__ void store(float factor, int rows, int dim, const RowOf& row_of) {
    const int lane = threadIdx.x % kWarpSize;
    const bool pairs = dim % 2 == 0;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int r = lane / 4 + 8 * i, m = i / 2, half = i % 2;
      if (r >= rows) continue;
      T* to = row_of(r);
#pragma unroll
      for (int n = 0; n < 2 * kBlocks; ++n) {
        const int column = first_column_ + 8 * n + lane % 4 * 2;
        const float (&sums)[4] = kOfX ? of_x_[m][n] : of_y_[kKeys ? m : 0][kKeys ? n : 0];
        const float both[2] = {sums[2 * half] * factor, sums[2 * half + 1] * factor};
        if (pairs && column < dim) store_floats(to + column, both);
        if (pairs) continue;
        if (column < dim) to[column] = static_cast<T>(both[0]);
        if (column + 1 < dim) to[column + 1] = static_cast<T>(both[1]);
      }
    }
  }

 protected:
  static constexpr int kDepths = Shape::kRowBytes / 32;  // MMA k-steps along a row
  using Left =
      uint32_t[Shape::kLeftInRegisters ? kRowTiles : 1][Shape::kLeftInRegisters ? kDepths : 1][4];

  template <int kRowTile, int kPart>
  static __device__ __forceinline__ void load_left(uint32_t (&to)[4], uint32_t left) {
    at_half_part<Tile, kPart>(left, [&](uint32_t at, auto offset) {
      ldmatrix<decltype(offset)::value + kRowTile * 16 * Shape::kRowBytes>(to, at);
    });
  }

  // out += A B^T: A is the row tiles from kFirst on, in registers or at `left`; B is kStep rows at
  // `right`.
  template <int kFirst, int kCount>
  static __device__ __forceinline__ void multiply_rows(float (&out)[kCount][kStepTiles][4],
                                                       const Left& words, uint32_t left,
                                                       uint32_t right) {
    unroll<Shape::kRowBytes / 64>([&](auto part) {
      Fragment<T, 4> a[kCount][2];
      unroll<kCount>([&](auto m) {
        unroll<2>([&](auto k) {
          if constexpr (Shape::kLeftInRegisters) {
            const uint32_t (&w)[4] = words[kFirst + m][2 * part + k];
            a[m][k] = make_fragment<T>(w[0], w[1], w[2], w[3]);
          } else {
            uint32_t w[4];
            load_left<kFirst + m, 2 * part + k>(w, left);
            a[m][k] = make_fragment<T>(w[0], w[1], w[2], w[3]);
          }
        });
      });
      at_part<Tile, part>(right, [&](uint32_t at, auto offset) {
        unroll<kStepTiles>([&](auto n) {
          uint32_t w[4];
          ldmatrix<decltype(offset)::value + 8 * n * Shape::kRowBytes>(w, at);
          const auto low = make_fragment<T>(w[0], w[1]), high = make_fragment<T>(w[2], w[3]);
#pragma unroll
          for (int m = 0; m < kCount; ++m)
            mma(out[m][n], a[m][0], low), mma(out[m][n], a[m][1], high);
        });
      });
    });
  }

  // Converts accumulators of columns 8 n ... + 7 to their part of an A operand.
  static __device__ __forceinline__ void to_left(Fragment<T, 4>& to, int n, const float (&x)[4]) {
    if constexpr (Shape::kFloat) {
      to = make_fragment<T>(__float_as_uint(x[0]), __float_as_uint(x[2]), __float_as_uint(x[1]),
                            __float_as_uint(x[3]));
    } else {
      to.words[2 * n] = pack<T>(x[0], x[1]);
      to.words[2 * n + 1] = pack<T>(x[2], x[3]);
    }
  }

  // acc += A B, B being kStep rows at `right`.
  template <int kFirst, int kTiles, int kCount>
  static __device__ __forceinline__ void accumulate(float (&acc)[kTiles][2 * kBlocks][4],
                                                    const Fragment<T, 4> (&a)[kCount],
                                                    uint32_t right) {
    const auto add = [&](int i, const Fragment<T, 2>& b) {
#pragma unroll
      for (int m = 0; m < kCount; ++m) mma(acc[kFirst + m][i], a[m], b);
    };
    unroll<kBlocks>([&](auto i) {
      if constexpr (!Shape::kFloat) {
        at_half_part<Tile, i>(right, [&](uint32_t at, auto offset) {
          uint32_t words[4];
          ldmatrix_trans<decltype(offset)::value>(words, at);
          add(2 * i, make_fragment<T>(words[0], words[1]));
          add(2 * i + 1, make_fragment<T>(words[2], words[3]));
        });
      } else {
        // Rows 2 c and 2 c + 1 of 8: their chunks differ in the lowest bit.
        unroll<2>([&](auto j) {
          at_part<Tile, i>(right ^ j * 32, [&](uint32_t at, auto offset) {
            constexpr int kAt = decltype(offset)::value;
            add(2 * i + j,
                make_fragment<T>(load_word<kAt>(at), load_word<kAt + Shape::kRowBytes>(at ^ 16)));
          });
        });
      }
    });
  }

  int row_warp_, first_column_;
  float softcap_, scale_, factor_;
  uint32_t left_;            // this lane's address of A operands from x
  int left_y_;               // offset from there to A operands from y
  uint32_t rows_, columns_;  // offsets of B operands in a streamed tile
  Left x_, y_;
  // Accumulators of dS x and P y.
  float of_x_[kRowTiles][2 * kBlocks][4], of_y_[kKeys ? kRowTiles : 1][kKeys ? 2 * kBlocks : 1][4];
};

}  // namespace tokenmill::cuda
