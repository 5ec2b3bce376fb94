// Low-rank edits of rows of hidden states.

#pragma once

#include <type_traits>
#include <vector>
#include "numbers.hpp"

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

constexpr int kRowsAtOnce = 4;      // rows that read an edit's tensors while those are in cache
constexpr int64_t kRanksAtOnce = 8;   // columns of down whose sums stay in registers

// inner (kRowsAtOnce, rank) = states·down, for Width columns of down from `column` on.
template <int Width>
inline void project(const float* states, const float* down, int64_t d, int64_t rank,
                    int64_t column, float* inner) {
  float sums[kRowsAtOnce][Width] = {};
  for (int64_t i = 0; i < d; ++i)
    for (int row = 0; row < kRowsAtOnce; ++row)
      for (int r = 0; r < Width; ++r)
        sums[row][r] += states[row * d + i] * down[i * rank + column + r];
  for (int row = 0; row < kRowsAtOnce; ++row)
    for (int r = 0; r < Width; ++r) inner[row * rank + column + r] = sums[row][r];
}

// delta (kRowsAtOnce, d) += inner·up, for Width rows of up from `column` on.
template <int Width>
inline void expand(const float* inner, const float* up, int64_t d, int64_t rank, int64_t column,
                   float* delta) {
  for (int row = 0; row < kRowsAtOnce; ++row)
    for (int64_t i = 0; i < d; ++i) {
      float sum = delta[row * d + i];
      for (int r = 0; r < Width; ++r)
        sum += inner[row * rank + column + r] * up[(column + r) * d + i];
      delta[row * d + i] = sum;
    }
}

// Calls `step` with a constant width and a column, until all ranks are done.
template <typename Step>
inline void over_ranks(int64_t rank, const Step& step) {
  int64_t column = 0;
  for (; column + kRanksAtOnce <= rank; column += kRanksAtOnce)
    step(std::integral_constant<int, kRanksAtOnce>{}, column);
  if (rank - column >= 4) step(std::integral_constant<int, 4>{}, column), column += 4;
  for (; column < rank; ++column) step(std::integral_constant<int, 1>{}, column);
}

template <typename T>
void edit_rows(T* hidden, int64_t d, const RowEdit& edit, int64_t first, int64_t count,
               float* scratch) {
  float* states = scratch;                    // (kRowsAtOnce, d); rows from `count` on are unused
  float* delta = states + kRowsAtOnce * d;    // the same
  float* inner = delta + kRowsAtOnce * d;     // (kRowsAtOnce, r)
  for (int64_t row = 0; row < count; ++row) {
    const T* from = hidden + edit.rows[first + row] * d;
    for (int64_t i = 0; i < d; ++i) {
      const float h = load(from[i]);
      states[row * d + i] = h;
      const float gained = edit.gain ? edit.gain[i] * h : 0.0f;
      delta[row * d + i] = (edit.shift ? edit.shift[i] : 0.0f) + gained;
    }
  }
  if (edit.down) {
    over_ranks(edit.rank, [&](auto width, int64_t column) {
      project<decltype(width)::value>(states, edit.down, d, edit.rank, column, inner);
    });
    for (int64_t row = 0; edit.bias && row < count; ++row)
      for (int64_t r = 0; r < edit.rank; ++r)
        inner[row * edit.rank + r] += edit.bias[(first + row) * edit.bias_stride + r];
    over_ranks(edit.rank, [&](auto width, int64_t column) {
      expand<decltype(width)::value>(inner, edit.up, d, edit.rank, column, delta);
    });
  }
  for (int64_t row = 0; row < count; ++row) {
    T* to = hidden + edit.rows[first + row] * d;
    for (int64_t i = 0; i < d; ++i)
      store(states[row * d + i] + edit.strength * delta[row * d + i], to + i);
  }
}

template <typename T>
void apply_edits(T* hidden, int64_t d, const RowEdit* edits, int64_t count, int threads) {
  struct Block {
    int64_t edit, first;
  };
  std::vector<Block> blocks;
  std::vector<int64_t> ends;  // of each group, in blocks
  int64_t largest_rank = 0;
  for (int64_t e = 0; e < count; ++e) {
    largest_rank = std::max(largest_rank, edits[e].rank);
    for (int64_t first = 0; first < edits[e].num_rows; first += kRowsAtOnce)
      blocks.push_back({e, first});
    if (e + 1 == count || edits[e + 1].group != edits[e].group) ends.push_back(blocks.size());
  }
  const int64_t work = int64_t(blocks.size()) * kRowsAtOnce * d * (largest_rank + 1);
#pragma omp parallel num_threads(threads) if (work >= kLeastParallel)
  {
    std::vector<float> scratch(kRowsAtOnce * (2 * d + largest_rank));
    int64_t begin = 0;
    for (const int64_t end : ends) {
#pragma omp for schedule(dynamic, 4)
      for (int64_t at = begin; at < end; ++at) {
        const RowEdit& edit = edits[blocks[at].edit];
        const int64_t first = blocks[at].first;
        const int64_t rows = std::min<int64_t>(kRowsAtOnce, edit.num_rows - first);
        edit_rows(hidden, d, edit, first, rows, scratch.data());
      }
      begin = end;
    }
  }
}

}  // namespace reft
