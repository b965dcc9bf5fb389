#include "ptxvm/fatbin.h"

#include <dlfcn.h>
#include <elf.h>

#include <cstring>

#include "ptxvm/device.h"

namespace ptxvm {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1;
constexpr uint32_t kContainerMagic = 0xba55ed50;
constexpr uint64_t kFlagLz4 = 0x2000, kFlagZstd = 0x8000;
constexpr uint64_t kFlagSpecific = 0x100000;  // compute_90a: runs only on this architecture

struct Wrapper {
  uint32_t magic, version;
  const char* data;
  const void* file;
};

struct Container {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};

struct Entry {
  enum Kind : uint16_t { ptx = 1, elf = 2 };
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t payload_bytes;     // padded
  uint32_t compressed_bytes;  // 0 if not compressed
  uint32_t options_offset;
  uint16_t minor, major;
  uint32_t architecture;
  uint32_t name_offset, name_bytes;
  uint64_t flags, reserved, raw_bytes;
};
static_assert(sizeof(Entry) == 64);

// Empty, with a reason in `error`, if the payload cannot be read.
std::string payload(const Entry& entry, const char* data, std::string& error) {
  if (!(entry.flags & (kFlagZstd | kFlagLz4))) return {data, entry.payload_bytes};
  const char* const advice = "; build it with nvcc --compress-mode=none";
  if (entry.flags & kFlagLz4) {
    error = std::string("the module is compressed with LZ4") + advice;
    return {};
  }
  using Decompress = size_t (*)(void*, size_t, const void*, size_t);
  static void* const library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
  static const auto decompress =
      library ? reinterpret_cast<Decompress>(dlsym(library, "ZSTD_decompress")) : nullptr;
  if (!decompress) {
    error = std::string("the module is compressed and there is no libzstd.so.1") + advice;
    return {};
  }
  std::string raw(entry.raw_bytes, 0);
  if (decompress(raw.data(), raw.size(), data, entry.compressed_bytes) != raw.size()) {
    error = std::string("the module's compressed PTX is damaged") + advice;
    return {};
  }
  return raw;
}

// Register counts: the top byte of sh_info of each section .text.<kernel>.
void read_registers(const std::string& image, std::map<std::string, uint32_t>& registers) {
  Elf64_Ehdr header;
  if (image.size() < sizeof header) return;
  std::memcpy(&header, image.data(), sizeof header);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_shentsize != sizeof(Elf64_Shdr))
    return;
  const auto section = [&](size_t index, Elf64_Shdr& out) {
    const uint64_t at = header.e_shoff + index * sizeof out;
    if (at + sizeof out > image.size()) return false;
    std::memcpy(&out, image.data() + at, sizeof out);
    return true;
  };
  Elf64_Shdr names, current;
  if (!section(header.e_shstrndx, names)) return;
  for (size_t i = 0; i < header.e_shnum; ++i) {
    if (!section(i, current)) return;
    const uint64_t at = names.sh_offset + current.sh_name;
    if (at >= image.size()) return;
    const char* name = image.c_str() + at;
    if (std::strncmp(name, ".text.", 6) == 0) registers[name + 6] = current.sh_info >> 24;
  }
}

// Visits each entry of the container with its data; false if it is no container.
template <typename Visit>
bool visit_entries(const void* pointer, Visit visit) {
  Wrapper wrapper;
  std::memcpy(&wrapper, pointer, sizeof wrapper);
  Container container;
  if (wrapper.magic != kWrapperMagic) return false;
  std::memcpy(&container, wrapper.data, sizeof container);
  if (container.magic != kContainerMagic) return false;
  const char* at = wrapper.data + container.header_bytes;
  const char* const end = at + container.bytes;
  while (at + sizeof(Entry) <= end) {
    Entry entry;
    std::memcpy(&entry, at, sizeof entry);
    visit(entry, at + entry.header_bytes);
    at += entry.header_bytes + entry.payload_bytes;
  }
  return true;
}

// Suitability of an entry for the device; 0 if it does not run there.
uint32_t rank(const Entry& entry) {
  const bool specific = entry.flags & kFlagSpecific;
  const bool runs = specific ? device().specific && entry.architecture == device().newest_ptx
                             : entry.architecture <= device().newest_ptx;
  return runs ? 2 * entry.architecture + specific : 0;
}

}  // namespace

const void* place_of_ptx(const void* wrapper) {
  const void* place = nullptr;
  uint32_t best = 0;
  visit_entries(wrapper, [&](const Entry& entry, const char* data) {
    if (entry.kind != Entry::ptx || rank(entry) <= best) return;
    best = rank(entry);
    place = data;
  });
  return place;
}

FatBinary read_fat_binary(const void* wrapper) {
  FatBinary result;
  uint32_t best_elf = 0, other_ptx = 0;
  const void* const place = place_of_ptx(wrapper);
  const bool is_container = visit_entries(wrapper, [&](const Entry& entry, const char* data) {
    if (entry.kind == Entry::ptx && !rank(entry)) other_ptx = entry.architecture;
    if (data == place) {
      result.ptx = payload(entry, data, result.error);
      result.ptx.resize(std::strlen(result.ptx.c_str()));  // the payload is zero-padded
    }
    if (entry.kind == Entry::elf && rank(entry) > best_elf) {
      std::string ignored;
      best_elf = rank(entry);
      read_registers(payload(entry, data, ignored), result.registers);
    }
  });
  if (!is_container) {
    result.error = "the module's container is not one that the machine knows";
    return result;
  }
  const std::string newest = std::to_string(device().newest_ptx);
  if (result.ptx.empty() && result.error.empty())
    result.error = "the module holds no PTX for compute_" + newest + " or below" +
                   (other_ptx ? ", only for compute_" + std::to_string(other_ptx) : "") +
                   "; build it with -gencode arch=compute_" +
                   (device().specific ? newest + "a" : "80") + ",code=compute_" +
                   (device().specific ? newest + "a" : "80");
  return result;
}

}  // namespace ptxvm
