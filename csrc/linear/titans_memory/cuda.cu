#include "linear/titans_memory/params.h"
namespace tokenmill {
int64_t workspace_floats(const TitansParams&) { return 0; }
int64_t workspace_floats(const TitansBackwardParams&) { return 0; }
const char* launch_cuda(const TitansParams&, void*) { return "no"; }
const char* launch_cuda(const TitansBackwardParams&, void*) { return "no"; }
}
