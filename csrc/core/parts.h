// Workspace of several parts in one allocation.
#pragma once
#include "core/array.h"
#include "core/dtype.h"

namespace tokenmill {

// Parts of one allocation, each aligned like an allocation of its own.
class Parts {
 public:
  // Reserves `bytes` bytes and returns their offset.
  int64_t add(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ = round_up(bytes_ + bytes, 256);
    return at;
  }
  void allocate(const View& like) { memory_ = empty({bytes_}, like, ScalarType::Byte); }
  template <typename T = void>
  T* at(int64_t offset) {
    return reinterpret_cast<T*>(static_cast<unsigned char*>(memory_.mutable_data()) + offset);
  }

 private:
  int64_t bytes_ = 0;
  Array memory_;
};

}  // namespace tokenmill
