// Runs csrc/cuda/launch.cu on a fake CUDA runtime, which the cases below set up. Prints one line
// per case.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "cuda/launch.cuh"

namespace tokenmill {
int use_device(int device);  // core/stream.h
void restore_device(int device);
}  // namespace tokenmill

namespace {

constexpr int kLimit = 101376, kStatic = 1024;  // bytes

std::mutex mutex;
std::set<int> limits_set;
int times_set = 0;
int allowed[40] = {};  // by device
thread_local int device = 0;
cudaError_t of_launch = cudaSuccess, of_query = cudaSuccess, of_memset = cudaSuccess;
int driver = 12040;
std::atomic<int> launches{0};

void first_kernel(int, float) {}
void second_kernel(int, float) {}

void show(const char* name, const char* error) {
  std::printf("%s: %s\n", name, error ? error : "null");
}

}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* out) {
  *out = device;
  return of_query;
}
cudaError_t cudaSetDevice(int wanted) {
  if (wanted >= 40) return cudaErrorInvalidValue;
  device = wanted;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 84 : kLimit;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->sharedSizeBytes = kStatic;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  const std::lock_guard lock(mutex);
  limits_set.insert(value);
  ++times_set;
  allowed[device] = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void** arguments, size_t bytes,
                             cudaStream_t) {
  const std::lock_guard lock(mutex);
  ++launches;
  float second;  // the caller's int, converted for the kernel
  std::memcpy(&second, arguments[1], sizeof second);
  if (static_cast<int>(bytes) > allowed[device] || second != 2) return cudaErrorInvalidValue;
  return of_launch;
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return of_memset; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "other";
}
}

int main() {
  using namespace tokenmill::cuda;
  const auto run = [](int64_t bytes) {
    return launch<first_kernel>(int64_t{3}, 32, bytes, nullptr, 1, 2);
  };
  std::vector<std::thread> threads;
  std::atomic<int> failed{0};
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 500; ++i) failed += run(1000 * ((i * 7 + t) % 90 + 1)) != nullptr;
    });
  for (std::thread& thread : threads) thread.join();
  std::printf("threads: %d failed, %zu limit, raised %s\n", failed.load(), limits_set.size(),
              times_set <= 4 ? "once" : "often");
  std::printf("limit: %d\n", *limits_set.begin());
  device = 1;
  show("another device", run(50000));
  device = 39;
  show("a device behind the table", run(50000));
  show("too much", run(kLimit - kStatic + 1));
  device = 0;
  const int before = tokenmill::use_device(3), during = device;
  tokenmill::restore_device(before);
  std::printf("devices: %d, %d, %d\n", before, during, device);
  try {
    tokenmill::use_device(40);
  } catch (const std::exception& error) {
    show("no such device", error.what());
  }
  show("another kernel", launch<second_kernel>(dim3(1, 2), 32, 60000, nullptr, 1, 2));
  launches = 0;
  show("no blocks", launch<first_kernel>(dim3(4, 0), 32, 0, nullptr, 1, 2));
  std::printf("launches: %d\n", launches.load());
  show("too many blocks", launch<first_kernel>(kMaxGrid + 1, 32, 0, nullptr, 1, 2));
  show("no bytes", set_bytes(nullptr, 0, 0, nullptr));
  of_memset = cudaErrorInvalidValue;
  show("bytes", set_bytes(nullptr, 0, 1, nullptr));
  of_launch = cudaErrorInvalidValue;
  show("launch", run(0));
  of_launch = cudaErrorUnsupportedPtxVersion;
  show("PTX", run(0));
  of_launch = cudaErrorInsufficientDriver;
  show("old driver", run(0));
  driver = 0;
  show("no driver", run(0));
  std::printf("multiprocessors: %d\n", multiprocessors());
  of_query = cudaErrorInsufficientDriver;
  try {
    multiprocessors();
  } catch (const std::exception& error) {
    show("query", error.what());
  }
}
