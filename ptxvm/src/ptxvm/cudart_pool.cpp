// Memory pools: which there are, and their attributes. cudart_memory.cpp allocates from them.
#include <algorithm>
#include <vector>

#include "ptxvm/device.h"
#include "ptxvm/pool.h"

using namespace ptxvm;

namespace {

struct Pools {
  std::vector<PoolOwner> all;
  std::map<int, PoolOwner> defaults;  // by device
  std::map<int, PoolOwner> current;   // by device, if it is not the default
};

// Lives until the process ends: host code frees memory while it exits.
Pools& pools = *new Pools;

PoolOwner default_pool(int device) {
  PoolOwner& pool = pools.defaults[device];
  if (!pool) {
    pool = std::make_shared<CUmemPoolHandle_st>();
    pool->location = {cudaMemLocationTypeDevice, device};
    pools.all.push_back(pool);
  }
  return pool;
}

PoolOwner current_pool_of(int device) {
  const auto chosen = pools.current.find(device);
  return chosen == pools.current.end() ? default_pool(device) : chosen->second;
}

cudaError_t no_device(const char* function, int device) {
  return refuse(cudaErrorInvalidDevice,
                std::string(function) + ": no device " + std::to_string(device));
}

cudaError_t no_pool(const char* function) {
  return refuse(cudaErrorInvalidValue, std::string(function) + ": no such pool");
}

cudaError_t get_pool(const char* function, cudaMemPool_t* pool, int device,
                     PoolOwner (*which)(int)) {
  const std::lock_guard lock(runtime().mutex);
  if (!device_of(device)) return no_device(function, device);
  *pool = which(device).get();
  return finish();
}

cudaError_t set_pool(const char* function, int device, cudaMemPool_t handle) {
  const std::lock_guard lock(runtime().mutex);
  if (!device_of(device)) return no_device(function, device);
  const PoolOwner pool = owner_of(handle);
  if (!pool) return no_pool(function);
  if (pool->location.type != cudaMemLocationTypeDevice || pool->location.id != device)
    return refuse(cudaErrorInvalidValue,
                  std::string(function) + ": the pool must lie on the device");
  pools.current[device] = pool;
  return finish();
}

// Pools of cudaMemGetMemPool and its like: of pinned memory on a device.
cudaError_t require_device_memory(const char* function, const cudaMemLocation& location,
                                  cudaMemAllocationType type) {
  if (location.type == cudaMemLocationTypeDevice && type == cudaMemAllocationTypePinned)
    return cudaSuccess;
  return refuse(cudaErrorNotSupported,
                std::string(function) + ": pools are of pinned memory on a device here");
}

// A number of bytes that only 0 may be written to, which begins a new maximum.
struct Counter {
  size_t now;
  size_t* most;  // null: `now` itself is the attribute
};

bool find_counter(CUmemPoolHandle_st& pool, cudaMemPoolAttr attribute, Counter& counter) {
  switch (attribute) {
    case cudaMemPoolAttrReservedMemCurrent:
    case cudaMemPoolAttrUsedMemCurrent:
      counter = {pool.used, nullptr};
      return true;
    case cudaMemPoolAttrReservedMemHigh:
    case cudaMemPoolAttrUsedMemHigh:
      counter = {pool.used, &pool.most_used};
      return true;
    default:
      return false;
  }
}

int* find_reuse(CUmemPoolHandle_st& pool, cudaMemPoolAttr attribute) {
  const int i = attribute - cudaMemPoolReuseFollowEventDependencies;
  return i >= 0 && i < 3 ? &pool.reuse[i] : nullptr;
}

}  // namespace

namespace ptxvm {

PoolOwner current_pool() { return current_pool_of(device_ordinal()); }

PoolOwner owner_of(cudaMemPool_t handle) {
  const auto found = std::find_if(pools.all.begin(), pools.all.end(),
                                  [&](const PoolOwner& pool) { return pool.get() == handle; });
  return found == pools.all.end() ? nullptr : *found;
}

}  // namespace ptxvm

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  return get_pool("cudaDeviceGetDefaultMemPool", pool, device, default_pool);
}
cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) {
  return get_pool("cudaDeviceGetMemPool", pool, device, current_pool_of);
}
cudaError_t cudaDeviceSetMemPool(int device, cudaMemPool_t pool) {
  return set_pool("cudaDeviceSetMemPool", device, pool);
}
cudaError_t cudaMemGetDefaultMemPool(cudaMemPool_t* pool, cudaMemLocation* location,
                                     cudaMemAllocationType type) {
  const char* const name = "cudaMemGetDefaultMemPool";
  const auto error = require_device_memory(name, *location, type);
  return error ? error : get_pool(name, pool, location->id, default_pool);
}
cudaError_t cudaMemGetMemPool(cudaMemPool_t* pool, cudaMemLocation* location,
                              cudaMemAllocationType type) {
  const char* const name = "cudaMemGetMemPool";
  const auto error = require_device_memory(name, *location, type);
  return error ? error : get_pool(name, pool, location->id, current_pool_of);
}
cudaError_t cudaMemSetMemPool(cudaMemLocation* location, cudaMemAllocationType type,
                              cudaMemPool_t pool) {
  const char* const name = "cudaMemSetMemPool";
  const auto error = require_device_memory(name, *location, type);
  return error ? error : set_pool(name, location->id, pool);
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* handle, const cudaMemPoolProps* properties) {
  const std::lock_guard lock(runtime().mutex);
  const char* const name = "cudaMemPoolCreate";
  const cudaMemLocation& location = properties->location;
  if (const auto error = require_device_memory(name, location, properties->allocType)) return error;
  if (!device_of(location.id)) return no_device(name, location.id);
  if (properties->handleTypes != cudaMemHandleTypeNone)
    return refuse(cudaErrorNotSupported, std::string(name) + ": pools cannot be shared here");
  auto pool = std::make_shared<CUmemPoolHandle_st>();
  pool->location = location;
  pool->maximum = properties->maxSize;
  pools.all.push_back(pool);
  *handle = pool.get();
  return finish();
}

// Memory of the pool stays until it is freed.
cudaError_t cudaMemPoolDestroy(cudaMemPool_t handle) {
  const std::lock_guard lock(runtime().mutex);
  const PoolOwner pool = owner_of(handle);
  if (!pool) return no_pool("cudaMemPoolDestroy");
  for (const auto& [device, fixed] : pools.defaults)
    if (fixed == pool)
      return refuse(cudaErrorInvalidValue, "cudaMemPoolDestroy: the pool is a device's default");
  std::erase_if(pools.current, [&](const auto& entry) { return entry.second == pool; });
  std::erase(pools.all, pool);
  return finish();
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t) {
  const std::lock_guard lock(runtime().mutex);
  return owner_of(pool) ? finish() : no_pool("cudaMemPoolTrimTo");
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t handle, cudaMemPoolAttr attribute, void* value) {
  const std::lock_guard lock(runtime().mutex);
  const PoolOwner pool = owner_of(handle);
  if (!pool) return no_pool("cudaMemPoolGetAttribute");
  Counter counter;
  if (const int* const reuse = find_reuse(*pool, attribute))
    *static_cast<int*>(value) = *reuse;
  else if (attribute == cudaMemPoolAttrReleaseThreshold)
    *static_cast<uint64_t*>(value) = pool->threshold;
  else if (find_counter(*pool, attribute, counter))
    *static_cast<uint64_t*>(value) = counter.most ? *counter.most : counter.now;
  else
    return refuse(cudaErrorNotSupported,
                  "cudaMemPoolGetAttribute: unknown attribute " + std::to_string(attribute));
  return finish();
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t handle, cudaMemPoolAttr attribute, void* value) {
  const std::lock_guard lock(runtime().mutex);
  const PoolOwner pool = owner_of(handle);
  if (!pool) return no_pool("cudaMemPoolSetAttribute");
  Counter counter;
  if (int* const reuse = find_reuse(*pool, attribute)) {
    *reuse = *static_cast<const int*>(value);
  } else if (attribute == cudaMemPoolAttrReleaseThreshold) {
    pool->threshold = *static_cast<const uint64_t*>(value);
  } else if (find_counter(*pool, attribute, counter)) {
    if (!counter.most || *static_cast<const uint64_t*>(value) != 0)
      return refuse(cudaErrorInvalidValue,
                    "cudaMemPoolSetAttribute: only a high-water mark may be set, to 0");
    *counter.most = counter.now;
  } else {
    return refuse(cudaErrorNotSupported,
                  "cudaMemPoolSetAttribute: unknown attribute " + std::to_string(attribute));
  }
  return finish();
}

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t handle, const cudaMemAccessDesc* list,
                                 size_t count) {
  const std::lock_guard lock(runtime().mutex);
  const PoolOwner pool = owner_of(handle);
  if (!pool) return no_pool("cudaMemPoolSetAccess");
  for (size_t i = 0; i < count; ++i) {
    const auto& [location, flags] = list[i];
    if (location.type != cudaMemLocationTypeDevice || !device_of(location.id))
      return no_device("cudaMemPoolSetAccess", location.id);
    if (location.id == pool->location.id && flags != cudaMemAccessFlagsProtReadWrite)
      return refuse(cudaErrorInvalidValue,
                    "cudaMemPoolSetAccess: the device of the pool reads and writes it");
    pool->access[location.id] = flags;
  }
  return finish();
}

cudaError_t cudaMemPoolGetAccess(cudaMemAccessFlags* flags, cudaMemPool_t handle,
                                 cudaMemLocation* location) {
  const std::lock_guard lock(runtime().mutex);
  const PoolOwner pool = owner_of(handle);
  if (!pool) return no_pool("cudaMemPoolGetAccess");
  if (location->type != cudaMemLocationTypeDevice || !device_of(location->id))
    return no_device("cudaMemPoolGetAccess", location->id);
  const auto given = pool->access.find(location->id);
  *flags = location->id == pool->location.id ? cudaMemAccessFlagsProtReadWrite
           : given == pool->access.end()     ? cudaMemAccessFlagsProtNone
                                             : given->second;
  return finish();
}
