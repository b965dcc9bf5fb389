// C functions of the machine, in addition to the CUDA runtime's.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Makes global memory accessible to kernels.
void ptxvm_register(const void* base, size_t bytes, int writable);
void ptxvm_unregister(const void* base);
void ptxvm_unregister_all(void);

// "check=1,count=1,order=reverse,device=sm_86,...": names of Options in machine.h, and the device.
// Returns 0, or -1 and leaves a message for ptxvm_last_report.
int ptxvm_configure(const char* settings);

// All options in the format of ptxvm_configure, valid until the next call in this thread.
const char* ptxvm_options(void);

// CUDA runtime calls return the error of a failed kernel until this is called; on a GPU only a new
// process recovers from it. ptxvm_launch neither checks for such an error nor leaves one.
void ptxvm_recover(void);

// Report of the last failed launch or call of this thread; empty if none has failed since.
const char* ptxvm_last_report(void);

// The rule that the kernel of that launch broke, as an object of ptxvm_reports; null if it broke
// none. Read once, and valid until the next call in this thread.
const char* ptxvm_last_finding(void);

// With on_fault=report or collect: a JSON list with one object for each rule broken at a line:
// kernel, name (demangled), rule, count, and the report of the first time; the line of the PTX, the
// first line of the part around it that has neither branches nor what orders accesses, and file and
// source_line of -lineinfo ("" and 0 without); the same of `cause`, the earlier access or where a
// value was lost (null if there is none). Valid until the next call in this thread. The call clears
// the list; reports that were never fetched are printed when the process ends, unless on_fault is
// collect.
const char* ptxvm_reports(void);

// Counters of all launches since the last reset as JSON text, valid until the next call.
const char* ptxvm_counters(void);
void ptxvm_reset_counters(void);

// Loads PTX text: returns a handle or NULL (see ptxvm_last_report). args are pointers to the
// values.
void* ptxvm_load(const char* ptx);
int ptxvm_launch(void* module, const char* kernel, const uint32_t grid[3], const uint32_t block[3],
                 uint32_t dynamic_shared, void** args);
void ptxvm_unload(void* module);

// Parameters of each kernel in order, as JSON: {"kernel": [{"name": "x", "type": "u64", "count": 0,
// "bytes": 8}, ...], ...}. type: element type; count: elements of an array (0: a scalar). Valid
// until the next call in this thread.
const char* ptxvm_kernels(void* module);

// C++ name of a mangled name, such as a kernel's: "_Z1kPf" is "k(float*)". Any other name as it is.
// Valid until the next call in this thread.
const char* ptxvm_demangled(const char* name);

#ifdef __cplusplus
}
#endif
