// Kernels that the current device can run.
#pragma once

namespace tokenmill::cuda {

// True if the build has sm_90a kernels. Only for sources that choose between kernels: CMake defines
// the macro for no others.
#if defined(TOKENMILL_SM90)
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

// 90 for sm_90. Throws: no kernel can be chosen without it.
int compute_capability();

}  // namespace tokenmill::cuda
