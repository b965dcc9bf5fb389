#include "select/attention_column_scores/cuda_instances.cuh"

namespace tokenmill::cuda {

TOKENMILL_COLUMN_SCORES(__half)

}  // namespace tokenmill::cuda
