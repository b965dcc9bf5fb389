#include "tokens/cpu_rows.h"
#include "tokens/gather_tokens/params.h"

namespace tokenmill::TOKENMILL_ISA {

void gather_tokens(const GatherTokensParams& p) {
  const int64_t step = rows_per_item(p.row_bytes), parts = ceil_div(p.entries, step);
  const int64_t total = p.batch * p.entries * p.row_bytes;
  const int threads = threads_for(total);
  cpu::parallel_items(p.batch * parts, threads, [&](cpu::ItemCounter& items) {
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t b = item / parts, begin = item % parts * step;
      const int32_t* ids = p.indices + b * p.indices_batch;
      const char* x = p.x + b * p.x_batch;
      char* first = p.out + b * p.out_batch + begin * p.out_row;
      const Rows out{first, p.out_row, p.row_bytes, total};
      const int64_t end = std::min(begin + step, p.entries);
      copy_rows(out, begin, end, p.entries, [&](int64_t k) {
        const int64_t id = ids[k];
        if (id < 0) return static_cast<const char*>(nullptr);
        return p.flat ? x + id / p.tokens * p.x_batch + id % p.tokens * p.x_token
                      : x + id * p.x_token;
      });
    }
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
