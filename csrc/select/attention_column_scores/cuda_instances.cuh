// The kernels of one type of elements.
#pragma once
#include "select/attention_column_scores/cuda_launch.cuh"

#define TOKENMILL_COLUMN_SCORES(T)                                                               \
  template <>                                                                                    \
  const char* launch_pass<T>(const ColumnScoresParams& p, const ScorePlan& plan, ScorePass pass, \
                             cudaStream_t stream) {                                              \
    switch (bucket_of(p.head_dim)) {                                                             \
      case 64:                                                                                   \
        return launch_bucket<T, 64>(p, plan, pass, stream);                                      \
      case 128:                                                                                  \
        return launch_bucket<T, 128>(p, plan, pass, stream);                                     \
      default:                                                                                   \
        return launch_bucket<T, 256>(p, plan, pass, stream);                                     \
    }                                                                                            \
  }
