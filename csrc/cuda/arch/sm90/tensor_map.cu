#include <cuda_runtime.h>

#include "cuda/arch/sm90/tensor_map.h"

namespace tokenmill::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Entry point of the driver that the runtime has loaded: nothing links with libcuda.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (error == cudaSuccess && result == cudaDriverEntryPointSuccess)
    return reinterpret_cast<Encode>(found);
  cudaGetLastError();  // clears the error, which a later unrelated call would otherwise return
  return nullptr;
}

}  // namespace

const char* encode_map(CUtensorMap& map, const MappedRows& t, DType dtype, int box_rows) {
  static const Encode encode = find_encode();
  if (!encode) return kNotMapped;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t extents[] = {size(t.columns), size(t.tokens), size(t.heads), size(t.batch)};
  const cuuint64_t strides[] = {size(stride_of(t.rows.seq, t.tokens, t.columns)),
                                size(stride_of(t.rows.head, t.heads, t.columns)),
                                size(stride_of(t.rows.batch, t.batch, t.columns))};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result = encode(
      &map,
      dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, t.rows.data, extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : kNotMapped;
}

}  // namespace tokenmill::cuda
