// For wheels of manylinux_2_28, which load where glibc is 2.28 and libstdc++ has GLIBCXX_3.4.24:
// what these lack, or have under an older version of its symbol, is defined here, so that the
// linker does not bind the newer symbol of the build machine.
#include <cstdarg>
#include <cstdio>
#include <new>

#define PTXVM_HIDDEN __attribute__((visibility("hidden")))

// glibc 2.34 moved libdl into libc; every later glibc keeps the version of the old symbols.
#define PTXVM_BIND(name)                                                                   \
  __asm__(".text\n.globl " #name "\n.hidden " #name "\n.type " #name ", %function\n" #name \
          ":\njmp *ptxvm_old_" #name "@GOTPCREL(%rip)\n.size " #name ", .-" #name          \
          "\n.symver ptxvm_old_" #name ", " #name "@GLIBC_2.2.5\n");
PTXVM_BIND(dlopen)
PTXVM_BIND(dlsym)

extern "C" {

// glibc 2.32. Zero makes std::shared_ptr count atomically.
PTXVM_HIDDEN char __libc_single_threaded = 0;

// glibc 2.38 gave functions that also read binary numbers ("0b1") names of their own.
long old_strtol(const char*, char**, int) __asm__("strtol");
PTXVM_HIDDEN long __isoc23_strtol(const char* text, char** end, int base) {
  return old_strtol(text, end, base);
}
unsigned long long old_strtoull(const char*, char**, int) __asm__("strtoull");
PTXVM_HIDDEN unsigned long long __isoc23_strtoull(const char* text, char** end, int base) {
  return old_strtoull(text, end, base);
}
int old_vsscanf(const char*, const char*, va_list) __asm__("vsscanf");
PTXVM_HIDDEN int __isoc23_sscanf(const char* text, const char* format, ...) {
  va_list values;
  va_start(values, format);
  const int read = old_vsscanf(text, format, values);
  va_end(values);
  return read;
}

// GLIBCXX_3.4.29
[[noreturn]] PTXVM_HIDDEN void throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

}  // extern "C"
