// One parallel region per operator, on torch's own thread pool, with dynamic load balance: workers
// draw item numbers from a shared counter. Free of torch; core/parallel.cpp connects the pool.
#pragma once
#include <atomic>
#include <cstdint>

namespace tokenmill::cpu {

int num_threads();  // set by torch.set_num_threads
void run_workers(int workers, void (*body)(int worker, void* context), void* context);

class ItemCounter {
 public:
  explicit ItemCounter(int64_t count) : count_(count) {}
  // The next item, or -1 when there is none left.
  int64_t next() {
    const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < count_ ? item : -1;
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t count_;
};

// Calls body(ItemCounter&) once in each of min(threads, items) workers. body draws its items until
// next() is -1; which worker runs an item must not influence the result.
template <typename Body>
inline __attribute__((always_inline)) void parallel_items(int64_t items, int threads,
                                                          const Body& body) {
  if (items <= 0) return;
  ItemCounter counter(items);
  if (threads <= 1 || items == 1) return body(counter);
  struct Context {
    const Body* body;
    ItemCounter* counter;
  } context{&body, &counter};
  run_workers(
      static_cast<int>(items < threads ? items : threads),
      [](int, void* c) {
        auto* context = static_cast<Context*>(c);
        (*context->body)(*context->counter);
      },
      &context);
}

}  // namespace tokenmill::cpu
