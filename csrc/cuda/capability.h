// Which kernels the current device can run.
#pragma once

namespace tokenmill::cuda {

// 90 for 9.0. Throws: no kernel can be chosen without it.
int compute_capability();

}  // namespace tokenmill::cuda
