// Every operator of the package: the table of contents. Implementations register themselves in
// csrc/<family>/<op>/host.cpp; fake and autograd in python/tokenmill/<family>/<op>.py.
#include "core/box.h"

namespace tokenmill {
namespace {

// Defines operators, and keeps their schemas for the names of arguments.
struct Schemas {
  void def(const char* schema) {
    all().push_back(schema);
    library.def(schema);
  }
  static std::vector<std::string_view>& all() {
    static std::vector<std::string_view> schemas;
    return schemas;
  }
  torch::stable::detail::StableLibrary& library;
};

}  // namespace

std::string argument_name(std::string_view op, size_t index) {
  for (std::string_view schema : Schemas::all()) {
    const size_t open = schema.find('(');
    if (schema.substr(0, open) != op) continue;
    std::string_view arguments = schema.substr(open + 1, schema.find(") ->") - open - 1);
    for (size_t i = 0; i < index; ++i) arguments.remove_prefix(arguments.find(", ") + 2);
    arguments = arguments.substr(0, arguments.find(", "));
    return std::string(arguments.substr(arguments.rfind(' ') + 1));
  }
  return "argument " + std::to_string(index);
}

}  // namespace tokenmill

TOKENMILL_LIBRARY(library) {
  tokenmill::Schemas m{library};
  // dense: attention with any score map. An output that a call does not have is of size 0.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, str kind, float scale, "
      "Tensor? score_bias, float score_bias_value, bool score_bias_neg_log_n, Tensor? bias, "
      "Tensor? alibi_slopes, Tensor? sink, float softcap, bool causal, SymInt window_left, "
      "SymInt window_right, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
      "SymInt? max_seqlen_k, str precision) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor? out, Tensor? lse, "
      "bool[] needs, Tensor q, Tensor k, Tensor v, str kind, float scale, "
      "Tensor? score_bias, float score_bias_value, bool score_bias_neg_log_n, Tensor? bias, "
      "Tensor? alibi_slopes, Tensor? sink, float softcap, bool causal, SymInt window_left, "
      "SymInt window_right, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
      "SymInt? max_seqlen_k, str precision) -> (Tensor dq, Tensor dk, "
      "Tensor dv, Tensor dscore_bias, Tensor dbias, Tensor dalibi_slopes, Tensor dsink)");
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens_k, "
      "Tensor? block_table, str kind, float scale, Tensor? score_bias, float score_bias_value, "
      "bool score_bias_neg_log_n, Tensor? alibi_slopes, Tensor? sink, float softcap, "
      "SymInt window_left, SymInt num_splits, str schedule) -> (Tensor out, Tensor lse)");
  m.def("merge_attention_states(Tensor outs, Tensor? lses) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_attention_states_backward(Tensor dout, Tensor? dlse, Tensor outs, Tensor? lses) -> "
      "(Tensor douts, Tensor dlses)");

  // linear: attention as a recurrence over a state
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay, str feature_map, "
      "float scale, bool normalize, Tensor? initial_state, bool return_final_state, "
      "Tensor? cu_seqlens, SymInt? chunk_size) -> (Tensor out, Tensor final_state, "
      "Tensor normalizer)");
  m.def(
      "linear_attention_out(Tensor q, Tensor k, Tensor v, Tensor? log_decay, str feature_map, "
      "float scale, bool normalize, Tensor? initial_state, bool return_final_state, "
      "Tensor? cu_seqlens, SymInt? chunk_size, Tensor(a!) out) -> (Tensor final_state, "
      "Tensor normalizer)");
  m.def(
      "linear_attention_backward(Tensor? dout, Tensor? dfinal_state, Tensor? out, "
      "Tensor? normalizer, bool[] needs, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
      "str feature_map, float scale, bool normalize, Tensor? initial_state, Tensor? cu_seqlens, "
      "SymInt? chunk_size) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, "
      "Tensor dinitial_state)");
  m.def(
      "linear_attention_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor? log_decay, "
      "str feature_map, float scale, bool normalize, Tensor? state_indices) -> Tensor");

  // select: which keys to attend to
  m.def(
      "topk_select(Tensor scores, SymInt k, Tensor? lengths, Tensor? row_starts, str tie, "
      "str order, SymInt force_first, SymInt force_last, Tensor? block_table, SymInt page_size, "
      "Tensor? row_to_batch, bool return_values) -> (Tensor indices, Tensor counts, "
      "Tensor values, Tensor physical)");
  m.def(
      "attention_column_scores(Tensor q, Tensor k, Tensor? lse, float scale, bool causal, "
      "str reduce, SymInt? window_queries, str head_reduce, Tensor? lengths, "
      "Tensor? query_lengths, float gumbel_tau, int seed) -> Tensor");
  m.def(
      "attention_row_scores(Tensor q, Tensor k, Tensor? lse, float scale, bool causal, str reduce, "
      "SymInt skip, Tensor? lengths) -> Tensor");
  m.def(
      "kv_cache_compact(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor keep, Tensor counts, "
      "Tensor? lengths, Tensor? block_table, Tensor? rotations, bool interleaved, "
      "bool compensation) -> (Tensor lengths_now, Tensor k_sum, Tensor v_sum, Tensor dropped)");
  m.def(
      "sparse_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor indices, "
      "Tensor counts, Tensor seqlens_k, Tensor? block_table, SymInt block_k, SymInt num_sink, "
      "SymInt num_recent, str pos_mode, Tensor? cos, Tensor? sin, bool interleaved, "
      "Tensor? extra_k, Tensor? extra_v, Tensor? extra_log_count, float scale, float softcap, "
      "Tensor? sink, SymInt num_splits, bool return_mass) -> (Tensor out, Tensor lse, "
      "Tensor mass)");
  // Not `mode`: torch takes that name for itself where it functionalizes a call.
  m.def(
      "block_pool_keys(Tensor k, SymInt block, str pooling, Tensor? lengths, "
      "Tensor? block_table) -> Tensor");
  m.def(
      "block_pool_keys_update(Tensor k, Tensor(a!) pooled, SymInt block, str pooling, "
      "Tensor start, Tensor? lengths, Tensor? block_table) -> ()");
  m.def(
      "kv_block_scores(Tensor q, Tensor k, str scoring, SymInt block_k, str q_reduce, "
      "SymInt block_q, str head_reduce, float scale, bool causal, SymInt num_sink, "
      "SymInt num_recent, Tensor? lengths, Tensor? block_table) -> Tensor");
  m.def("query_similarity_gate(Tensor q, Tensor q_ref, float threshold) -> Tensor");

  // sparse: attention to blocks of keys, and which blocks
  m.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, "
      "SymInt block_q, SymInt block_k, bool causal, SymInt num_sink, SymInt num_recent, "
      "float scale, float softcap, Tensor? lengths) -> (Tensor out, "
      "Tensor lse)");
  m.def(
      "block_sparse_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
      "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, SymInt block_q, "
      "SymInt block_k, bool causal, SymInt num_sink, SymInt num_recent, float scale, "
      "float softcap, Tensor? lengths) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "bilevel_routing_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, "
      "SymInt region_y, SymInt region_x, SymInt key_region_y, SymInt key_region_x, float scale, "
      "bool mask_padding) -> (Tensor out, Tensor lse)");
  m.def(
      "bilevel_routing_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
      "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, SymInt region_y, "
      "SymInt region_x, SymInt key_region_y, SymInt key_region_x, float scale, "
      "bool mask_padding) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "transpose_block_list(Tensor indices, Tensor counts, SymInt num_blocks) -> "
      "(Tensor offsets, Tensor rows)");
  m.def(
      "hip_block_select(Tensor q, Tensor k, SymInt budget, SymInt block_q, SymInt block_k, "
      "SymInt stride_q, str representative, SymInt num_sink, SymInt num_recent, str bound, "
      "Tensor? start_indices, Tensor? start_counts, SymInt restart_span, bool causal, "
      "str head_reduce, Tensor? seqlens_k, Tensor? block_table) -> (Tensor indices, "
      "Tensor counts)");

  // tokens: rows of a sequence chosen, gathered, merged, scattered and pooled. An index of -1
  // stands for no row.
  m.def(
      "topk_partition(Tensor scores, SymInt k, Tensor? counts, bool largest, str order, "
      "Tensor? valid, SymInt protect_first, SymInt protect_last) -> (Tensor keep, Tensor rest)");
  m.def(
      "mask_partition(Tensor mask, SymInt? max_total) -> (Tensor indices, Tensor cu_seqlens, "
      "Tensor inverse)");
  m.def("gather_tokens(Tensor x, Tensor indices) -> Tensor");
  m.def("gather_tokens_out(Tensor x, Tensor indices, Tensor(a!) out) -> ()");
  m.def(
      "scatter_tokens(Tensor y, Tensor indices, Tensor? base, SymInt batch, SymInt tokens) -> "
      "Tensor");
  m.def(
      "gather_fuse(Tensor x, Tensor keep, Tensor rest, Tensor weight, SymInt prefix, "
      "bool normalize) -> (Tensor out, Tensor weight_sum)");
  m.def(
      "gather_fuse_out(Tensor x, Tensor keep, Tensor rest, Tensor weight, SymInt prefix, "
      "bool normalize, Tensor(a!) out) -> Tensor weight_sum");
  m.def(
      "gather_fuse_backward(Tensor dout, Tensor out, Tensor weight_sum, Tensor x, Tensor keep, "
      "Tensor rest, Tensor weight, SymInt prefix, bool normalize) -> (Tensor dx, Tensor dweight)");
  m.def(
      "segment_reduce(Tensor x, Tensor offsets, Tensor? perm, Tensor? weight, str reduce) -> "
      "(Tensor y, Tensor weight_sum, Tensor arg)");
  m.def(
      "segment_reduce_backward(Tensor dy, Tensor? dweight_sum, Tensor y, Tensor weight_sum, "
      "Tensor arg, bool needs_dweight, Tensor x, Tensor offsets, Tensor? perm, Tensor? weight, "
      "str reduce) -> (Tensor dx, Tensor dweight)");
  m.def("best_match(Tensor a, Tensor b, bool normalize) -> (Tensor index, Tensor score)");
  m.def(
      "local_pool(Tensor x, Tensor? mask, SymInt kernel_y, SymInt kernel_x, SymInt dilation_y, "
      "SymInt dilation_x, str pooling, bool count_include_pad, bool subtract_input) -> Tensor");
  m.def(
      "local_pool_backward(Tensor dout, Tensor x, Tensor? mask, SymInt kernel_y, "
      "SymInt kernel_x, SymInt dilation_y, SymInt dilation_x, str pooling, "
      "bool count_include_pad, bool subtract_input) -> Tensor");
  m.def(
      "cluster_tokens(Tensor x, SymInt grid_y, SymInt grid_x, SymInt iters, float tau, "
      "SymInt window, bool window_labels) -> (Tensor centroids, Tensor labels, Tensor mass, "
      "Tensor previous)");
  m.def(
      "cluster_tokens_backward(Tensor dcentroids, Tensor mass, Tensor previous, Tensor x, "
      "SymInt grid_y, SymInt grid_x, SymInt iters, float tau, SymInt window, "
      "bool window_labels) -> Tensor dx");
  m.def(
      "reconstruct_tokens(Tensor features, Tensor centroids, Tensor values, SymInt k, float tau, "
      "str norm) -> (Tensor out, Tensor index, Tensor weight)");
  m.def(
      "reconstruct_tokens_backward(Tensor dout, Tensor index, Tensor weight, Tensor features, "
      "Tensor centroids, Tensor values, SymInt k, float tau, str norm) -> Tensor dvalues");

  // introspection
  m.def("cpu_isa(str? select=None) -> str");
  m.def("cpu_peak_flops(str dtype, int repeats=5) -> float");
}
