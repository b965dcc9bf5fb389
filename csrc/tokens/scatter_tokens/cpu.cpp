// Each row of out is written once, from its source.
#include "tokens/cpu_rows.h"
#include "tokens/scatter_tokens/params.h"

namespace tokenmill::TOKENMILL_ISA {

void scatter_tokens(const ScatterTokensParams& p) {
  const int64_t step = rows_per_item(p.row_bytes), parts = ceil_div(p.tokens, step);
  const int64_t total = p.batch * p.tokens * p.row_bytes;
  const int threads = threads_for(total);
  cpu::parallel_items(p.batch * parts, threads, [&](cpu::ItemCounter& items) {
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t b = item / parts, begin = item % parts * step;
      const int32_t* places = p.places + b * p.tokens;
      const char* y = p.y + b * p.y_batch;
      const char* base = p.base ? p.base + b * p.base_batch : nullptr;
      char* first = p.out + (b * p.tokens + begin) * p.row_bytes;
      const Rows out{first, p.row_bytes, p.row_bytes, total};
      const int64_t end = std::min(begin + step, p.tokens);
      copy_rows(out, begin, end, p.tokens, [&](int64_t n) {
        if (places[n] >= 0) return y + places[n] * p.y_row;
        return base ? base + n * p.base_token : nullptr;
      });
    }
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
