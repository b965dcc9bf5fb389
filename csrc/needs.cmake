# Of a build of some operators (TOKENMILL_OPS): those whose kernels each one calls, by itself or in
# its gradients.
macro(needs op)
  if("${op}" IN_LIST TOKENMILL_OPS)
    foreach(needed ${ARGN})
      if(NOT "${needed}" IN_LIST TOKENMILL_OPS)
        list(APPEND TOKENMILL_OPS ${needed})
      endif()
    endforeach()
  endif()
endmacro()

needs(dense/attention dense/attention_decode)
needs(dense/attention_decode dense/attention)
needs(select/indexer_topk_select select/topk_select)
needs(tokens/scatter_tokens tokens/gather_tokens)
needs(tokens/gather_tokens sparse/transpose_block_list tokens/segment_reduce)
needs(tokens/reconstruct_tokens sparse/transpose_block_list)
