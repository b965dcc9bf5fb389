// The container that nvcc puts into an object file: PTX and machine code of a module.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace ptxvm {

struct FatBinary {
  std::string ptx;
  std::string error;                          // why there is no PTX, if so
  std::map<std::string, uint32_t> registers;  // per kernel, of the machine code beside the PTX
};

// Of the PTX that the device takes. `wrapper` is what __cudaRegisterFatBinary gets.
FatBinary read_fat_binary(const void* wrapper);

// Where the container holds that PTX: the same for devices that take the same. Null if it has none.
const void* place_of_ptx(const void* wrapper);

}  // namespace ptxvm
