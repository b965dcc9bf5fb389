#include "core/emulated.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "core/stream.h"
#include "ptxvm/host_api.h"

namespace tokenmill {
namespace emulated {
namespace {

struct Extent {
  const char* begin;
  const char* end;
  bool writable;
};

thread_local std::vector<Extent> notes;

std::mutex& machine() {
  static std::mutex mutex;
  return mutex;
}

// q, k and v may be slices of one projection, whose extents interleave.
std::vector<Extent> disjoint(std::vector<Extent> extents) {
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  std::vector<Extent> merged;
  for (const Extent& e : extents) {
    if (merged.empty() || e.begin >= merged.back().end) {
      merged.push_back(e);
      continue;
    }
    merged.back().end = std::max(merged.back().end, e.end);
    merged.back().writable |= e.writable;
  }
  return merged;
}

}  // namespace

Frame::Frame() { notes.clear(); }
Frame::~Frame() { notes.clear(); }

void note(const void* base, int64_t bytes, bool writable) {
  const char* begin = static_cast<const char*>(base);
  if (begin && bytes > 0) notes.push_back({begin, begin + bytes, writable});
}

}  // namespace emulated

CudaScope::CudaScope(const View& on) : on_(on) {
  emulated::machine().lock();
  for (const emulated::Extent& e : emulated::disjoint(emulated::notes))
    ptxvm_register(e.begin, static_cast<size_t>(e.end - e.begin), e.writable);
}

CudaScope::~CudaScope() {
  ptxvm_recover();  // an error has been reported already, and must not affect the next call
  ptxvm_unregister_all();
  emulated::machine().unlock();
}

void* CudaScope::stream() const { return nullptr; }

}  // namespace tokenmill
