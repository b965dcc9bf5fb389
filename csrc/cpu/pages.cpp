#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/dtype.h"

namespace tokenmill::cpu {

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 1 << 21;
  if (bytes < 2 * kPage) return;
  const int64_t first = reinterpret_cast<int64_t>(data), end = (first + bytes) / kPage * kPage;
  const int64_t begin = round_up(first, kPage);
  // a refusal is harmless
  madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#endif
}

}  // namespace tokenmill::cpu
