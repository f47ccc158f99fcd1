// What XLA's own code for CPUs does slowly: products of few bfloat16 rows, and attention of few
// queries over pages. Shapes and meanings stand in cpu.py, which builds and calls this.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct bf16 {
  uint16_t bits;
};
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));
template <class T>
struct Vector;
template <>
struct Vector<float> {
  using type = Floats;
};
template <>
struct Vector<bf16> {
  using type = Halves;
};
template <>
struct Vector<int8_t> {
  using type = Bytes;
};
constexpr int64_t kLanes = 16;
// Rows and outputs whose sums are held in registers at a time, kTile squared.
#ifdef __AVX512F__
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif
// Outputs ahead of those at work whose weights are fetched meanwhile.
constexpr int64_t kAhead = 16;
constexpr float kMasked = -1e30f;

Floats widen(Floats x) { return x; }
Floats widen(Halves x) { return (Floats)(__builtin_convertvector(x, Ints) << 16); }
Floats widen(Bytes x) { return __builtin_convertvector(x, Floats); }

// Copies `count` numbers, mostly kLanes: then in one go.
inline void copy(void* to, const void* from, int64_t count, int64_t bytes) {
  if (count == kLanes)
    std::memcpy(to, from, kLanes * bytes);
  else
    std::memcpy(to, from, count * bytes);
}

// The first `count` of kLanes numbers, zeros behind them.
template <class T>
Floats load(const T* x, int64_t count = kLanes) {
  typename Vector<T>::type found = {};
  copy(&found, x, count, sizeof *x);
  return widen(found);
}

void put(Floats x, float* to, int64_t count) { copy(to, &x, count, sizeof *to); }
void put(Floats x, bf16* to, int64_t count) {
  Ints bits = (Ints)x;
  // To the nearest, to even; of what is not a number, rounding could carry into the sign.
  Ints near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, none = Ints{} + 0x7fc0;
  Halves found = __builtin_convertvector(x == x ? near : none, Halves);
  copy(to, &found, count, sizeof *to);
}

// Adds the products of 2 * kLanes pairs to sums of each lane.
template <class T>
void multiply(const T* x, const T* w, Floats& sums) {
  sums += load(x) * load(w);
  sums += load(x + kLanes) * load(w + kLanes);
}

#ifdef __AVX512BF16__
void multiply(const bf16* x, const bf16* w, Floats& sums) {
  auto pairs = [](const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); };
  sums = (Floats)_mm512_dpbf16_ps((__m512)sums, pairs(x), pairs(w));
}
#endif

// In lane i the sum over all lanes of the i-th of 16.
inline __attribute__((always_inline)) Floats total(const Floats (&each)[16]) {
#ifdef __AVX512F__
  __m512 four[4];
  for (int i = 0; i < 4; i++) {
    __m512 a = (__m512)each[4 * i], b = (__m512)each[4 * i + 1];
    __m512 c = (__m512)each[4 * i + 2], d = (__m512)each[4 * i + 3];
    __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    four[i] = (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
  }
  auto halved = [](__m512 a, __m512 b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  return (Floats)halved(halved(four[0], four[1]), halved(four[2], four[3]));
#else
  Floats found = {};
  for (int i = 0; i < 16; i++)
    for (int lane = 0; lane < kLanes; lane++) found[i] += each[i][lane];
  return found;
#endif
}

// y[m, n] = sum over k of x[m, k] w[n, k], for M rows and N outputs; y has `stride` a row.
template <int M, int N, class T, class Y>
void tile(const T* x, const T* w, Y* y, int64_t inner, int64_t stride) {
  static_assert(M * N <= 16);
  Floats sums[16] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= inner; k += 2 * kLanes)
    for (int n = 0; n < N; n++) {
      // As many as are read here, in the order in which they lie.
      __builtin_prefetch(w + kAhead * inner + N * k + n * 2 * kLanes, 0, 2);
      for (int m = 0; m < M; m++)
        multiply(x + m * inner + k, w + n * inner + k, sums[m * N + n]);
    }
  for (; k < inner; k += kLanes) {
    int64_t left = std::min(kLanes, inner - k);
    for (int n = 0; n < N; n++)
      for (int m = 0; m < M; m++)
        sums[m * N + n] += load(x + m * inner + k, left) * load(w + n * inner + k, left);
  }
  float found[16];
  put(total(sums), found, 16);
  for (int m = 0; m < M; m++) put(load(found + m * N, N), y + m * stride, N);
}

template <int N, class T, class Y>
void rows_of(const T* x, const T* w, Y* y, int64_t rows, int64_t inner, int64_t stride) {
  for (; rows >= kTile; rows -= kTile, x += kTile * inner, y += kTile * stride)
    tile<kTile, N>(x, w, y, inner, stride);
  if (rows == 3) tile<std::min(kTile, 3), N>(x, w, y, inner, stride);
  if (rows == 2) tile<std::min(kTile, 2), N>(x, w, y, inner, stride);
  if (rows == 1) tile<1, N>(x, w, y, inner, stride);
}

// As `tile`, for any number of rows and outputs.
template <class T, class Y>
void product(const T* x, const T* w, Y* y, int64_t rows, int64_t outer, int64_t inner,
             int64_t stride) {
  int64_t n = 0;
  if (rows == 1)
    for (; n + 16 <= outer; n += 16) tile<1, 16>(x, w + n * inner, y + n, inner, stride);
  for (; n + kTile <= outer; n += kTile)
    rows_of<kTile>(x, w + n * inner, y + n, rows, inner, stride);
  for (; n < outer; n++) rows_of<1>(x, w + n * inner, y + n, rows, inner, stride);
}

// Runs work(0) to work(count - 1), on as many threads as there are. Who comes late finds nothing
// left to do, so nobody waits for a thread that is busy elsewhere.
template <class Work>
void parallel(ffi::ThreadPool& pool, int64_t count, Work work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto some = [shared, count, work] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count; shared->done.fetch_add(1)) work(i);
  };
  int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  for (int64_t more = 1; more < threads; more++) pool.Schedule(std::function<void()>(some));
  some();
  while (shared->done.load() < count) std::this_thread::yield();
}

ffi::Error rows(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w,
                ffi::Result<ffi::Buffer<ffi::BF16>> y) {
  int64_t many = x.dimensions()[0], inner = x.dimensions()[1], outer = w.dimensions()[0];
  auto from = (const bf16*)x.untyped_data(), weight = (const bf16*)w.untyped_data();
  auto to = (bf16*)y->untyped_data();
  int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  // Long enough to be read at full speed, short enough to end together.
  int64_t part = std::clamp<int64_t>(outer / (2 * threads) / 16 * 16, 48, 384);
  parallel(pool, (outer + part - 1) / part, [=](int64_t i) {
    int64_t n = i * part;
    product(from, weight + n * inner, to + n, many, std::min(part, outer - n), inner, outer);
  });
  return ffi::Error::Success();
}

// e to the power of x <= 0, relative error below 2e-7; exactly 0 from -87 on. Cephes' polynomial.
Floats power(Floats x) {
  Floats none = {};
  Ints far = x < none - 87.0f;
  Floats shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
  Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  Floats scale = (Floats)(((Ints)shifted + 127) << 23);
  return far ? none : sum * scale;
}

struct Pages {
  const void *keys, *values;
  const float *key_scales, *value_scales;
  const int32_t *pages, *there, *owner, *positions, *segments;
  int64_t columns, size, heads, pool, inner, outer, times, count;
  float scale, soft_cap;
  int32_t window, chunk;

  // Whether a column of a row names a page; one that was given back is -1.
  bool there_is(int64_t row, int64_t column) const {
    int32_t page = pages[row * columns + column];
    return page >= 0 && page < pool;
  }

  // Which of the kLanes places from `place` on a query sees, -1 or 0 each.
  Ints seen(int64_t row, int64_t time, int64_t place, int64_t count) const {
    if (!there_is(row, place / size)) return Ints{};
    int32_t now = positions[row * times + time], own = segments[row * times + time];
    int32_t first = window ? std::max(now - window + 1, 0) : 0;
    if (chunk) first = std::max(first, now / chunk * chunk);
    Ints at = Ints{} - 1, whose = {};
    copy(&at, there + row * columns * size + place, count, sizeof *there);
    copy(&whose, owner + row * columns * size + place, count, sizeof *owner);
    return (at >= first) & (at <= now) & (whose == own);
  }
};

float largest(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#else
  float found = x[0];
  for (int lane = 1; lane < kLanes; lane++) found = x[lane] > found ? x[lane] : found;
  return found;
#endif
}

float sum(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  float found = 0;
  for (int lane = 0; lane < kLanes; lane++) found += x[lane];
  return found;
#endif
}

template <class T>
void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

// The numbers [size, features] of a head's part of a page as T, a row each `stride`, zeros behind
// them: where they lie if they can, else in `room`. int8 ones are multiplied by their scales.
template <class T, class Stored>
const T* as(const Stored* from, const float* scales, int64_t size, int64_t features,
            int64_t stride, std::vector<T>& room) {
  if constexpr (std::is_same_v<Stored, T>)
    if (stride == features) return from;
  room.resize(size * stride);
  for (int64_t s = 0; s < size; s++)
    for (int64_t i = 0; i < stride; i += kLanes) {
      Floats x = load(from + s * features + i, std::clamp(features - i, int64_t{0}, kLanes));
      put(std::is_same_v<Stored, int8_t> ? x * scales[s] : x, &room[s * stride + i],
          std::min(kLanes, stride - i));
    }
  return room.data();
}

// Adds values [size, stride] by the weights of R rows to what J registers a row hold.
template <int R, int J, class T>
void mix(const T* values, int64_t size, int64_t stride, const float* weights, int64_t row,
         float* found) {
  Floats sums[R][J];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) sums[r][j] = load(found + r * stride + j * kLanes);
  for (int64_t s = 0; s < size; s++)
    for (int j = 0; j < J; j++) {
      Floats value = load(values + s * stride + j * kLanes);
      for (int r = 0; r < R; r++) sums[r][j] += value * weights[r * row + s];
    }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) put(sums[r][j], found + r * stride + j * kLanes, kLanes);
}

template <int R, class T>
void mix_rows(const T* values, int64_t size, int64_t stride, const float* weights, int64_t row,
              float* found) {
  int64_t i = 0;
  for (; i + kTile * kLanes <= stride; i += kTile * kLanes)
    mix<R, kTile>(values + i, size, stride, weights, row, found + i);
  for (; i < stride; i += kLanes) mix<R, 1>(values + i, size, stride, weights, row, found + i);
}

// Scores [size] of a row: scaled, capped, masked, and their exponentials above the running `top`,
// whose sum goes to `all`. Returns what earlier sums are to be multiplied by.
float soften(const Pages& p, float* scores, const Ints* open, int64_t size, float& top,
             float& all) {
  Floats highest = Floats{} + top;
  for (int64_t s = 0; s < size; s += kLanes) {
    Floats x = load(scores + s) * p.scale;
    if (p.soft_cap > 0)
      for (int lane = 0; lane < kLanes; lane++)
        x[lane] = p.soft_cap * std::tanh(x[lane] / p.soft_cap);
    x = open[s / kLanes] ? x : Floats{} + kMasked;
    highest = x > highest ? x : highest;
    put(x, scores + s, kLanes);
  }
  float most = largest(highest), kept = power(Floats{top - most})[0];
  Floats each = {};
  for (int64_t s = 0; s < size; s += kLanes) {
    Floats x = power(load(scores + s) - most);
    x = open[s / kLanes] ? x : Floats{};  // where a row sees nothing, all are as high as the top
    each += x;
    put(x, scores + s, kLanes);
  }
  top = most, all = all * kept + sum(each);
  return kept;
}

// The queries [rows, inner] of one sequence that share a head of keys: y [rows, outer].
template <class Stored, class T>
void look(const Pages& p, int64_t b, int64_t head, const T* q, const float* sinks, int64_t rows,
          T* y) {
  constexpr int64_t kPages = 16;  // whose scores are softened together
  thread_local std::vector<T> key_room, value_room;
  thread_local std::vector<float> room;
  thread_local std::vector<Ints> open;
  int64_t size = (p.size + kLanes - 1) / kLanes * kLanes, wide = kPages * size;
  int64_t outer = (p.outer + kLanes - 1) / kLanes * kLanes;
  room.assign(rows * (wide + outer + 2), 0.0f);
  open.resize(p.times * wide / kLanes);
  float *scores = room.data(), *found = scores + rows * wide, *top = found + rows * outer;
  float* all = top + rows;
  for (int64_t r = 0; r < rows; r++) top[r] = sinks[r], all[r] = 1;
  auto part = [&](int64_t column) {
    return (p.pages[b * p.columns + column] * p.heads + head) * p.size;
  };
  auto keys = (const Stored*)p.keys, values = (const Stored*)p.values;
  for (int64_t start = 0; start < p.count; start += kPages) {
    int64_t many = std::min(kPages, p.count - start);
    bool seen[kPages] = {}, some = false;
    for (int64_t j = 0; j < many; j++) {
      if (start + j + 1 < p.count && p.there_is(b, start + j + 1))
        fetch(keys + part(start + j + 1) * p.inner, p.size * p.inner);
      Ints any = {};
      for (int64_t time = 0; time < p.times; time++)
        for (int64_t s = 0; s < size; s += kLanes) {
          int64_t place = (start + j) * p.size + s;
          Ints yes = p.seen(b, time, place, std::min(kLanes, p.size - s));
          any |= open[(time * wide + j * size + s) / kLanes] = yes;
        }
      some |= seen[j] = sum(__builtin_convertvector(any, Floats)) != 0;
      if (!seen[j]) continue;
      int64_t at = part(start + j);
      fetch(values + at * p.outer, p.size * p.outer);
      auto key = as<T>(keys + at * p.inner, p.key_scales + at, p.size, p.inner, p.inner, key_room);
      product(q, key, scores + j * size, rows, p.size, p.inner, wide);
    }
    if (!some) continue;
    for (int64_t r = 0; r < rows; r++) {
      float kept = soften(p, scores + r * wide, &open[r % p.times * wide / kLanes], many * size,
                          top[r], all[r]);
      for (int64_t i = r * outer; i < (r + 1) * outer; i += kLanes)
        put(load(found + i) * kept, found + i, kLanes);
    }
    for (int64_t j = 0; j < many; j++) {
      if (!seen[j]) continue;
      int64_t at = part(start + j), r = 0;
      auto value =
          as<T>(values + at * p.outer, p.value_scales + at, p.size, p.outer, outer, value_room);
      const float* weights = scores + j * size;
      for (; r + 3 <= rows; r += 3)
        mix_rows<3>(value, p.size, outer, weights + r * wide, wide, found + r * outer);
      for (; r < rows; r++)
        mix_rows<1>(value, p.size, outer, weights + r * wide, wide, found + r * outer);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < p.outer; i += kLanes)
      put(load(found + r * outer + i) / all[r], y + r * p.outer + i, std::min(kLanes, p.outer - i));
}

ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys,
                  ffi::AnyBuffer values, ffi::Buffer<ffi::F32> key_scales,
                  ffi::Buffer<ffi::F32> value_scales, ffi::Buffer<ffi::S32> pages,
                  ffi::Buffer<ffi::S32> there, ffi::Buffer<ffi::S32> owner,
                  ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> segments,
                  ffi::Buffer<ffi::S32> count, ffi::Buffer<ffi::F32> sinks, float scale,
                  float soft_cap, int32_t window, int32_t chunk, ffi::Result<ffi::AnyBuffer> y) {
  auto shape = q.dimensions(), stored = keys.dimensions();
  int64_t heads = shape[1], many = shape[2], inner = shape[3], outer = values.dimensions()[3];
  Pages p{keys.untyped_data(), values.untyped_data(), key_scales.typed_data(),
          value_scales.typed_data(), pages.typed_data(), there.typed_data(), owner.typed_data(),
          positions.typed_data(), segments.typed_data(), pages.dimensions()[1], stored[2], heads,
          stored[0], inner, outer, positions.dimensions()[1], *count.typed_data(), scale, soft_cap, window,
          chunk};
  auto run = [&](auto kept, auto read) {
    using Stored = decltype(kept);
    using T = decltype(read);
    auto from = (const T*)q.untyped_data();
    auto to = (T*)y->untyped_data();
    const float* sink = sinks.typed_data();
    parallel(pool, shape[0] * heads, [=](int64_t i) {
      look<Stored>(p, i / heads, i % heads, from + i * many * inner, sink + i % heads * many, many,
                   to + i * many * outer);
    });
    return ffi::Error::Success();
  };
  bool narrow = q.element_type() == ffi::BF16;
  if (keys.element_type() == ffi::S8) return narrow ? run(int8_t{}, bf16{}) : run(int8_t{}, 0.0f);
  return narrow ? run(bf16{}, bf16{}) : run(0.0f, 0.0f);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ropewalk_rows, rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ropewalk_attend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int32_t>("window")
                                  .Attr<int32_t>("chunk")
                                  .Ret<ffi::AnyBuffer>());
