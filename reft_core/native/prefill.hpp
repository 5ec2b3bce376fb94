// Attention of the packed tokens of many prompts, each over its slot.
//
// Letters: N rows, B sequences, H query heads, KH key-value heads, G = H / KH, D head size.

#pragma once

#include <vector>
#include "rows.hpp"

namespace reft {

// Prefill attention works on tiles: kTileRows queries against kTileKeys keys, whose products stay in
// registers. All queries that share a key head are rows of one matrix.
#ifdef __AVX512F__
constexpr int kLanes = 16, kTileRows = 8;
#else
constexpr int kLanes = 8, kTileRows = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
constexpr int kTileVectors = 2;
constexpr int64_t kTileColumns = kLanes * kTileVectors;
constexpr int64_t kTileKeys = 64;
constexpr int64_t kQueriesAtATime = 128;  // positions of one task; its keys are packed once
constexpr float kMasked = -1e30f;

// sums (kTileRows, kTileColumns) = rows (kTileRows, count)·columns (count, kTileColumns).
inline void multiply_tile(const float* rows, int64_t row_stride, const float* columns,
                          int64_t column_stride, int64_t count,
                          Lanes (&sums)[kTileRows][kTileVectors]) {
  for (int row = 0; row < kTileRows; ++row)
    for (int v = 0; v < kTileVectors; ++v) sums[row][v] = Lanes{};
  for (int64_t i = 0; i < count; ++i) {
    Lanes column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v)
      column[v] = *reinterpret_cast<const Lanes*>(columns + i * column_stride + v * kLanes);
    for (int row = 0; row < kTileRows; ++row)
      for (int v = 0; v < kTileVectors; ++v)
        sums[row][v] += rows[row * row_stride + i] * column[v];
  }
}

// Rows first..last-1 of a packed prefill: a slot's tokens from first_position on.
struct Segment {
  int64_t first, last, slot, first_position;
};

// Tokens first..last-1 of a slot are those of another, `source`.
struct Copied {
  int64_t source, slot, first, last;
};

struct PrefillArguments {
  void* heads;                   // (N, H + 2·KH, D): queries, keys, values, not yet turned
  const float *cosines, *sines;  // (N, D)
  void *keys, *values;           // (slots, KH, slot_len, D)
  const Segment* segments;
  const Copied* copies;          // made in their order, once all keys are stored
  void* out;                     // (N, H, D)
  int64_t num_segments, num_copies, H, KH, D, slot_len;
  int64_t window;                // positions that a query sees, itself included; 0: all
  float scale;
  int32_t threads;
};

// Turns the keys of one segment's key head and stores them, and the values, in the slot.
template <typename T>
void store_keys(const PrefillArguments& a, const Segment& segment, int64_t kh) {
  const int64_t D = a.D, width = (a.H + 2 * a.KH) * D;
  const int64_t offset = ((segment.slot * a.KH + kh) * a.slot_len + segment.first_position) * D;
  T *keys = static_cast<T*>(a.keys) + offset, *values = static_cast<T*>(a.values) + offset;
  for (int64_t row = segment.first; row < segment.last; ++row, keys += D, values += D) {
    const T* heads = static_cast<const T*>(a.heads) + row * width;
    rotate(heads + (a.H + kh) * D, keys, a.cosines + row * D, a.sines + row * D, D, 1.0f);
    std::memcpy(values, heads + (a.H + a.KH + kh) * D, D * sizeof(T));
  }
}

// Makes the copies of one key head.
template <typename T>
void copy_keys(const PrefillArguments& a, int64_t kh) {
  const int64_t slot_size = a.slot_len * a.D;
  for (const Copied* copy = a.copies; copy < a.copies + a.num_copies; ++copy)
    for (void* const stored : {a.keys, a.values}) {
      T* const head = static_cast<T*>(stored) + kh * slot_size;
      const T* from = head + copy->source * a.KH * slot_size;
      T* to = head + copy->slot * a.KH * slot_size;
      std::copy(from + copy->first * a.D, from + copy->last * a.D, to + copy->first * a.D);
    }
}

// Memory of one thread, for queries of one task.
struct Scratch {
  int64_t rows, columns;  // queries, and D padded to whole tiles
  std::vector<float> queries, keys, values, weights, sums, largest, totals;

  Scratch(int64_t num_rows, int64_t D)
      : rows((num_rows + kTileRows - 1) / kTileRows * kTileRows),
        columns((D + kTileColumns - 1) / kTileColumns * kTileColumns),
        queries(rows * D), keys(D * kTileKeys), values(kTileKeys * columns),
        weights(kTileRows * kTileKeys), sums(rows * columns), largest(rows), totals(rows) {}
};

// Attention of positions first..last-1 of a segment, for the queries of one key head. Softmax is
// taken block by block of keys, with a running maximum (Milakov and Gimelshein 2018).
template <typename T>
void attend_task(const PrefillArguments& a, const Segment& segment, int64_t kh, int64_t first,
                 int64_t last, Scratch& s) {
  const int64_t D = a.D, G = a.H / a.KH, width = (a.H + 2 * a.KH) * D, columns = s.columns;
  const int64_t num_rows = (last - first) * G;
  const int64_t tiled_rows = (num_rows + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t offset = (segment.slot * a.KH + kh) * a.slot_len * D;
  const T *keys = static_cast<const T*>(a.keys) + offset;
  const T *values = static_cast<const T*>(a.values) + offset;
  const auto row_of = [&](int64_t position) {
    return segment.first + position - segment.first_position;
  };
  std::fill(s.queries.begin(), s.queries.end(), 0.0f);
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t row = row_of(first + i / G), head = kh * G + i % G;
    rotate(static_cast<const T*>(a.heads) + row * width + head * D, s.queries.data() + i * D,
           a.cosines + row * D, a.sines + row * D, D, a.scale);
  }
  std::fill(s.sums.begin(), s.sums.end(), 0.0f);
  std::fill(s.totals.begin(), s.totals.end(), 0.0f);
  std::fill(s.largest.begin(), s.largest.end(), kMasked);
  const int64_t earliest = a.window ? std::max<int64_t>(0, first + 1 - a.window) : 0;
  for (int64_t begin = earliest / kTileKeys * kTileKeys; begin < last; begin += kTileKeys) {
    const int64_t count = std::min(kTileKeys, last - begin);
    for (int64_t l = 0; l < kTileKeys; ++l)
      for (int64_t i = 0; i < D; ++i) {
        const bool there = l < count;
        s.keys[i * kTileKeys + l] = there ? load(keys[(begin + l) * D + i]) : 0.0f;
        s.values[l * columns + i] = there ? load(values[(begin + l) * D + i]) : 0.0f;
      }
    for (int64_t tile = 0; tile < tiled_rows; tile += kTileRows) {
      const int64_t newest = first + std::min(tile + kTileRows, num_rows) / G;
      if (newest < begin) continue;  // the causal mask hides the whole block
      Lanes sums[kTileRows][kTileVectors];
      for (int64_t column = 0; column < kTileKeys; column += kTileColumns) {
        multiply_tile(s.queries.data() + tile * D, D, s.keys.data() + column, kTileKeys, D, sums);
        for (int row = 0; row < kTileRows; ++row)
          std::memcpy(s.weights.data() + row * kTileKeys + column, sums[row], sizeof sums[row]);
      }
      for (int row = 0; row < kTileRows; ++row) {
        float* weights = s.weights.data() + row * kTileKeys;
        const int64_t position = first + (tile + row) / G;
        const int64_t from = a.window ? std::max<int64_t>(0, position + 1 - a.window - begin) : 0;
        const int64_t to = std::min(count, position + 1 - begin);  // visible: from..to-1
        float largest = s.largest[tile + row];
        for (int64_t l = from; l < to; ++l) largest = std::max(largest, weights[l]);
        const float shrink = exponential(s.largest[tile + row] - largest);
        float total = 0;
        for (int64_t l = 0; l < kTileKeys; ++l) {
          const float weight = exponential(weights[l] - largest);
          weights[l] = l >= from && l < to ? weight : 0.0f;
          total += weights[l];
        }
        s.totals[tile + row] = s.totals[tile + row] * shrink + total;
        s.largest[tile + row] = largest;
        float* out = s.sums.data() + (tile + row) * columns;
        for (int64_t i = 0; i < columns; ++i) out[i] *= shrink;
      }
      for (int64_t column = 0; column < columns; column += kTileColumns) {
        multiply_tile(s.weights.data(), kTileKeys, s.values.data() + column, columns, count, sums);
        for (int row = 0; row < kTileRows; ++row)
          for (int v = 0; v < kTileVectors; ++v)
            *reinterpret_cast<Lanes*>(s.sums.data() + (tile + row) * columns + column +
                                      v * kLanes) += sums[row][v];
      }
    }
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    T* out = static_cast<T*>(a.out) + (row_of(first + i / G) * a.H + kh * G + i % G) * D;
    for (int64_t k = 0; k < D; ++k) store(s.sums[i * columns + k] / s.totals[i], out + k);
  }
}

template <typename T>
void attend_prefill(const PrefillArguments& a) {
  struct Task {
    int64_t segment, kh, first, last;
  };
  std::vector<Task> tasks;
  for (int64_t at = 0; at < a.num_segments; ++at) {
    const Segment& segment = a.segments[at];
    const int64_t end = segment.first_position + segment.last - segment.first;
    for (int64_t kh = 0; kh < a.KH; ++kh)
      for (int64_t first = segment.first_position; first < end; first += kQueriesAtATime)
        tasks.push_back({at, kh, first, std::min(first + kQueriesAtATime, end)});
  }
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.num_segments * a.KH; ++i)
      store_keys<T>(a, a.segments[i / a.KH], i % a.KH);
#pragma omp for schedule(static)
    for (int64_t kh = 0; kh < a.KH; ++kh) copy_keys<T>(a, kh);
    Scratch scratch(kQueriesAtATime * (a.H / a.KH), a.D);
#pragma omp for schedule(dynamic)
    for (int64_t i = int64_t(tasks.size()) - 1; i >= 0; --i)  // the longest first
      attend_task<T>(a, a.segments[tasks[i].segment], tasks[i].kh, tasks[i].first, tasks[i].last,
                     scratch);
  }
}

}  // namespace reft
