// Keys assigned to each block of attention_decode by the kernel's own schedule.
#include "dense/attention_decode/kernel_shape.cuh"

using namespace tokenmill;
using namespace tokenmill::cuda;

using Shape = DecodeShape<__half, 128>;

// Segments of block i: number[i] of them, of which the first `room` are written, kFields numbers
// each.
extern "C" __global__ void segments(const int32_t* lengths, int batch, int heads, int kv_heads,
                                    int tokens, int window, int tile_rows, int room, int* number,
                                    int* out) {
  DecodeParams d{};
  d.attention.batch = batch;
  d.attention.heads = heads;
  d.attention.kv_heads = kv_heads;
  d.attention.seqlen_q = tokens;
  d.attention.window_left = window;
  d.cache.seqlens = lengths;
  d.cache.capacity = int64_t{1} << 29;
  DecodePlan plan{};
  plan.group = heads / kv_heads;
  plan.rows = plan.group * tokens;
  plan.tile_rows = tile_rows;
  plan.row_tiles = (plan.rows + tile_rows - 1) / tile_rows;

  constexpr int kFields = 6;
  Segments<Shape> taken(d, plan);
  int n = 0;
  for (Segment s; taken.take(s); ++n) {
    if (threadIdx.x != 0 || n >= room) continue;
    int* const to = out + (blockIdx.x * room + n) * kFields;
    to[0] = static_cast<int>(s.output);
    to[1] = s.begin;
    to[2] = s.end;
    to[3] = s.part;
    to[4] = s.parts;
    to[5] = static_cast<int>(s.first_block);
  }
  if (threadIdx.x == 0) number[blockIdx.x] = n;
}
