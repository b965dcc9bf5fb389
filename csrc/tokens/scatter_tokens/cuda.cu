#include "tokens/scatter_tokens/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const ScatterTokensParams& p, void* stream) {
  using namespace cuda;
  const auto s = static_cast<cudaStream_t>(stream);
  cudaMemsetAsync(p.places, 0xff, p.batch * p.tokens * sizeof(int32_t), s);  // -1
  const int64_t blocks = ceil_div(p.entries, kRowThreads);
  if (blocks > kMostBlocks) return "too many indices for a launch";
  if (blocks > 0 && p.sequences > 0) {
    const int64_t sequences = p.sequences < kMostBatches ? p.sequences : kMostBatches;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(sequences));
    scatter_places_kernel<<<grid, kRowThreads, 0, s>>>(p);
  }
  const uint64_t strides = p.row_bytes | p.y_batch | p.y_row | p.base_batch | p.base_token;
  const char* error = nullptr;
  visit_width(address(p.y) | address(p.base) | strides, [&]<typename T>() {
    const RowGrid g(ceil_div(p.row_bytes, sizeof(T)), p.tokens, p.batch);
    scatter_tokens_kernel<T><<<g.grid, g.block, 0, s>>>(p);
    error = last_error();
  });
  return error;
}

}  // namespace tokenmill
