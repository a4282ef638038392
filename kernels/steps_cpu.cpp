// Steps on a CPU in one pass over the pages: absorb, read, and where the norm is a head's own also norm, gate, project
// and add. What is computed is said in settled.py; recurrence/settled.py does the same in plain torch.
//
// Plain C++17 without intrinsics and without PyTorch's headers: steps_cpu.py compiles it for the CPU at hand in a few
// seconds and calls it through ctypes. Its threads are OpenMP's, of the library that PyTorch has loaded.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t G = 16;           // tokens between boundaries, GRANULARITY
constexpr int64_t TOKENS = 2 * G;   // pending and new ones of a step, at most
constexpr int64_t LARGEST = 256;    // head size
constexpr int64_t AHEAD = 16;       // columns: a page holds few, and the hardware's prefetcher starts anew on each
constexpr float L2_EPS = 1e-6f;     // as norm.py
constexpr float NORM_EPS = 1e-5f;   // as memory/spec.py

// Compilers of a few years ago have neither type.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return of_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float16 x) {  // the exponent's bias grows by 112, which makes subnormal numbers right too
  const uint32_t infinite = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  const float size = of_bits((static_cast<uint32_t>(x.bits & 0x7fff) << 13) | infinite) * (infinite ? 1.f : 0x1p112f);
  return x.bits & 0x8000 ? -size : size;
}

// To the nearest, ties to even.
template <class T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40)};
}
template <> inline float16 from_float<float16>(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) half = 0x7e00;
  else if (size >= 0x477ff000) half = 0x7c00;                                         // 65,520 rounds to infinity
  else if (size < 0x38800000) half = bits_of(of_bits(size) + 0.5f) - 0x3f000000;      // subnormal: steps of 2^-24
  else half = (size + 0xfff + ((size >> 13) & 1) - (112u << 23)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace

extern "C" {

// As steps_cpu.py's, field by field. Strides are in elements.
struct Arguments {
  // Query heads, KV heads, head size, requests that step, threads at most.
  int64_t heads, kv_heads, head_size, num_requests, num_threads;
  // The batch.
  const void* query;
  int64_t query_token, query_head;
  const int64_t *requests, *first_tokens, *lens, *computed, *first_reads;
  // Window pages: planes of keys (transposed within a block), values and gates, and which block a request's is.
  const void *keys, *values, *gates;
  int64_t window_block, window_head, block_size, num_gates;
  const int32_t* window_table;
  int64_t window_width;
  // State pages.
  void* columns;
  int64_t page, columns_per_page, num_pages, kept;
  const int32_t* state_table;
  int64_t state_width;
  // The rule.
  int64_t window, sinks, period, turns, inner;
  // The memory.
  int64_t delta, keeps_decay, decay_from_rate;
  const float* A_log;
  float scale;
  // What is read, [N, H, D] float32; or null, and it is added to the output as the rest says.
  float* o;
  void* output;
  int64_t output_token, output_head;
  const float* z;
  int64_t z_token;
  const void *norm, *projection;
  const float* router;  // [N, H], or null
};

}  // extern "C"

namespace {

struct Rule {
  const Arguments& a;
  int64_t boundary(int64_t n) const { return std::max(n, a.window + a.sinks) / G * G; }
  int64_t absorbed(int64_t n) const { return std::max(n - a.window, a.sinks); }
  int64_t slot(int64_t boundary) const {
    const int64_t index = boundary / G;
    return index % a.period == 0 ? index / a.period % a.turns : a.turns + index % a.inner;
  }
};

// Places of columns, which lie one after another over the pages of one slot.
template <class S> struct Columns {
  S* base;
  const int32_t* pages;
  int64_t page, per_page, size;

  Columns(const Arguments& a, int64_t request, int64_t slot)
      : base(static_cast<S*>(a.columns)),
        pages(a.state_table + request * a.state_width + slot * a.num_pages),
        page(a.page), per_page(a.columns_per_page), size(a.head_size) {}

  S* at(int64_t column) const { return base + pages[column / per_page] * page + column % per_page * size; }

  void list(int64_t first, int64_t count, S** to) const {
    int64_t which = first / per_page, within = first % per_page;
    for (int64_t i = 0; i < count; i++) {
      to[i] = base + pages[which] * page + within * size;
      if (++within == per_page) which++, within = 0;
    }
  }
};

template <int64_t FIXED> inline float dot(const float* x, const float* y, int64_t size) {
  const int64_t n = FIXED ? FIXED : size;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; d++) sum += x[d] * y[d];
  return sum;
}

template <int64_t FIXED> inline void normalise(float* x, int64_t size) {
  const int64_t n = FIXED ? FIXED : size;
  const float factor = 1.f / std::sqrt(dot<FIXED>(x, x, n) + L2_EPS);
#pragma omp simd
  for (int64_t d = 0; d < n; d++) x[d] *= factor;
}

template <int64_t FIXED> inline void add(float factor, const float* x, float* to, int64_t size) {
  const int64_t n = FIXED ? FIXED : size;
#pragma omp simd
  for (int64_t d = 0; d < n; d++) to[d] += factor * x[d];
}

// Norm, gate and projection of one head's `o`, added to the output: Memory.read_out, and rounded where that rounds.
template <class T, int64_t FIXED>
void read_out(const Arguments& a, int64_t token, int64_t read, int64_t head, const float* o) {
  const int64_t n = FIXED ? FIXED : a.head_size;
  const T* norm = static_cast<const T*>(a.norm);
  const T* projection = static_cast<const T*>(a.projection) + head * n * n;
  const float z = a.z[token * a.z_token + head];
  const float gate = z / (1.f + std::exp(-z)), rms = 1.f / std::sqrt(dot<FIXED>(o, o, n) / n + NORM_EPS);
  alignas(64) float y[LARGEST], m[LARGEST];
  for (int64_t d = 0; d < n; d++) {
    y[d] = to_float(from_float<T>(o[d] * rms * to_float(norm[d]) * gate));
    m[d] = 0;
  }
  for (int64_t i = 0; i < n; i++) {
    const T* row = projection + i * n;
    const float factor = y[i];
#pragma omp simd
    for (int64_t d = 0; d < n; d++) m[d] += factor * to_float(row[d]);
  }
  T* out = static_cast<T*>(a.output) + token * a.output_token + head * a.output_head;
  // A router's weight is rounded too, and so is its product.
  const float weight = a.router ? to_float(from_float<T>(a.router[read * a.heads + head])) : 1.f;
  for (int64_t d = 0; d < n; d++) {
    float added = to_float(from_float<T>(m[d]));
    if (a.router) added = to_float(from_float<T>(added * weight));
    out[d] = from_float<T>(to_float(out[d]) + added);
  }
}

// The pending and new tokens of a request, of one KV head.
struct Tokens {
  alignas(64) float keys[TOKENS][LARGEST], values[TOKENS][LARGEST];
  const void* gates[TOKENS];

  template <class T, int64_t FIXED>
  void read(const Arguments& a, int64_t request, int64_t kv_head, int64_t first, int64_t count, int64_t values_from) {
    const int64_t n = FIXED ? FIXED : a.head_size;
    for (int64_t t = 0; t < count;) {  // as many at once as lie in one block
      const int64_t offset = (first + t) % a.block_size, here = std::min(count - t, a.block_size - offset);
      const int64_t block = a.window_table[request * a.window_width + (first + t) / a.block_size];
      const int64_t place = block * a.window_block + kv_head * a.window_head;
      const T* key = static_cast<const T*>(a.keys) + place + offset;
      for (int64_t d = 0; d < n; d++, key += a.block_size)
        for (int64_t i = 0; i < here; i++) keys[t + i][d] = to_float(key[i]);
      const T* value = static_cast<const T*>(a.values) + place + offset * n;
      const T* gate = static_cast<const T*>(a.gates) + place + offset * a.num_gates;
      for (int64_t i = 0; i < here; i++) {
        gates[t + i] = gate + i * a.num_gates;
        if (t + i >= values_from)
          for (int64_t d = 0; d < n; d++) values[t + i][d] = to_float(value[i * n + d]);
      }
      t += here;
    }
    for (int64_t t = 0; t < count; t++) normalise<FIXED>(keys[t], n);
  }
};

// All of a step's work for some query heads of one KV head of one request.
template <class T, class S, int64_t FIXED>
void step(const Arguments& a, int64_t index, int64_t kv_head, int64_t first_head, int64_t last_head, Tokens& tokens) {
  const Rule rule{a};
  const int64_t n = FIXED ? FIXED : a.head_size, group = a.heads / a.kv_heads;
  const int64_t request = a.requests[index], num_new = a.lens[index], computed = a.computed[index];
  const int64_t source = rule.boundary(computed), target = rule.boundary(computed + num_new);
  const int64_t first = rule.absorbed(source), pending = computed - a.window - first, count = pending + num_new;
  const int64_t settled = rule.absorbed(target) - first;  // tokens that the next boundary's state takes in
  const bool fresh = first == a.sinks, crosses = target > source;
  const Columns<S> from(a, request, rule.slot(source)), to(a, request, rule.slot(target));
  tokens.read<T, FIXED>(a, request, kv_head, first, count, a.delta ? pending : 0);

  alignas(64) float u[TOKENS][LARGEST], query[G][LARGEST], o[LARGEST];
  alignas(64) float seen_key[G][LARGEST], seen_query[G][LARGEST];
  float g[TOKENS], b[TOKENS], weights[TOKENS];
  S* columns[LARGEST + AHEAD];
  float overlap[G][TOKENS];  // k_t . k of new tokens, the same for all heads
  if (a.delta)
    for (int64_t i = 0; i < num_new; i++)
      for (int64_t t = 0; t < pending + i; t++) overlap[i][t] = dot<FIXED>(tokens.keys[t], tokens.keys[pending + i], n);
  const int64_t gates_per_head = a.num_gates / group;

  for (int64_t head = first_head; head < last_head; head++) {
    const float factor = a.decay_from_rate ? -std::exp(a.A_log[head]) : 0.f;
    for (int64_t t = 0; t < count; t++) {
      const T* gate = static_cast<const T*>(tokens.gates[t]) + head % group * gates_per_head;
      b[t] = to_float(gate[gates_per_head - 1]);
      g[t] = a.keeps_decay ? to_float(gate[0]) : factor * b[t];
    }
    for (int64_t i = 0; i < num_new; i++) {
      const T* q = static_cast<const T*>(a.query) + (a.first_tokens[index] + i) * a.query_token + head * a.query_head;
      for (int64_t d = 0; d < n; d++) query[i][d] = to_float(q[d]);
      normalise<FIXED>(query[i], n);
    }

    // What keys and queries see of the settled state, which is read once.
    const int64_t listed = std::min(n + AHEAD, a.heads * (n + a.kept) - head * n);
    from.list(head * n, listed, columns);
    std::fill(columns + listed, columns + n + AHEAD, columns[listed - 1]);
    const int64_t rows = a.heads * n + head * a.kept;
    for (int64_t t = 0; t < pending && a.delta; t++) {
      const S* row = from.at(rows + t);
      for (int64_t d = 0; d < n; d += 64 / sizeof(S)) __builtin_prefetch(row + d);
    }
    if (fresh) {
      for (int64_t i = 0; i < num_new; i++)
        std::fill(seen_key[i], seen_key[i] + n, 0.f), std::fill(seen_query[i], seen_query[i] + n, 0.f);
    } else {
      // Four columns at a time: their sums do not wait for each other.
      for (int64_t j = 0; j < n; j += 4) {
        for (int64_t c = 0; c < 4; c++)
          for (int64_t d = 0; d < n; d += 64 / sizeof(S)) __builtin_prefetch(columns[j + c + AHEAD] + d);
        const S *x0 = columns[j], *x1 = columns[j + 1], *x2 = columns[j + 2], *x3 = columns[j + 3];
        for (int64_t i = 0; i < num_new; i++) {
          const float *key = tokens.keys[pending + i], *q = query[i];
          float k0 = 0, k1 = 0, k2 = 0, k3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
#pragma omp simd reduction(+ : k0, k1, k2, k3, q0, q1, q2, q3)
          for (int64_t d = 0; d < n; d++) {
            const float y0 = to_float(x0[d]), y1 = to_float(x1[d]), y2 = to_float(x2[d]), y3 = to_float(x3[d]);
            k0 += y0 * key[d], k1 += y1 * key[d], k2 += y2 * key[d], k3 += y3 * key[d];
            q0 += y0 * q[d], q1 += y1 * q[d], q2 += y2 * q[d], q3 += y3 * q[d];
          }
          float *by_key = seen_key[i] + j, *by_query = seen_query[i] + j;
          by_key[0] = k0, by_key[1] = k1, by_key[2] = k2, by_key[3] = k3;
          by_query[0] = q0, by_query[1] = q1, by_query[2] = q2, by_query[3] = q3;
        }
      }
    }

    // Updates of the pending tokens.
    for (int64_t t = 0; t < pending; t++) {
      if (a.delta) {
        const S* row = from.at(rows + t);
        for (int64_t d = 0; d < n; d++) u[t][d] = to_float(row[d]);
      } else {
        for (int64_t d = 0; d < n; d++) u[t][d] = b[t] * tokens.values[t][d];
      }
    }

    for (int64_t i = 0; i < num_new; i++) {
      const int64_t now = pending + i;
      // What is left of each token. Sums grow from the newest on, so that a large decay spoils none behind it.
      float sum = 0;
      for (int64_t t = now; t >= 0; t--) weights[t] = std::exp(sum), sum += g[t];
      const float of_state = std::exp(sum);
      float* update = u[now];
      const float* value = tokens.values[now];
      if (a.delta) {
        alignas(64) float seen[LARGEST];
        for (int64_t d = 0; d < n; d++) seen[d] = of_state * seen_key[i][d];
        for (int64_t t = 0; t < now; t++) add<FIXED>(weights[t] * overlap[i][t], u[t], seen, n);
        for (int64_t d = 0; d < n; d++) update[d] = b[now] * (value[d] - seen[d]);
      } else {
        for (int64_t d = 0; d < n; d++) update[d] = b[now] * value[d];
      }
      for (int64_t d = 0; d < n; d++) o[d] = of_state * seen_query[i][d];
      for (int64_t t = 0; t <= now; t++)
        add<FIXED>(weights[t] * dot<FIXED>(tokens.keys[t], query[i], n), u[t], o, n);
      for (int64_t d = 0; d < n; d++) o[d] *= a.scale;
      const int64_t read = a.first_reads[index] + i;
      if (a.o) std::memcpy(a.o + (read * a.heads + head) * n, o, n * sizeof(float));
      else read_out<T, FIXED>(a, a.first_tokens[index] + i, read, head, o);
    }

    if (a.delta) {
      for (int64_t t = pending; t < count; t++) {
        S* row;
        if (t >= settled) row = to.at(rows + t - settled);
        // Behind a boundary that is crossed these count for a step that is taken back, if that boundary is left at all.
        else if (!crosses || from.pages != to.pages) row = from.at(rows + t);
        else continue;
        for (int64_t d = 0; d < n; d++) row[d] = from_float<S>(u[t][d]);
      }
    }
    if (!crosses) continue;

    // Settle: M <- exp(G) M + sum of w k u^T, column by column.
    float sum = 0;
    for (int64_t t = settled - 1; t >= 0; t--) weights[t] = std::exp(sum), sum += g[t];
    const float of_state = std::exp(sum);
    S* written[LARGEST];
    to.list(head * n, n, written);
    for (int64_t j = 0; j < n; j++) {
      alignas(64) float x[LARGEST];
      const S* column = columns[j];
      for (int64_t d = 0; d < n; d++) x[d] = fresh ? 0.f : of_state * to_float(column[d]);
      for (int64_t t = 0; t < settled; t++) add<FIXED>(weights[t] * u[t][j], tokens.keys[t], x, n);
      for (int64_t d = 0; d < n; d++) written[j][d] = from_float<S>(x[d]);
    }
  }
}

template <class T, class S, int64_t FIXED> void steps(const Arguments& a) {
  // A KV head's tokens are read once for its query heads, unless that leaves threads idle.
  const int64_t group = a.heads / a.kv_heads, units = a.num_requests * a.kv_heads;
  const int64_t parts = std::min(group, (a.num_threads + units - 1) / units);
#pragma omp parallel num_threads(static_cast<int>(std::min(a.num_threads, units * parts)))
  {
    std::vector<Tokens> tokens(1);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units * parts; unit++) {
      const int64_t part = unit % parts, kv_head = unit / parts % a.kv_heads, index = unit / parts / a.kv_heads;
      const int64_t first = kv_head * group;
      step<T, S, FIXED>(a, index, kv_head, first + part * group / parts, first + (part + 1) * group / parts, tokens[0]);
    }
  }
}

template <class T, class S> void steps(const Arguments& a) {
  switch (a.head_size) {
    case 64: return steps<T, S, 64>(a);
    case 128: return steps<T, S, 128>(a);
    default: return steps<T, S, 0>(a);
  }
}

}  // namespace

extern "C" {

#define ENTRY(NAME, T, S) void NAME(const Arguments* a) { steps<T, S>(*a); }
ENTRY(float32_float32, float, float)
ENTRY(float32_bfloat16, float, bfloat16)
ENTRY(bfloat16_float32, bfloat16, float)
ENTRY(bfloat16_bfloat16, bfloat16, bfloat16)
ENTRY(float16_float32, float16, float)
ENTRY(float16_bfloat16, float16, bfloat16)

int64_t size_of_arguments() { return sizeof(Arguments); }

}  // extern "C"
