// Attention of the packed tokens of many prompts, each over its slot.
//
// Letters: N rows, B sequences, H query heads, KH key-value heads, G = H / KH, D head size.

#pragma once

#include <vector>
#include "rows.hpp"
#include "tiles.hpp"

namespace reft {

// Works on tiles, kTileRows queries against kTileKeys keys. All queries that share a key head are
// rows of one matrix.
constexpr int64_t kTileKeys = 64;
constexpr int64_t kQueriesAtATime = 128;  // positions of one task; its keys are packed once
constexpr float kMasked = -1e30f;

// Rows first..last-1 of a packed prefill: a slot's tokens from first_position on. The first
// `shared` tokens of the slot have the keys of the segment's before.
struct Segment {
  int64_t first, last, slot, first_position, shared;
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

// Makes the copies of one key head, of what is `stored`: keys, or values.
template <typename T>
void copy_head(const PrefillArguments& a, void* stored, int64_t kh) {
  const int64_t slot_size = a.slot_len * a.D;
  T* const head = static_cast<T*>(stored) + kh * slot_size;
  for (const Copied* copy = a.copies; copy < a.copies + a.num_copies; ++copy) {
    const T* from = head + copy->source * a.KH * slot_size;
    T* to = head + copy->slot * a.KH * slot_size;
    std::copy(from + copy->first * a.D, from + copy->last * a.D, to + copy->first * a.D);
  }
}

// Queries of one task: positions first..last-1 of a segment, all heads that share a key head.
struct Part {
  const Segment* segment;
  int64_t first, last;
  int64_t row;  // of its first query in the task's matrix

  int64_t row_of(int64_t position) const {
    return segment->first + position - segment->first_position;
  }
};

struct Task {
  std::vector<Part> parts;
  int64_t kh;
  int64_t shared;  // tokens whose keys are the first part's in all parts, in whole blocks
};

inline int64_t tiled(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

// Memory of one thread, for queries of one task. What is multiplied is of the type of the hidden
// states, all else is float32.
template <typename T>
struct Scratch {
  int64_t columns;  // D padded to whole tiles
  std::vector<T> queries, keys, values, weights;
  std::vector<float> scores, sums, largest, totals;

  Scratch(int64_t rows, int64_t D)
      : columns((D + kTileColumns - 1) / kTileColumns * kTileColumns),
        queries(rows * D), keys(D * kTileKeys), values(kTileKeys * columns),
        weights(kTileRows * kTileKeys), scores(kTileRows * kTileKeys), sums(rows * columns),
        largest(rows), totals(rows) {}
};

// Puts `count` keys and values of a slot, from `begin` on, where tiles can be read off: keys as
// (D / kDepth, kTileKeys, kDepth), values as (kTileKeys / kDepth, columns, kDepth).
template <typename T>
void pack_block(const PrefillArguments& a, int64_t slot, int64_t kh, int64_t begin, int64_t count,
                Scratch<T>& s) {
  const int64_t D = a.D, depth = kDepth<T>, offset = ((slot * a.KH + kh) * a.slot_len + begin) * D;
  const T *keys = static_cast<const T*>(a.keys) + offset;
  const T *values = static_cast<const T*>(a.values) + offset;
  if (count < kTileKeys) {
    std::fill(s.keys.begin(), s.keys.end(), T{});
    std::fill(s.values.begin(), s.values.end(), T{});
  }
  for (int64_t l = 0; l < count; ++l)
    for (int64_t i = 0; i < D; i += depth)
      std::memcpy(s.keys.data() + i * kTileKeys + l * depth, keys + l * D + i, sizeof(float));
  for (int64_t l = 0; l < count; ++l) {
    T* to = s.values.data() + l / depth * s.columns * depth + l % depth;
    for (int64_t i = 0; i < D; ++i) to[i * depth] = values[l * D + i];
  }
}

// Turns the queries of a part.
template <typename T>
void load_queries(const PrefillArguments& a, const Part& part, int64_t kh, Scratch<T>& s) {
  const int64_t D = a.D, G = a.H / a.KH, width = (a.H + 2 * a.KH) * D;
  for (int64_t i = 0; i < (part.last - part.first) * G; ++i) {
    const int64_t row = part.row_of(part.first + i / G), head = kh * G + i % G;
    rotate(static_cast<const T*>(a.heads) + row * width + head * D,
           s.queries.data() + (part.row + i) * D, a.cosines + row * D, a.sines + row * D, D,
           a.scale);
  }
}

// Attention of a part over the block of keys that is packed. Softmax is taken block by block, with
// a running maximum (Milakov and Gimelshein 2018).
template <typename T>
void attend_block(const PrefillArguments& a, const Part& part, int64_t begin, int64_t count,
                  Scratch<T>& s) {
  const int64_t D = a.D, G = a.H / a.KH, columns = s.columns;
  const int64_t depth = kDepth<T>, whole = (count + depth - 1) / depth * depth;
  const int64_t num_rows = (part.last - part.first) * G;
  for (int64_t tile = 0; tile < num_rows; tile += kTileRows) {
    const int64_t newest = part.first + std::min(tile + kTileRows, num_rows) / G;
    if (newest < begin) continue;  // the causal mask hides the whole block
    Lanes sums[kTileRows][kTileVectors];
    for (int64_t column = 0; column < kTileKeys; column += kTileColumns) {
      multiply_tile(s.queries.data() + (part.row + tile) * D, D, s.keys.data() + column * depth,
                    kTileKeys, D, sums);
      for (int row = 0; row < kTileRows; ++row)
        std::memcpy(s.scores.data() + row * kTileKeys + column, sums[row], sizeof sums[row]);
    }
    for (int row = 0; row < kTileRows; ++row) {
      const int64_t at = part.row + tile + row;
      float* scores = s.scores.data() + row * kTileKeys;
      const int64_t position = part.first + (tile + row) / G;
      const int64_t from = a.window ? std::max<int64_t>(0, position + 1 - a.window - begin) : 0;
      const int64_t to = std::min(count, position + 1 - begin);  // visible: from..to-1
      float largest = s.largest[at];
      for (int64_t l = from; l < to; ++l) largest = std::max(largest, scores[l]);
      const float shrink = exponential(s.largest[at] - largest);
      float total = 0;
      for (int64_t l = 0; l < kTileKeys; ++l) {
        const float weight = exponential(scores[l] - largest);
        scores[l] = l >= from && l < to ? weight : 0.0f;
        total += scores[l];
      }
      T* weights = s.weights.data() + row * kTileKeys;
      for (int64_t l = 0; l < kTileKeys; ++l) store(scores[l], weights + l);
      s.totals[at] = s.totals[at] * shrink + total;
      s.largest[at] = largest;
      float* out = s.sums.data() + at * columns;
      for (int64_t i = 0; i < columns; ++i) out[i] *= shrink;
    }
    for (int64_t column = 0; column < columns; column += kTileColumns) {
      multiply_tile(s.weights.data(), kTileKeys, s.values.data() + column * depth, columns, whole,
                    sums);
      for (int row = 0; row < kTileRows; ++row)
        for (int v = 0; v < kTileVectors; ++v)
          *reinterpret_cast<Lanes*>(s.sums.data() + (part.row + tile + row) * columns + column +
                                    v * kLanes) += sums[row][v];
    }
  }
}

// Writes what a part's queries came to.
template <typename T>
void store_outputs(const PrefillArguments& a, const Part& part, int64_t kh, const Scratch<T>& s) {
  const int64_t D = a.D, G = a.H / a.KH;
  for (int64_t i = 0; i < (part.last - part.first) * G; ++i) {
    const int64_t row = part.row_of(part.first + i / G), at = part.row + i;
    T* out = static_cast<T*>(a.out) + (row * a.H + kh * G + i % G) * D;
    for (int64_t k = 0; k < D; ++k) store(s.sums[at * s.columns + k] / s.totals[at], out + k);
  }
}

template <typename T>
void attend_task(const PrefillArguments& a, const Task& task, Scratch<T>& s) {
  std::fill(s.queries.begin(), s.queries.end(), T{});
  std::fill(s.sums.begin(), s.sums.end(), 0.0f);
  std::fill(s.totals.begin(), s.totals.end(), 0.0f);
  std::fill(s.largest.begin(), s.largest.end(), kMasked);
  const auto first_block = [&](const Part& part) {
    const int64_t earliest = a.window ? std::max<int64_t>(0, part.first + 1 - a.window) : 0;
    return earliest / kTileKeys * kTileKeys;
  };
  int64_t first = task.shared;
  for (const Part& part : task.parts) {
    load_queries<T>(a, part, task.kh, s);
    first = std::min(first, first_block(part));
  }
  for (int64_t begin = first; begin < task.shared; begin += kTileKeys) {
    pack_block<T>(a, task.parts[0].segment->slot, task.kh, begin, kTileKeys, s);
    for (const Part& part : task.parts) attend_block(a, part, begin, kTileKeys, s);
  }
  for (const Part& part : task.parts)
    for (int64_t begin = std::max(task.shared, first_block(part)); begin < part.last;
         begin += kTileKeys) {
      const int64_t count = std::min(kTileKeys, part.last - begin);
      pack_block<T>(a, part.segment->slot, task.kh, begin, count, s);
      attend_block(a, part, begin, count, s);
    }
  for (const Part& part : task.parts) store_outputs<T>(a, part, task.kh, s);
}

// Segments first..last-1 may be parts of one task: short ones, whose keys are mostly one another's.
inline int64_t end_of_family(const PrefillArguments& a, int64_t first) {
  const auto is_short = [](const Segment& segment) {
    return segment.last - segment.first <= kQueriesAtATime / 2;
  };
  int64_t last = first + 1;
  if (is_short(a.segments[first]))
    while (last < a.num_segments && is_short(a.segments[last]) &&
           a.segments[last].shared >= kTileKeys)
      ++last;
  return last;
}

// Work for all threads, in tasks of at most `most_rows` queries.
inline std::vector<Task> tasks_of(const PrefillArguments& a, int64_t most_rows) {
  const int64_t G = a.H / a.KH, wanted = (2 * a.threads + a.KH - 1) / a.KH;
  std::vector<Task> tasks;
  for (int64_t at = 0; at < a.num_segments;) {
    const int64_t end = end_of_family(a, at), most_parts = (end - at + wanted - 1) / wanted;
    if (end - at == 1) {
      const Segment& segment = a.segments[at++];
      const int64_t last = segment.first_position + segment.last - segment.first;
      for (int64_t first = segment.first_position; first < last; first += kQueriesAtATime)
        for (int64_t kh = 0; kh < a.KH; ++kh)
          tasks.push_back({{{&segment, first, std::min(first + kQueriesAtATime, last), 0}}, kh, 0});
      continue;
    }
    while (at < end) {
      Task task{{}, 0, a.segments[at].first_position / kTileKeys * kTileKeys};
      int64_t row = 0;
      for (; at < end && int64_t(task.parts.size()) < most_parts; ++at) {
        const Segment& segment = a.segments[at];
        const int64_t length = segment.last - segment.first, rows = tiled(length * G);
        if (row + rows > most_rows) break;
        task.parts.push_back(
            {&segment, segment.first_position, segment.first_position + length, row});
        row += rows;
        const int64_t same = std::min(segment.shared, segment.first_position);
        if (task.parts.size() > 1)
          task.shared = std::min(task.shared, same / kTileKeys * kTileKeys);
      }
      for (task.kh = 0; task.kh < a.KH; ++task.kh) tasks.push_back(task);
    }
  }
  return tasks;
}

template <typename T>
void attend_prefill(const PrefillArguments& a) {
  const int64_t most_rows = tiled(kQueriesAtATime * (a.H / a.KH));
  const std::vector<Task> tasks = tasks_of(a, most_rows);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.num_segments * a.KH; ++i)
      store_keys<T>(a, a.segments[i / a.KH], i % a.KH);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * a.KH; ++i)
      copy_head<T>(a, i % 2 ? a.values : a.keys, i / 2);
    Scratch<T> scratch(most_rows, a.D);
#pragma omp for schedule(dynamic)
    for (int64_t i = int64_t(tasks.size()) - 1; i >= 0; --i)  // the longest first
      attend_task<T>(a, tasks[i], scratch);
  }
}

}  // namespace reft
