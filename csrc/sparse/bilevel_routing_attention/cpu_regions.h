// Regions of a feature map, for the CPU kernels: places are pixels in region order.
#pragma once
#include "cpu/workspace.h"
#include "sparse/bilevel_routing_attention/params.h"
#include "sparse/cpu_walk.h"

namespace tokenmill::TOKENMILL_ISA {

struct MapRows : Rows {
  int64_t line;
};

// Addresses of the pixels of a map. The pixels of a region have consecutive places. If `aligned`,
// and a region has at least kWidth pixels, its first place is a multiple of kWidth, so that each
// full vector lies in one region. Places past the end of a region have no pixel.
class RegionOrder {
 public:
  RegionOrder(const RegionGrid& map, bool aligned)
      : slots_(slots(map, aligned)),
        regions_(map.regions()),
        memory_(places() + regions_ + 2 * 16),
        spots_(reinterpret_cast<int32_t*>(memory_.take(places()))),
        pixels_(reinterpret_cast<int32_t*>(memory_.take(regions_))) {
    for (int64_t i = 0; i < regions_; ++i) {
      const Region r = map.region(static_cast<int32_t>(i));
      pixels_[i] = r.pixels();
      int32_t* spot = spots_ + first(i);
      for (int32_t y = r.y; y < r.y + r.height; ++y)
        for (int32_t x = r.x; x < r.x + r.width; ++x) *spot++ = y << 16 | x;
      while (spot < spots_ + first(i + 1)) *spot++ = kNowhere;
    }
  }

  int64_t places() const { return regions_ * slots_; }
  int64_t first(int64_t region) const { return region * slots_; }
  int64_t pixels(int64_t region) const { return pixels_[region]; }
  int64_t max_pixels() const { return regions_ > 0 ? pixels_[0] : 0; }
  bool has_pixel(int64_t place) const { return spots_[place] != kNowhere; }
  int64_t y(int64_t place) const { return spots_[place] >> 16; }
  int64_t x(int64_t place) const { return spots_[place] & 0xffff; }

  char* row(const MapRows& rows, DType t, int64_t b, int64_t place, int64_t h) const {
    const int64_t at = b * rows.batch + h * rows.head + y(place) * rows.line + x(place) * rows.seq;
    return static_cast<char*>(rows.data) + at * size_of(t);
  }

 private:
  static constexpr int32_t kNowhere = -1;
  static int64_t slots(const RegionGrid& map, bool aligned) {
    const int64_t pixels = map.regions() > 0 ? map.region(0).pixels() : 0;
    return aligned && pixels >= kWidth ? round_up(pixels, kWidth) : pixels;
  }

  int64_t slots_, regions_;
  cpu::Workspace memory_;
  int32_t *spots_, *pixels_;
};

struct RegionWalk {
  using BackwardParams = BilevelBackwardParams;

  const BilevelParams& d;
  RegionOrder of_queries, of_keys;

  explicit RegionWalk(const BilevelParams& d)
      : d(d), of_queries(d.queries, false), of_keys(d.keys, true) {}

  MapRows q() const { return {d.attention.q, d.q_line}; }
  MapRows k() const { return {d.attention.k, d.k_line}; }
  MapRows v() const { return {d.attention.v, d.v_line}; }
  MapRows out() const { return {d.attention.out, d.out_line}; }
  MapRows dout(const BilevelBackwardParams& g) const { return {g.dout, g.dout_line}; }
  MapRows dq(const BilevelBackwardParams& g) const { return {g.dq, d.queries.width * g.dq.seq}; }
  MapRows dk(const BilevelBackwardParams& g) const { return {g.dk, d.keys.width * g.dk.seq}; }
  MapRows dv(const BilevelBackwardParams& g) const { return {g.dv, d.keys.width * g.dv.seq}; }
  char* query_row(const MapRows& rows, int64_t b, int64_t query, int64_t h) const {
    return of_queries.row(rows, d.attention.dtype, b, query, h);
  }
  char* key_row(const MapRows& rows, int64_t b, int64_t key, int64_t h) const {
    return of_keys.row(rows, d.attention.dtype, b, key, h);
  }
  int64_t lse_at(int64_t b, int64_t h, int64_t query) const {
    const int64_t pixel = of_queries.y(query) * d.queries.width + of_queries.x(query);
    return (b * d.attention.heads + h) * d.attention.seqlen_q + pixel;
  }
  void keep_delta(const BilevelBackwardParams&, int64_t, float) const {}

  int64_t max_queries() const { return of_queries.max_pixels(); }
  int64_t first_query(int64_t region) const { return of_queries.first(region); }
  int64_t queries(int64_t region) const { return of_queries.pixels(region); }
  int64_t query_places() const { return of_queries.places(); }
  int64_t key_places() const { return of_keys.places(); }
  bool has_key(int64_t place) const { return of_keys.has_pixel(place); }
  int64_t max_runs() const { return d.list.entries; }

  void find(const RowTile& t, KeyRuns& runs) const {
    runs.clear();
    const int64_t list_head = d.list_head(t.head), n = d.list.count(t.b, list_head, t.list_row);
    const int32_t* ids = d.list.at(t.b, list_head, t.list_row);
    ListWalk walk{d.keys.regions()};
    int64_t missing = 0;
    for (int64_t e = 0; e < n; ++e) {
      if (!walk.counts(ids[e])) continue;
      const int64_t begin = of_keys.first(ids[e]), pixels = of_keys.pixels(ids[e]);
      runs.join(0, {begin, begin + pixels, 0, KeyRuns::kAlways});
      missing += d.keys.pixels() - pixels;
    }
    if (d.pads_count && missing > 0)
      runs.sink = static_cast<float>(std::log(static_cast<double>(missing)));
  }

  SeenBy seen_by(const KeyRun&, int64_t) const { return {0, SeenBy::kNever}; }
};

}  // namespace tokenmill::TOKENMILL_ISA
