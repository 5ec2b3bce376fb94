// Products of small tiles of matrices, whose sums stay in registers.

#pragma once

#include "numbers.hpp"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace reft {

#ifdef __AVX512F__
constexpr int kLanes = 16, kTileRows = 8;
#else
constexpr int kLanes = 8, kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kLanes * kTileVectors;
typedef float Lanes
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(2), may_alias));
typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));

// Numbers of one column that lie side by side, since one instruction multiplies them: two of
// bfloat16. A matrix is laid out for tiles as (count / kDepth, columns, kDepth).
template <typename T>
constexpr int kDepth = sizeof(float) / sizeof(T);

// The kDepth numbers of a row, once for every lane.
template <typename T>
inline Lanes spread(const T* numbers) {
  int32_t bits;
  std::memcpy(&bits, numbers, sizeof bits);
  return Lanes(Bits{} + bits);
}

inline void add_product(Lanes row, Lanes column, Lanes& sum, float) { sum += row * column; }

inline void add_product(Lanes row, Lanes column, Lanes& sum, bfloat16) {
#ifdef __AVX512BF16__
  sum = Lanes(_mm512_dpbf16_ps(__m512(sum), __m512bh(row), __m512bh(column)));
#else
  const Bits high = Bits{} + int32_t(0xffff0000);
  sum += Lanes(Bits(row) << 16) * Lanes(Bits(column) << 16);
  sum += Lanes(Bits(row) & high) * Lanes(Bits(column) & high);
#endif
}

// sums (Rows, kTileColumns) = rows (Rows, count)·columns (count / kDepth, column_stride, kDepth).
template <int Rows, typename T>
inline void multiply_tile(const T* rows, int64_t row_stride, const T* columns,
                          int64_t column_stride, int64_t count,
                          Lanes (&sums)[Rows][kTileVectors]) {
  static_assert(kTileVectors == 2);
  Lanes left[Rows] = {}, right[Rows] = {};  // what compilers keep in registers; not so `sums`
  for (int64_t i = 0; i < count; i += kDepth<T>) {
    const Lanes* column = reinterpret_cast<const Lanes*>(columns + i * column_stride);
    const Lanes first = column[0], second = column[1];
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Lanes number = spread(rows + row * row_stride + i);
      add_product(number, first, left[row], T{});
      add_product(number, second, right[row], T{});
    }
  }
  for (int row = 0; row < Rows; ++row) sums[row][0] = left[row], sums[row][1] = right[row];
}

}  // namespace reft
