// CUB scans and, with FULL, a sum and a sort, unmodified. Prints a line "what wrong" for each, or
// for those that the arguments name: the number of wrong elements. Blocks look back at values
// published by earlier blocks: for numbers, flag and value in one word; for pairs, a value and then
// its flag.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cub/cub.cuh>
#include <numeric>
#include <vector>

struct Pair {
  int64_t sum, count;
};

struct Add {
  __host__ __device__ Pair operator()(Pair a, Pair b) const {
    return {a.sum + b.sum, a.count + b.count};
  }
};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Output of call(temporary, bytes, in, out) for the input.
template <typename T, typename Call>
std::vector<T> run(const std::vector<T>& in, size_t outputs, const Call& call) {
  T *on_in = nullptr, *on_out = nullptr;
  void* temporary = nullptr;
  size_t bytes = 0;
  check(cudaMalloc(&on_in, in.size() * sizeof(T)));
  check(cudaMalloc(&on_out, outputs * sizeof(T)));
  check(cudaMemcpy(on_in, in.data(), in.size() * sizeof(T), cudaMemcpyHostToDevice));
  check(call(nullptr, bytes, on_in, on_out));
  check(cudaMalloc(&temporary, bytes));
  check(call(temporary, bytes, on_in, on_out));
  check(cudaDeviceSynchronize());
  std::vector<T> out(outputs);
  check(cudaMemcpy(out.data(), on_out, outputs * sizeof(T), cudaMemcpyDeviceToHost));
  for (void* memory : {static_cast<void*>(on_in), static_cast<void*>(on_out), temporary})
    check(cudaFree(memory));
  return out;
}

// More tiles than the 32 that a warp looks at together: 70000 pairs suffice, as do 300000 numbers.
constexpr int kCount = 70000;
#ifdef FULL
constexpr int kNumbers = 300000;
#else
constexpr int kNumbers = kCount;
#endif

int scan(const std::vector<uint32_t>& numbers) {
  const auto out =
      run(numbers, kNumbers, [](void* temporary, size_t& bytes, uint32_t* from, uint32_t* to) {
        return cub::DeviceScan::InclusiveSum(temporary, bytes, from, to, kNumbers);
      });
  int wrong = 0;
  uint32_t sum = 0;
  for (int i = 0; i < kNumbers; ++i) wrong += out[i] != (sum += numbers[i]);
  return wrong;
}

int scan_of_pairs(const std::vector<uint32_t>& numbers) {
  std::vector<Pair> pairs;
  for (int i = 0; i < kCount; ++i) pairs.push_back({numbers[i] % 7, numbers[i] % 3});
  const auto out = run(pairs, kCount, [](void* temporary, size_t& bytes, Pair* from, Pair* to) {
    return cub::DeviceScan::ExclusiveScan(temporary, bytes, from, to, Add(), Pair{0, 0}, kCount);
  });
  int wrong = 0;
  Pair sum{0, 0};
  for (int i = 0; i < kCount; ++i) {
    wrong += out[i].sum != sum.sum || out[i].count != sum.count;
    sum = Add()(sum, pairs[i]);
  }
  return wrong;
}

#ifdef FULL
int sum(const std::vector<uint32_t>& numbers) {
  const auto out =
      run(numbers, 1, [](void* temporary, size_t& bytes, uint32_t* from, uint32_t* to) {
        return cub::DeviceReduce::Sum(temporary, bytes, from, to, kCount);
      });
  return out[0] != std::accumulate(numbers.begin(), numbers.begin() + kCount, 0u);
}

int sort(const std::vector<uint32_t>& numbers) {
  const auto out =
      run(numbers, kCount, [](void* temporary, size_t& bytes, uint32_t* from, uint32_t* to) {
        return cub::DeviceRadixSort::SortKeys(temporary, bytes, from, to, kCount);
      });
  std::vector<uint32_t> wanted(numbers.begin(), numbers.begin() + kCount);
  std::sort(wanted.begin(), wanted.end());
  int wrong = 0;
  for (int i = 0; i < kCount; ++i) wrong += out[i] != wanted[i];
  return wrong;
}
#endif

int main(int count, char** names) {
  std::vector<uint32_t> numbers(kNumbers);
  for (int i = 0; i < kNumbers; ++i) numbers[i] = uint32_t(i) * 2654435761u;
  const auto tell = [&](const char* name, int (&wrong)(const std::vector<uint32_t>&)) {
    for (int i = 1; i < count || count == 1; ++i)
      if (count == 1 || !std::strcmp(names[i], name)) {
        std::printf("%s %d\n", name, wrong(numbers));
        return;
      }
  };
  tell("scan", scan);
  tell("scan_of_pairs", scan_of_pairs);
#ifdef FULL
  tell("sum", sum);
  tell("sort", sort);
#endif
}
