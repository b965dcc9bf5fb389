// Driver functions that host code requests through the runtime: the encoders of tensor maps.
#include <cuda.h>

#include <algorithm>
#include <string>

#include "ptxvm/async.h"
#include "ptxvm/cudart.h"
#include "ptxvm/tensor_map.h"

using namespace ptxvm;

namespace {

using Element = Transfer::Element;

// Driver functions leave no error for cudaGetLastError.
CUresult reject(const std::string& rule, CUresult error = CUDA_ERROR_INVALID_VALUE) {
  last_report() = "cuTensorMapEncodeTiled: " + rule;
  return error;
}

// False for a type that the machine does not know.
bool find_type(CUtensorMapDataType type, Element& element, uint32_t& bytes) {
  struct Entry {
    CUtensorMapDataType type;
    Element element;
    uint32_t bytes;
  };
  static constexpr Entry kEntries[] = {{CU_TENSOR_MAP_DATA_TYPE_UINT8, Element::b8, 1},
                                       {CU_TENSOR_MAP_DATA_TYPE_UINT16, Element::b8, 2},
                                       {CU_TENSOR_MAP_DATA_TYPE_UINT32, Element::u32, 4},
                                       {CU_TENSOR_MAP_DATA_TYPE_INT32, Element::s32, 4},
                                       {CU_TENSOR_MAP_DATA_TYPE_UINT64, Element::u64, 8},
                                       {CU_TENSOR_MAP_DATA_TYPE_INT64, Element::s64, 8},
                                       {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, Element::f16, 2},
                                       {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, Element::f32, 4},
                                       {CU_TENSOR_MAP_DATA_TYPE_FLOAT64, Element::f64, 8},
                                       {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, Element::bf16, 2},
                                       {CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, Element::tf32, 4}};
  for (const Entry& entry : kEntries)
    if (entry.type == type) {
      element = entry.element;
      bytes = entry.bytes;
      return true;
    }
  return false;
}

std::string got(uint64_t value) { return "; got " + std::to_string(value); }

CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  TensorMap map{};
  map.magic = TensorMap::kMagic;
  Element element{};
  uint32_t bytes = 0;
  if (!out || !base || !extents || !box || !steps || (rank > 1 && !strides))
    return reject("a null pointer");
  if (!find_type(type, element, bytes))
    return reject("data type " + std::to_string(type) + " is not supported",
                  CUDA_ERROR_NOT_SUPPORTED);
  if (rank < 1 || rank > kMaxRank) return reject("rank: must be from 1 to 5" + got(rank));
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return reject("interleaved layouts are not supported", CUDA_ERROR_NOT_SUPPORTED);
  if (swizzle < CU_TENSOR_MAP_SWIZZLE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B)
    return reject("swizzle: must be none, 32, 64 or 128 bytes", CUDA_ERROR_NOT_SUPPORTED);
  if (reinterpret_cast<uint64_t>(base) % 16)
    return reject("the address of the tensor must be a multiple of 16 bytes");
  const bool is_float = element >= Element::f16;
  map.fill_nan = fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
  if (map.fill_nan && !is_float) return reject("NaN fills floating-point tensors only");
  map.base = reinterpret_cast<uint64_t>(base);
  map.rank = static_cast<uint8_t>(rank);
  map.element_bytes = static_cast<uint8_t>(bytes);
  map.element = static_cast<uint8_t>(element);
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.strides[0] = bytes;
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
  const uint32_t row = box[0] * bytes;
  if (row % 16) return reject("a row of the box must be a multiple of 16 bytes" + got(row));
  if (map.swizzle && row > 16u << map.swizzle)
    return reject("a row of the box must not exceed the " + std::to_string(16u << map.swizzle) +
                  " bytes of the swizzle" + got(row));
  // Narrower rows would leave gaps in shared memory.
  if (map.swizzle && row < 16u << map.swizzle)
    return reject("a row of the box shorter than the " + std::to_string(16u << map.swizzle) +
                      " bytes of the swizzle is not supported" + got(row),
                  CUDA_ERROR_NOT_SUPPORTED);
  *out = {};
  std::copy_n(reinterpret_cast<const char*>(&map), sizeof map, reinterpret_cast<char*>(out));
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
