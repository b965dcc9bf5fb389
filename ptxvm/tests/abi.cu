// Host code and kernels that use every entry point of the runtime that compiled objects call.
#include <cuda_profiler_api.h>
#include <cuda_runtime.h>

#include <cstring>

struct Scaled {
  const float* a;
  const float* b;
  float* out;
  int n;
  short scale;
  double offset;
};

__constant__ float weights[4];
__device__ unsigned counter = 7;

__global__ void add(const float* a, const float* b, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = a[i] + b[i];
}

__global__ void scaled(const __grid_constant__ Scaled p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  p.out[i] = p.a[i] * p.scale + p.b[i] * weights[i & 3] + static_cast<float>(p.offset);
  atomicAdd(&counter, 1);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum(const float* x, float* out, int n) {
  extern __shared__ float partial[];
  float total = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) total += x[i];
  for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(0xffffffffu, total, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / 32; ++i) total += partial[i];
    *out = total;
  }
}

// Grid barrier: every block waits for all others.
__global__ void meet(unsigned* arrived, unsigned* out) {
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1);
    while (*static_cast<volatile unsigned*>(arrived) < gridDim.x) {
    }
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = *static_cast<volatile unsigned*>(arrived);
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int launch_add(const float* a, const float* b, float* out, int n, int threads) {
  add<<<(n + 255) / 256, threads>>>(a, b, out, n);
  return cudaGetLastError();
}

EXPORT int launch_add_by_pointer(const float* a, const float* b, float* out, int n) {
  void* arguments[] = {&a, &b, &out, &n};
  return cudaLaunchKernel(reinterpret_cast<const void*>(add), dim3((n + 255) / 256), dim3(256),
                          arguments, 0, nullptr);
}

EXPORT int launch_add_extended(const float* a, const float* b, float* out, int n, int cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((n + 255) / 256);
  config.blockDim = dim3(256);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, add, a, b, out, n);
}

EXPORT int launch_scaled(const float* a, const float* b, float* out, int n, unsigned* count) {
  const float host[4] = {1, 2, 3, 4};
  if (const auto error = cudaMemcpyToSymbol(weights, host, sizeof host)) return error;
  scaled<<<(n + 127) / 128, 128>>>(Scaled{a, b, out, n, -3, 0.5});
  return cudaMemcpyFromSymbol(count, counter, sizeof *count);
}

EXPORT int launch_meet(unsigned* arrived, unsigned* out, int blocks) {
  void* arguments[] = {&arrived, &out};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(meet), dim3(blocks), dim3(64),
                                     arguments, 0, nullptr);
}

// Uses device memory, a stream and events.
EXPORT int launch_sum(const float* x, float* out, int n, int threads, int shared, int allow) {
  if (allow) {
    const auto error =
        cudaFuncSetAttribute(sum<256>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error) return error;
  }
  float *device_x, *device_out, milliseconds;
  cudaStream_t stream;
  cudaEvent_t start, stop;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  if (const auto error = cudaMalloc(&device_x, n * sizeof(float))) return error;
  cudaMalloc(&device_out, sizeof(float));
  cudaMemcpyAsync(device_x, x, n * sizeof(float), cudaMemcpyHostToDevice, stream);
  cudaMemsetAsync(device_out, 0, sizeof(float), stream);
  cudaEventRecord(start, stream);
  sum<256><<<1, threads, shared, stream>>>(device_x, device_out, n);
  cudaError_t error = cudaGetLastError();
  cudaEventRecord(stop, stream);
  cudaMemcpyAsync(out, device_out, sizeof(float), cudaMemcpyDeviceToHost, stream);
  if (!error) error = cudaStreamSynchronize(stream);
  if (!error) error = cudaEventElapsedTime(&milliseconds, start, stop);
  if (!error && milliseconds < 0) error = cudaErrorUnknown;
  cudaFree(device_x);
  cudaFree(device_out);
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaStreamDestroy(stream);
  return error;
}

EXPORT int query(int* values) {
  cudaFuncAttributes attributes;
  cudaDeviceProp properties;
  if (const auto error = cudaFuncGetAttributes(&attributes, sum<256>)) return error;
  if (const auto error = cudaGetDeviceProperties(&properties, 0)) return error;
  values[0] = attributes.maxThreadsPerBlock;
  values[1] = attributes.numRegs;
  values[2] = properties.major * 10 + properties.minor;
  values[3] = properties.multiProcessorCount;
  cudaDeviceGetAttribute(&values[4], cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&values[5], sum<256>, 256, 40000);
  return cudaSuccess;
}

EXPORT int limits(int* values) {
  cudaDeviceProp properties;
  int device;
  cudaGetDevice(&device);
  if (const auto error = cudaGetDeviceProperties(&properties, device)) return error;
  int i = 0;
  for (const auto which :
       {cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
        cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
        cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor})
    cudaDeviceGetAttribute(&values[i++], which, device);
  values[i++] = properties.major * 10 + properties.minor;
  values[i++] = static_cast<int>(properties.sharedMemPerBlockOptin);
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&values[i], sum<256>, 256, 24000);
}

// Error codes of the calls that follow a kernel with an out-of-bounds access.
EXPORT int after_a_fault(int* codes) {
  float* x;
  cudaEvent_t event;
  if (const auto error = cudaMalloc(&x, 64)) return error;
  cudaEventCreate(&event);
  add<<<1, 256>>>(x, x, x, 256);
  float host = 0;
  void* none = nullptr;
  int n = 0;
  codes[n++] = cudaDeviceSynchronize();
  codes[n++] = cudaStreamSynchronize(nullptr);
  codes[n++] = cudaStreamQuery(nullptr);
  codes[n++] = cudaMemcpy(&host, x, 4, cudaMemcpyDeviceToHost);
  codes[n++] = cudaMemset(x, 0, 4);
  codes[n++] = cudaEventRecord(event);
  codes[n++] = cudaEventSynchronize(event);
  codes[n++] = cudaMalloc(&none, 4);
  codes[n++] = launch_add(x, x, x, 16, 16);
  codes[n++] = cudaPeekAtLastError();
  codes[n++] = cudaGetLastError();
  codes[n++] = cudaGetLastError();
  codes[n++] = cudaFree(x);
  return n;
}

// Out-of-bounds copies and fills, each with guard bytes that must not change.
EXPORT int out_of_range(int* codes) {
  char *memory, host[4096] = {}, beside[4096];
  if (const auto error = cudaMalloc(&memory, 64)) return -error;
  cudaMemset(memory, 7, 64);
  int n = 0;
  codes[n++] = cudaMemcpy(memory, host, 65, cudaMemcpyHostToDevice);
  codes[n++] = cudaMemcpy(memory, host, 4096, cudaMemcpyDefault);
  codes[n++] = cudaMemcpy(host, memory, 65, cudaMemcpyDeviceToHost);
  codes[n++] = cudaMemcpy(memory + 60, memory, 8, cudaMemcpyDeviceToDevice);
  codes[n++] = cudaMemset(memory, 0, 65);
  codes[n++] = cudaMemset2D(memory, 40, 0, 32, 2);
  codes[n++] = cudaMemcpy2D(memory, 40, host, 32, 32, 2, cudaMemcpyHostToDevice);
  codes[n++] = cudaMemcpy(beside, host, 4, cudaMemcpyHostToDevice);
  codes[n++] = cudaMemset(host, 0, 4);
  codes[n++] = cudaMemcpy(nullptr, host, 4, cudaMemcpyHostToDevice);
  cudaGetLastError();
  cudaMemcpy(host, memory, 64, cudaMemcpyDeviceToHost);
  for (int i = 0; i < 64; ++i)
    if (host[i] != 7) return -1;
  return cudaFree(memory) ? -2 : n;
}

// Calls that have no effect here; returns the number of the first unexpected result.
EXPORT int other_calls() {
  size_t limit = 0, pitch = 0;
  float* rows;
  if (cudaProfilerStart() || cudaProfilerStop()) return 1;
  if (cudaDeviceSetLimit(cudaLimitStackSize, 4096)) return 2;
  if (cudaDeviceGetLimit(&limit, cudaLimitStackSize) || limit != 4096) return 3;
  if (cudaMallocPitch(&rows, &pitch, 100, 3) || pitch < 100 || pitch % 256) return 4;
  if (cudaMemset2D(rows, pitch, 1, 100, 3)) return 5;
  return cudaFree(rows);
}

EXPORT const char* text_of(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// True if an error text stays valid after others have been requested.
EXPORT int texts_stay(int error) {
  const char* const text = text_of(error);
  char copy[4096] = {};
  std::strncpy(copy, text, sizeof copy - 1);
  for (int other = 0; other < 1000; ++other) text_of(other);
  return std::strcmp(text, copy) == 0;
}

EXPORT int last_error() { return cudaGetLastError(); }
