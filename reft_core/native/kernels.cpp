// What a forward of a Llama-like model does between its matrix products, on a CPU, and the edits of
// its hidden states.
//
// Plain loops that a C++17 compiler turns into vector code for the machine at hand; no headers
// but the standard library's. Numbers are stored as float32 or bfloat16 and computed in float32.
// A NaN or infinity comes out as one, so that the engine still sees which request made it.
//
// Letters: N rows, B sequences, H query heads, KH key-value heads, G = H / KH, D head size.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kLeastParallel = 16384;  // numbers for which waking other threads pays
constexpr int64_t kMostHeadSize = 256;
constexpr int kQueriesAtOnce = 4;  // query heads that read a key while it is in registers

struct bfloat16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, bfloat16* to) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  const uint32_t rounded = wide + 0x7fff + ((wide >> 16) & 1);  // to nearest, ties to even
  to->bits = value != value ? 0x7fc0 : uint16_t(rounded >> 16);
}

// e^x as 2^whole · 2^rest, the latter by a polynomial (minimax on [0, 1), error 2e-7). For x <= 0
// or moderate; below -87 it stays at about 1e-38. Branch-free, so that loops over it vectorise.
inline float exponential(float x) {
  const float scaled = std::min(std::max(x, -87.0f), 88.0f) * 1.44269504f;
  const float whole = __builtin_floorf(scaled), rest = scaled - whole;
  float power = 1.8775767e-3f;
  power = power * rest + 8.9893397e-3f;
  power = power * rest + 5.5826318e-2f;
  power = power * rest + 2.4015361e-1f;
  power = power * rest + 6.9315308e-1f;
  power = power * rest + 9.9999994e-1f;
  const int32_t exponent = (int32_t(whole) + 127) * (1 << 23);
  float factor;
  std::memcpy(&factor, &exponent, sizeof factor);
  return x == x ? power * factor : x;
}

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

template <typename T>
void rotate_heads(T* heads, const float* cosines, const float* sines, int64_t N, int64_t turned,
                  int64_t stride, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) if (N * turned * D >= kLeastParallel)
  for (int64_t row = 0; row < N; ++row)
    for (int64_t head = 0; head < turned; ++head) {
      T* at = heads + row * stride + head * D;
      rotate(at, at, cosines + row * D, sines + row * D, D, 1.0f);
    }
}

// Softmax-weighted sum of n values, for Q queries that share them.
template <typename T, int Q, int Width>
inline void attend_some(const float* queries, const T* keys, const T* values, int64_t n,
                        int64_t head_size, float* scores, T* out) {
  const int64_t D = Width ? Width : head_size;  // a constant where it is known
  for (int64_t l = 0; l < n; ++l) {
    const T* key = keys + l * D;
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
              queries.data() + g * D, keys + first * D, values + first * D, at + 1 - first, D,
              scores.data(), out + g * D);
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

// Prefill attention works on tiles: kTileRows queries against kTileKeys keys, whose products stay in
// registers. All queries that share a key head are rows of one matrix.
#ifdef __AVX512F__
constexpr int kLanes = 16, kTileRows = 8;
#else
constexpr int kLanes = 8, kTileRows = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
constexpr int kTileVectors = 2;
constexpr int64_t kTileColumns = kLanes * kTileVectors;
constexpr int64_t kTileKeys = 64;
constexpr int64_t kQueriesAtATime = 128;  // positions of one task; its keys are packed once
constexpr float kMasked = -1e30f;

// sums (kTileRows, kTileColumns) = rows (kTileRows, count)·columns (count, kTileColumns).
inline void multiply_tile(const float* rows, int64_t row_stride, const float* columns,
                          int64_t column_stride, int64_t count,
                          Lanes (&sums)[kTileRows][kTileVectors]) {
  for (int row = 0; row < kTileRows; ++row)
    for (int v = 0; v < kTileVectors; ++v) sums[row][v] = Lanes{};
  for (int64_t i = 0; i < count; ++i) {
    Lanes column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v)
      column[v] = *reinterpret_cast<const Lanes*>(columns + i * column_stride + v * kLanes);
    for (int row = 0; row < kTileRows; ++row)
      for (int v = 0; v < kTileVectors; ++v)
        sums[row][v] += rows[row * row_stride + i] * column[v];
  }
}

// Rows first..last-1 of a packed prefill: a slot's tokens from first_position on.
struct Segment {
  int64_t first, last, slot, first_position;
};

struct PrefillArguments {
  void* heads;                   // (N, H + 2·KH, D): queries, keys, values, not yet turned
  const float *cosines, *sines;  // (N, D)
  void *keys, *values;           // (slots, KH, slot_len, D)
  const Segment* segments;
  void* out;                     // (N, H, D)
  int64_t num_segments, H, KH, D, slot_len;
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

// Memory of one thread, for queries of one task.
struct Scratch {
  int64_t rows, columns;  // queries, and D padded to whole tiles
  std::vector<float> queries, keys, values, weights, sums, largest, totals;

  Scratch(int64_t num_rows, int64_t D)
      : rows((num_rows + kTileRows - 1) / kTileRows * kTileRows),
        columns((D + kTileColumns - 1) / kTileColumns * kTileColumns),
        queries(rows * D), keys(D * kTileKeys), values(kTileKeys * columns),
        weights(kTileRows * kTileKeys), sums(rows * columns), largest(rows), totals(rows) {}
};

// Attention of positions first..last-1 of a segment, for the queries of one key head. Softmax is
// taken block by block of keys, with a running maximum (Milakov and Gimelshein 2018).
template <typename T>
void attend_task(const PrefillArguments& a, const Segment& segment, int64_t kh, int64_t first,
                 int64_t last, Scratch& s) {
  const int64_t D = a.D, G = a.H / a.KH, width = (a.H + 2 * a.KH) * D, columns = s.columns;
  const int64_t num_rows = (last - first) * G;
  const int64_t tiled_rows = (num_rows + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t offset = (segment.slot * a.KH + kh) * a.slot_len * D;
  const T *keys = static_cast<const T*>(a.keys) + offset;
  const T *values = static_cast<const T*>(a.values) + offset;
  const auto row_of = [&](int64_t position) {
    return segment.first + position - segment.first_position;
  };
  std::fill(s.queries.begin(), s.queries.end(), 0.0f);
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t row = row_of(first + i / G), head = kh * G + i % G;
    rotate(static_cast<const T*>(a.heads) + row * width + head * D, s.queries.data() + i * D,
           a.cosines + row * D, a.sines + row * D, D, a.scale);
  }
  std::fill(s.sums.begin(), s.sums.end(), 0.0f);
  std::fill(s.totals.begin(), s.totals.end(), 0.0f);
  std::fill(s.largest.begin(), s.largest.end(), kMasked);
  const int64_t earliest = a.window ? std::max<int64_t>(0, first + 1 - a.window) : 0;
  for (int64_t begin = earliest / kTileKeys * kTileKeys; begin < last; begin += kTileKeys) {
    const int64_t count = std::min(kTileKeys, last - begin);
    for (int64_t l = 0; l < kTileKeys; ++l)
      for (int64_t i = 0; i < D; ++i) {
        const bool there = l < count;
        s.keys[i * kTileKeys + l] = there ? load(keys[(begin + l) * D + i]) : 0.0f;
        s.values[l * columns + i] = there ? load(values[(begin + l) * D + i]) : 0.0f;
      }
    for (int64_t tile = 0; tile < tiled_rows; tile += kTileRows) {
      const int64_t newest = first + std::min(tile + kTileRows, num_rows) / G;
      if (newest < begin) continue;  // the causal mask hides the whole block
      Lanes sums[kTileRows][kTileVectors];
      for (int64_t column = 0; column < kTileKeys; column += kTileColumns) {
        multiply_tile(s.queries.data() + tile * D, D, s.keys.data() + column, kTileKeys, D, sums);
        for (int row = 0; row < kTileRows; ++row)
          std::memcpy(s.weights.data() + row * kTileKeys + column, sums[row], sizeof sums[row]);
      }
      for (int row = 0; row < kTileRows; ++row) {
        float* weights = s.weights.data() + row * kTileKeys;
        const int64_t position = first + (tile + row) / G;
        const int64_t from = a.window ? std::max<int64_t>(0, position + 1 - a.window - begin) : 0;
        const int64_t to = std::min(count, position + 1 - begin);  // visible: from..to-1
        float largest = s.largest[tile + row];
        for (int64_t l = from; l < to; ++l) largest = std::max(largest, weights[l]);
        const float shrink = exponential(s.largest[tile + row] - largest);
        float total = 0;
        for (int64_t l = 0; l < kTileKeys; ++l) {
          const float weight = exponential(weights[l] - largest);
          weights[l] = l >= from && l < to ? weight : 0.0f;
          total += weights[l];
        }
        s.totals[tile + row] = s.totals[tile + row] * shrink + total;
        s.largest[tile + row] = largest;
        float* out = s.sums.data() + (tile + row) * columns;
        for (int64_t i = 0; i < columns; ++i) out[i] *= shrink;
      }
      for (int64_t column = 0; column < columns; column += kTileColumns) {
        multiply_tile(s.weights.data(), kTileKeys, s.values.data() + column, columns, count, sums);
        for (int row = 0; row < kTileRows; ++row)
          for (int v = 0; v < kTileVectors; ++v)
            *reinterpret_cast<Lanes*>(s.sums.data() + (tile + row) * columns + column +
                                      v * kLanes) += sums[row][v];
      }
    }
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    T* out = static_cast<T*>(a.out) + (row_of(first + i / G) * a.H + kh * G + i % G) * D;
    for (int64_t k = 0; k < D; ++k) store(s.sums[i * columns + k] / s.totals[i], out + k);
  }
}

template <typename T>
void attend_prefill(const PrefillArguments& a) {
  struct Task {
    int64_t segment, kh, first, last;
  };
  std::vector<Task> tasks;
  for (int64_t at = 0; at < a.num_segments; ++at) {
    const Segment& segment = a.segments[at];
    const int64_t end = segment.first_position + segment.last - segment.first;
    for (int64_t kh = 0; kh < a.KH; ++kh)
      for (int64_t first = segment.first_position; first < end; first += kQueriesAtATime)
        tasks.push_back({at, kh, first, std::min(first + kQueriesAtATime, end)});
  }
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.num_segments * a.KH; ++i)
      store_keys<T>(a, a.segments[i / a.KH], i % a.KH);
    Scratch scratch(kQueriesAtATime * (a.H / a.KH), a.D);
#pragma omp for schedule(dynamic)
    for (int64_t i = int64_t(tasks.size()) - 1; i >= 0; --i)  // the longest first
      attend_task<T>(a, a.segments[tasks[i].segment], tasks[i].kh, tasks[i].first, tasks[i].last,
                     scratch);
  }
}

// One low-rank edit and the rows it changes: h += strength · ((h·down + bias)·up + shift + gain ∘ h).
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
      delta[row * d + i] = (edit.shift ? edit.shift[i] : 0.0f) + (edit.gain ? edit.gain[i] * h : 0.0f);
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

}  // namespace

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
