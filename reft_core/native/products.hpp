// Linear maps, of few rows above all: each weight is read once, in the order in which it lies.
//
// Letters: N rows, in and out the widths, P panels of kTileColumns outputs.

#pragma once

#include <utility>
#include "tiles.hpp"

namespace reft {

constexpr int64_t kPanelsAtOnce = 4;

// Lays a weight (out, in) out as (P, in / kDepth, kTileColumns, kDepth), with zeros for what is not
// there.
template <typename T>
void pack_weight(const T* weight, int64_t out, int64_t in, T* packed, int threads) {
  const int64_t depth = kDepth<T>, groups = in / depth;
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < out; first += kTileColumns) {
    T* to = packed + first * in;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t column = first; column < first + kTileColumns; ++column)
        for (int64_t i = 0; i < depth; ++i)
          *to++ = column < out ? weight[column * in + group * depth + i] : T{};
  }
}

struct ProductArguments {
  const void* x;       // (N, in)
  const void* packed;  // see pack_weight
  const void* bias;    // (out,), or null
  const void* other;   // (N, out), what the product is added to, or null; may be `to`
  void* to;            // (N, out)
  int64_t N, in, out;
  int32_t threads;
};

// Outputs of one panel, from column `first` on, for Rows rows.
template <int Rows, typename T>
inline void multiply_panel(const ProductArguments& a, int64_t row, int64_t first) {
  Lanes sums[Rows][kTileVectors];
  multiply_tile<Rows>(static_cast<const T*>(a.x) + row * a.in, a.in,
                      static_cast<const T*>(a.packed) + first * a.in, kTileColumns, a.in, sums);
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t count = std::min<int64_t>(kTileColumns, a.out - first);
  for (int r = 0; r < Rows; ++r) {
    float values[kTileColumns];
    std::memcpy(values, sums[r], sizeof values);
    const int64_t at = (row + r) * a.out + first;
    const T* other = static_cast<const T*>(a.other) + at;
    T* to = static_cast<T*>(a.to) + at;
    if (bias)
      for (int64_t i = 0; i < count; ++i) values[i] += load(bias[first + i]);
    if (a.other)
      for (int64_t i = 0; i < count; ++i) values[i] += load(other[i]);
    for (int64_t i = 0; i < count; ++i) store(values[i], to + i);
  }
}

// Outputs of one panel, for the tile of rows from `row` on or what there is of it.
template <typename T, int... Counts>
inline void multiply_rows(const ProductArguments& a, int64_t row, int64_t first,
                          std::integer_sequence<int, Counts...>) {
  const int64_t count = std::min<int64_t>(kTileRows, a.N - row);
  ((count == Counts + 1 ? multiply_panel<Counts + 1, T>(a, row, first) : void()), ...);
}

// to = x·weightᵀ + bias + other, rounded once. A row's outputs do not depend on the other rows.
template <typename T>
void multiply(const ProductArguments& a) {
  const int64_t panels = (a.out + kTileColumns - 1) / kTileColumns;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t part = 0; part < a.threads; ++part) {
    const int64_t end = panels * (part + 1) / a.threads;
    // Some panels at a time, so that rows and outputs are near when the next one needs them.
    for (int64_t some = panels * part / a.threads; some < end; some += kPanelsAtOnce) {
      const int64_t first = some * kTileColumns;
      const int64_t last = std::min(some + kPanelsAtOnce, end) * kTileColumns;
      for (int64_t row = 0; row < a.N; row += kTileRows)
        for (int64_t column = first; column < last; column += kTileColumns)
          multiply_rows<T>(a, row, column, std::make_integer_sequence<int, kTileRows>{});
    }
  }
}

}  // namespace reft
