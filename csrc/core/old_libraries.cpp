// For manylinux_2_28 wheels, which load with glibc 2.28 and a libstdc++ with GLIBCXX_3.4.24 and
// CXXABI_1.3.11: symbols that these lack, or have under an older version, are defined here; the
// linker finds them here first and does not bind the newer symbol of the build machine. Compiled as
// C++17: C++20 gives std::stringbuf::str a newer symbol.
#include <cxxabi.h>

#include <cstring>
#include <exception>
#include <ios>
#include <new>
#include <sstream>
#include <string>
#include <utility>

#define TM_HIDDEN __attribute__((visibility("hidden")))

// Forwards `name` to the symbol of that version, which every later glibc has kept.
#if defined(__x86_64__)
#define TM_OLDEST "2.2.5"
#define TM_JUMP(to) "jmp *" to "@GOTPCREL(%rip)\n"
#elif defined(__aarch64__)
#define TM_OLDEST "2.17"
#define TM_JUMP(to) "adrp x16, :got:" to "\nldr x16, [x16, :got_lo12:" to "]\nbr x16\n"
#else
#error "no versions of symbols are known for this processor"
#endif
#define TM_BIND(name, version)                                                              \
  __asm__(".text\n.globl " #name "\n.hidden " #name "\n.type " #name ", %function\n" #name  \
          ":\n" TM_JUMP("tokenmill_old_" #name) ".size " #name ", .-" #name                 \
                                                "\n.symver tokenmill_old_" #name ", " #name \
                                                "@GLIBC_" version "\n");

// 2.29 moved their error handling out of them.
TM_BIND(exp, TM_OLDEST)
TM_BIND(log, TM_OLDEST)

// 2.34 moved libpthread, libdl and librt into libc. The static CUDA runtime needs most of these.
#if defined(__x86_64__)
TM_BIND(dlmopen, "2.3.4")
#else
TM_BIND(dlmopen, TM_OLDEST)
#endif
TM_BIND(dlclose, TM_OLDEST)
TM_BIND(dlerror, TM_OLDEST)
TM_BIND(dlopen, TM_OLDEST)
TM_BIND(dlsym, TM_OLDEST)
TM_BIND(dlvsym, TM_OLDEST)
TM_BIND(pthread_condattr_setpshared, TM_OLDEST)
TM_BIND(pthread_create, TM_OLDEST)
TM_BIND(pthread_detach, TM_OLDEST)
TM_BIND(pthread_getspecific, TM_OLDEST)
TM_BIND(pthread_join, TM_OLDEST)
TM_BIND(pthread_key_create, TM_OLDEST)
TM_BIND(pthread_key_delete, TM_OLDEST)
TM_BIND(pthread_kill, TM_OLDEST)
TM_BIND(pthread_mutex_trylock, TM_OLDEST)
TM_BIND(pthread_mutexattr_destroy, TM_OLDEST)
TM_BIND(pthread_mutexattr_init, TM_OLDEST)
TM_BIND(pthread_mutexattr_setpshared, TM_OLDEST)
TM_BIND(pthread_mutexattr_settype, TM_OLDEST)
TM_BIND(pthread_once, TM_OLDEST)
TM_BIND(pthread_rwlock_destroy, TM_OLDEST)
TM_BIND(pthread_rwlock_init, TM_OLDEST)
TM_BIND(pthread_rwlock_rdlock, TM_OLDEST)
TM_BIND(pthread_rwlock_timedrdlock, TM_OLDEST)
TM_BIND(pthread_rwlock_timedwrlock, TM_OLDEST)
TM_BIND(pthread_rwlock_tryrdlock, TM_OLDEST)
TM_BIND(pthread_rwlock_trywrlock, TM_OLDEST)
TM_BIND(pthread_rwlock_unlock, TM_OLDEST)
TM_BIND(pthread_rwlock_wrlock, TM_OLDEST)
TM_BIND(pthread_rwlockattr_destroy, TM_OLDEST)
TM_BIND(pthread_rwlockattr_init, TM_OLDEST)
TM_BIND(pthread_rwlockattr_setpshared, TM_OLDEST)
TM_BIND(pthread_setspecific, TM_OLDEST)
TM_BIND(pthread_spin_destroy, TM_OLDEST)
TM_BIND(pthread_spin_init, TM_OLDEST)
TM_BIND(pthread_spin_lock, TM_OLDEST)
TM_BIND(pthread_spin_trylock, TM_OLDEST)
TM_BIND(pthread_spin_unlock, TM_OLDEST)
TM_BIND(sem_destroy, TM_OLDEST)
TM_BIND(sem_init, TM_OLDEST)
TM_BIND(sem_post, TM_OLDEST)
TM_BIND(sem_timedwait, TM_OLDEST)
TM_BIND(sem_trywait, TM_OLDEST)
TM_BIND(sem_wait, TM_OLDEST)
TM_BIND(shm_open, TM_OLDEST)
TM_BIND(shm_unlink, TM_OLDEST)

extern "C" {

// 2.32. Zero makes std::shared_ptr count atomically.
TM_HIDDEN char __libc_single_threaded = 0;

// The 2.38 version also parses binary numbers ("0b1").
long old_strtol(const char*, char**, int) __asm__("strtol");
TM_HIDDEN long __isoc23_strtol(const char* text, char** end, int base) {
  return old_strtol(text, end, base);
}

// GLIBCXX_3.4.26
TM_HIDDEN void new_stringstream(void* self) __asm__(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void new_stringstream(void* self) { new (self) std::stringstream(std::ios::in | std::ios::out); }
TM_HIDDEN void new_ostringstream(void* self) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void new_ostringstream(void* self) { new (self) std::ostringstream(std::ios::out); }

// GLIBCXX_3.4.29
[[noreturn]] TM_HIDDEN void throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// GLIBCXX_3.4.32: g++ 13 and later leave the initialisation of std::cout etc. to the library.
TM_HIDDEN void init_streams() __asm__("_ZSt21ios_base_library_initv");
void init_streams() { static std::ios_base::Init init; }

// CXXABI_1.3.15: g++ 14 and later call it where an exception would leave a noexcept function.
[[noreturn]] TM_HIDDEN void end_in_noexcept(void* exception) __asm__("__cxa_call_terminate");
void end_in_noexcept(void* exception) {
  if (exception) abi::__cxa_begin_catch(exception);
  std::terminate();
}

// GLIBCXX_3.4.31: std::string::replace in place, from text that may be part of the string: the
// `before` characters at `at`, followed by `behind` characters, become the `size` of `text`.
TM_HIDDEN void
replace(void*, char* at, size_t before, const char* text, size_t size, size_t behind) __asm__(
    "_ZNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEE15_M_replace_coldEPcmPKcmm");
void replace(void*, char* at, size_t before, const char* text, size_t size, size_t behind) {
  const std::string copy(text, size);
  std::memmove(at + size, at + before, behind);
  std::memcpy(at, copy.data(), size);
}

}  // extern "C"

TM_HIDDEN std::string text_of(const std::stringbuf* self) __asm__(
    "_ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string text_of(const std::stringbuf* self) { return self->str(); }
TM_HIDDEN std::string take_text_of(std::stringbuf* self) __asm__(
    "_ZNOSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string take_text_of(std::stringbuf* self) {
  std::string text = self->str();
  self->str("");
  return text;
}

// CXXABI_1.3.13. A copy adds a reference; a copy that is never destroyed only counts.
using ExceptionPtr = std::exception_ptr;
extern "C" {
void copy_exception(void* self, const ExceptionPtr* other) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_exception(ExceptionPtr* self) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
TM_HIDDEN void add_reference(ExceptionPtr* self) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(ExceptionPtr* self) {
  alignas(ExceptionPtr) char copy[sizeof(ExceptionPtr)];
  copy_exception(copy, self);
}
TM_HIDDEN void release(ExceptionPtr* self) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(ExceptionPtr* self) {
  destroy_exception(self);
  new (self) ExceptionPtr();
}
}
