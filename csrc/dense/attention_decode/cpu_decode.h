// Dispatch of a call to an instance of cpu_engine.h.
#pragma once
#include "cpu/parallel.h"
#include "dense/attention_decode/cpu_engine.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t kLongHead = 256;  // channels of a head, beyond which it is latent
// bytes that one thread reads in the time of a parallel region
constexpr int64_t kSerialBytes = 1 << 17;

template <class Keys, int kRows, bool kTiles = false>
void decode_rows(const typename Keys::Params& d) {
  const DecodePlan<Keys, kRows, kTiles> plan(d);
  const AttentionParams& p = d.attention;
  int64_t keys = 0;
  for (int64_t u = 0; u < plan.units(); ++u) keys += plan.range_of(u).end - plan.range_of(u).begin;
  const int64_t bytes =
      keys * plan.heads * (p.head_dim + p.value_dim) * element_bytes(d.cache.dtype);
  const int threads = bytes < kSerialBytes ? 1 : cpu::num_threads();
  cpu::parallel_items(plan.items(), threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    DecodeWorker<Keys, kRows, kTiles> worker(plan);
    for (int64_t item; (item = items.next()) >= 0;) worker.run(item);
  });
}

template <class Keys>
int64_t rows_of_head(const typename Keys::Params& d) {
  return d.attention.heads / Keys::row_heads(d) * Keys::queries(d);
}
template <class Keys>
void decode(const typename Keys::Params& d) {
  const int64_t rows = rows_of_head<Keys>(d);
  if (rows == 1) return decode_rows<Keys, 1>(d);
  rows == 2 ? decode_rows<Keys, 2>(d) : decode_rows<Keys, 4>(d);
}

template <template <class, DType> class KeysOf, class Params>
void decode_narrow(const Params& d) {
  switch (d.attention.dtype) {
    case DType::float16:
      return decode<KeysOf<Float32, DType::float16>>(d);
    case DType::bfloat16:
#if defined(TM_DOTS)
      return decode<KeysOf<BFloat16, DType::bfloat16>>(d);
#else
      return decode<KeysOf<Float32, DType::bfloat16>>(d);
#endif
    default:
      return decode<KeysOf<Float32, DType::float32>>(d);
  }
}
template <template <class, DType> class KeysOf, class Params>
void decode_tiles(const Params& d) {
#if defined(TM_DOTS)
  if (d.cache.dtype == DType::bfloat16)
    return decode_rows<KeysOf<BFloat16, DType::bfloat16>, kWidth, true>(d);
#endif
  decode_rows<KeysOf<Float32, DType::float32>, kWidth, true>(d);
}

// Dispatches to KeysOf<Op, element type>. Rows of latent heads and of float8 share words of keys if
// they fill more than half of a block.
template <template <class, DType> class KeysOf, class Params>
void decode_elements(const Params& d) {
  using Floats = KeysOf<Float32, DType::float32>;
  const AttentionParams& p = d.attention;
  const bool codes = d.cache.dtype == DType::float8_e4m3fn;
  const bool latent = p.head_dim > kLongHead || p.value_dim > kLongHead;
  if ((codes || latent) && rows_of_head<Floats>(d) > kWidth / 2) return decode_tiles<KeysOf>(d);
  if (codes) {
    using Codes = KeysOf<Float32, DType::float8_e4m3fn>;
    return rows_of_head<Codes>(d) == 1 ? decode_rows<Codes, 1>(d) : decode_rows<Codes, 4>(d);
  }
  decode_narrow<KeysOf>(d);
}

// The same for latent heads whose keys have the type of q.
template <template <class, DType> class KeysOf, class Params>
void decode_latent(const Params& d) {
  const bool tiles = rows_of_head<KeysOf<Float32, DType::float32>>(d) > kWidth / 2;
  tiles ? decode_tiles<KeysOf>(d) : decode_narrow<KeysOf>(d);
}

}  // namespace tokenmill::TOKENMILL_ISA
