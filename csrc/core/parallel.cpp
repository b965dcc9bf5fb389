#include "cpu/parallel.h"

#include "core/stable.h"

namespace tokenmill::cpu {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_workers(int workers, void (*body)(int worker, void* context), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) body(static_cast<int>(w), context);
  });
}

}  // namespace tokenmill::cpu
