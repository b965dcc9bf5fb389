// Which kernels the current device can run.
#pragma once

namespace tokenmill::cuda {

// Whether the build has kernels of 9.0a. Only sources that choose between kernels may ask: CMake
// tells no others.
#if defined(TOKENMILL_SM90)
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

// 90 for 9.0. Throws: no kernel can be chosen without it.
int compute_capability();

}  // namespace tokenmill::cuda
