// The forward of Llama-like models on a CPU, in parts and by whole layers, and the edits of its
// hidden states: the functions that Python calls, once for each type of number.
//
// Plain loops that a C++17 compiler turns into vector code for the machine at hand; no headers but
// the standard library's. A NaN or infinity comes out as one, so that the engine still sees which
// request made it.

#include "decode.hpp"
#include "edits.hpp"
#include "layers.hpp"

using namespace reft;

// Outputs of a linear map rounded up to whole panels.
extern "C" int64_t padded_outputs(int64_t out) {
  return (out + kTileColumns - 1) / kTileColumns * kTileColumns;
}

// Whether the machine multiplies whole matrices of bfloat16 by an instruction, which these loops do
// not use.
extern "C" int32_t has_matrix_instructions() {
#ifdef __AMX_BF16__
  return 1;
#else
  return 0;
#endif
}

#define FOR_EACH_TYPE(DEFINE) DEFINE(float, float32) DEFINE(bfloat16, bfloat16)

#define DEFINE(T, NAME)                                                                         \
  extern "C" void rms_norm_##NAME(const T* x, const T* weight, T* out, int64_t N, int64_t d,    \
                                  float eps, int32_t threads) {                                 \
    rms_norm(x, weight, out, N, d, eps, threads);                                               \
  }                                                                                             \
  extern "C" void silu_mul_##NAME(const T* gate_up, T* out, int64_t N, int64_t width,           \
                                  int32_t threads) {                                            \
    silu_mul(gate_up, out, N, width, threads);                                                  \
  }                                                                                             \
  extern "C" void attend_decode_##NAME(const DecodeArguments* arguments) {                      \
    attend_decode_by_size<T>(*arguments);                                                       \
  }                                                                                             \
  extern "C" void attend_prefill_##NAME(const PrefillArguments* arguments) {                    \
    attend_prefill<T>(*arguments);                                                              \
  }                                                                                             \
  extern "C" void pack_weight_##NAME(const T* weight, int64_t out, int64_t in, T* packed,       \
                                     int32_t threads) {                                         \
    pack_weight(weight, out, in, packed, threads);                                              \
  }                                                                                             \
  extern "C" void multiply_##NAME(const ProductArguments* arguments) {                          \
    multiply<T>(*arguments);                                                                    \
  }                                                                                             \
  extern "C" void run_layers_##NAME(const LayerWeights* layers, int64_t first, int64_t last,    \
                                    const LayersArguments* arguments) {                         \
    run_layers<T>(layers, first, last, *arguments);                                             \
  }                                                                                             \
  extern "C" void apply_edits_##NAME(T* hidden, int64_t d, const RowEdit* edits, int64_t count, \
                                     int32_t threads) {                                         \
    apply_edits(hidden, d, edits, count, threads);                                              \
  }
FOR_EACH_TYPE(DEFINE)
