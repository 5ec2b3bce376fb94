// Attention of one new token a sequence over its slot.
//
// Letters: N rows, B sequences, H query heads, KH key-value heads, G = H / KH, D head size.

#pragma once

#include <type_traits>
#include <vector>
#include "rows.hpp"

namespace reft {

constexpr int64_t kMostHeadSize = 256;
constexpr int kQueriesAtOnce = 4;  // query heads that read a key while it is in registers

// Asks for numbers that are about to be read, which the processor does not guess by itself where
// one head's end and the next one's begin. Any address will do.
template <typename T>
inline void fetch(const T* numbers, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(numbers + i);
}

// Softmax-weighted sum of n values, for Q queries that share them. `next` are the keys that will be
// read after this.
template <typename T, int Q, int Width>
inline void attend_some(const float* queries, const T* keys, const T* values, const T* next,
                        int64_t n, int64_t head_size, float* scores, T* out) {
  const int64_t D = Width ? Width : head_size;  // a constant where it is known
  for (int64_t l = 0; l < n; ++l) {
    const T* key = keys + l * D;
    fetch(values + l * D, D);
    float sums[Q] = {};
    for (int64_t i = 0; i < D; ++i) {
      const float k = load(key[i]);
      for (int q = 0; q < Q; ++q) sums[q] += queries[q * D + i] * k;
    }
    for (int q = 0; q < Q; ++q) scores[q * n + l] = sums[q];
  }
  float totals[Q];
  for (int q = 0; q < Q; ++q) {
    float* weights = scores + q * n;
    float largest = weights[0], total = 0;
    for (int64_t l = 1; l < n; ++l) largest = std::max(largest, weights[l]);
    for (int64_t l = 0; l < n; ++l) {
      weights[l] = exponential(weights[l] - largest);
      total += weights[l];
    }
    totals[q] = total;
  }
  float sums[Q][Width ? Width : kMostHeadSize] = {};
  for (int64_t l = 0; l < n; ++l) {
    const T* value = values + l * D;
    fetch(next + l * D, D);
    for (int64_t i = 0; i < D; ++i) {
      const float v = load(value[i]);
      for (int q = 0; q < Q; ++q) sums[q][i] += scores[q * n + l] * v;
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int64_t i = 0; i < D; ++i) store(sums[q][i] / totals[q], out + q * D + i);
}

struct DecodeArguments {
  const void* heads;       // (B, H + 2·KH, D): queries, keys, values, not yet turned
  const float *cosines, *sines;  // (B, D)
  void *keys, *values;     // (slots, KH, slot_len, D), slot b being sequence b's
  const int64_t* positions;  // (B,), of the new token
  void* out;               // (B, H, D)
  int64_t B, H, KH, D, slot_len;
  int64_t window;          // positions that a query sees, itself included; 0: all
  float scale;
  int32_t threads;
};

template <typename T, int Width>
void attend_decode(const DecodeArguments& a) {
  const int64_t D = a.D, G = a.H / a.KH;
#pragma omp parallel num_threads(a.threads)
  {
    std::vector<float> queries(G * D), scores(kQueriesAtOnce * a.slot_len);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.B * a.KH; ++item) {
      const int64_t b = item / a.KH, kh = item % a.KH, at = a.positions[b];
      const T* row = static_cast<const T*>(a.heads) + b * (a.H + 2 * a.KH) * D;
      const float *cosines = a.cosines + b * D, *sines = a.sines + b * D;
      T* keys = static_cast<T*>(a.keys) + item * a.slot_len * D;
      T* values = static_cast<T*>(a.values) + item * a.slot_len * D;
      rotate(row + (a.H + kh) * D, keys + at * D, cosines, sines, D, 1.0f);
      std::memcpy(values + at * D, row + (a.H + a.KH + kh) * D, D * sizeof(T));
      for (int64_t g = 0; g < G; ++g)
        rotate(row + (kh * G + g) * D, queries.data() + g * D, cosines, sines, D, a.scale);
      const int64_t first = a.window ? std::max<int64_t>(0, at + 1 - a.window) : 0;
      T* out = static_cast<T*>(a.out) + (b * a.H + kh * G) * D;
      for (int64_t g = 0; g < G; g += kQueriesAtOnce) {
        const auto attend = [&](auto count) {
          attend_some<T, decltype(count)::value, Width>(
              queries.data() + g * D, keys + first * D, values + first * D,
              keys + (a.slot_len + first) * D, at + 1 - first, D, scores.data(), out + g * D);
        };
        switch (std::min<int64_t>(G - g, kQueriesAtOnce)) {
          case 1: attend(std::integral_constant<int, 1>{}); break;
          case 2: attend(std::integral_constant<int, 2>{}); break;
          case 3: attend(std::integral_constant<int, 3>{}); break;
          default: attend(std::integral_constant<int, kQueriesAtOnce>{});
        }
      }
    }
  }
}

template <typename T>
void attend_decode_by_size(const DecodeArguments& arguments) {
  switch (arguments.D) {
    case 64: return attend_decode<T, 64>(arguments);
    case 128: return attend_decode<T, 128>(arguments);
    default: return attend_decode<T, 0>(arguments);
  }
}

}  // namespace reft
