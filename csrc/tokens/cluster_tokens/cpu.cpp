// An image is split into chunks of rows of cells, whose pixels add to per-chunk sums over the
// clusters that they reach; the sums of an image are then added in order. Distances and weights of
// a few pixels of a cell only live in cache between steps.
#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "tokens/cpu_nearest.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int kPixels = 4;                // pixels of a cell processed together
constexpr int kGroup = kWidth / kPixels;  // clusters that share a vector of distances with them
constexpr int64_t kMaxChunks = 8;

struct Shape {
  explicit Shape(const ClusterParams& p)
      : row(round_up(p.channels, kWidth)), maximum(round_up(p.window_y() * p.window_x(), kGroup)) {
    const int64_t work = p.height * p.width * p.window_y() * p.window_x() * p.channels;
    chunks = std::clamp<int64_t>(std::min(work >> 22, p.grid_y / (p.reach + 1)), 1, kMaxChunks);
    chunk_rows = ceil_div(p.grid_y, chunks);
    chunks = ceil_div(p.grid_y, chunk_rows);
    sum_rows = std::min(chunk_rows + 2 * p.reach, p.grid_y);
    sum_floats = sum_rows * p.grid_x * (row + 1);
  }
  int64_t row;      // floats per row of channels
  int64_t maximum;  // maximum clusters weighted per pixel
  // Per image; depends only on the shapes of a call.
  int64_t chunks, chunk_rows;  // rows of cells
  int64_t sum_rows;            // rows of clusters that a chunk reaches
  int64_t sum_floats;          // per chunk: sums, then masses
};

// Pixels of a cell, kPixels at a time, against their candidate clusters.
class Cell {
 public:
  Cell(const ClusterParams& p, const Shape& shape)
      : p(p),
        shape(shape),
        memory(kPixels * (shape.row + shape.maximum) + 2 * shape.row + 4 * 16),
        near(shape.maximum),
        sums(shape.maximum) {
    pixels = memory.take(kPixels * shape.row);
    weights = memory.take(kPixels * shape.maximum);
    nothing = memory.take(shape.row);
    spare = memory.take(shape.row);
    std::fill(nothing, nothing + shape.row, 0.f);
    std::fill(spare, spare + shape.row, 0.f);
  }

  // Calls visit(y, x, count) for groups of consecutive pixels of a cell, from (y, x) on, row by
  // row. `from`: rows of the clusters of image b.
  template <typename Visit>
  void for_each_group(int64_t b, int64_t cell_y, int64_t cell_x, const float* from,
                      const Visit& visit) {
    ys = cells_near(cell_y, p.reach, p.grid_y);
    xs = cells_near(cell_x, p.reach, p.grid_x);
    count = 0;
    for (int64_t y = ys.begin; y < ys.end; ++y)
      for (int64_t x = xs.begin; x < xs.end; ++x)
        near[count++] = from + (y * p.grid_x + x) * shape.row;
    padded = round_up(count, kGroup);
    for (int64_t k = count; k < padded; ++k) near[k] = nothing;
    const CellRange rows = pixels_of_cells(cell_y, cell_y, p.height, p.grid_y);
    const CellRange columns = pixels_of_cells(cell_x, cell_x, p.width, p.grid_x);
    Place at[kPixels];
    int have = 0;
    for (int64_t y = rows.begin; y < rows.end; ++y)
      for (int64_t x = columns.begin; x < columns.end; ++x) {
        at[have++] = {y, x};
        const bool last = y + 1 == rows.end && x + 1 == columns.end;
        if (have < kPixels && !last) continue;
        load_pixels(b, at, have);
        visit(at, have);
        have = 0;
      }
  }

  struct Place {
    int64_t y, x;
  };

  // weights[k][pixel] = |pixel - cluster k|^2, infinity past the last cluster.
  void measure() const {
    for (int64_t k = 0; k < padded; k += kGroup) {
      vf sum[kWidth];
      TM_UNROLL(16)
      for (int i = 0; i < kWidth; ++i) sum[i] = zero();
      const float* clusters[kGroup];
      for (int g = 0; g < kGroup; ++g) clusters[g] = near[k + g];
      for (int64_t c = 0; c < shape.row; c += kWidth) {
        vf x[kPixels];
        TM_UNROLL(4)
        for (int i = 0; i < kPixels; ++i) x[i] = load(pixels + i * shape.row + c);
        TM_UNROLL(4)
        for (int g = 0; g < kGroup; ++g) {
          const vf centroid = load(clusters[g] + c);
          TM_UNROLL(4)
          for (int i = 0; i < kPixels; ++i) {
            const vf difference = x[i] - centroid;
            sum[g * kPixels + i] = fma(difference, difference, sum[g * kPixels + i]);
          }
        }
      }
      store(weights + k * kPixels, sum_each(sum));
    }
    for (int64_t i = count * kPixels; i < padded * kPixels; ++i) weights[i] = __builtin_inff();
  }

  // Softmax of each pixel over its clusters, from distances; 0 for pixels that do not exist.
  void weigh(int have) const {
    vf minimum = set(__builtin_inff());
    for (int64_t i = 0; i < padded * kPixels; i += kWidth)
      minimum = min_of(minimum, load(weights + i));
    minimum = over_groups(minimum, [](float a, float b) { return b < a ? b : a; });
    const vf factor = set(p.tau * kLog2e);
    for (int64_t i = 0; i < padded * kPixels; i += kWidth) {
      const vf t = (minimum - load(weights + i)) * factor;
      store(weights + i, select(less(t, set(kMinLog2Weight)), zero(), exp2<5>(t)));
    }
    std::fill(weights + count * kPixels, weights + padded * kPixels, 0.f);
    vf total = zero();
    for (int64_t i = 0; i < padded * kPixels; i += kWidth) total = total + load(weights + i);
    total = over_groups(total, [](float a, float b) { return a + b; });
    float factors[kWidth];
    store(factors, set(1.f) / total);
    for (int i = 0; i < kWidth; ++i)
      if (i % kPixels >= have) factors[i] = 0;
    const vf inverse = load(factors);
    for (int64_t i = 0; i < padded * kPixels; i += kWidth)
      store(weights + i, load(weights + i) * inverse);
  }

  // Adds the weighted pixels to the sums of their clusters: rows of clusters from first_row on,
  // then the masses.
  void add_to(float* to, int64_t first_row) {
    float* const masses = to + shape.sum_rows * p.grid_x * shape.row;
    int64_t k = 0;
    for (int64_t y = ys.begin; y < ys.end; ++y)
      for (int64_t x = xs.begin; x < xs.end; ++x, ++k) {
        const int64_t at = (y - first_row) * p.grid_x + x;
        const float* q = weights + k * kPixels;
        masses[at] += (q[0] + q[1]) + (q[2] + q[3]);
        sums[k] = to + at * shape.row;
      }
    for (; k < padded; ++k) sums[k] = spare;
    for (k = 0; k < padded; k += kGroup) {
      vf q[kGroup][kPixels];
      float* rows[kGroup];
      TM_UNROLL(4)
      for (int g = 0; g < kGroup; ++g) {
        rows[g] = sums[k + g];
        TM_UNROLL(4)
        for (int i = 0; i < kPixels; ++i) q[g][i] = set(weights[(k + g) * kPixels + i]);
      }
      for (int64_t c = 0; c < shape.row; c += kWidth) {
        vf x[kPixels];
        TM_UNROLL(4)
        for (int i = 0; i < kPixels; ++i) x[i] = load(pixels + i * shape.row + c);
        TM_UNROLL(4)
        for (int g = 0; g < kGroup; ++g) {
          vf sum = load(rows[g] + c);
          TM_UNROLL(4)
          for (int i = 0; i < kPixels; ++i) sum = fma(q[g][i], x[i], sum);
          store(rows[g] + c, sum);
        }
      }
    }
  }

  // Weighted sum of cluster rows for each pixel; the rows are `offset` floats from `near`.
  void gather(const Place* at, int have, ptrdiff_t offset, int64_t b, void* out) const {
    visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
      for (int64_t c = 0; c < shape.row; c += kWidth) {
        vf sum[kPixels] = {zero(), zero(), zero(), zero()};
        for (int64_t k = 0; k < count; ++k) {
          const vf row = load(near[k] + offset + c);
          TM_UNROLL(4)
          for (int i = 0; i < kPixels; ++i)
            sum[i] = fma(set(weights[k * kPixels + i]), row, sum[i]);
        }
        for (int i = 0; i < have; ++i) {
          const int64_t pixel = (b * p.height + at[i].y) * p.width + at[i].x;
          e.store_n(out, pixel * p.channels + c, sum[i], p.channels - c);
        }
      }
    });
  }

  // Nearest of the candidate clusters.
  void label(const Place* at, int have, int64_t b) const {
    for (int i = 0; i < have; ++i) {
      float minimum = __builtin_inff();
      int64_t place = 0;
      for (int64_t k = 0; k < count; ++k) {
        const float raw = weights[k * kPixels + i];
        const float d = raw <= kMaxDistance ? raw : kMaxDistance;
        if (d < minimum) minimum = d, place = k;
      }
      const int64_t width = xs.end - xs.begin;
      const int64_t cluster = (ys.begin + place / width) * p.grid_x + xs.begin + place % width;
      p.labels[(b * p.height + at[i].y) * p.width + at[i].x] = static_cast<int32_t>(cluster);
    }
  }

 private:
  void load_pixels(int64_t b, const Place* at, int have) const {
    visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
      for (int i = 0; i < kPixels; ++i)
        for (int64_t c = 0; c < shape.row; c += kWidth)
          store(pixels + i * shape.row + c,
                i < have ? e.load_n(p.x, p.x_at(b, at[i].y, at[i].x) + c, p.channels - c) : zero());
    });
  }

  // Lanes kPixels apart belong to the same pixel.
  template <typename Combine>
  static vf over_groups(vf x, const Combine& combine) {
    float lane[kWidth];
    store(lane, x);
    for (int i = kPixels; i < kWidth; ++i) lane[i % kPixels] = combine(lane[i % kPixels], lane[i]);
    for (int i = kPixels; i < kWidth; ++i) lane[i] = lane[i % kPixels];
    return load(lane);
  }

  const ClusterParams& p;
  const Shape& shape;
  cpu::Workspace memory;
  float *pixels, *weights, *nothing, *spare;
  std::vector<const float*> near;
  std::vector<float*> sums;
  CellRange ys{}, xs{};
  int64_t count = 0, padded = 0;
};

// Centroids of one image through all iterations. Each step has items that any thread may process.
class Image {
 public:
  Image(const ClusterParams& p, const Shape& shape, int64_t b, float* centroids, float* partial)
      : p(p), shape(shape), b(b), centroids(centroids), partial(partial) {}

  // Initial centroids of a row of cells.
  void pool(int64_t cell_y) const {
    const CellRange ys = pooled_pixels(cell_y, p.height, p.grid_y);
    for (int64_t cell_x = 0; cell_x < p.grid_x; ++cell_x) {
      const CellRange xs = pooled_pixels(cell_x, p.width, p.grid_x);
      const vf size = set(static_cast<float>((ys.end - ys.begin) * (xs.end - xs.begin)));
      float* to = centroids + (cell_y * p.grid_x + cell_x) * shape.row;
      visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
        for (int64_t c = 0; c < shape.row; c += kWidth) {
          vf sum = zero();
          for (int64_t y = ys.begin; y < ys.end; ++y)
            for (int64_t x = xs.begin; x < xs.end; ++x)
              sum = sum + e.load_n(p.x, p.x_at(b, y, x) + c, p.channels - c);
          store(to + c, sum / size);
        }
      });
    }
  }

  void assign(int64_t chunk, Cell& cell) const {
    float* const to = partial + chunk * shape.sum_floats;
    std::fill(to, to + shape.sum_floats, 0.f);
    const int64_t first = chunk * shape.chunk_rows;
    const int64_t last = std::min(first + shape.chunk_rows, p.grid_y);
    for (int64_t y = first; y < last; ++y)
      for (int64_t x = 0; x < p.grid_x; ++x)
        cell.for_each_group(b, y, x, centroids, [&](const Cell::Place*, int have) {
          cell.measure();
          cell.weigh(have);
          cell.add_to(to, first_row(chunk));
        });
  }

  // Updates a row of clusters.
  void update(int64_t y, bool last) const {
    for (int64_t x = 0; x < p.grid_x; ++x) {
      const int64_t cluster = y * p.grid_x + x, out = b * p.clusters() + cluster;
      float* const row = centroids + cluster * shape.row;
      if (last)
        for (int64_t c = 0; c < p.channels; c += kWidth)
          store_from_float_n(p.previous, DType::float32, out * p.channels + c, load(row + c),
                             p.channels - c);
      float mass = 0;
      for_each_sum(y, x, [&](const float*, float m) { mass += m; });
      if (mass != 0) {
        for (int64_t c = 0; c < shape.row; c += kWidth) {
          vf sum = zero();
          for_each_sum(y, x, [&](const float* from, float) { sum = sum + load(from + c); });
          store(row + c, sum / set(mass));
        }
      }
      if (!last) continue;
      p.mass[out] = mass;
      store_row(row, 1, static_cast<char*>(p.centroids) + out * p.channels * element_size(),
                p.dtype, p.channels);
    }
  }

 private:
  int64_t element_size() const { return p.dtype == DType::float32 ? 4 : 2; }
  int64_t first_row(int64_t chunk) const {
    const int64_t first = std::max<int64_t>(chunk * shape.chunk_rows - p.reach, 0);
    return std::min(first, p.grid_y - shape.sum_rows);
  }

  template <typename Visit>
  void for_each_sum(int64_t y, int64_t x, const Visit& visit) const {
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
      const int64_t row = y - first_row(chunk);
      if (row < 0 || row >= shape.sum_rows) continue;
      const float* from = partial + chunk * shape.sum_floats;
      const int64_t at = row * p.grid_x + x;
      visit(from + at * shape.row, from[shape.sum_rows * p.grid_x * shape.row + at]);
    }
  }

  const ClusterParams& p;
  const Shape& shape;
  const int64_t b;
  float *const centroids, *const partial;
};

template <typename Body>
void for_each_item(int64_t items, int threads, const Body& body) {
  cpu::parallel_items(items, threads, [&](cpu::ItemCounter& counter) {
    FlushDenormals flush;
    for (int64_t item; (item = counter.next()) >= 0;) body(item);
  });
}

template <typename Body>
void for_each_item_with_cell(const ClusterParams& p, const Shape& shape, int64_t items, int threads,
                             const Body& body) {
  cpu::parallel_items(items, threads, [&](cpu::ItemCounter& counter) {
    FlushDenormals flush;
    Cell cell(p, shape);
    for (int64_t item; (item = counter.next()) >= 0;) body(item, cell);
  });
}

void label_by_window(const ClusterParams& p, const Shape& shape, const float* centroids,
                     int threads) {
  for_each_item_with_cell(p, shape, p.batch * p.grid_y, threads, [&](int64_t item, Cell& cell) {
    const int64_t b = item / p.grid_y, y = item % p.grid_y;
    for (int64_t x = 0; x < p.grid_x; ++x)
      cell.for_each_group(b, y, x, centroids + b * p.clusters() * shape.row,
                          [&](const Cell::Place* at, int have) {
                            cell.measure();
                            cell.label(at, have, b);
                          });
  });
}

void label_by_all(const ClusterParams& p, const Shape& shape, const float* centroids, int threads) {
  const int64_t pixels = p.height * p.width, size = p.dtype == DType::float32 ? 4 : 2;
  const int64_t chunk = NearestFinder::chunk_rows(pixels, p.channels, threads);
  const int64_t chunks = ceil_div(pixels, chunk), clusters = p.clusters();
  const RowSets sets{centroids,  DType::float32,       p.batch,  clusters,
                     p.channels, clusters * shape.row, shape.row};
  for_screened_sets(
      sets, pixels, 1, threads, [&](const RowSets& some, const Screen* screen, int64_t image) {
        cpu::parallel_items(some.batch * chunks, threads, [&](cpu::ItemCounter& counter) {
          FlushDenormals flush;
          NearestFinder finder(some, screen, chunk, 1, false);
          std::vector<const char*> rows(chunk);
          for (int64_t item; (item = counter.next()) >= 0;) {
            const int64_t b = image + item / chunks, first = item % chunks * chunk;
            const int64_t count = std::min(chunk, pixels - first);
            for (int64_t i = 0; i < count; ++i) {
              const int64_t at = p.x_at(b, (first + i) / p.width, (first + i) % p.width);
              rows[i] = static_cast<const char*>(p.x) + at * size;
            }
            finder.run(item / chunks, rows.data(), p.dtype, count);
            for (int64_t i = 0; i < count; ++i) p.labels[b * pixels + first + i] = *finder.id(i);
          }
        });
      });
}

}  // namespace

void cluster_tokens(const ClusterParams& p) {
  const Shape shape(p);
  const int64_t clusters = p.clusters() * shape.row, images = p.batch;
  const int64_t work = images * p.height * p.width * p.clusters() * p.channels;
  const int threads = work < (1 << 16) ? 1 : cpu::num_threads();
  cpu::Workspace memory(images * clusters);
  float* const centroids = memory.take(images * clusters);
  if (shape.chunks == 1) {  // small images: one thread each
    cpu::parallel_items(images, threads, [&](cpu::ItemCounter& counter) {
      FlushDenormals flush;
      Cell cell(p, shape);
      cpu::Workspace partial(shape.sum_floats);
      float* const sums = partial.take(shape.sum_floats);
      for (int64_t b; (b = counter.next()) >= 0;) {
        const Image image(p, shape, b, centroids + b * clusters, sums);
        for (int64_t y = 0; y < p.grid_y; ++y) image.pool(y);
        for (int64_t i = 0; i < p.iters; ++i) {
          image.assign(0, cell);
          for (int64_t y = 0; y < p.grid_y; ++y) image.update(y, i + 1 == p.iters);
        }
      }
    });
  } else {
    cpu::Workspace partial(shape.chunks * shape.sum_floats);
    float* const sums = partial.take(shape.chunks * shape.sum_floats);
    for (int64_t b = 0; b < images; ++b) {
      const Image image(p, shape, b, centroids + b * clusters, sums);
      for_each_item(p.grid_y, threads, [&](int64_t y) { image.pool(y); });
      for (int64_t i = 0; i < p.iters; ++i) {
        for_each_item_with_cell(p, shape, shape.chunks, threads,
                                [&](int64_t chunk, Cell& cell) { image.assign(chunk, cell); });
        for_each_item(p.grid_y, threads, [&](int64_t y) { image.update(y, i + 1 == p.iters); });
      }
    }
  }
  if (p.window_labels)
    label_by_window(p, shape, centroids, threads);
  else
    label_by_all(p, shape, centroids, threads);
}

// dx_n = sum over m of Q_mn dcentroids_m / mass_m, 0 from clusters without mass.
void cluster_tokens_backward(const ClusterBackwardParams& q) {
  const ClusterParams& p = q.forward;
  const Shape shape(p);
  const int64_t clusters = p.clusters() * shape.row, rows = p.batch * p.clusters();
  const int64_t work = p.batch * p.height * p.width * shape.maximum * p.channels;
  const int threads = work < (1 << 16) ? 1 : cpu::num_threads();
  cpu::Workspace memory(2 * p.batch * clusters + 16);
  float* const previous = memory.take(p.batch * clusters);
  float* const gradients = memory.take(p.batch * clusters);
  for_each_item(rows, threads, [&](int64_t r) {
    const vf inverse = set(p.mass[r] != 0 ? 1 / p.mass[r] : 0.f);
    for (int64_t c = 0; c < shape.row; c += kWidth) {
      const int64_t at = r * p.channels + c, n = p.channels - c;
      store(previous + r * shape.row + c, load_as_float_n(p.previous, DType::float32, at, n));
      const vf d = load_as_float_n(q.dcentroids, p.dtype, at, n);
      store(gradients + r * shape.row + c, p.mass[r] != 0 ? d * inverse : zero());
    }
  });
  const ptrdiff_t offset = gradients - previous;
  for_each_item_with_cell(p, shape, p.batch * p.grid_y, threads, [&](int64_t item, Cell& cell) {
    const int64_t b = item / p.grid_y, y = item % p.grid_y;
    for (int64_t x = 0; x < p.grid_x; ++x)
      cell.for_each_group(b, y, x, previous + b * clusters, [&](const Cell::Place* at, int have) {
        cell.measure();
        cell.weigh(have);
        cell.gather(at, have, offset, b, q.dx);
      });
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
