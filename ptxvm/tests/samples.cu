// Small programs with features that CUDA's samples use: cuda::barrier, cuda::pipeline,
// memcpy_async, grid.sync(), wmma, graphs, virtual functions.
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <atomic>
#include <chrono>
#include <cuda/barrier>
#include <cuda/pipeline>
#include <thread>

namespace cg = cooperative_groups;

constexpr int kTile = 64;

// Warps 0 and 1 fill one of two buffers while the other warps sum the other buffer.
__global__ void producer_consumer(const float* x, float* out, int tiles) {
  using barrier = cuda::barrier<cuda::thread_scope_block>;
  __shared__ float buffer[2][kTile];
  __shared__ barrier ready[2], filled[2];
  const auto block = cg::this_thread_block();
  if (block.thread_rank() < 2) {
    init(&ready[threadIdx.x], block.size());
    init(&filled[threadIdx.x], block.size());
  }
  block.sync();
  if (threadIdx.x < kTile) {
    for (int i = 0; i < tiles; ++i) {
      ready[i % 2].arrive_and_wait();
      buffer[i % 2][threadIdx.x] = x[i * kTile + threadIdx.x];
      barrier::arrival_token token = filled[i % 2].arrive();
    }
    return;
  }
  barrier::arrival_token first = ready[0].arrive(), second = ready[1].arrive();
  float sum = 0;
  for (int i = 0; i < tiles; ++i) {
    filled[i % 2].arrive_and_wait();
    sum += buffer[i % 2][threadIdx.x - kTile];
    barrier::arrival_token token = ready[i % 2].arrive();
  }
  out[threadIdx.x - kTile] = sum;
}

// Copies of tiles by the block, two stages ahead, and by a group with a wait.
__global__ void pipelined(const float* x, float* out, int tiles) {
  constexpr int kStages = 2;
  __shared__ alignas(16) float buffer[kStages][kTile];
  __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, kStages> state;
  const auto block = cg::this_thread_block();
  auto pipeline = cuda::make_pipeline(block, &state);
  float sum = 0;
  for (int compute = 0, fetch = 0; compute < tiles; ++compute) {
    for (; fetch < tiles && fetch < compute + kStages; ++fetch) {
      pipeline.producer_acquire();
      cuda::memcpy_async(block, buffer[fetch % kStages], x + fetch * kTile,
                         cuda::aligned_size_t<16>(kTile * sizeof(float)), pipeline);
      pipeline.producer_commit();
    }
    pipeline.consumer_wait();
    sum += buffer[compute % kStages][(threadIdx.x + 1) % kTile];
    pipeline.consumer_release();
  }
  block.sync();
  cg::memcpy_async(block, buffer[0], x, kTile * sizeof(float));
  cg::wait(block);
  out[threadIdx.x] = sum + buffer[0][threadIdx.x];
}

// Sum of all elements: per block, then over the block sums.
__global__ void grid_sum(const float* x, float* partial, float* out, int n) {
  const auto grid = cg::this_grid();
  const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  float sum = 0;
  for (unsigned long long i = grid.thread_rank(); i < n; i += grid.size()) sum += x[i];
  for (int step = warp.size() / 2; step; step /= 2) sum += warp.shfl_down(sum, step);
  if (warp.thread_rank() == 0) partial[grid.thread_rank() / 32] = sum;
  grid.sync();
  if (grid.thread_rank() != 0) return;
  float total = 0;
  for (int i = 0; i < grid.size() / 32; ++i) total += partial[i];
  *out = total;
}

// C = 2 A B + C, one warp per 16 x 16 tile.
__global__ void wmma_gemm(const __half* a, const __half* b, float* c, int n, int k) {
  using namespace nvcuda::wmma;
  const int row = blockIdx.y * 16, column = blockIdx.x * 16;
  fragment<matrix_a, 16, 16, 16, __half, row_major> left;
  fragment<matrix_b, 16, 16, 16, __half, col_major> right;
  fragment<accumulator, 16, 16, 16, float> sums, old;
  fill_fragment(sums, 0.0f);
  for (int i = 0; i < k; i += 16) {
    load_matrix_sync(left, a + row * k + i, k);
    load_matrix_sync(right, b + column * k + i, k);
    mma_sync(sums, left, right, sums);
  }
  float* const place = c + row * n + column;
  load_matrix_sync(old, place, n, mem_row_major);
  for (int i = 0; i < sums.num_elements; ++i) old.x[i] += 2 * sums.x[i];
  store_matrix_sync(place, old, n, mem_row_major);
}

struct Shape {
  __device__ virtual float area(float x) const = 0;
};
struct Square : Shape {
  __device__ float area(float x) const override { return x * x; }
};
struct Circle : Shape {
  __device__ float area(float x) const override { return 3 * x * x; }
};

using Function = float (*)(float);
__device__ float half_of(float x) { return x / 2; }
__device__ Function table[] = {half_of};

// Calls through pointers fault; a module that contains them runs its other kernels.
__global__ void indirect(float* out, int which) {
  Square square;
  Circle circle;
  const Shape* const shapes[] = {&square, &circle};
  *out = which < 2 ? shapes[which]->area(*out) : table[which - 2](*out);
}

__global__ void scale(float* x, float by, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] *= by;
}

__global__ void differences(const unsigned* a, const unsigned* b, unsigned* out) {
  out[0] = __vabsdiffu4(*a, *b);
  out[1] = __vsadu4(*a, *b);
  out[2] = __vabsdiffs2(*a, *b);
  out[3] = __vadd4(*a, *b);
  out[4] = __vmaxu2(*a, *b);
  out[5] = __vavgu4(*a, *b);
  out[6] = __vabsss2(*a);
  out[7] = __vabsdiffs4(*a, *b);
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int run_producer_consumer(const float* x, float* out, int tiles) {
  producer_consumer<<<1, 2 * kTile>>>(x, out, tiles);
  return cudaGetLastError();
}
EXPORT int run_pipelined(const float* x, float* out, int tiles) {
  pipelined<<<1, kTile>>>(x, out, tiles);
  return cudaGetLastError();
}
EXPORT int run_grid_sum(const float* x, float* partial, float* out, int n, int blocks) {
  void* arguments[] = {&x, &partial, &out, &n};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(grid_sum), dim3(blocks),
                                     dim3(128), arguments, 0, nullptr);
}
EXPORT int run_grid_sum_alone(const float* x, float* partial, float* out, int n) {
  grid_sum<<<1, 128>>>(x, partial, out, n);
  return cudaGetLastError();
}
EXPORT int run_wmma_gemm(const __half* a, const __half* b, float* c, int m, int n, int k) {
  wmma_gemm<<<dim3(n / 16, m / 16), 32>>>(a, b, c, n, k);
  return cudaGetLastError();
}
EXPORT int run_indirect(float* out, int which) {
  indirect<<<1, 1>>>(out, which);
  return cudaGetLastError();
}
EXPORT int run_differences(const unsigned* a, const unsigned* b, unsigned* out) {
  differences<<<1, 1>>>(a, b, out);
  return cudaGetLastError();
}

// Captured once with a copy and a branch in another stream, launched three times: x is multiplied
// by 6 each time; y is a copy of x between the factors 2 and 3.
EXPORT int run_graph(float* x, float* y, int n) {
  cudaStream_t stream, side;
  cudaEvent_t fork, join;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamCaptureStatus status;
  size_t nodes = 0;
  cudaStreamCreate(&stream);
  cudaStreamCreate(&side);
  cudaEventCreate(&fork);
  cudaEventCreate(&join);
  if (const auto error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal)) return error;
  scale<<<(n + 63) / 64, 64, 0, stream>>>(x, 2, n);
  cudaEventRecord(fork, stream);
  cudaStreamWaitEvent(side, fork, 0);
  cudaMemcpyAsync(y, x, n * sizeof(float), cudaMemcpyDeviceToDevice, side);
  cudaEventRecord(join, side);
  cudaStreamWaitEvent(stream, join, 0);
  scale<<<(n + 63) / 64, 64, 0, stream>>>(x, 3, n);
  if (cudaStreamIsCapturing(side, &status) || status != cudaStreamCaptureStatusActive) return -1;
  if (const auto error = cudaStreamEndCapture(stream, &graph)) return error;
  if (cudaStreamIsCapturing(side, &status) || status != cudaStreamCaptureStatusNone) return -2;
  if (cudaGraphGetNodes(graph, nullptr, &nodes) || nodes != 3) return -3;
  if (const auto error = cudaGraphInstantiate(&executable, graph, 0)) return error;
  cudaGraphDestroy(graph);
  for (int i = 0; i < 3; ++i)
    if (const auto error = cudaGraphLaunch(executable, stream)) return error;
  cudaGraphExecDestroy(executable);
  cudaEventDestroy(fork);
  cudaEventDestroy(join);
  cudaStreamDestroy(side);
  if (const auto error = cudaStreamSynchronize(stream)) return error;
  return cudaStreamDestroy(stream);
}

// Calls that a capture forbids: each of them ends one capture without a graph.
EXPORT int run_bad_captures(float* x, int* codes) {
  cudaStream_t stream, other;
  cudaEvent_t event;
  cudaGraph_t graph;
  void* memory;
  cudaStreamCreate(&stream);
  cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
  cudaEventCreate(&event);
  int n = 0;
  const auto capture = [&](auto call) {
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
    scale<<<1, 1, 0, stream>>>(x, 2, 1);
    codes[n++] = call();
    codes[n++] = cudaStreamEndCapture(stream, &graph);
    cudaGetLastError();
  };
  codes[n++] = cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal);
  codes[n++] = cudaStreamEndCapture(stream, &graph);
  capture([&] { return cudaStreamSynchronize(stream); });
  capture([&] { return cudaMalloc(&memory, 16); });
  capture([&] { return cudaMemcpy(x, x, 4, cudaMemcpyDeviceToDevice); });
  capture([&] {
    cudaEventRecord(event, stream);
    return cudaStreamWaitEvent(other, event, 0);
  });
  codes[n++] = cudaStreamSynchronize(stream);
  cudaEventDestroy(event);
  cudaStreamDestroy(other);
  cudaStreamDestroy(stream);
  return n;
}

// Error codes of a call during each capture, and of the end of the capture.
EXPORT int run_more_captures(float* x, int* codes) {
  cudaStream_t stream, side, blocking;
  cudaEvent_t fork, join;
  cudaGraph_t graph, other;
  cudaStreamCaptureStatus status;
  void* memory;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
  cudaStreamCreate(&blocking);
  cudaEventCreate(&fork);
  cudaEventCreate(&join);
  int n = 0;
  const auto capture = [&](cudaStream_t origin, auto call) {
    cudaStreamBeginCapture(origin, cudaStreamCaptureModeGlobal);
    cudaEventRecord(fork, origin);
    codes[n++] = call();
    codes[n++] = cudaStreamEndCapture(origin, &graph);
    cudaGetLastError();
  };
  const auto draw_in = [&](cudaStream_t which) { cudaStreamWaitEvent(which, fork, 0); };
  capture(stream, [&] {  // work after the event that joins the stream
    draw_in(side);
    cudaEventRecord(join, side);
    cudaMemsetAsync(x, 0, 4, side);
    return cudaStreamWaitEvent(stream, join, 0);
  });
  cudaEventRecord(join, side);
  capture(stream, [&] { return cudaStreamWaitEvent(stream, join, 0); });
  capture(stream, [&] {
    int error = 0;
    std::thread([&] { error = cudaStreamEndCapture(stream, &graph); }).join();
    return error;
  });
  capture(stream, [&] {
    int error = 0;
    std::thread([&] {
      auto mode = cudaStreamCaptureModeThreadLocal;
      cudaThreadExchangeStreamCaptureMode(&mode);
      error = cudaMalloc(&memory, 16);
      cudaFree(memory);
    }).join();
    return error;
  });
  cudaStreamBeginCapture(side, cudaStreamCaptureModeGlobal);
  capture(stream, [&] { return cudaStreamWaitEvent(side, fork, 0); });
  codes[n++] = cudaStreamEndCapture(side, &graph);
  capture(blocking, [&] { return cudaEventRecord(join, nullptr); });
  capture(blocking, [&] { return cudaStreamSynchronize(nullptr); });
  capture(blocking, [&] { return cudaStreamIsCapturing(nullptr, &status); });
  capture(stream, [&] {
    draw_in(blocking);
    return cudaMemset(x, 0, 4);
  });
  capture(stream, [&] { return cudaEventQuery(join); });
  capture(stream, [&] {
    cudaStreamSynchronize(stream);
    return cudaEventRecord(join, stream);
  });
  capture(stream, [&] {
    cudaStreamSynchronize(stream);
    return cudaStreamWaitEvent(side, fork, 0);
  });
  capture(stream, [&] { return cudaMallocAsync(&memory, 16, stream); });
  capture(stream, [&] {
    scale<<<1, 2048, 0, stream>>>(x, 2, 1);
    return cudaGetLastError();
  });
  capture(stream, [&] {
    scale<<<1, 1, 1 << 20, stream>>>(x, 2, 1);
    return cudaGetLastError();
  });
  capture(cudaStreamPerThread, [&] { return cudaMemsetAsync(x, 0, 4, cudaStreamPerThread); });
  float time;
  codes[n++] = cudaEventElapsedTime(&time, fork, fork);
  cudaGraphExec_t executable;
  cudaGraphExecUpdateResultInfo info;
  cudaGraphCreate(&other, 0);
  cudaGraphInstantiate(&executable, other, 0);
  codes[n++] = cudaGraphExecUpdate(executable, graph, &info);
  cudaGraphExecDestroy(executable);
  // The caller keeps its graph if the capture into it ends without one.
  cudaStreamBeginCaptureToGraph(stream, other, nullptr, nullptr, 0, cudaStreamCaptureModeGlobal);
  cudaStreamSynchronize(stream);
  codes[n++] = cudaStreamEndCapture(stream, &graph);
  codes[n++] = cudaGraphDestroy(other);
  // Destroys a stream that is part of another stream's capture, then one with its own capture.
  capture(stream, [&] {
    draw_in(side);
    return cudaStreamDestroy(side);
  });
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  cudaEventRecord(fork, stream);
  draw_in(blocking);
  codes[n++] = cudaStreamDestroy(stream);
  codes[n++] = cudaMemsetAsync(x, 0, 4, blocking);
  cudaGetLastError();
  cudaEventDestroy(fork);
  cudaEventDestroy(join);
  cudaStreamDestroy(blocking);
  return n;
}

// A host function for which another thread allocates memory; 0 if that thread finishes.
EXPORT int run_host_function() {
  static std::atomic<bool> done;
  done = false;
  const auto wait = [](void*) {
    std::thread([] {
      void* memory;
      done = !cudaMalloc(&memory, 16) && !cudaFree(memory);
    }).detach();
    for (int i = 0; i < 2000 && !done; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
  };
  if (const auto error = cudaLaunchHostFunc(nullptr, wait, nullptr)) return error;
  return done ? 0 : -1;
}

EXPORT int run_cooperative(int threads, int kilobytes) {
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(scale), dim3(1), dim3(threads),
                                     nullptr, static_cast<size_t>(kilobytes) << 10, nullptr);
}

// Error codes and numbers of bytes of a pool of at most 1000 bytes; out[0] becomes 2 * 3.
EXPORT int run_pool(float* out, int* results) {
  int n = 0;
  cudaMemPool_t standard, pool, current;
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location = {cudaMemLocationTypeDevice, 0};
  properties.maxSize = 1000;
  const auto attribute = [&](cudaMemPool_t of, cudaMemPoolAttr which) {
    uint64_t value = ~0ull;
    cudaMemPoolGetAttribute(of, which, &value);
    return static_cast<int>(value);
  };
  results[n++] = cudaDeviceGetDefaultMemPool(&standard, 0);
  results[n++] = cudaMemPoolCreate(&pool, &properties);
  results[n++] = cudaDeviceSetMemPool(0, pool);
  results[n++] = cudaDeviceGetMemPool(&current, 0) || current != pool;
  uint64_t threshold = ~0ull;
  cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold);
  results[n++] = attribute(pool, cudaMemPoolAttrReleaseThreshold);
  float *x, *y, *z;
  results[n++] = cudaMallocAsync(&x, 600, nullptr);
  results[n++] = cudaMallocAsync(&y, 600, nullptr);  // beyond the maximum
  results[n++] = cudaMallocFromPoolAsync(&z, 600, standard, nullptr);
  results[n++] = attribute(pool, cudaMemPoolAttrUsedMemCurrent);
  results[n++] = attribute(standard, cudaMemPoolAttrUsedMemCurrent);
  const float three = 3;
  cudaMemcpyAsync(x, &three, 4, cudaMemcpyHostToDevice, nullptr);
  scale<<<1, 1>>>(x, 2, 1);
  cudaMemcpyAsync(out, x, 4, cudaMemcpyDeviceToHost, nullptr);
  cudaFreeAsync(z, nullptr);
  results[n++] = cudaMemPoolDestroy(pool);  // x stays
  results[n++] = cudaDeviceGetMemPool(&current, 0) || current != standard;
  results[n++] = cudaMemPoolTrimTo(pool, 0);
  results[n++] = cudaFreeAsync(x, nullptr);
  results[n++] = cudaMemPoolDestroy(standard);
  uint64_t zero = 0;
  results[n++] = attribute(standard, cudaMemPoolAttrUsedMemHigh);
  cudaMemPoolSetAttribute(standard, cudaMemPoolAttrUsedMemHigh, &zero);
  results[n++] = attribute(standard, cudaMemPoolAttrUsedMemHigh);
  properties.handleTypes = cudaMemHandleTypePosixFileDescriptor;
  results[n++] = cudaMemPoolCreate(&pool, &properties);
  cudaMemAccessFlags flags;
  results[n++] = cudaMemPoolGetAccess(&flags, standard, &properties.location);
  results[n++] = flags;
  cudaGetLastError();
  return n;
}

// A call that the machine does not have.
EXPORT int run_missing() {
  cudaPitchedPtr memory;
  const int error = cudaMalloc3D(&memory, make_cudaExtent(4, 4, 4));
  cudaGetLastError();
  return error;
}

EXPORT const char* text_of(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
