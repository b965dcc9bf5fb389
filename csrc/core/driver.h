// NVIDIA driver that a build requires. Free of CUDA.
#pragma once
#include <string>

namespace tokenmill {

// First Linux driver release that runs code of a CUDA runtime of this major version (NVIDIA's rule
// of minor version compatibility); 0: unknown.
constexpr int min_driver(int cuda_major) {
  return cuda_major == 12 ? 525 : cuda_major == 13 ? 580 : 0;
}

// 13000 -> "13.0"
inline std::string cuda_version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Error text for a driver that cannot run code built with a toolkit of version `built`. found: CUDA
// version that the driver supports, 0 without a driver. To compile PTX the driver must be as new as
// the toolkit; otherwise its major version is enough.
inline std::string driver_text(int built, int found, bool compiles_ptx) {
  const int major = built / 1000;
  std::string text = compiles_ptx ? "this build has nothing but PTX for this GPU, which needs an "
                                  : "this build needs an ";
  text += "NVIDIA driver for CUDA " + cuda_version_text(compiles_ptx ? built : major * 1000);
  const bool named = !compiles_ptx && min_driver(major) > 0;
  text += named ? " (" + std::to_string(min_driver(major)) + " or later)" : " or later";
  return text + (found > 0 ? "; the driver here supports CUDA " + cuda_version_text(found)
                           : "; there is no driver here");
}

}  // namespace tokenmill
