// Every operator of the package: the table of contents. A schema is the only list of an operator's
// arguments: the records of C++ (csrc/<family>/<op>/host.cpp) and of Python have its fields in its
// order. Arguments after the leading tensors are keyword-only. Implementations register themselves
// in host.cpp; fake and autograd in python/tokenmill/<family>/<op>.py.
#include "core/door.h"
#include "core/stable.h"

namespace {

struct Definitions {
  void def(const std::string& schema) {
    tokenmill::define_schema(schema);
    library.def(schema.c_str());
  }
  torch::stable::detail::StableLibrary& library;
};

}  // namespace

TOKENMILL_LIBRARY(library) {
  Definitions m{library};
  using Arguments = std::string;

  // dense: attention with any score map. Outputs that a call does not have are of size 0.
  // scale=None is 1/sqrt(D).
  const Arguments attention =
      "Tensor q, Tensor k, Tensor v, *, str kind=\"softmax\", str normalize=\"none\", "
      "float? scale=None, Tensor? score_bias=None, float score_bias_value=0.0, "
      "bool score_bias_neg_log_n=False, Tensor? bias=None, Tensor? mask_ranges=None, "
      "Tensor? mask_q_spans=None, Tensor? mask_k_spans=None, Tensor? alibi_slopes=None, "
      "SymInt grid_width=0, str grid_distance=\"chebyshev\", SymInt grid_window=-1, "
      "Tensor? sink=None, float softcap=0.0, bool causal=False, SymInt window_left=-1, "
      "SymInt window_right=-1, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, str precision=\"accurate\", "
      "bool post_decay=False, bool invariant=False";
  m.def("attention(" + attention + ") -> (Tensor out, Tensor lse)");
  m.def("attention_out(" + attention + ", Tensor(a!) out) -> (Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor? out, Tensor? lse, "
      "bool needs_dscore_bias, bool needs_dbias, bool needs_dalibi_slopes, bool needs_dsink, " +
      attention +
      ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dscore_bias, Tensor dbias, "
      "Tensor dalibi_slopes, Tensor dsink)");
  const Arguments decode =
      "Tensor q, Tensor k_cache, Tensor v_cache, *, Tensor seqlens_k, "
      "Tensor? block_table=None, str kind=\"softmax\", str normalize=\"none\", "
      "float? scale=None, Tensor? score_bias=None, float score_bias_value=0.0, "
      "bool score_bias_neg_log_n=False, Tensor? mask_ranges=None, Tensor? mask_q_spans=None, "
      "Tensor? mask_k_spans=None, Tensor? alibi_slopes=None, Tensor? sink=None, "
      "float softcap=0.0, bool causal=True, SymInt window_left=-1, SymInt window_right=-1, "
      "Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None, SymInt num_splits=0, "
      "str schedule=\"auto\", Tensor? k_scale=None, Tensor? v_scale=None, bool invariant=False";
  m.def("attention_decode(" + decode + ") -> (Tensor out, Tensor lse)");
  m.def("attention_decode_out(" + decode + ", Tensor(a!) out) -> (Tensor lse)");
  const Arguments merge = "Tensor outs, Tensor? lses=None";
  m.def("merge_attention_states(" + merge + ") -> (Tensor out, Tensor lse)");
  m.def("merge_attention_states_backward(Tensor dout, Tensor? dlse, " + merge +
        ") -> (Tensor douts, Tensor dlses)");
  const Arguments additive = "Tensor q, Tensor k, Tensor v_weight, *, Tensor? mask=None";
  m.def("additive_attention(" + additive + ") -> (Tensor scores)");
  m.def("additive_attention_backward(Tensor dscores, " + additive +
        ") -> (Tensor dq, Tensor dk, Tensor dv_weight)");

  // linear: attention as a recurrence over a state
  const Arguments linear =
      "Tensor q, Tensor k, Tensor v, *, Tensor? log_decay=None, str feature_map=\"identity\", "
      "float? scale=None, bool normalize=False, Tensor? initial_state=None, "
      "bool return_final_state=False, Tensor? cu_seqlens=None, SymInt? chunk_size=None";
  m.def("linear_attention(" + linear + ") -> (Tensor out, Tensor final_state, Tensor normalizer)");
  m.def("linear_attention_out(" + linear +
        ", Tensor(a!) out) -> (Tensor final_state, Tensor normalizer)");
  m.def(
      "linear_attention_backward(Tensor? dout, Tensor? dfinal_state, Tensor? out, "
      "Tensor? normalizer, bool needs_dlog_decay, bool needs_dinitial_state, " +
      linear + ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_state)");
  m.def(
      "linear_attention_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) state, *, "
      "Tensor? log_decay=None, str feature_map=\"identity\", float? scale=None, "
      "bool normalize=False, Tensor? state_indices=None, Tensor? accepted=None) -> Tensor");
  const Arguments delta =
      "Tensor q, Tensor k, Tensor v, Tensor beta, *, Tensor? log_decay=None, float? scale=None, "
      "bool qk_l2norm=False, Tensor? initial_state=None, bool return_final_state=False, "
      "Tensor? cu_seqlens=None";
  m.def("delta_attention(" + delta + ") -> (Tensor out, Tensor final_state)");
  m.def(
      "delta_attention_backward(Tensor? dout, Tensor? dfinal_state, bool needs_dlog_decay, "
      "bool needs_dinitial_state, " +
      delta +
      ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, Tensor dlog_decay, "
      "Tensor dinitial_state)");
  m.def(
      "delta_attention_decode(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor(a!) state, *, "
      "Tensor? log_decay=None, float? scale=None, bool qk_l2norm=False, "
      "Tensor? state_indices=None, Tensor? accepted=None) -> Tensor");
  const Arguments conv =
      "Tensor x, Tensor weight, Tensor? bias=None, *, str activation=\"none\", "
      "Tensor? initial_state=None, bool return_final_state=False, Tensor? cu_seqlens=None";
  m.def("causal_conv1d(" + conv + ") -> (Tensor out, Tensor final_state)");
  m.def("causal_conv1d_backward(Tensor? dout, Tensor? dfinal_state, bool needs_dinitial_state, " +
        conv + ") -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_decode(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias=None, *, "
      "str activation=\"none\", Tensor? state_indices=None, Tensor? accepted=None) -> Tensor");
  const Arguments titans =
      "Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor eta, Tensor theta, *, "
      "SymInt chunk_size=64, Tensor? initial_memory=None, Tensor? initial_momentum=None, "
      "bool return_final_state=False, Tensor? cu_seqlens=None";
  m.def("titans_memory(" + titans + ") -> (Tensor out, Tensor memory, Tensor momentum)");
  m.def(
      "titans_memory_backward(Tensor? dout, Tensor? dmemory, Tensor? dmomentum, "
      "bool needs_dinitial_state, " +
      titans +
      ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dalpha, Tensor deta, Tensor dtheta, "
      "Tensor dinitial_memory, Tensor dinitial_momentum)");

  // select: which keys to attend to
  m.def(
      "topk_select(Tensor scores, SymInt k, *, Tensor? lengths=None, Tensor? row_starts=None, "
      "str tie=\"low\", str order=\"index\", SymInt force_first=0, SymInt force_last=0, "
      "Tensor? block_table=None, SymInt page_size=1, Tensor? row_to_batch=None, "
      "bool return_values=False, Tensor? previous=None) -> (Tensor indices, Tensor counts, "
      "Tensor values, Tensor physical)");
  m.def(
      "attention_column_scores(Tensor q, Tensor k, Tensor? lse=None, *, float? scale=None, "
      "bool causal=False, str reduce=\"sum\", SymInt? window_queries=None, "
      "str head_reduce=\"none\", Tensor? seqlens_k=None, Tensor? seqlens_q=None, "
      "float gumbel_tau=0.0, int seed=0) -> Tensor");
  m.def(
      "attention_row_scores(Tensor q, Tensor k, *, Tensor? lse=None, float? scale=None, "
      "bool causal=False, str reduce=\"mean\", SymInt skip=0, Tensor? seqlens_k=None) -> Tensor");
  m.def(
      "kv_cache_compact(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor keep, Tensor counts, *, "
      "Tensor? seqlens_k=None, Tensor? block_table=None, Tensor? rerotate=None, "
      "bool interleaved=False, bool compensation=False) -> (Tensor seqlens_k_now, Tensor k_sum, "
      "Tensor v_sum, Tensor dropped)");
  // A scale per token ([P, page size, Hk]) is written, any other is only read.
  m.def(
      "kv_cache_append(Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor k, Tensor? v, Tensor slots, "
      "*, Tensor? q=None, Tensor? cos=None, Tensor? sin=None, Tensor? positions=None, "
      "bool interleaved=False, Tensor? k_scale=None, Tensor? v_scale=None, "
      "Tensor(c!)? k_scale_out=None, Tensor(d!)? v_scale_out=None, SymInt rope_offset=0) "
      "-> Tensor");
  // Not named `mode`: torch uses that name itself when it functionalizes a call.
  m.def(
      "block_pool_keys(Tensor k, SymInt block, *, str pooling=\"mean\", Tensor? lengths=None, "
      "Tensor? block_table=None) -> Tensor");
  m.def(
      "block_pool_keys_update(Tensor k, Tensor(a!) pooled, SymInt block, *, "
      "str pooling=\"mean\", Tensor start, Tensor? lengths=None, Tensor? block_table=None) -> ()");
  m.def(
      "kv_block_scores(Tensor q, Tensor k, *, str scoring=\"dot\", SymInt block_k=1, "
      "str q_reduce=\"none\", SymInt block_q=1, str head_reduce=\"none\", float? scale=None, "
      "bool causal=False, SymInt num_sink=0, SymInt num_recent=0, Tensor? seqlens_k=None, "
      "Tensor? block_table=None, Tensor? k_scale=None) -> Tensor");
  m.def(
      "indexer_topk_select(Tensor q, Tensor k, Tensor weights, SymInt topk, *, bool causal=True, "
      "str activation=\"relu\", SymInt block_k=1, SymInt num_sink=0, SymInt num_recent=0, "
      "Tensor? seqlens_k=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "Tensor? block_table=None, bool return_values=False, Tensor? k_scale=None, "
      "Tensor? previous=None) -> (Tensor indices, Tensor counts, Tensor values)");
  m.def("query_similarity_gate(Tensor q, Tensor q_ref, float threshold=0.9) -> Tensor");
  m.def(
      "hip_block_select(Tensor q, Tensor k, *, SymInt budget=512, SymInt block_q=64, "
      "SymInt block_k=2, SymInt stride_q=2, str representative=\"middle\", SymInt num_sink=16, "
      "SymInt num_recent=256, str bound=\"sample\", Tensor? start_indices=None, "
      "Tensor? start_counts=None, SymInt restart_span=8, bool causal=True, "
      "str head_reduce=\"none\", Tensor? seqlens_k=None, Tensor? block_table=None, "
      "Tensor? seqlens_q=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None) -> "
      "(Tensor indices, Tensor counts)");

  // sparse: attention to selected keys, or to blocks of them
  const Arguments sparse_decode =
      "Tensor q, Tensor k_cache, Tensor v_cache, Tensor indices, "
      "Tensor counts, *, Tensor seqlens_k, Tensor? block_table=None, SymInt block_k=1, "
      "SymInt num_sink=0, SymInt num_recent=0, str pos_mode=\"absolute\", Tensor? cos=None, "
      "Tensor? sin=None, bool interleaved=False, Tensor? extra_k=None, Tensor? extra_v=None, "
      "Tensor? extra_log_count=None, float? scale=None, float softcap=0.0, Tensor? sink=None, "
      "SymInt num_splits=0, bool return_mass=False, Tensor? k_scale=None, Tensor? v_scale=None";
  m.def("sparse_decode_attention(" + sparse_decode + ") -> (Tensor out, Tensor lse, Tensor mass)");
  m.def("sparse_decode_attention_out(" + sparse_decode +
        ", Tensor(a!) out) -> (Tensor lse, Tensor mass)");
  const Arguments block_sparse =
      "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, *, SymInt block_q, "
      "SymInt block_k, bool causal=False, SymInt num_sink=0, SymInt num_recent=0, "
      "float? scale=None, float softcap=0.0, Tensor? seqlens_k=None, Tensor? sink=None, "
      "bool return_mass=False, Tensor? block_table=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None";
  m.def("block_sparse_attention(" + block_sparse + ") -> (Tensor out, Tensor lse, Tensor mass)");
  m.def("block_sparse_attention_out(" + block_sparse +
        ", Tensor(a!) out) -> (Tensor lse, Tensor mass)");
  m.def(
      "block_sparse_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
      "bool needs_dsink, " +
      block_sparse + ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)");
  const Arguments bilevel =
      "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, *, SymInt region_y, "
      "SymInt region_x, SymInt key_region_y, SymInt key_region_x, float? scale=None, "
      "bool mask_padding=True";
  m.def("bilevel_routing_attention(" + bilevel + ") -> (Tensor out, Tensor lse)");
  m.def("bilevel_routing_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " +
        bilevel + ") -> (Tensor dq, Tensor dk, Tensor dv)");
  const Arguments landmark = "Tensor q, Tensor k, Tensor v, *, SymInt block=64, float? scale=None";
  m.def("landmark_attention(" + landmark + ") -> (Tensor out, Tensor lse)");
  m.def("landmark_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " +
        landmark + ") -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "transpose_block_list(Tensor indices, Tensor counts, SymInt num_blocks) -> "
      "(Tensor offsets, Tensor rows)");

  // tokens: rows of a sequence selected, gathered, merged, scattered and pooled. Index -1 is no
  // row.
  m.def(
      "topk_partition(Tensor scores, SymInt k, *, Tensor? counts=None, bool largest=True, "
      "str order=\"score\", Tensor? valid=None, SymInt protect_first=0, SymInt protect_last=0) -> "
      "(Tensor keep, Tensor rest)");
  m.def(
      "mask_partition(Tensor mask, *, SymInt? max_total=None) -> (Tensor indices, "
      "Tensor cu_seqlens, Tensor inverse)");
  m.def("gather_tokens(Tensor x, Tensor indices) -> Tensor");
  m.def("gather_tokens_out(Tensor x, Tensor indices, *, Tensor(a!) out) -> ()");
  m.def(
      "scatter_tokens(Tensor y, Tensor indices, Tensor? base=None, *, SymInt batch, "
      "SymInt tokens) -> Tensor");
  const Arguments fuse =
      "Tensor x, Tensor keep, Tensor rest, Tensor weight, *, SymInt prefix=1, "
      "bool normalize=False";
  m.def("gather_fuse(" + fuse + ") -> (Tensor out, Tensor weight_sum)");
  m.def("gather_fuse_out(" + fuse + ", Tensor(a!) out) -> Tensor weight_sum");
  m.def("gather_fuse_backward(Tensor dout, Tensor out, Tensor weight_sum, " + fuse +
        ") -> (Tensor dx, Tensor dweight)");
  const Arguments segments =
      "Tensor x, Tensor offsets, *, Tensor? perm=None, Tensor? weight=None, str reduce=\"sum\"";
  m.def("segment_reduce(" + segments + ") -> (Tensor y, Tensor weight_sum, Tensor arg)");
  m.def(
      "segment_reduce_backward(Tensor dy, Tensor? dweight_sum, Tensor y, Tensor weight_sum, "
      "Tensor arg, bool needs_dweight, " +
      segments + ") -> (Tensor dx, Tensor dweight)");
  m.def("best_match(Tensor a, Tensor b, *, bool normalize=False) -> (Tensor index, Tensor score)");
  const Arguments pool =
      "Tensor x, Tensor? mask=None, *, SymInt kernel_y, SymInt kernel_x, SymInt dilation_y=1, "
      "SymInt dilation_x=1, str pooling=\"avg\", bool count_include_pad=False, "
      "bool subtract_input=False";
  m.def("local_pool(" + pool + ") -> Tensor");
  m.def("local_pool_backward(Tensor dout, " + pool + ") -> Tensor");
  const Arguments cluster =
      "Tensor x, *, SymInt grid_y, SymInt grid_x, SymInt iters=5, float tau, SymInt window=7, "
      "bool window_labels=False";
  m.def("cluster_tokens(" + cluster +
        ") -> (Tensor centroids, Tensor labels, Tensor mass, Tensor previous)");
  m.def("cluster_tokens_backward(Tensor dcentroids, Tensor mass, Tensor previous, " + cluster +
        ") -> Tensor dx");
  const Arguments reconstruct =
      "Tensor features, Tensor centroids, Tensor values, *, SymInt k=3, float tau, "
      "str norm=\"l1\"";
  m.def("reconstruct_tokens(" + reconstruct + ") -> (Tensor out, Tensor index, Tensor weight)");
  m.def("reconstruct_tokens_backward(Tensor dout, Tensor index, Tensor weight, " + reconstruct +
        ") -> Tensor dvalues");

  // introspection
  m.def("gpu_probe(Tensor x, *, str of=\"shared\", SymInt blocks=1, SymInt steps=1) -> Tensor");
  library.def("cpu_isa(str? select=None) -> str");
  library.def("cpu_peak_flops(str dtype, int repeats=5) -> float");
  library.def("cpu_rate(str of, int bytes=0, int repeats=5) -> float");

  // tuning
  library.def("knob(str name, int? set=None) -> int");
}
