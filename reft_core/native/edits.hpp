// Low-rank edits of rows of hidden states.

#pragma once

#include <type_traits>
#include <utility>
#include <vector>
#include "tiles.hpp"

namespace reft {

// One edit and the rows it changes: h += strength · ((h·down + bias)·up + shift + gain ∘ h).
// Absent parts are null; all are float32.
struct RowEdit {
  const float *down, *up;     // (d, r), (r, d)
  const float* bias;          // (r,), or (num_rows, r) with bias_stride r
  const float *shift, *gain;  // (d,)
  const int64_t* rows;        // (num_rows,)
  int64_t num_rows, rank, bias_stride;
  int64_t group;              // edits next to each other with one group change different rows
  float strength;
};

constexpr int kRowsAtOnce = 8;        // rows that read an edit's tensors while those are in cache
constexpr int64_t kRanksAtOnce = 8;   // columns of down whose sums stay in registers

template <int Width>
struct Some {
  typedef float numbers __attribute__((vector_size(Width * sizeof(float))));
};

// Width numbers side by side, from anywhere in memory.
template <int Width>
inline typename Some<Width>::numbers some(const float* from) {
  typename Some<Width>::numbers numbers;
  std::memcpy(&numbers, from, sizeof numbers);
  return numbers;
}

// Calls `step` with a constant number of things and the first of them, until all are done.
template <int Most, typename Step>
inline void in_steps(int64_t count, const Step& step) {
  int64_t first = 0;
  for (; first + Most <= count; first += Most) step(std::integral_constant<int, Most>{}, first);
  if constexpr (Most > 4)
    if (count - first >= 4) step(std::integral_constant<int, 4>{}, first), first += 4;
  for (; first < count; ++first) step(std::integral_constant<int, 1>{}, first);
}

// inner (r, Rows) = states (Rows, d)·down. Fetches the next edit's down.
template <int Rows>
inline void project(const float* states, const RowEdit& edit, const RowEdit& next, int64_t d,
                    float* inner) {
  in_steps<kRanksAtOnce>(edit.rank, [&](auto width, int64_t column) {
    constexpr int Width = decltype(width)::value;
    typename Some<Width>::numbers sums[Rows] = {};
    for (int64_t i = 0; i < d; ++i) {
      const auto down = some<Width>(edit.down + i * edit.rank + column);
      __builtin_prefetch(next.down + i * edit.rank + column);
#pragma GCC unroll 8
      for (int row = 0; row < Rows; ++row) sums[row] += states[row * d + i] * down;
    }
    for (int row = 0; row < Rows; ++row)
      for (int r = 0; r < Width; ++r) inner[(column + r) * Rows + row] = sums[row][r];
  });
}

// states (Rows, d) += strength · (inner·up + shift + gain ∘ states). Fetches the next edit's up.
template <int Rows>
inline void expand(const float* inner, const RowEdit& edit, const RowEdit& next, int64_t d,
                   float* states) {
  in_steps<kLanes>(d, [&](auto width, int64_t i) {
    constexpr int Width = decltype(width)::value;
    typename Some<Width>::numbers sums[Rows] = {};
    for (int64_t r = 0; r < edit.rank; ++r) {
      const auto up = some<Width>(edit.up + r * d + i);
      __builtin_prefetch(next.up + r * d + i);
#pragma GCC unroll 8
      for (int row = 0; row < Rows; ++row) sums[row] += inner[r * Rows + row] * up;
    }
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      auto state = some<Width>(states + row * d + i);
      if (edit.shift) sums[row] += some<Width>(edit.shift + i);
      if (edit.gain) sums[row] += some<Width>(edit.gain + i) * state;
      state += edit.strength * sums[row];
      std::memcpy(states + row * d + i, &state, sizeof state);
    }
  });
}

template <int Rows, typename T>
void edit_rows(T* hidden, int64_t d, const RowEdit& edit, const RowEdit& next, int64_t first,
               float* scratch) {
  float* states = scratch;            // (Rows, d)
  float* inner = states + Rows * d;   // (r, Rows)
  for (int row = 0; row < Rows; ++row) {
    const T* from = hidden + edit.rows[first + row] * d;
    for (int64_t i = 0; i < d; ++i) states[row * d + i] = load(from[i]);
  }
  project<Rows>(states, edit, next, d, inner);
  for (int row = 0; edit.bias && row < Rows; ++row)
    for (int64_t r = 0; r < edit.rank; ++r)
      inner[r * Rows + row] += edit.bias[(first + row) * edit.bias_stride + r];
  expand<Rows>(inner, edit, next, d, states);
  for (int row = 0; row < Rows; ++row) {
    T* to = hidden + edit.rows[first + row] * d;
    for (int64_t i = 0; i < d; ++i) store(states[row * d + i], to + i);
  }
}

// The same for a number of rows that is known only now.
template <typename T, int... Counts>
inline void edit_some_rows(T* hidden, int64_t d, const RowEdit& edit, const RowEdit& next,
                           int64_t first, int64_t count, float* scratch,
                           std::integer_sequence<int, Counts...>) {
  ((count == Counts + 1 ? edit_rows<Counts + 1>(hidden, d, edit, next, first, scratch) : void()),
   ...);
}

template <typename T>
void apply_edits(T* hidden, int64_t d, const RowEdit* edits, int64_t count, int threads) {
  struct Block {
    const RowEdit* edit;
    int64_t first, count;
  };
  std::vector<Block> blocks;
  std::vector<int64_t> ends;  // of each group, in blocks
  int64_t largest_rank = 0;
  for (int64_t e = 0; e < count; ++e) {
    const RowEdit& edit = edits[e];
    largest_rank = std::max(largest_rank, edit.rank);
    const int64_t parts = (edit.num_rows + kRowsAtOnce - 1) / kRowsAtOnce;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = edit.num_rows * part / parts;
      blocks.push_back({&edit, first, edit.num_rows * (part + 1) / parts - first});
    }
    if (e + 1 == count || edits[e + 1].group != edit.group) ends.push_back(blocks.size());
  }
  const int64_t work = int64_t(blocks.size()) * kRowsAtOnce * d * (largest_rank + 1);
#pragma omp parallel num_threads(threads) if (work >= kLeastParallel)
  {
    std::vector<float> scratch(kRowsAtOnce * (d + largest_rank));
    int64_t begin = 0;
    for (const int64_t end : ends) {
#pragma omp for schedule(static)
      for (int64_t at = begin; at < end; ++at) {
        const Block& block = blocks[at];
        const RowEdit& next = block.edit[block.edit + 1 < edits + count];
        edit_some_rows(hidden, d, *block.edit, next, block.first, block.count, scratch.data(),
                       std::make_integer_sequence<int, kRowsAtOnce>{});
      }
      begin = end;
    }
  }
}

}  // namespace reft
