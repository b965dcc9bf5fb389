// Sets elements of 2 or 4 bytes to one value.
#pragma once
#include <cstdint>

namespace tokenmill {

struct FillParams {
  void* data;
  int64_t count;
  int32_t element_bytes;
  uint32_t bits;  // bit pattern of the value, in the low bytes
};

const char* launch_cuda(const FillParams&, void* stream);

}  // namespace tokenmill
