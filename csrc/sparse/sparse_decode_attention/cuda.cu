#include "cuda/refuse.cuh"
#include "sparse/sparse_decode_attention/cuda_plan.cuh"
#include "sparse/sparse_decode_attention/kernel_mass.cuh"

namespace tokenmill {
namespace cuda::sparse_decode_attention {
namespace {

int64_t rows_of_head(const SparseDecodeParams& d) {
  return d.attention.heads / d.row_heads() * d.attention.seqlen_q;
}

// Rounded up to whole steps, with one more at both ends of the listed keys.
int64_t logit_row(const SparseDecodeParams& d) {
  return round_up(listed_keys(d), kLogitAlign) + 2 * kLogitAlign;
}

int64_t logit_count(const SparseDecodeParams& d) {
  return d.mass ? d.attention.batch * d.row_heads() * rows_of_head(d) * logit_row(d) : 0;
}

int64_t listed_count(const SparseDecodeParams& d) {
  return d.mass ? round_up(2 * d.attention.batch * d.row_heads(), kLogitAlign) : 0;
}

// While there are few warps, each is a CTA.
const char* launch_mass(const SparseLaunch& d, cudaStream_t stream) {
  const int64_t heads = d.attention.batch * d.row_heads();
  const int64_t warps = ceil_div(d.entries, mass_entries(d.log2_block));
  const bool few = heads * warps <= 2 * multiprocessors();
  const int threads = few ? kWarpSize : kMassThreads;
  return launch<sparse_mass_kernel>(ceil_div(heads * warps * kWarpSize, threads), threads, 0,
                                    stream, d, static_cast<int>(rows_of_head(d)), warps, heads);
}

}  // namespace
}  // namespace cuda::sparse_decode_attention

int64_t workspace_bytes(const SparseDecodeParams& d) {
  const int64_t bytes = cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    using namespace cuda;
    using namespace cuda::sparse_decode_attention;
    if (d.cache.dtype == DType::float8_e4m3fn)
      return visit_float8_bucket(d.attention, [&]<int kBucket>() {
        return workspace_bytes(plan_sparse<ListedKeys<T, kBucket, Float8>>(d));
      });
    return visit_bucket(d.attention, [&]<int kBucket>() {
      return workspace_bytes(plan_sparse<ListedKeys<T, kBucket>>(d));
    });
  });
  return bytes + 4 * (cuda::sparse_decode_attention::logit_count(d) +
                      cuda::sparse_decode_attention::listed_count(d));
}

const char* launch_cuda(const SparseDecodeParams& params, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  cuda::sparse_decode_attention::SparseLaunch d{
      {params, nullptr, cuda::sparse_decode_attention::logit_row(params), nullptr, false, 0}};
  if (d.cache.pages > 0x7fffffff)
    return cuda::refuse("k_cache", "must have at most 2^31 - 1 pages on CUDA", d.cache.pages);
  if (d.cache.capacity > cuda::kMaxLength)
    return cuda::refuse("k_cache", "must have room for at most 2^29 keys of a request on CUDA",
                        d.cache.capacity);
  const int64_t others = cuda::sparse_decode_attention::listed_keys(d) + d.extra;
  if (others > cuda::kMaxLength)
    return cuda::refuse("indices", "must list, with extra_k, at most 2^29 keys on CUDA", others);
  const bool float8 = d.cache.dtype == DType::float8_e4m3fn;
  if (d.positions == 0) d.cos = d.sin = nullptr;
  d.wide_tables = cuda::is_vectorizable<float>(d.cos, d.pairs, d.cos_stride) &&
                  cuda::is_vectorizable<float>(d.sin, d.pairs, d.sin_stride);
  float* const workspace = static_cast<float*>(d.workspace);
  float* const behind = workspace + cuda::sparse_decode_attention::logit_count(d);
  if (d.mass) d.logits = workspace, d.listed = reinterpret_cast<int2*>(behind);
  const char* error = nullptr;
  if (d.attention.seqlen_q > 0)
    error = cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
      float* const sums = behind + cuda::sparse_decode_attention::listed_count(d);
      if (float8) return cuda::sparse_decode_attention::launch_float8<T>(d, sums, s);
      return cuda::sparse_decode_attention::launch_sparse<T>(d, sums, s);
    });
  return error || !d.mass ? error : cuda::sparse_decode_attention::launch_mass(d, s);
}

}  // namespace tokenmill
