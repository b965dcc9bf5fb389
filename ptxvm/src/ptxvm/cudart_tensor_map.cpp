// Driver functions that host code requests through the runtime: the encoders of tensor maps.
#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "ptxvm/cudart.h"
#include "ptxvm/tensor_map.h"

using namespace ptxvm;

namespace {

// Driver functions leave no error for cudaGetLastError.
CUresult reject(const std::string& rule, CUresult error = CUDA_ERROR_INVALID_VALUE) {
  last_report() = "cuTensorMapEncodeTiled: " + rule;
  return error;
}

// The number of a type in PTX; one of no type if the machine does not know it.
uint32_t number_of(CUtensorMapDataType type) {
  constexpr uint32_t kNone = ~0u;
  if (type >= CU_TENSOR_MAP_DATA_TYPE_UINT8 && type <= CU_TENSOR_MAP_DATA_TYPE_FLOAT32) return type;
  return type == CU_TENSOR_MAP_DATA_TYPE_FLOAT64    ? 9
         : type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 10
         : type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 ? 11
                                                    : kNone;
}

std::string got(uint64_t value) { return "; got " + std::to_string(value); }

CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill) {
  TensorMap map{};
  const uint32_t number = number_of(type);
  if (!out || !base || !extents || !box || !steps || (rank > 1 && !strides))
    return reject("a null pointer");
  if (!find_element(number, map.element, map.element_bytes))
    return reject("data type " + std::to_string(type) + " is not supported",
                  CUDA_ERROR_NOT_SUPPORTED);
  if (rank < 1 || rank > kMaxRank) return reject("rank: must be from 1 to 5" + got(rank));
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return reject("interleaved layouts are not supported", CUDA_ERROR_NOT_SUPPORTED);
  if (swizzle < CU_TENSOR_MAP_SWIZZLE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B)
    return reject("swizzle: must be none, 32, 64 or 128 bytes", CUDA_ERROR_NOT_SUPPORTED);
  if (reinterpret_cast<uint64_t>(base) % 16)
    return reject("the address of the tensor must be a multiple of 16 bytes");
  const bool is_float = map.element >= Transfer::Element::f16;
  map.fill_nan = fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
  if (map.fill_nan && !is_float) return reject("NaN fills floating-point tensors only");
  map.base = reinterpret_cast<uint64_t>(base);
  map.rank = static_cast<uint8_t>(rank);
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.promotion = static_cast<uint8_t>(promotion);
  map.strides[0] = map.element_bytes;
  for (cuuint32_t d = 0; d < rank; ++d) {
    const std::string at = " of dimension " + std::to_string(d);
    if (extents[d] < 1 || extents[d] > uint64_t{1} << 32)
      return reject("extent" + at + ": must be from 1 to 2^32" + got(extents[d]));
    if (box[d] < 1 || box[d] > 256)
      return reject("box" + at + ": must be from 1 to 256" + got(box[d]));
    if (steps[d] != 1)
      return reject("element stride" + at + ": only 1 is supported" + got(steps[d]),
                    CUDA_ERROR_NOT_SUPPORTED);
    if (d > 0 && (strides[d - 1] % 16 || strides[d - 1] >= uint64_t{1} << 40))
      return reject("stride" + at + ": must be a multiple of 16 below 2^40" + got(strides[d - 1]));
    map.extents[d] = static_cast<uint32_t>(std::min<uint64_t>(extents[d], UINT32_MAX));
    map.box[d] = static_cast<uint16_t>(box[d]);
    if (d > 0) map.strides[d] = strides[d - 1];
  }
  const uint32_t row = box[0] * map.element_bytes;
  if (row % 16) return reject("a row of the box must be a multiple of 16 bytes" + got(row));
  if (map.swizzle && row > 16u << map.swizzle)
    return reject("a row of the box must not exceed the " + std::to_string(16u << map.swizzle) +
                  " bytes of the swizzle" + got(row));
  // Narrower rows would leave gaps in shared memory.
  if (map.swizzle && row < 16u << map.swizzle)
    return reject("a row of the box shorter than the " + std::to_string(16u << map.swizzle) +
                      " bytes of the swizzle is not supported" + got(row),
                  CUDA_ERROR_NOT_SUPPORTED);
  uint64_t words[kTensorMapWords];
  pack(map, number, words);
  static_assert(sizeof words == sizeof *out);
  std::memcpy(out, words, sizeof words);
  return CUDA_SUCCESS;
}

// Stands for all im2col encoders, whose argument lists differ: the arguments are ignored.
CUresult refuse_im2col() {
  last_report() = "cuTensorMapEncodeIm2col: im2col is not supported";
  return CUDA_ERROR_NOT_SUPPORTED;
}

}  // namespace

PTXVM_EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function,
                                                          unsigned, unsigned long long,
                                                          cudaDriverEntryPointQueryResult* result) {
  const std::string name = symbol;
  *function = name == "cuTensorMapEncodeTiled"    ? reinterpret_cast<void*>(encode_tiled)
              : name == "cuTensorMapEncodeIm2col" ? reinterpret_cast<void*>(refuse_im2col)
                                                  : nullptr;
  if (result)
    *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

PTXVM_EXPORT cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function,
                                                 unsigned long long flags,
                                                 cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(symbol, function, 0, flags, result);
}

PTXVM_PER_THREAD(cudaGetDriverEntryPointByVersion, _ptsz);
// Deprecated, so that PTXVM_PER_THREAD would warn.
extern "C" __attribute__((visibility("default"), alias("cudaGetDriverEntryPoint"))) cudaError_t
cudaGetDriverEntryPoint_ptsz(const char*, void**, unsigned long long,
                             cudaDriverEntryPointQueryResult*);
