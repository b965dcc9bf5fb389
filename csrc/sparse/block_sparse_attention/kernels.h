// Tables of the kernels of block_sparse_attention on GPUs (host_kernels.cpp).
#pragma once
#include "core/kernels.h"
#include "sparse/block_sparse_attention/params.h"

namespace tokenmill {

std::span<const Kernel<BlockSparseParams>> kernels_of(const BlockSparseParams&);
std::span<const Kernel<BlockSparseBackwardParams>> kernels_of(const BlockSparseBackwardParams&);

namespace cuda::block_sparse_attention {

const char* launch_on_sm80(const BlockSparseParams&, void* stream);
const char* launch_on_sm80(const BlockSparseBackwardParams&, void* stream);

}  // namespace cuda::block_sparse_attention
}  // namespace tokenmill
