# Instances of the kernels' launchers: a generated source each, so that they compile side by side.
# An operator's cuda*.cu declares them `extern template`.
set(ELEMENTS __half __nv_bfloat16 float)

# cuda_instances(header declaration [ELEMENTS element ...] [MODES mode ...] [INTO sources])
# `declaration` names ELEMENT, and MODE where there are some. Appends to `sources`, else to `cuda`.
function(cuda_instances header declaration)
  cmake_parse_arguments(PARSE_ARGV 2 only "" "INTO" "ELEMENTS;MODES")
  if(NOT only_INTO)
    set(only_INTO cuda)
  endif()
  if(NOT only_ELEMENTS)
    set(only_ELEMENTS ${ELEMENTS})
  endif()
  if(NOT only_MODES)
    set(only_MODES "-")
  endif()
  get_filename_component(folder ${header} DIRECTORY)
  if(TOKENMILL_OPS)
    list(JOIN TOKENMILL_OPS "|" wanted)
    if(NOT folder MATCHES "^(${wanted})$")
      return()
    endif()
  endif()
  get_filename_component(stem ${header} NAME_WE)
  foreach(element ${only_ELEMENTS})
    foreach(mode ${only_MODES})
      string(REPLACE ELEMENT ${element} instance "${declaration}")
      string(REPLACE MODE ${mode} instance "${instance}")
      string(REGEX REPLACE "_-$" "" name ${stem}_${element}_${mode})
      string(REGEX REPLACE "___(nv_)?" "_" name ${name})
      set(source ${CMAKE_BINARY_DIR}/built/${folder}/${name}.cu)
      file(CONFIGURE OUTPUT ${source} @ONLY CONTENT
           "#include \"${header}\"\n\nnamespace tokenmill::cuda {\ntemplate ${instance};\n}\n")
      list(APPEND ${only_INTO} ${source})
    endforeach()
  endforeach()
  set(${only_INTO} ${${only_INTO}} PARENT_SCOPE)
endfunction()

cuda_instances(dense/attention/kernel.cuh
  "const char* launch_forward<ELEMENT>(const AttentionParams&, const MaskBounds&, cudaStream_t)")
cuda_instances(dense/attention/kernel_sm90.cuh
  "const char* launch_forward_sm90<ELEMENT, Weights::MODE>(const AttentionParams&, const KvCache&, cudaStream_t)"
  ELEMENTS __half __nv_bfloat16 MODES softmax sigmoid INTO cuda_sm90)
cuda_instances(dense/attention/kernel_backward_sm90.cuh
  "const char* launch_backward_sm90<ELEMENT, Weights::MODE>(const Sm90Backward&, cudaStream_t)"
  ELEMENTS __half __nv_bfloat16 MODES softmax sigmoid INTO cuda_sm90)
# float32 has the general mode alone.
cuda_instances(dense/attention/kernel_backward_launch.cuh
  "const char* launch_pairs<ELEMENT, Mode::MODE>(const BackwardArgs&, cudaStream_t)"
  ELEMENTS __half __nv_bfloat16 MODES softmax sigmoid fast_sigmoid elementwise general)
cuda_instances(dense/attention/kernel_backward_launch.cuh
  "const char* launch_pairs<ELEMENT, Mode::MODE>(const BackwardArgs&, cudaStream_t)"
  ELEMENTS float MODES general)
cuda_instances(dense/attention_decode/cuda_launch.cuh
  "const char* launch_decode<ELEMENT>(const DecodeParams&, cudaStream_t)")
cuda_instances(dense/attention_decode/float8_launch.cuh
  "const char* launch_float8<ELEMENT>(const DecodeParams&, cudaStream_t)")
cuda_instances(dense/attention_decode/prefill_launch.cuh
  "const char* launch_prefill<ELEMENT>(const DecodeParams&, const MaskBounds&, int most_queries, cudaStream_t)")
cuda_instances(dense/attention_decode/prefill_float8_launch.cuh
  "const char* launch_prefill_float8<ELEMENT>(const DecodeParams&, const MaskBounds&, cudaStream_t)")
cuda_instances(dense/attention_decode/kernel_sm90.cuh
  "const char* launch_decode_sm90<ELEMENT>(const DecodeParams&, cudaStream_t)"
  ELEMENTS __half __nv_bfloat16 INTO cuda_sm90)
cuda_instances(linear/linear_attention/cuda_launch.cuh
  "const char* linear_attention::launch_recurrence<ELEMENT>(const Recurrence&, const RecurrencePlan&, cudaStream_t)")
cuda_instances(linear/linear_attention/kernel_sm90.cuh
  "const char* linear_attention::launch_sm90<ELEMENT>(const Recurrence&, const RecurrencePlan&, cudaStream_t)"
  ELEMENTS __half __nv_bfloat16 INTO cuda_sm90)
cuda_instances(select/attention_column_scores/cuda_launch.cuh
  "const char* attention_column_scores::launch_pass<ELEMENT>(const ColumnScoresParams&, const ScorePlan&, ScorePass, cudaStream_t)")
cuda_instances(sparse/sparse_decode_attention/cuda_launch.cuh
  "const char* sparse_decode_attention::launch_sparse<ELEMENT>(const SparseLaunch&, void*, cudaStream_t)")
cuda_instances(sparse/sparse_decode_attention/float8_launch.cuh
  "const char* sparse_decode_attention::launch_float8<ELEMENT>(const SparseLaunch&, void*, cudaStream_t)")
cuda_instances(sparse/bilevel_routing_attention/cuda_launch.cuh
  "const char* bilevel_routing_attention::launch_bilevel<ELEMENT>(const RegionLaunch&, cudaStream_t)")
cuda_instances(sparse/bilevel_routing_attention/cuda_backward_launch.cuh
  "const char* bilevel_routing_attention::launch_bilevel<ELEMENT>(const RegionGradients&, cudaStream_t)")
cuda_instances(sparse/block_sparse_attention/cuda_launch.cuh
  "const char* block_sparse_attention::launch_block_sparse<ELEMENT>(const BlockSparseParams&, cudaStream_t)")
cuda_instances(sparse/block_sparse_attention/kernel_sm90.cuh
  "const char* block_sparse_attention::launch_block_sparse_sm90<ELEMENT>(const BlockSparseParams&, cudaStream_t)"
  ELEMENTS __half __nv_bfloat16 INTO cuda_sm90)
cuda_instances(sparse/block_sparse_attention/kernel_backward_sm90.cuh
  "const char* block_sparse_attention::launch_gradients_sm90<ELEMENT>(const BlockSparseBackwardParams&, const block_sparse_attention::BlockSparseGradients&, cudaStream_t)"
  ELEMENTS __half __nv_bfloat16 INTO cuda_sm90)
cuda_instances(sparse/block_sparse_attention/cuda_requests_launch.cuh
  "const char* block_sparse_attention::launch_requests<ELEMENT>(const BlockSparseParams&, cudaStream_t)")
cuda_instances(sparse/block_sparse_attention/cuda_latent_launch.cuh
  "const char* block_sparse_attention::launch_latent<ELEMENT>(const LatentLaunch&, void*, cudaStream_t)")
cuda_instances(sparse/block_sparse_attention/cuda_backward_launch.cuh
  "const char* block_sparse_attention::launch_block_sparse<ELEMENT>(const BlockSparseBackwardParams&, cudaStream_t)")
cuda_instances(sparse/block_sparse_attention/cuda_requests_backward_launch.cuh
  "const char* block_sparse_attention::launch_requests<ELEMENT>(const BlockSparseBackwardParams&, cudaStream_t)")
cuda_instances(sparse/landmark_attention/cuda_launch.cuh
  "const char* landmark_attention::launch_landmark<ELEMENT>(const LandmarkParams&, cudaStream_t)")
cuda_instances(sparse/landmark_attention/cuda_backward_launch.cuh
  "const char* landmark_attention::launch_landmark<ELEMENT>(const LandmarkBackwardParams&, cudaStream_t)")
