// Whole layers of Llama-like models, as the fused forward runs them where no edit is inside.
//
// Letters: N rows, d model width, H query heads, KH key-value heads, D head size, W the MLP's width.

#pragma once

#include "decode.hpp"
#include "prefill.hpp"
#include "products.hpp"

namespace reft {

struct LinearWeights {
  const void *packed, *bias;  // see ProductArguments
};

struct LayerWeights {
  const void *attention_norm, *mlp_norm;  // (d,)
  const void *query_norm, *key_norm;      // (D,), or null: heads are not normed
  LinearWeights qkv, out, gate_up, down;  // (d, (H + 2·KH)·D), (H·D, d), (d, 2·W), (W, d)
  int64_t window;                         // positions that a query sees, itself included; 0: all
  float scale, attention_eps, mlp_eps, query_eps, key_eps;
};

struct LayersArguments {
  void* hidden;                      // (N, d), changed in place
  const float *cosines, *sines;      // (N, D)
  void *const *keys, *const *values; // each layer's (slots, KH, slot_len, D)
  const int64_t* positions;          // (N,) for a decode, slot n being row n's; else null
  const Segment* segments;           // of a prefill
  const Copied* copies;
  const int64_t* rows;               // (num_rows,), ascending: those that the last layer goes on
                                     // with, once keys and values are stored; null: all
  void* scratch;                     // N · (d + max((2·H + 2·KH)·D, 3·W)) numbers
  int64_t num_segments, num_copies, num_rows, N, d, W, H, KH, D, slot_len;
  int32_t threads;
};

template <typename T>
void attend(const LayersArguments& a, const LayerWeights& weights, int64_t layer, void* heads,
            void* out) {
  if (a.positions)
    attend_decode_by_size<T>({heads, a.cosines, a.sines, a.keys[layer], a.values[layer],
                              a.positions, out, a.N, a.H, a.KH, a.D, a.slot_len, weights.window,
                              weights.scale, a.threads});
  else
    attend_prefill<T>({heads, a.cosines, a.sines, a.keys[layer], a.values[layer], a.segments,
                       a.copies, out, a.num_segments, a.num_copies, a.H, a.KH, a.D, a.slot_len,
                       weights.window, weights.scale, a.threads});
}

// Moves some rows, ascending, to the front.
template <typename T>
void keep_rows(T* x, int64_t width, const int64_t* rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (rows[i] != i) std::memcpy(x + i * width, x + rows[i] * width, width * sizeof(T));
}

// Layers first..last-1.
template <typename T>
void run_layers(const LayerWeights* layers, int64_t first, int64_t last, const LayersArguments& a) {
  T *hidden = static_cast<T*>(a.hidden), *normed = static_cast<T*>(a.scratch);
  T* const rest = normed + a.N * a.d;
  T *const heads = rest, *const attended = heads + a.N * (a.H + 2 * a.KH) * a.D;
  T *const gate_up = rest, *const activated = gate_up + a.N * 2 * a.W;
  int64_t N = a.N;
  const auto times = [&](const T* x, int64_t in, const LinearWeights& linear, int64_t out,
                         const T* other, T* to) {
    multiply<T>({x, linear.packed, linear.bias, other, to, N, in, out, a.threads});
  };
  for (int64_t layer = first; layer < last; ++layer) {
    const LayerWeights& w = layers[layer];
    rms_norm(hidden, static_cast<const T*>(w.attention_norm), normed, a.N, a.d, w.attention_eps,
             a.threads);
    times(normed, a.d, w.qkv, (a.H + 2 * a.KH) * a.D, nullptr, heads);
    if (w.query_norm)
      for (int64_t n = 0; n < a.N; ++n) {
        T *queries = heads + n * (a.H + 2 * a.KH) * a.D, *keys = queries + a.H * a.D;
        rms_norm(queries, static_cast<const T*>(w.query_norm), queries, a.H, a.D, w.query_eps, 1);
        rms_norm(keys, static_cast<const T*>(w.key_norm), keys, a.KH, a.D, w.key_eps, 1);
      }
    attend<T>(a, w, layer, heads, attended);
    if (a.rows && layer == last - 1) {
      N = a.num_rows;
      keep_rows(hidden, a.d, a.rows, N);
      keep_rows(attended, a.H * a.D, a.rows, N);
    }
    times(attended, a.H * a.D, w.out, a.d, hidden, hidden);
    rms_norm(hidden, static_cast<const T*>(w.mlp_norm), normed, N, a.d, w.mlp_eps, a.threads);
    times(normed, a.d, w.gate_up, 2 * a.W, nullptr, gate_up);
    silu_mul(gate_up, activated, N, a.W, a.threads);
    times(activated, a.W, w.down, a.d, hidden, hidden);
  }
}

}  // namespace reft
