// Structures of DLPack 1.x (github.com/dmlc/dlpack, dlpack.h), whose layout is an ABI: borrowed and
// owned arrays, and the function table through which a framework exchanges them without Python
// calls.
#pragma once
#include <cstdint>

namespace tokenmill::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6,
  kFloat8E4m3fn = 10,
  kFloat8E4m3fnuz = 11,
  kFloat8E5m2 = 12,
  kFloat8E5m2fnuz = 13
};

struct Device {
  DeviceType type;
  int32_t id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;  // strides in elements; null: contiguous
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

// `__dlpack_c_exchange_api__` of a type is a capsule with the name below. Functions return 0, or -1
// with a Python error set, except `allocate`, which reports errors through a callback.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* error,
                  void (*set_error)(void* error, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*managed_to_object)(ManagedTensor* tensor, void** object);
  int (*borrow_from_object)(void* object, Tensor* out);
  int (*current_stream)(DeviceType type, int32_t id, void** stream);
};

constexpr const char* kExchangeApi = "dlpack_exchange_api";

}  // namespace tokenmill::dlpack
