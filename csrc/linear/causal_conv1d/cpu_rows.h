// Tokens of sequences, dense or packed, as rows of one list, and the rows before a token.
#pragma once
#include "linear/causal_conv1d/params.h"
#include "linear/cpu_conv.h"

namespace tokenmill::TOKENMILL_ISA {

// Rows of one sequence.
struct Segment {
  int64_t b, position, count;  // the first row's position in the sequence
  int64_t row;                 // and among all rows
  int64_t length;              // of the sequence
};

inline int64_t begin_of(const CausalConv1dParams& p, int64_t b) {
  return p.cu_seqlens ? p.cu_seqlens[b] : b * p.seqlen;
}
inline int64_t length_of(const CausalConv1dParams& p, int64_t b) {
  return p.cu_seqlens ? p.cu_seqlens[b + 1] - p.cu_seqlens[b] : p.seqlen;
}

// Calls visit(Segment) for rows first .. last - 1, in order.
template <typename Visit>
void each_segment(const CausalConv1dParams& p, int64_t first, int64_t last, const Visit& visit) {
  while (first < last) {
    const int64_t b =
        p.cu_seqlens
            ? std::upper_bound(p.cu_seqlens, p.cu_seqlens + p.batch + 1, first) - p.cu_seqlens - 1
            : first / p.seqlen;
    const int64_t position = first - begin_of(p, b), length = length_of(p, b);
    const int64_t count = std::min(last - first, length - position);
    visit(Segment{b, position, count, first, length});
    first += count;
  }
}

TM_INLINE char* row_at(const ConvRows& r, DType t, const CausalConv1dParams& p, int64_t b,
                       int64_t position, int64_t channel) {
  const int64_t in_batch = p.cu_seqlens ? p.cu_seqlens[b] + position : position;
  return element(r.data, t, b * r.batch + in_batch * r.seq + channel);
}

// The W - 1 inputs before a sequence, at n channels.
class Before {
 public:
  Before(void* memory, int64_t ld) : rows_(static_cast<char*>(memory)), ld_(ld) {}

  void load(const CausalConv1dParams& p, int64_t b, int64_t channel, int64_t n) {
    if (b == b_ && channel == channel_) return;
    b_ = b;
    channel_ = channel;
    const int64_t count = p.filter.width - 1;
    bytes_ = ld_ * bytes_of(p.dtype);
    if (!p.initial.data) std::memset(rows_, 0, count * bytes_);
    if (p.initial.data)
      for (int64_t k = 0; k < count; ++k)
        load_column(p.initial, p.dtype, b, k, channel, n, rows_ + k * bytes_);
  }
  // Row k, of position k - (W - 1).
  const void* row(int64_t k) const { return rows_ + k * bytes_; }

 private:
  char* rows_;
  int64_t ld_, bytes_ = 0, b_ = -1, channel_ = -1;
};

// Inputs position - (W - 1) .. position + count - 1 of a sequence.
inline void input_rows(const CausalConv1dParams& p, const Before& before, int64_t b,
                       int64_t position, int64_t count, int64_t channel, const void** rows) {
  const int64_t back = p.filter.width - 1;
  for (int64_t i = 0; i < count + back; ++i) {
    const int64_t at = position - back + i;
    rows[i] = at < 0 ? before.row(back + at) : row_at(p.x, p.dtype, p, b, at, channel);
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
