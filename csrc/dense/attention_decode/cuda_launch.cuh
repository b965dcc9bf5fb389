// Chooses blocks for the decode kernel and launches one instance of it.
#pragma once
#include "dense/attention_decode/kernel.cuh"

namespace tokenmill::cuda {

constexpr int64_t kMaxAutoSplits = 128;

// One launch: its plan, and the workspace that it needs.
struct DecodeLaunch {
  DecodePlan plan;
  int64_t blocks, outputs, partial_floats;
  int shared_bytes;
};

inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// By shapes alone: lengths lie on the device.
template <typename T, int kBucket>
DecodeLaunch plan_decode(const DecodeParams& d) {
  using Shape = DecodeShape<T, kBucket>;
  const AttentionParams& p = d.attention;
  DecodeLaunch launch{};
  DecodePlan& plan = launch.plan;
  const int64_t rows = p.heads / p.kv_heads * p.seqlen_q;
  int row_warps = Shape::kMinRowWarps;
  while (row_warps < Shape::kMaxRowWarps && 16 * row_warps < rows) row_warps *= 2;
  while (1 << plan.log2_row_warps < row_warps) ++plan.log2_row_warps;
  plan.group = static_cast<int>(p.heads / p.kv_heads);
  plan.rows = static_cast<int>(rows);
  plan.tile_rows = 16 * row_warps;
  plan.row_tiles = static_cast<int>(ceil_div(rows, plan.tile_rows));
  plan.aligned = is_vectorizable<T>(p.q.data, p.head_dim, p.q.batch, p.q.seq, p.q.head) &&
                 is_vectorizable<T>(d.cache.k.data, p.head_dim, d.cache.k.batch, d.cache.k.seq,
                                    d.cache.k.head) &&
                 is_vectorizable<T>(d.cache.v.data, p.value_dim, d.cache.v.batch, d.cache.v.seq,
                                    d.cache.v.head);
  launch.shared_bytes = Shape::shared_bytes(row_warps);
  launch.outputs = p.batch * p.kv_heads * plan.row_tiles;
  const int64_t filling = 2 * multiprocessors();
  // What a request has room for may be far more than what it has: never more blocks than fill.
  const int64_t worth = ceil_div(d.cache.capacity, kLeastSteps<Shape> * Shape::kTileKeys);
  const int64_t most = worth < 1 ? 1 : worth < kMaxAutoSplits ? worth : kMaxAutoSplits;
  if (d.stream_k) {
    launch.blocks = launch.outputs * most < filling ? launch.outputs * most : filling;
    launch.partial_floats = 2 * launch.blocks;
  } else {
    const int64_t wanted = ceil_div(filling, launch.outputs);
    plan.splits = static_cast<int>(d.num_splits > 0 ? d.num_splits : wanted < most ? wanted : most);
    launch.blocks = launch.outputs * plan.splits;
    // float32 sums over many keys need room of their own.
    launch.partial_floats = plan.splits > 1 || Shape::kFloat ? launch.blocks : 0;
  }
  launch.partial_floats *= plan.tile_rows * int64_t{Shape::kPartialRow};
  return launch;
}

inline int64_t workspace_bytes(const DecodeLaunch& launch) {
  return 4 * (launch.partial_floats + launch.outputs);
}

template <typename T, int kBucket>
const char* launch_decode(const DecodeParams& d, cudaStream_t stream) {
  DecodeLaunch launch = plan_decode<T, kBucket>(d);
  if (launch.blocks > 0x7fffffff) return "2^31 blocks at most on CUDA";
  launch.plan.partials = static_cast<float*>(d.workspace);
  launch.plan.arrived = reinterpret_cast<int*>(launch.plan.partials + launch.partial_floats);
  cudaMemsetAsync(launch.plan.arrived, 0, launch.outputs * sizeof(int), stream);
  const auto kernel = attention_decode_kernel<T, kBucket>;
  cudaError_t error = cudaSuccess;
  if (launch.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 launch.shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(launch.blocks), kDecodeThreads, launch.shared_bytes, stream>>>(
        d, launch.plan);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// visit.operator()<bucket>()
template <typename Visit>
auto visit_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return visit.template operator()<64>();
  if (dim <= 128) return visit.template operator()<128>();
  return visit.template operator()<256>();
}

// Defined in cuda_<dtype>.cu each.
template <typename T>
const char* launch_decode(const DecodeParams& d, cudaStream_t stream);

#define TOKENMILL_DECODE_INSTANCES(T)                                                         \
  template <>                                                                                 \
  const char* launch_decode<T>(const DecodeParams& d, cudaStream_t stream) {                  \
    return visit_bucket(d.attention,                                                          \
                        [&]<int kBucket>() { return launch_decode<T, kBucket>(d, stream); }); \
  }

}  // namespace tokenmill::cuda
