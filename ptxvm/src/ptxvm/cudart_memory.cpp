// Memory. Device memory is host memory.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "ptxvm/check.h"
#include "ptxvm/pool.h"
#include "ptxvm/streams.h"

using namespace ptxvm;

namespace {

constexpr size_t kAlignment = 256;  // bytes, of cudaMalloc
constexpr size_t kPitch = 512;      // bytes, of cudaMallocPitch

cudaError_t allocate(const char* function, void** pointer, size_t bytes,
                     const PoolOwner& pool = nullptr) {
  const std::lock_guard lock(runtime().mutex);
  if (pool && !pool->take(bytes))
    return refuse(cudaErrorMemoryAllocation,
                  std::string(function) + ": the pool has no " + std::to_string(bytes) + " bytes");
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* const memory = std::aligned_alloc(kAlignment, rounded);
  if (!memory) {
    if (pool) pool->give_back(bytes);
    return refuse(cudaErrorMemoryAllocation,
                  std::string(function) + ": no memory for " + std::to_string(bytes) + " bytes");
  }
  std::memset(memory, 0xff, rounded);  // NaN wherever a kernel reads uninitialised memory
  runtime().allocations[memory] = {bytes, pool};
  register_memory(memory, bytes, true);
  *pointer = memory;
  return cudaSuccess;
}

cudaError_t release(const char* function, void* pointer) {
  const std::lock_guard lock(runtime().mutex);
  const auto found = runtime().allocations.find(pointer);
  if (found == runtime().allocations.end())
    return refuse(cudaErrorInvalidValue,
                  std::string(function) + ": the pointer is not one of cudaMalloc");
  if (const auto& [bytes, pool] = found->second; pool) pool->give_back(bytes);
  runtime().allocations.erase(found);
  unregister_memory(pointer);
  std::free(pointer);
  return finish();
}

// Allocations that synchronise the device.
cudaError_t allocate_at_once(const char* function, void** pointer, size_t bytes) {
  *pointer = nullptr;
  if (const auto error = finish(); error || bytes == 0) return error;
  if (const auto error = forbid_in_capture(function)) return error;
  return allocate(function, pointer, bytes);
}

// Null `handle`: from the current pool.
cudaError_t allocate_in_stream(const char* function, void** pointer, size_t bytes,
                               const cudaMemPool_t* handle, cudaStream_t stream) {
  *pointer = nullptr;
  if (const auto error = leave_out_of_capture(function, stream)) return error;
  const std::lock_guard lock(runtime().mutex);
  const PoolOwner pool = handle ? owner_of(*handle) : current_pool();
  if (!pool) return refuse(cudaErrorInvalidValue, std::string(function) + ": no such pool");
  return bytes ? allocate(function, pointer, bytes, pool) : finish();
}

cudaError_t release_at_once(const char* function, void* pointer) {
  if (!pointer) return finish();
  if (const auto error = forbid_in_capture(function)) return error;
  return release(function, pointer);
}

// One side of a copy or a fill: it must lie within an allocation or, unless `on_device`, in host
// memory that overlaps no allocation.
cudaError_t check_range(const char* what, const void* base, size_t bytes, bool on_device,
                        Access kind) {
  const Where where = locate(base, bytes, kind);
  if (where == Where::inside || (where == Where::outside && !on_device)) return cudaSuccess;
  char range[64];
  std::snprintf(range, sizeof range, "%zu bytes at %p", bytes, base);
  return refuse(cudaErrorInvalidValue, std::string(what) + " must lie in one allocation that " +
                                           (kind == Access::write ? "may be written" : "exists") +
                                           "; got " + range);
}

struct Rows {
  size_t pitch, width, count;  // bytes, bytes, rows
  size_t bytes() const { return count ? (count - 1) * pitch + width : 0; }
};

cudaError_t copy_rows(void* destination, size_t destination_pitch, const void* source,
                      size_t source_pitch, size_t width, size_t height, cudaMemcpyKind kind) {
  if (const auto error = finish()) return error;
  if (width == 0 || height == 0) return cudaSuccess;
  if (width > destination_pitch || width > source_pitch)
    return refuse(cudaErrorInvalidPitchValue, "cudaMemcpy2D: a row is longer than the pitch");
  const std::lock_guard lock(runtime().mutex);
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault)
    return refuse(cudaErrorInvalidMemcpyDirection, "cudaMemcpy: unknown kind");
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  if (const auto error =
          check_range("cudaMemcpy: the destination", destination,
                      Rows{destination_pitch, width, height}.bytes(), to_device, Access::write))
    return error;
  if (const auto error =
          check_range("cudaMemcpy: the source", source, Rows{source_pitch, width, height}.bytes(),
                      from_device, Access::read))
    return error;
  for (size_t row = 0; row < height; ++row)
    std::memmove(static_cast<char*>(destination) + row * destination_pitch,
                 static_cast<const char*>(source) + row * source_pitch, width);
  return cudaSuccess;
}

cudaError_t copy(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind) {
  return copy_rows(destination, bytes, source, bytes, bytes, 1, kind);
}

cudaError_t fill_rows(void* pointer, size_t pitch, int value, size_t width, size_t height) {
  if (const auto error = finish()) return error;
  if (width == 0 || height == 0) return cudaSuccess;
  if (width > pitch && height > 1)
    return refuse(cudaErrorInvalidPitchValue, "cudaMemset2D: a row is longer than the pitch");
  const std::lock_guard lock(runtime().mutex);
  if (const auto error = check_range("cudaMemset: the range", pointer,
                                     Rows{pitch, width, height}.bytes(), true, Access::write))
    return error;
  for (size_t row = 0; row < height; ++row)
    std::memset(static_cast<char*>(pointer) + row * pitch, value, width);
  return cudaSuccess;
}

cudaError_t fill(void* pointer, int value, size_t bytes) {
  return fill_rows(pointer, bytes, value, bytes, 1);
}

cudaError_t find_variable(const void* symbol, const Variable*& variable) {
  const auto record = runtime().variables.find(symbol);
  if (record == runtime().variables.end())
    return refuse(cudaErrorInvalidSymbol, "no such variable is registered");
  const Image& image = record->second.loaded->open();
  const std::string& name = record->second.name;
  const Module* const module = image.module.get();
  if (!module) return refuse(static_cast<cudaError_t>(image.error), name + ": " + image.report);
  const auto found = module->variables.find(name);
  if (found == module->variables.end() || !found->second.memory)
    return refuse(cudaErrorInvalidSymbol, name + ": the module has no such variable");
  variable = &found->second;
  return cudaSuccess;
}

cudaError_t find_symbol(const void* symbol, size_t bytes, size_t offset, char*& memory) {
  const std::lock_guard lock(runtime().mutex);
  if (const auto error = finish()) return error;
  const Variable* found = nullptr;
  if (const auto error = find_variable(symbol, found)) return error;
  const Variable& variable = *found;
  if (offset > variable.bytes || bytes > variable.bytes - offset)
    return refuse(cudaErrorInvalidValue, variable.name + ": bytes " + std::to_string(offset) +
                                             " to " + std::to_string(offset + bytes) + " of " +
                                             std::to_string(variable.bytes));
  memory = variable.memory + offset;
  return cudaSuccess;
}

cudaError_t copy_to_symbol(const void* symbol, const void* source, size_t bytes, size_t offset) {
  const std::lock_guard lock(runtime().mutex);
  char* memory = nullptr;
  if (const auto error = find_symbol(symbol, bytes, offset, memory)) return error;
  if (const auto error =
          check_range("cudaMemcpyToSymbol: the source", source, bytes, false, Access::read))
    return error;
  std::memmove(memory, source, bytes);
  return cudaSuccess;
}

cudaError_t copy_from_symbol(void* destination, const void* symbol, size_t bytes, size_t offset) {
  const std::lock_guard lock(runtime().mutex);
  char* memory = nullptr;
  if (const auto error = find_symbol(symbol, bytes, offset, memory)) return error;
  if (const auto error = check_range("cudaMemcpyFromSymbol: the destination", destination, bytes,
                                     false, Access::write))
    return error;
  std::memmove(destination, memory, bytes);
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return allocate_at_once("cudaMalloc", pointer, bytes);
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  return allocate_at_once("cudaMallocHost", pointer, bytes);
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return allocate_at_once("cudaHostAlloc", pointer, bytes);
}
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
  return allocate_at_once("cudaMallocManaged", pointer, bytes);
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t stream) {
  return allocate_in_stream("cudaMallocAsync", pointer, bytes, nullptr, stream);
}
cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t bytes, cudaMemPool_t pool,
                                    cudaStream_t stream) {
  return allocate_in_stream("cudaMallocFromPoolAsync", pointer, bytes, &pool, stream);
}
cudaError_t cudaMallocPitch(void** pointer, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + kPitch - 1) / kPitch * kPitch;
  return allocate_at_once("cudaMallocPitch", pointer, *pitch * height);
}
cudaError_t cudaFree(void* pointer) { return release_at_once("cudaFree", pointer); }
cudaError_t cudaFreeHost(void* pointer) { return release_at_once("cudaFreeHost", pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  if (const auto error = leave_out_of_capture("cudaFreeAsync", stream)) return error;
  return pointer ? release("cudaFreeAsync", pointer) : finish();
}

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  const std::lock_guard lock(runtime().mutex);
  register_memory(pointer, bytes, true);
  return finish();
}

cudaError_t cudaHostUnregister(void* pointer) {
  const std::lock_guard lock(runtime().mutex);
  unregister_memory(pointer);
  return finish();
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return finish();
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(runtime().mutex);
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  for (const auto& [base, allocation] : runtime().allocations) {
    const auto* const first = static_cast<const char*>(base);
    if (pointer < first || pointer >= first + allocation.bytes) continue;
    attributes->type = cudaMemoryTypeDevice;
    attributes->devicePointer = attributes->hostPointer = const_cast<void*>(pointer);
  }
  return finish();
}

// Prefetching is a no-op: all memory is host memory.
cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  return finish();
}
cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) {
  return finish();
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = size_t{8} << 30;
  return finish();
}

cudaError_t cudaMemcpy(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind) {
  return submit(nullptr, [=] { return copy(destination, source, bytes, kind); });
}
cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes,
                            cudaMemcpyKind kind, cudaStream_t stream) {
  return submit(stream, [=] { return copy(destination, source, bytes, kind); });
}
cudaError_t cudaMemcpy2D(void* destination, size_t destination_pitch, const void* source,
                         size_t source_pitch, size_t width, size_t height, cudaMemcpyKind kind) {
  return submit(nullptr, [=] {
    return copy_rows(destination, destination_pitch, source, source_pitch, width, height, kind);
  });
}
cudaError_t cudaMemcpy2DAsync(void* destination, size_t destination_pitch, const void* source,
                              size_t source_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  return submit(stream, [=] {
    return copy_rows(destination, destination_pitch, source, source_pitch, width, height, kind);
  });
}
cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  return submit(nullptr, [=] { return fill(pointer, value, bytes); });
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  return submit(stream, [=] { return fill(pointer, value, bytes); });
}
cudaError_t cudaMemset2D(void* pointer, size_t pitch, int value, size_t width, size_t height) {
  return submit(nullptr, [=] { return fill_rows(pointer, pitch, value, width, height); });
}
cudaError_t cudaMemset2DAsync(void* pointer, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream) {
  return submit(stream, [=] { return fill_rows(pointer, pitch, value, width, height); });
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* source, size_t bytes, size_t offset,
                               cudaMemcpyKind) {
  return submit(nullptr, [=] { return copy_to_symbol(symbol, source, bytes, offset); });
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* source, size_t bytes,
                                    size_t offset, cudaMemcpyKind, cudaStream_t stream) {
  return submit(stream, [=] { return copy_to_symbol(symbol, source, bytes, offset); });
}
cudaError_t cudaMemcpyFromSymbol(void* destination, const void* symbol, size_t bytes, size_t offset,
                                 cudaMemcpyKind) {
  return submit(nullptr, [=] { return copy_from_symbol(destination, symbol, bytes, offset); });
}
cudaError_t cudaMemcpyFromSymbolAsync(void* destination, const void* symbol, size_t bytes,
                                      size_t offset, cudaMemcpyKind, cudaStream_t stream) {
  return submit(stream, [=] { return copy_from_symbol(destination, symbol, bytes, offset); });
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  char* memory = nullptr;
  const auto error = find_symbol(symbol, 0, 0, memory);
  *pointer = memory;
  return error;
}
cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  const std::lock_guard lock(runtime().mutex);
  const Variable* variable = nullptr;
  if (const auto error = find_variable(symbol, variable)) return error;
  *bytes = variable->bytes;
  return finish();
}

PTXVM_PER_THREAD(cudaMemcpy, _ptds);
PTXVM_PER_THREAD(cudaMemcpy2D, _ptds);
PTXVM_PER_THREAD(cudaMemcpyToSymbol, _ptds);
PTXVM_PER_THREAD(cudaMemcpyFromSymbol, _ptds);
PTXVM_PER_THREAD(cudaMemset, _ptds);
PTXVM_PER_THREAD(cudaMemset2D, _ptds);
PTXVM_PER_THREAD(cudaMemcpyAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemcpy2DAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemcpyToSymbolAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemcpyFromSymbolAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemsetAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemset2DAsync, _ptsz);
PTXVM_PER_THREAD(cudaMallocAsync, _ptsz);
PTXVM_PER_THREAD(cudaMallocFromPoolAsync, _ptsz);
PTXVM_PER_THREAD(cudaFreeAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemPrefetchAsync, _ptsz);
