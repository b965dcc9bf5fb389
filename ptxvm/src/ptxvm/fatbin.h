// The container that nvcc embeds in an object file: PTX and machine code of a module.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace ptxvm {

struct FatBinary {
  std::string ptx;
  std::string error;                          // why there is no PTX, if there is none
  std::map<std::string, uint32_t> registers;  // per thread, of the machine code, by kernel
};

// The PTX that the device accepts. `wrapper` is the argument of __cudaRegisterFatBinary.
FatBinary read_fat_binary(const void* wrapper);

// Position of that PTX in the container: equal for devices that take the same PTX. Null if there is
// none.
const void* place_of_ptx(const void* wrapper);

}  // namespace ptxvm
