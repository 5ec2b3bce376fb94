// What happens to each row of hidden states or heads by itself.

#pragma once

#include "numbers.hpp"

namespace reft {

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t N, int64_t d, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (N * d >= kLeastParallel)
  for (int64_t row = 0; row < N; ++row) {
    const T* from = x + row * d;
    T* to = out + row * d;
    float squares = 0;
    for (int64_t i = 0; i < d; ++i) squares += load(from[i]) * load(from[i]);
    const float factor = 1.0f / __builtin_sqrtf(squares / float(d) + eps);
    for (int64_t i = 0; i < d; ++i) store(load(from[i]) * factor * load(weight[i]), to + i);
  }
}

template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t N, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (N * width >= kLeastParallel)
  for (int64_t row = 0; row < N; ++row) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    T* to = out + row * width;
    for (int64_t i = 0; i < width; ++i) {
      const float g = load(gate[i]);
      store(g / (1.0f + exponential(-g)) * load(up[i]), to + i);
    }
  }
}

// One head (D) turned by its position's angles; `from` and `to` may be the same.
template <typename T, typename U>
inline void rotate(const T* from, U* to, const float* cosines, const float* sines, int64_t D,
                   float scale) {
  const int64_t half = D / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float left = load(from[i]), right = load(from[i + half]);
    store((left * cosines[i] - right * sines[i]) * scale, to + i);
    store((right * cosines[i + half] + left * sines[i + half]) * scale, to + i + half);
  }
}

}  // namespace reft
