// sm_80 backward: seven products in two launches, without atomics. One kernel owns the keys, one
// the queries; both are the same program, seen from either side:
//
//   keys:     S = K Q^T, dP = V dO^T, dV += P dO, dK += dS Q
//   queries:  S = Q K^T, dP = dO V^T, dQ += dS K
//   softmax:  dS = P (dP - delta), delta = rowsum(dO O) - dlse;   sigmoid: dS = P (1 - P) dP
//   with ALiBi decay F: dS = P (F dP - delta), dV += P F dO
//   others:   P = f(S) / r, dS = f'(S) (dP - delta) / r; for Normalize::sum r = s + 1e-8 and
//             delta = rowsum(dO O) - r ds, else delta = 0
//
// Rows are owned, columns stream by in tiles. Two warps share kRows rows: the S warp holds the
// fragments of K (or Q) and makes S and P, the dS warp holds V (or dO) and makes dP and dS. No warp
// could hold both operands and both accumulators. P goes to the dS warp, and on the queries' side
// dS to the S warp, through shared memory, each lane's own elements, in accumulator order.
#pragma once
#include "attention/backward_shape.cuh"

namespace tokenmill::cuda {

template <typename T, int kDim, Side kSide, Mode kMode>
struct PairWorker {
  using Shape = PairShape<T, kDim, kMode>;
  using Tile = typename Shape::Tile;
  using Left = Fragment<T, 4>;
  static constexpr bool kKeys = kSide == Side::keys;
  static constexpr int kTiles = Shape::kTiles;
  static constexpr int kDepth = kDim / kMmaDepth<T>;  // MMAs along a row
  // On the queries' side each of the two warps accumulates every other block of 16 columns.
  static constexpr int kBlocks = kKeys ? kDim / 16 : kDim / 32;
  // P is scaled where scales_weights() says so; on the queries' side P is not rounded to T.
  static constexpr bool kScale = kKeys && std::is_same_v<T, __half> && kMode != Mode::softmax;
  static constexpr bool kStatistics = kMode != Mode::sigmoid && kMode != Mode::fast_sigmoid;
  // The score_mod differs between heads.
  static constexpr bool kOfHead = kMode != Mode::softmax && kMode != Mode::elementwise;
  // Row sums may be tiny, and infinity times a dP - delta of 0 is NaN.
  static constexpr bool kClamps =
      Shape::kPacked && std::is_same_v<T, __half> && kMode == Mode::elementwise;
  using Mod = BackwardScoreMod<kMode, kScale>;

  const BackwardArgs& args;
  const AttentionParams& p;
  uint32_t exchange;  // the lane's exchange slot: the only address that outlives a tile
  // Derived anew for each tile from the warp and the exchange slot:
  BlockInfoView info;
  int lane, pair;
  bool makes_ds;
  int full;  // barrier of the pair, P or slopes written; full + 1: the opposite direction
  uint32_t base, ring, owned;
  int first_row;  // set for masked tiles and in Mode::general
  int counter;    // tile number, if it is not in shared memory
  Left left[Shape::kHeld ? kTiles : 1][Shape::kHeld ? kDepth : 1];
  float acc[kTiles][2 * kBlocks][4];
  float statistics[kTiles][2];  // row statistics, on the queries' side
  float bias_sum = 0, slope_sum = 0;

  // shared: start of shared memory.
  __device__ __forceinline__ void enter(uint32_t shared) {
    exchange = 0;
    place();
    // Through a shuffle: ptxas would keep the summands of a sum.
    exchange = __shfl_sync(kFullWarp, shared - info.address, lane);
    place();
  }
  __device__ __forceinline__ void place() {
    const unsigned thread = thread_index(), pairs = thread_count() / (2 * kWarpSize);
    lane = thread % kWarpSize;
    pair = thread / kWarpSize & (pairs - 1);
    makes_ds = thread / kWarpSize >= pairs;
    full = 1 + 2 * pair;
    const uint32_t exchanges = exchange - pair * Shape::kExchangeBytes - lane * kChunkBytes;
    ring = exchanges - 2 * Shape::kStageBytes;
    base = ring - (Shape::kHeld ? 0 : pairs * Shape::kOwnedBytes);
    owned = base + (pair * 2 + makes_ds) * Shape::kRows * Tile::kRowBytes;
    info.address = base - Shape::info_bytes(pairs);
  }

  __device__ __forceinline__ PairAddresses make_addresses() const {
    const uint32_t x = 0, y = Shape::kTileBytes, summed = kKeys && !makes_ds ? y : x;
    const int block = kKeys ? 0 : makes_ds;
    return {(makes_ds ? y : x) + Tile::offset(lane % 8, lane / 8),
            summed + (Shape::kWide
                          ? Tile::offset(lane % 4 * 2, 4 * block + lane / 16) + lane / 4 % 4 * 4
                          : Tile::offset(lane % 16, 2 * block + lane / 16)),
            y + Shape::kTileBytes + (makes_ds ? Shape::kColumns * 4 : 0) + lane % 4 * 8};
  }
  __device__ uint32_t own_tile_number() const {
    return info.address + kTileNumberOffset + thread_index() * 4;
  }
  __device__ uint32_t own_addresses() const {
    return info.address + kTileNumberOffset + thread_count() * 4 +
           thread_index() * sizeof(PairAddresses);
  }
  // Parks the constant of a head for plain sigmoid in shared memory; the mainloop has no register
  // for it.
  __device__ void park_constant(const Mod& score_mod) const {
    store_shared<offsetof(PairAddresses, statistics)>(own_addresses(),
                                                      __float_as_uint(score_mod.constant));
  }
  // Column tile number.
  __device__ __forceinline__ int tile() const {
    if constexpr (Shape::kWide) return counter;
    return load_int<0>(own_tile_number());
  }
  __device__ __forceinline__ void next_tile() {
    cuda::opt_barrier(exchange);  // values derived from it must not outlive the tile
    place();
    if constexpr (Shape::kWide)
      ++counter;
    else
      store_shared<0>(own_tile_number(), static_cast<uint32_t>(tile() + 1));
  }
  __device__ __forceinline__ PairAddresses addresses(uint32_t stage) const {
    PairAddresses a = {};
    if constexpr (Shape::kWide) {
      a = make_addresses();
    } else {
      uint32_t words[4];
      load_shared(words, own_addresses());
      a.rows = words[0], a.columns = words[1], a.statistics = words[2];
    }
    a.rows += stage;
    a.columns += stage;
    if constexpr (kStatistics) a.statistics += stage;
    return a;
  }

  __device__ __forceinline__ Left load_left(int m, int k) const {
    uint32_t words[4];
    ldmatrix(words, owned + m * 16 * Tile::kRowBytes + Tile::offset(lane % 16, 2 * k + lane / 16));
    return make_fragment<T>(words[0], words[1], words[2], words[3]);
  }

  // out = init + (rows of block m) (8 rows of the tile from kRow on)^T; calls use(Index<m>{}, out)
  // for each active block m.
  template <bool kMasked, int kRow, typename Init, typename Use>
  __device__ __forceinline__ void multiply_rows(uint32_t address, unsigned active, const Init& init,
                                                const Use& use) const {
    constexpr int kParts = Tile::kRowBytes / 64;
    // Holds either the B operands of all parts or the accumulators of all blocks.
    constexpr bool kHoldRight = kParts < kTiles;
    uint32_t words[kHoldRight ? kParts : 1][4];
    float out[kHoldRight ? 1 : kTiles][4];
    const auto load = [&](auto part, uint32_t (&to)[4]) {
      at_part<Tile, part>(address, [&](uint32_t at, auto offset) {
        ldmatrix<decltype(offset)::value + kRow * Tile::kRowBytes>(to, at);
      });
    };
    const auto multiply = [&](auto part, int m, const uint32_t (&w)[4], float (&sum)[4]) {
      const Fragment<T, 2> right[2] = {make_fragment<T>(w[0], w[1]), make_fragment<T>(w[2], w[3])};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const Left a = Shape::kHeld ? left[m][2 * part + k] : load_left(m, 2 * part + k);
        if (part == 0 && k == 0) {
          const float c[4] = {init(m, 0), init(m, 1), init(m, 2), init(m, 3)};
          mma_from<T>(sum, a, right[k], c);
        } else {
          mma(sum, a, right[k]);
        }
      }
    };
    if constexpr (kHoldRight) {
      unroll<kParts>([&](auto part) { load(part, words[part]); });
      unroll<kTiles>([&](auto m) {
        if (kMasked && !(active >> m & 1)) return;
        unroll<kParts>([&](auto part) { multiply(part, m, words[part], out[0]); });
        use(m, out[0]);
      });
    } else {
      unroll<kParts>([&](auto part) {
        load(part, words[0]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
          if (!kMasked || active >> m & 1) multiply(part, m, words[0], out[m]);
      });
      unroll<kTiles>([&](auto m) {
        if (!kMasked || active >> m & 1) use(m, out[m]);
      });
    }
  }

  // acc += A times the 16 rows of the tile from kRow on: dV += P dO, dK += dS Q or dQ += dS K
  template <bool kMasked, int kRow>
  __device__ __forceinline__ void accumulate(const Left (&a)[Shape::kDepths][kTiles],
                                             uint32_t address, unsigned active) {
    unroll<kBlocks>([&](auto i) {
      if constexpr (!Shape::kWide) {
        // Otherwise all B operands would be loaded ahead.
        if constexpr (kKeys && i == kBlocks / 2) end_block(args.heads_per_block);
        uint32_t words[4];
        const auto load = [&](uint32_t at, auto offset) {
          ldmatrix_trans<decltype(offset)::value + kRow * Tile::kRowBytes>(words, at);
        };
        if constexpr (kKeys)
          at_half_part<Tile, i>(address, load);
        else
          at_part<Tile, i>(address, load);
        const Fragment<T, 2> right[2] = {make_fragment<T>(words[0], words[1]),
                                         make_fragment<T>(words[2], words[3])};
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          if (kMasked && !(active >> m & 1)) continue;
          mma(acc[m][2 * i], a[0][m], right[0]);
          mma(acc[m][2 * i + 1], a[0][m], right[1]);
        }
      } else {
        // Rows 2 c and 2 c + 1 of 8: their chunks differ in the lowest bit.
        unroll<2 * Shape::kDepths>([&](auto n) {
          constexpr int k = n / 2, j = n % 2;
          at_part<Tile, kKeys ? i : 2 * i>(address ^ j * 32, [&](uint32_t at, auto offset) {
            constexpr int kAt = decltype(offset)::value + (kRow + 8 * k) * Tile::kRowBytes;
            const auto right =
                make_fragment<T>(load_word<kAt>(at), load_word<kAt + Tile::kRowBytes>(at ^ 16));
#pragma unroll
            for (int m = 0; m < kTiles; ++m) mma(acc[m][2 * i + j], a[k][m], right);
          });
        });
      }
    });
  }

  // Offset from `exchange` at which a lane passes block kIndex of plane kPlane.
  template <int kPlane, int kIndex>
  static constexpr int kSlot = (kPlane * Shape::kPlaneSlots + kIndex) * Shape::kSlotBytes;
  // Accumulators of columns 8 h .. 8 h + 7 as part of an A fragment.
  __device__ __forceinline__ static void to_left(Left (&to)[Shape::kDepths][kTiles], int m, int h,
                                                 const float (&x)[4]) {
    if constexpr (Shape::kWide) {
      to[h][m] = make_fragment<T>(__float_as_uint(x[0]), __float_as_uint(x[2]),
                                  __float_as_uint(x[1]), __float_as_uint(x[3]));
    } else {
      to[0][m].words[2 * h] = pack<T>(x[0], x[1]);
      to[0][m].words[2 * h + 1] = pack<T>(x[2], x[3]);
    }
  }

  // Statistic for accumulator element i; columns: statistics of its two columns.
  __device__ __forceinline__ float statistic(int m, int i, float2 columns) const {
    if constexpr (kKeys) return i % 2 ? columns.y : columns.x;
    return statistics[m][i / 2];
  }
  template <int kColumn>
  __device__ __forceinline__ float2 column_statistics(uint32_t address) const {
    if constexpr (!kKeys || !kStatistics) return {0, 0};
    if (kMode == Mode::general && !has_backward_statistics(p)) {
      const float none = makes_ds ? 0 : 1;
      return {none, none};
    }
    return load_float2<kColumn * 4>(address);
  }

  // Visible columns of a row, relative to `column`.
  struct Seen {
    int begin;
    unsigned length;

    __device__ Seen(const MaskBand& band, int row, int column) {
      begin = band.begin(row) - column;
      const int end = band.end(row) - column;
      length = end > begin ? end - begin : 0;
    }
    __device__ bool operator()(int i) const { return static_cast<unsigned>(i - begin) < length; }
  };

  __device__ __forceinline__ int row_of(int m, int i) const {
    return first_row + 16 * m + i / 2 * 8 + lane / 4;
  }

  // Mask of a head.
  __device__ __forceinline__ HeadMask mask_of(const Mod& score_mod) const {
    return {p.mask, args.bounds, score_mod.batch, score_mod.head, score_mod.sequence};
  }
  // Visible elements of an accumulator under the mask, as bits; first: column of elements 0 and 2.
  __device__ __forceinline__ unsigned seen_pairs(const Mod& score_mod, int m, int first) const {
    unsigned seen = 0;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int row = row_of(m, i), column = first + i % 2;
      const bool sees = mask_of(score_mod).sees(kKeys ? column : row, kKeys ? row : column);
      seen |= static_cast<unsigned>(sees) << i;
    }
    return seen;
  }

  // S warp: S = Q K^T, P and slopes; dV += P dO or dQ += dS K. column: first of 16, at row kRow of
  // the tiles.
  template <bool kMasked, int kRow>
  __device__ __forceinline__ void score_step(const Mod& score_mod, const PairAddresses& stage,
                                             int column, unsigned active) {
    Left weights[Shape::kDepths][kTiles], slopes[Shape::kDepths][kTiles];
    unroll<2>([&](auto h) {
      const float2 columns = column_statistics<kRow + 8 * h>(stage.statistics);
      const auto zero = [](int, int) { return 0.f; };
      bool waited = !kKeys || h > 0;
      // S = Q K^T or K Q^T
      multiply_rows<kMasked, kRow + 8 * h>(stage.rows, active, zero, [&](auto m, float (&s)[4]) {
        if (!waited) pair_sync_next(full);
        waited = true;
        float slope[4], through[4];
        const MaskBand band = kMasked ? info.band() : MaskBand{0, 0, 0};
        const int first = column + 8 * h + lane % 4 * 2;
        unsigned seen = 0xf;
        if constexpr (kMasked && kMode == Mode::general)
          if (active >> (kWholeAt + m) & 1 ^ 1) seen = seen_pairs(score_mod, m, first);
        score_mod.visit(p.map, args.weight_scale, [&](const auto& map) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = row_of(m, i), at = first + i % 2;
            Weight w = map.apply_map(s[i], args.factor, kKeys ? at : row, kKeys ? row : at,
                                     statistic(m, i, columns));
            if (kMasked && !(Seen(band, row, first)(i % 2) && seen >> i & 1)) w.p = w.slope = 0;
            s[i] = w.p;
            slope[i] = kClamps ? min_or_nan(w.slope, 65504) : w.slope;
            through[i] = w.through;
          }
        });
        if (kKeys) to_left(weights, m, h, s);
        if constexpr (Shape::kPacked) {
          if constexpr (!kKeys || kMode != Mode::softmax) to_left(slopes, m, h, slope);
        } else {
          store_floats<kSlot<0, 2 * m + h>>(exchange, slope);
          if constexpr (kMode == Mode::general)
            store_floats<kSlot<1, 2 * m + h>>(exchange, through);
        }
      });
    });
    if constexpr (Shape::kPacked)
      unroll<kTiles>([&](auto m) {
        if (kMasked && !(active >> m & 1)) return;
        if constexpr (kKeys && kMode == Mode::softmax)
          store_shared<kSlot<0, m>>(exchange, weights[0][m].words);
        else
          store_shared<kSlot<0, m>>(exchange, slopes[0][m].words);
      });
    pair_arrive(full);
    if constexpr (!kKeys) {
      pair_sync_next(full);
      unroll<kTiles>([&](auto m) {
        if (kMasked && !(active >> m & 1)) return;
        if constexpr (Shape::kWide) {
          unroll<2>([&](auto h) {
            float ds[4];
            load_floats<kSlot<0, 2 * m + h>>(ds, exchange);
            to_left(weights, m, h, ds);
          });
        } else {
          load_shared<kSlot<0, Shape::kPacked ? m : 2 * m>>(weights[0][m].words, exchange);
        }
      });
    }
    accumulate<kMasked, kRow>(weights, stage.columns, active);  // dV += P dO or dQ += dS K
  }

  template <bool kMasked, int kRow>
  __device__ __forceinline__ void gradient_step(const Mod& score_mod, const PairAddresses& stage,
                                                int column, unsigned active) {
    Left ds[Shape::kDepths][kTiles];  // dS = slope (dP - delta)
    uint32_t packed[kTiles][4];
    unroll<2>([&](auto h) {
      const float2 columns = column_statistics<kRow + 8 * h>(stage.statistics);
      const bool post_decay = kMode == Mode::general && p.post_decay;
      const auto init = [&](int m, int i) {
        return kStatistics && !post_decay ? statistic(m, i, columns) : 0.f;
      };
      bool waited = h > 0;
      multiply_rows<kMasked, kRow + 8 * h>(stage.rows, active, init, [&](auto m, float (&dp)[4]) {
        if (!waited) pair_sync(full);
        waited = true;
        float w[4];
        if constexpr (Shape::kPacked) {
          if (h == 0) load_shared<kSlot<0, m>>(packed[m], exchange);
          const float2 top = unpack<T>(packed[m][2 * h]), bottom = unpack<T>(packed[m][2 * h + 1]);
          w[0] = top.x, w[1] = top.y, w[2] = bottom.x, w[3] = bottom.y;
        } else {
          load_floats<kSlot<0, 2 * m + h>>(w, exchange);
        }
        if (post_decay) {
          if constexpr (kMode == Mode::general)
            fade(score_mod, w, dp, m, column + 8 * h + lane % 4 * 2, columns);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) dp[i] = kMasked && w[i] == 0 ? 0.f : w[i] * dp[i];
        }
        if constexpr (kMode == Mode::general) {
          if (!kKeys) add_sums(score_mod, dp, m, column + 8 * h + lane % 4 * 2);
          load_floats<kSlot<1, 2 * m + h>>(w, exchange);
#pragma unroll
          for (int i = 0; i < 4; ++i) dp[i] *= w[i];
        }
        to_left(ds, m, h, dp);
        if constexpr (!kKeys && Shape::kWide) store_floats<kSlot<0, 2 * m + h>>(exchange, dp);
      });
    });
    if constexpr (!kKeys && !Shape::kWide)
      unroll<kTiles>([&](auto m) {
        if (kMasked && !(active >> m & 1)) return;
        store_shared<kSlot<0, Shape::kPacked ? m : 2 * m>>(exchange, ds[0][m].words);
      });
    pair_arrive_next(full);
    if constexpr (kKeys && !kMasked && !Shape::kWide) end_block(args.heads_per_block);
    accumulate<kMasked, kRow>(ds, stage.columns, active);  // dK += dS Q or dQ += dS K
  }

  // Bits of the 16-row blocks that see any of the 16 columns from `column` on.
  __device__ unsigned active_blocks(int column) const {
    unsigned active = 0;
    const MaskBand band = info.band();
    const int rows = info.rows();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int from = first_row + 16 * m, last = min(from + 16, rows) - 1;
      if (from <= last && column < band.end(last) && column + Shape::kStep > band.begin(from))
        active |= 1u << m;
    }
    return active;
  }
  // The active blocks that the mask does not fully hide, and from bit kWholeAt on the fully visible
  // ones.
  static constexpr int kWholeAt = 16;
  __device__ __forceinline__ unsigned shown_blocks(const Mod& score_mod, int column,
                                                   unsigned active) const {
    if (!p.mask.any()) return active | active << kWholeAt;
    Visibility visibility{false, false};
    if (lane < kTiles && active >> lane & 1) {
      const int row = first_row + 16 * lane;
      visibility =
          mask_of(score_mod).visibility(kKeys ? column : row, kKeys ? row : column, Shape::kStep);
    }
    return __ballot_sync(kFullWarp, visibility.some) | __ballot_sync(kFullWarp, visibility.all)
                                                           << kWholeAt;
  }

  // Runs the tiles of a stage, whose first column is `first`.
  template <bool kMasked>
  __device__ __forceinline__ void run_tile(const Mod& score_mod, PairAddresses stage, int first) {
    if constexpr (kMasked || kMode == Mode::general) first_row = info.first_row(pair);
    if constexpr (!kMasked && kMode != Mode::general) {
      constexpr int kSteps = kKeys ? 1 : 2;  // more would cost registers
      const uint32_t end = stage.rows + Shape::kColumns * Tile::kRowBytes;
      const auto steps = [&](const auto& step) {
#pragma unroll 1
        for (; stage.rows != end; stage.rows += kSteps * Shape::kStep * Tile::kRowBytes) {
          unroll<kSteps>([&](auto i) { step(Index<i * Shape::kStep>{}); });
          stage.columns += kSteps * Shape::kStep * Tile::kRowBytes;
          stage.statistics += kSteps * Shape::kStep * 4;
        }
      };
      if (makes_ds)
        steps([&](auto row) { gradient_step<false, row>(score_mod, stage, 0, 0); });
      else
        steps([&](auto row) { score_step<false, row>(score_mod, stage, 0, 0); });
    } else {
      // The end is reloaded: a register for it is one too many.
      int column = first;
#pragma unroll 1
      do {
        unsigned active = kMasked ? active_blocks(column) : 1;
        if constexpr (kMasked && kMode == Mode::general)
          active = shown_blocks(score_mod, column, active);
        if (active) {
          if (makes_ds)
            gradient_step<kMasked, 0>(score_mod, stage, column, active);
          else
            score_step<kMasked, 0>(score_mod, stage, column, active);
        }
        stage.rows += Shape::kStep * Tile::kRowBytes;
        stage.columns += Shape::kStep * Tile::kRowBytes;
        stage.statistics += Shape::kStep * 4;
        column += Shape::kStep;
      } while (Shape::kColumns > Shape::kStep && (column - info.begin()) % Shape::kColumns != 0);
    }
  }

  // ALiBi as decay: turns dP of block m into dz, from the weights e without decay.
  __device__ __forceinline__ void fade(const Mod& score_mod, const float (&e)[4], float (&dp)[4],
                                       int m, int first, float2 columns) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row_of(m, i), column = first + i % 2;
      const float d = score_mod.distance(kKeys ? column : row, kKeys ? row : column);
      const auto faded =
          score_mod.faded(e[i], score_mod.mod.fade(d), dp[i], statistic(m, i, columns));
      dp[i] = faded.dz;
      if (!kKeys) slope_sum -= faded.moved * d;
    }
  }

  // Adds the gradients of logits dz of block m to the sums; first: column of elements 0 and 2.
  __device__ __forceinline__ void add_sums(const Mod& score_mod, const float (&dz)[4], int m,
                                           int first) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = row_of(m, i), key = first + i % 2;
      bias_sum += dz[i];
      if (!p.post_decay) slope_sum -= dz[i] * score_mod.distance(query, key);
      if (args.direct_bias && query < score_mod.mod.rows && key < score_mod.mod.columns)
        args.p.dbias[score_mod.batch * args.p.dbias_batch + score_mod.head * args.p.dbias_head +
                     query * args.p.dbias_q + key * args.p.dbias_k] = dz[i];
    }
  }
};

}  // namespace tokenmill::cuda
