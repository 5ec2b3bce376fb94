// What a forward of a Llama-like model does between its matrix products on a CPU, and the edits of
// its hidden states: the functions that Python calls, once for each type of number.
//
// Plain loops that a C++17 compiler turns into vector code for the machine at hand; no headers but
// the standard library's. A NaN or infinity comes out as one, so that the engine still sees which
// request made it.

#include "decode.hpp"
#include "edits.hpp"
#include "prefill.hpp"
#include "rows.hpp"

using namespace reft;

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
  extern "C" void rotate_heads_##NAME(T* heads, const float* cosines, const float* sines,       \
                                      int64_t N, int64_t turned, int64_t stride, int64_t D,     \
                                      int32_t threads) {                                        \
    rotate_heads(heads, cosines, sines, N, turned, stride, D, threads);                         \
  }                                                                                             \
  extern "C" void attend_decode_##NAME(const DecodeArguments* arguments) {                      \
    attend_decode_by_size<T>(*arguments);                                                       \
  }                                                                                             \
  extern "C" void attend_prefill_##NAME(const PrefillArguments* arguments) {                    \
    attend_prefill<T>(*arguments);                                                              \
  }                                                                                             \
  extern "C" void apply_edits_##NAME(T* hidden, int64_t d, const RowEdit* edits, int64_t count, \
                                     int32_t threads) {                                         \
    apply_edits(hidden, d, edits, count, threads);                                              \
  }
FOR_EACH_TYPE(DEFINE)
