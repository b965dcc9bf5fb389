// C functions of the machine beside those of the CUDA runtime.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Global memory that kernels may touch from now on.
void ptxvm_register(const void* base, size_t bytes, int writable);
void ptxvm_unregister(const void* base);
void ptxvm_unregister_all(void);

// "check=1,count=1,order=reverse,device=sm_86,...": names of Options in machine.h, and the device.
// Returns 0, or -1 and leaves a message for ptxvm_last_report.
int ptxvm_configure(const char* settings);

// All options as ptxvm_configure takes them, valid until the next call in this thread.
const char* ptxvm_options(void);

// Calls of the CUDA runtime return the error of a kernel that failed until this is called, for
// which there is no other way than a new process on a GPU. ptxvm_launch neither needs it nor calls
// for it.
void ptxvm_recover(void);

// What the last failed launch or call of this thread reported; empty if none failed since.
const char* ptxvm_last_report(void);

// With on_fault=report or collect: each rule that was broken at a line, as a list of JSON of
// objects with kernel, line, rule, count, and report, which is that of the first time. Valid until
// the next call in this thread. They are forgotten; those that nobody asked for are printed when
// the process ends, unless on_fault is collect.
const char* ptxvm_reports(void);

// Counters of all launches since the last reset as JSON text, valid until the next call.
const char* ptxvm_counters(void);
void ptxvm_reset_counters(void);

// Raw PTX text: returns a handle or NULL (see ptxvm_last_report). args are pointers to the values.
void* ptxvm_load(const char* ptx);
int ptxvm_launch(void* module, const char* kernel, const uint32_t grid[3], const uint32_t block[3],
                 uint32_t dynamic_shared, void** args);
void ptxvm_unload(void* module);

// What ptxvm_launch takes, as JSON: {"kernel": [{"name": "x", "type": "u64", "count": 0,
// "bytes": 8}, ...], ...}, with the parameters of each kernel of a text in their order. type is
// that of an element, count the number of elements of an array (0: a scalar). Valid until the next
// call in this thread.
const char* ptxvm_kernels(void* module);

#ifdef __cplusplus
}
#endif
