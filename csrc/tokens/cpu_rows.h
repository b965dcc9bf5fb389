// Row copies on the CPU, for the operators that move tokens.
#pragma once
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kItemBytes = 1 << 16;
// Below this a parallel region costs more than it gains.
constexpr int64_t kParallelBytes = 1 << 18;
// Prefetch distances in rows. While a row is copied, the row kRowsAhead later is prefetched, since
// hardware prefetchers cannot follow scattered rows. For a row kPagesAhead later, one line per page
// is touched, so that its address translation, the slowest part, is done in time.
constexpr int64_t kRowsAhead = 2, kPagesAhead = 8, kPageBytes = 4096;

TM_INLINE int64_t rows_per_item(int64_t row_bytes) {
  return std::max<int64_t>(1, kItemBytes / std::max<int64_t>(row_bytes, 1));
}
TM_INLINE int threads_for(int64_t bytes) { return bytes < kParallelBytes ? 1 : cpu::num_threads(); }

// Results larger than the caches are written with non-temporal stores: their lines are not read
// first.
constexpr int64_t kStreamBytes = 1 << 23;

TM_INLINE void stream(char* to, vf x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(to), x);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(to), x);
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(to), x);
#else
  store(reinterpret_cast<float*>(to), x);
#endif
}
// Fence after the last non-temporal store, before other threads read.
TM_INLINE void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Faster than memcpy, which copies rows of a few KiB, as if they fit the cache, with a microcoded
// instruction. `next`, if not null, is prefetched meanwhile.
template <bool kStream>
TM_INLINE void copy_row(char* to, const char* from, int64_t bytes, const char* next = nullptr) {
  constexpr int64_t kBytes = sizeof(vf);
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    if (next) __builtin_prefetch(next + i, 0, 3);
    TM_UNROLL(4)
    for (int64_t j = i; j < i + 64; j += kBytes) {
      const vf x = load(reinterpret_cast<const float*>(from + j));
      if constexpr (kStream)
        stream(to + j, x);
      else
        store(reinterpret_cast<float*>(to + j), x);
    }
  }
  if (i == bytes) return;
  if (bytes < kBytes) {
    std::memcpy(to, from, bytes);
    return;
  }
  for (; i < bytes; i += kBytes) {
    i = std::min(i, bytes - kBytes);  // the last vector may overlap
    store(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  }
}

// Rows to write, out of `total` bytes that the call writes.
struct Rows {
  char* first;
  int64_t step, bytes, total;
};

// Row i - begin of `to` = row(i), a pointer or null for zeros, for i from begin to end. Rows up to
// `last` are prefetched, since the caller continues with them.
template <typename Row>
TM_INLINE void copy_rows(const Rows& to, int64_t begin, int64_t end, int64_t last, const Row& row) {
  const int64_t bytes = to.bytes;
  const auto each = [&](auto&& copy) TM_LAMBDA {
    for (int64_t i = begin; i < end; ++i) copy(to.first + (i - begin) * to.step, row(i), i);
  };
  const auto small = [&]<typename T>(T) TM_LAMBDA {
    each([](char* at, const char* from, int64_t) TM_LAMBDA {
      T value{};
      if (from) std::memcpy(&value, from, sizeof value);
      std::memcpy(at, &value, sizeof value);
    });
  };
  switch (bytes) {
    case 2:
      return small(uint16_t{});
    case 4:
      return small(uint32_t{});
    case 8:
      return small(uint64_t{});
  }
  const auto large = [&]<bool kStream>() TM_LAMBDA {
    each([&](char* at, const char* from, int64_t i) TM_LAMBDA {
      if (!from) {
        std::memset(at, 0, bytes);
        return;
      }
      if (const char* later = i + kPagesAhead < last ? row(i + kPagesAhead) : nullptr)
        for (int64_t j = 0; j < bytes; j += kPageBytes) __builtin_prefetch(later + j, 0, 3);
      const char* next = i + kRowsAhead < last ? row(i + kRowsAhead) : nullptr;
      copy_row<kStream>(at, from, bytes, next ? next : from);
    });
  };
  const bool aligned = (reinterpret_cast<uintptr_t>(to.first) | to.step | bytes) % 64 == 0;
  if (to.total < kStreamBytes || !aligned) return large.template operator()<false>();
  large.template operator()<true>();
  end_stream();
}

}  // namespace
}  // namespace tokenmill::TOKENMILL_ISA
