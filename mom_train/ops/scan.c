/* Selective scan and causal convolution for the CPU. Rows have channels last, are fp32 or bf16, and are read through
 * `order`. All arithmetic is in fp32.
 *
 * This is plain C with the vector extensions of GCC and Clang. It is called through ctypes and needs no headers of
 * torch. A vector holds LANES channels. The scan processes a chunk of time steps and a range of channels at a time, so
 * that its work buffers stay in the cache: first everything that is needed once per token and channel (softplus,
 * gates), then the recurrence, with GROUP states at a time in registers. Only dB and dC are summed across lanes, once
 * per chunk.
 *
 * Work is divided into items, each a batch row and a range of channels. Every item writes its own slice of the outputs,
 * and the caller adds partial sums in a fixed order, so the result does not depend on the number of threads.
 *
 * Never compile this with -ffast-math, because exp2_nonpositive relies on rounding.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef STATE
#define STATE 16
#endif
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define GROUP (STATE % 4 ? 2 : 4)
#define LOG2E 1.44269504088896340736f
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES)));
typedef float vec_u __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t half_vec_u __attribute__((vector_size(2 * LANES), aligned(2)));

INLINE vec load(const float *p) { return *(const vec_u *)p; }
INLINE void store(float *p, vec v) { *(vec_u *)p = v; }
INLINE vec select_vec(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }
INLINE vec absolute(vec v) { return (vec)((ivec)v & 0x7fffffff); }

/* Load and store a vector of a row of the caller's tensors, which are bf16 if `half` and otherwise fp32. `at` counts
 * elements. */
INLINE vec load_row(const void *p, int64_t at, int half) {
  if (!half) return load((const float *)p + at);
  return (vec)(__builtin_convertvector((half_vec)(*(const half_vec_u *)((const uint16_t *)p + at)), uvec) << 16);
}
INLINE void store_row(void *p, int64_t at, int half, vec v) {
  if (!half) {
    store((float *)p + at, v);
    return;
  }
  uvec bits = (uvec)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* rounds to nearest, ties to even */
  rounded = (uvec)select_vec((ivec)(v != v), (vec)((uvec){0} + 0x7fc0), (vec)rounded);
  *(half_vec_u *)((uint16_t *)p + at) = __builtin_convertvector(rounded, half_vec);
}
INLINE float load_one(const void *p, int64_t at, int half) {
  if (!half) return ((const float *)p)[at];
  uint32_t bits = (uint32_t)((const uint16_t *)p)[at] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* 2^t for t <= 0, with a relative error of at most 1.6e-7; if t is far below 0, the result is 0 (or 2^-126).
 * 2^(t - round(t)) is the minimax polynomial of degree 5 with p(0) = 1 and p'(0) = ln 2, so that the distance of decays
 * close to one from one is exact enough. */
INLINE vec exp2_nonpositive(vec t) {
#if LANES == 16
  vec f = (vec)_mm512_reduce_ps((__m512)t, 8);
#else
  const float MAGIC = 12582912.f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
  vec low = (vec){0} - 126.f;
#if LANES == 8
  t = (vec)_mm256_max_ps((__m256)t, (__m256)low);
#else
  t = select_vec(t < low, low, t);
#endif
  vec k = t + MAGIC;
  vec f = t - (k - MAGIC);
#endif
  vec p = 1.3301863800734282e-3f * f + 9.669735096395016e-3f;
  p = p * f + 5.5505562573671341e-2f;
  p = p * f + 2.4022281169891357e-1f;
  p = p * f + 6.9314718055994531e-1f;
  p = p * f + 1.0f;
#if LANES == 16
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)(t - f));
#else
  return (vec)((ivec)p + ((ivec)k << 23));
#endif
}
/* 1 / v for v >= 1 */
INLINE vec reciprocal(vec v) {
#if LANES == 16
  vec r = (vec)_mm512_rcp14_ps((__m512)v);
  return r * (2.f - v * r);
#else
  return 1.f / v;
#endif
}
/* log(1 + u) for 0 <= u <= 1, as 2 atanh(u / (u + 2)) */
INLINE vec log1p_unit(vec u) {
  vec s = u * reciprocal(u + 2.f), q = s * s;
  vec p = 0.09090909f * q + 0.11111111f;
  p = p * q + 0.14285714f;
  p = p * q + 0.2f;
  p = p * q + 0.33333333f;
  return 2.f * s * (p * q + 1.f);
}
INLINE vec sigmoid_of(vec v, vec u) {
  vec r = reciprocal(1.f + u);
  return select_vec(v > 0.f, r, u * r);
}
INLINE vec exp_minus_abs(vec v) { return exp2_nonpositive(absolute(v) * -LOG2E); }
INLINE vec softplus_of(vec v, vec u) { return select_vec(v > 0.f, v, (vec){0}) + log1p_unit(u); }
INLINE vec sigmoid(vec v) { return sigmoid_of(v, exp_minus_abs(v)); }

static float *buffer(size_t floats) { return aligned_alloc(64, (floats * 4 + 63) / 64 * 64); }

/* Within a work item, denormal numbers are treated as zero: they would cost a hundred cycles each, and a state that has
 * decayed to 1e-38 does not matter. */
INLINE unsigned flush_denormals(void) {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
#else
  return 0;
#endif
}
INLINE void restore_denormals(unsigned before) {
#if defined(__x86_64__)
  _mm_setcsr(before);
#endif
}

/* A, states and their gradients are [D][STATE] for the caller and [block][state][lane] in the work buffers. */
static void load_state(float *out, const float *h, float scale, int64_t q0, int64_t q1) {
  for (int64_t q = q0; q < q1; q++)
    for (int n = 0; n < STATE; n++)
      for (int j = 0; j < LANES; j++)
        out[((q - q0) * STATE + n) * LANES + j] = h ? h[(q * LANES + j) * STATE + n] * scale : 0.f;
}
static void store_state(float *h, const float *in, int64_t q0, int64_t q1) {
  for (int64_t q = q0; q < q1; q++)
    for (int n = 0; n < STATE; n++)
      for (int j = 0; j < LANES; j++)
        h[(q * LANES + j) * STATE + n] = in[((q - q0) * STATE + n) * LANES + j];
}

/* Loads B or C of a chunk as fp32 [t][STATE]. */
static void load_bc(float *out, const void *p, int64_t stride, int half, const int32_t *order, int64_t len) {
  for (int64_t t = 0; t < len; t++)
    for (int n = 0; n < STATE; n++) out[t * STATE + n] = load_one(p, order[t] * stride + n, half);
}

/* Advances GROUP states h of one block of channels over a chunk, and adds C.h to y. With `keep`, writes all states
 * [1 + len][GROUP][LANES], beginning with the one before the chunk, and all decays [len][GROUP][LANES]. */
INLINE void advance(int64_t len, float *h, const float *decay, const float *B, const float *C, const float *delta,
                    const float *du, float *y, const uint8_t *position, int keep, float *states, float *decays) {
  vec hv[GROUP], av[GROUP];
  for (int i = 0; i < GROUP; i++) {
    hv[i] = load(h + i * LANES);
    av[i] = load(decay + i * LANES);
    if (keep) store(states + i * LANES, hv[i]);
  }
  for (int64_t t = 0; t < len; t++) {
    vec d = load(delta + t * LANES), x = load(du + t * LANES), out = load(y + t * LANES);
    int first = position[t] == 0;
    if (first && !keep)
      for (int i = 0; i < GROUP; i++) hv[i] = (vec){0};
    for (int i = 0; i < GROUP; i++) {
      vec e = exp2_nonpositive(d * av[i]);
      if (keep && first) e = (vec){0};
      hv[i] = e * hv[i] + x * B[t * STATE + i];
      out += hv[i] * C[t * STATE + i];
      if (keep) {
        store(states + ((t + 1) * GROUP + i) * LANES, hv[i]);
        store(decays + (t * GROUP + i) * LANES, e);
      }
    }
    store(y + t * LANES, out);
  }
  if (!keep)
    for (int i = 0; i < GROUP; i++) store(h + i * LANES, hv[i]);
}

/* The backward pass of `advance`: g, the gradient of the state after the chunk, becomes that of the state before it. */
INLINE void retreat(int64_t len, float *g, const float *decay, const float *B, const float *C, const float *delta,
                    const float *du, const float *go, const float *states, const float *decays, float *gdelta,
                    float *gdu, float *gA, float *gB, float *gC) {
  vec gv[GROUP], av[GROUP], gav[GROUP], hv[GROUP];
  for (int i = 0; i < GROUP; i++) {
    gv[i] = load(g + i * LANES);
    av[i] = load(decay + i * LANES);
    gav[i] = load(gA + i * LANES);
    hv[i] = load(states + (len * GROUP + i) * LANES);
  }
  for (int64_t t = len - 1; t >= 0; t--) {
    vec d = load(delta + t * LANES), x = load(du + t * LANES), o = load(go + t * LANES);
    vec gd = load(gdelta + t * LANES), gx = load(gdu + t * LANES);
    for (int i = 0; i < GROUP; i++) {
      int64_t at = (t * GROUP + i) * LANES;
      vec gn = gv[i] + o * C[t * STATE + i];
      store(gC + at, load(gC + at) + o * hv[i]);
      store(gB + at, load(gB + at) + x * gn);
      gx += gn * B[t * STATE + i];
      gv[i] = gn * load(decays + at);
      hv[i] = load(states + at);
      vec ge = gv[i] * hv[i];
      gd += ge * av[i];
      gav[i] += ge * d;
    }
    store(gdelta + t * LANES, gd);
    store(gdu + t * LANES, gx);
  }
  for (int i = 0; i < GROUP; i++) {
    store(g + i * LANES, gv[i]);
    store(gA + i * LANES, gav[i]);
  }
}

/* y = (C.h + D u) silu(z), h = exp(delta A) h + delta B u, delta = softplus(dt + bias[modality]).
 * states: [batch][chunks][D * STATE], the state before each chunk, or null if no gradient is needed. */
void mom_scan_forward(int64_t batch, int64_t L, int64_t D, int64_t chunk, int64_t ranges, int half, const void *x,
                      int64_t x_stride, const void *dt, int64_t dt_stride, const float *A, const void *B,
                      const void *C, int64_t bc_stride, const float *Dskip, const void *z, int64_t z_stride,
                      const float *bias, const int32_t *order, const uint8_t *modality, const uint8_t *position,
                      const float *h0, void *y, float *hT, float *states, int threads) {
  int64_t blocks = D / LANES, chunks = (L + chunk - 1) / chunk;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < ranges; r++) {
      unsigned mode = flush_denormals();
      int64_t q0 = blocks * r / ranges, q1 = blocks * (r + 1) / ranges, nq = q1 - q0, tile = chunk * LANES;
      size_t size = (size_t)nq * STATE * LANES;
      float *H = buffer(size), *decay = buffer(size), *Bc = buffer(chunk * STATE), *Cc = buffer(chunk * STATE);
      float *delta = buffer(nq * tile), *du = buffer(nq * tile), *out = buffer(nq * tile);
      load_state(decay, A, LOG2E, q0, q1);
      load_state(H, h0 ? h0 + b * D * STATE : 0, 1.f, q0, q1);
      for (int64_t c = 0; c < chunks; c++) {
        int64_t s = b * L + c * chunk, len = c * chunk + chunk < L ? chunk : L - c * chunk;
        if (states) memcpy(states + ((b * chunks + c) * D + q0 * LANES) * STATE, H, size * 4);
        load_bc(Bc, B, bc_stride, half, order + s, len);
        load_bc(Cc, C, bc_stride, half, order + s, len);
        for (int64_t t = 0; t < len; t++) {
          int64_t row = order[s + t];
          const float *bias_m = bias + modality[s + t] * D;
          for (int64_t q = 0; q < nq; q++) {
            int64_t d0 = (q0 + q) * LANES, at = q * tile + t * LANES;
            vec u = load_row(x, row * x_stride + d0, half);
            vec raw = load_row(dt, row * dt_stride + d0, half) + load(bias_m + d0);
            vec d = softplus_of(raw, exp_minus_abs(raw));
            store(delta + at, d);
            store(du + at, d * u);
            store(out + at, load(Dskip + d0) * u);
          }
        }
        for (int64_t q = 0; q < nq; q++)
          for (int n = 0; n < STATE; n += GROUP) {
            int64_t o = (q * STATE + n) * LANES;
            advance(len, H + o, decay + o, Bc + n, Cc + n, delta + q * tile, du + q * tile, out + q * tile,
                    position + s, 0, 0, 0);
          }
        for (int64_t t = 0; t < len; t++) {
          int64_t row = order[s + t];
          for (int64_t q = 0; q < nq; q++) {
            int64_t d0 = (q0 + q) * LANES;
            vec gate = load_row(z, row * z_stride + d0, half);
            store_row(y, row * D + d0, half, load(out + q * tile + t * LANES) * gate * sigmoid(gate));
          }
        }
      }
      store_state(hT + b * D * STATE, H, q0, q1);
      free(H), free(decay), free(Bc), free(Cc), free(delta), free(du), free(out);
      restore_denormals(mode);
    }
}

/* Sums dB or dC of a chunk over lanes, into [T][STATE]. */
static void store_lane_sums(float *out, const float *in, const int32_t *order, int64_t len) {
  for (int64_t t = 0; t < len; t++)
    for (int i = 0; i < GROUP; i++) {
      const float *p = in + (t * GROUP + i) * LANES;
      float sums[4] = {0, 0, 0, 0};
      for (int j = 0; j < LANES; j += 4)
        for (int k = 0; k < 4; k++) sums[k] += p[j + k];
      out[(int64_t)order[t] * STATE + i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
}

/* Gradients of mom_scan_forward. The states of a chunk are recomputed from the one stored before it. These are partial
 * sums: gB, gC: [ranges][T][STATE]; gA: [batch][D][STATE]; gD: [batch][D]; gbias: [batch][modalities][D]. */
void mom_scan_backward(int64_t batch, int64_t L, int64_t D, int64_t chunk, int64_t ranges, int64_t modalities,
                       int half, const void *x, int64_t x_stride, const void *dt, int64_t dt_stride, const float *A,
                       const void *B, const void *C, int64_t bc_stride, const float *Dskip, const void *z,
                       int64_t z_stride, const float *bias, const int32_t *order, const uint8_t *modality,
                       const uint8_t *position, const float *states, const void *gy, int64_t gy_stride,
                       const float *ghT, void *gx, void *gdt, void *gz, float *gA, float *gB, float *gC, float *gD,
                       float *gbias, float *gh0, int threads) {
  int64_t blocks = D / LANES, chunks = (L + chunk - 1) / chunk, T = batch * L;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < ranges; r++) {
      unsigned mode = flush_denormals();
      int64_t q0 = blocks * r / ranges, q1 = blocks * (r + 1) / ranges, nq = q1 - q0, tile = chunk * LANES;
      size_t size = (size_t)nq * STATE * LANES;
      enum { DELTA, DU, GO, GATE, SLOPE, OUT, GDELTA, GDU, PARTS };
      float *work = buffer(PARTS * nq * tile), *part[PARTS];
      for (int i = 0; i < PARTS; i++) part[i] = work + i * nq * tile;
      float *decay = buffer(size), *G = buffer(size), *gAr = buffer(size);
      float *gDr = buffer(nq * LANES), *gbr = buffer(modalities * nq * LANES);
      float *Bc = buffer(chunk * STATE), *Cc = buffer(chunk * STATE);
      float *hs = buffer((chunk + 1) * GROUP * LANES), *es = buffer(chunk * GROUP * LANES);
      float *gBl = buffer(chunk * GROUP * LANES), *gCl = buffer(chunk * GROUP * LANES);
      load_state(decay, A, LOG2E, q0, q1);
      load_state(G, ghT + b * D * STATE, 1.f, q0, q1);
      memset(gAr, 0, size * 4);
      memset(gDr, 0, nq * LANES * 4);
      memset(gbr, 0, modalities * nq * LANES * 4);
      for (int64_t c = chunks - 1; c >= 0; c--) {
        int64_t s = b * L + c * chunk, len = c * chunk + chunk < L ? chunk : L - c * chunk;
        const float *before = states + ((b * chunks + c) * D + q0 * LANES) * STATE;
        load_bc(Bc, B, bc_stride, half, order + s, len);
        load_bc(Cc, C, bc_stride, half, order + s, len);
        for (int64_t t = 0; t < len; t++) {
          int64_t row = order[s + t];
          const float *bias_m = bias + modality[s + t] * D;
          for (int64_t q = 0; q < nq; q++) {
            int64_t d0 = (q0 + q) * LANES, at = q * tile + t * LANES;
            vec u = load_row(x, row * x_stride + d0, half);
            vec raw = load_row(dt, row * dt_stride + d0, half) + load(bias_m + d0), e = exp_minus_abs(raw);
            vec d = softplus_of(raw, e);
            vec gate = load_row(z, row * z_stride + d0, half), sg = sigmoid(gate);
            vec g = load_row(gy, row * gy_stride + d0, half), go = g * gate * sg;
            store(part[DELTA] + at, d);
            store(part[DU] + at, d * u);
            store(part[GO] + at, go);
            store(part[GATE] + at, g * sg * (1.f + gate * (1.f - sg)));
            store(part[SLOPE] + at, sigmoid_of(raw, e));
            store(part[OUT] + at, load(Dskip + d0) * u);
            store(part[GDELTA] + at, (vec){0});
            store(part[GDU] + at, (vec){0});
            store(gDr + q * LANES, load(gDr + q * LANES) + go * u);
          }
        }
        for (int n = 0; n < STATE; n += GROUP) {
          memset(gBl, 0, len * GROUP * LANES * 4);
          memset(gCl, 0, len * GROUP * LANES * 4);
          for (int64_t q = 0; q < nq; q++) {
            int64_t o = (q * STATE + n) * LANES, at = q * tile;
            advance(len, (float *)before + o, decay + o, Bc + n, Cc + n, part[DELTA] + at, part[DU] + at,
                    part[OUT] + at, position + s, 1, hs, es);
            retreat(len, G + o, decay + o, Bc + n, Cc + n, part[DELTA] + at, part[DU] + at, part[GO] + at, hs, es,
                    part[GDELTA] + at, part[GDU] + at, gAr + o, gBl, gCl);
          }
          store_lane_sums(gB + r * T * STATE + n, gBl, order + s, len);
          store_lane_sums(gC + r * T * STATE + n, gCl, order + s, len);
        }
        for (int64_t t = 0; t < len; t++) {
          int64_t row = order[s + t];
          float *gb = gbr + modality[s + t] * nq * LANES;
          for (int64_t q = 0; q < nq; q++) {
            int64_t d0 = (q0 + q) * LANES, at = q * tile + t * LANES;
            vec gdu = load(part[GDU] + at), u = load_row(x, row * x_stride + d0, half);
            vec graw = (load(part[GDELTA] + at) * (1.f / LOG2E) + u * gdu) * load(part[SLOPE] + at);
            store(gb + q * LANES, load(gb + q * LANES) + graw);
            store_row(gdt, row * D + d0, half, graw);
            store_row(gx, row * D + d0, half, load(part[DELTA] + at) * gdu + load(part[GO] + at) * load(Dskip + d0));
            store_row(gz, row * D + d0, half, load(part[GATE] + at) * load(part[OUT] + at));
          }
        }
      }
      store_state(gA + b * D * STATE, gAr, q0, q1);
      store_state(gh0 + b * D * STATE, G, q0, q1);
      memcpy(gD + b * D + q0 * LANES, gDr, nq * LANES * 4);
      for (int64_t m = 0; m < modalities; m++)
        memcpy(gbias + (b * modalities + m) * D + q0 * LANES, gbr + m * nq * LANES, nq * LANES * 4);
      free(work), free(decay), free(G), free(gAr), free(gDr), free(gbr), free(Bc), free(Cc), free(hs), free(es),
          free(gBl), free(gCl);
      restore_denormals(mode);
    }
}

/* Runs only the inner loops, on data in the nearest cache. tools/bench.py compares the time of the scan with this lower
 * bound. Returns the number of elements (token x channel x state) per pass. */
int64_t mom_scan_floor(int64_t passes, int reverse) {
  enum { LENGTH = 32, ROW = LENGTH * LANES, TILE = (LENGTH + 1) * GROUP * LANES };
  float *small = buffer(8 * ROW), *tiles = buffer(4 * TILE), bc[LENGTH * STATE], decay[GROUP * LANES];
  float state[GROUP * LANES] = {0}, gA[GROUP * LANES] = {0};
  uint8_t position[LENGTH];
  memset(position, 1, LENGTH);
  memset(tiles, 0, 4 * TILE * 4);
  for (int i = 0; i < 8 * ROW; i++) small[i] = 0.01f;
  for (int i = 0; i < LENGTH * STATE; i++) bc[i] = 0.01f;
  for (int i = 0; i < GROUP * LANES; i++) decay[i] = -0.1f;
  for (int64_t i = 0; i < passes; i++) {
    if (reverse)
      retreat(LENGTH, state, decay, bc, bc, small, small + ROW, small + 2 * ROW, tiles, tiles + TILE,
              small + 3 * ROW, small + 4 * ROW, gA, tiles + 2 * TILE, tiles + 3 * TILE);
    else
      advance(LENGTH, state, decay, bc, bc, small, small + ROW, small + 2 * ROW, position, 0, 0, 0);
    __asm__ volatile("" ::"r"(state), "r"(small), "r"(gA), "r"(tiles) : "memory");
  }
  free(small), free(tiles);
  return LENGTH * GROUP * LANES;
}

/* Finds the inputs of the convolution at time t of batch row b, newest first. Returns how many of them are within the
 * document. */
static int64_t find_taps(const char **tap, int64_t b, int64_t t, int64_t L, int64_t D, int64_t K, int half,
                         const void *x, int64_t x_stride, const void *initial, const int32_t *order,
                         const uint8_t *position) {
  int64_t reach = position[b * L + t] + 1, width = half ? 2 : 4;
  int64_t taps = reach < K ? reach : K;
  if (!initial && t + 1 < taps) taps = t + 1;
  for (int64_t k = 0; k < taps; k++)
    tap[k] = t - k >= 0 ? (const char *)x + order[b * L + t - k] * x_stride * width
                        : (const char *)initial + (b * (K - 1) + K - 1 + t - k) * D * width;
  return taps;
}
INLINE vec preactivation(const char **tap, int64_t taps, const float *weight, int64_t D, int64_t K, vec bias,
                         int64_t d, int half) {
  for (int64_t k = 0; k < taps; k++) bias += load(weight + (K - 1 - k) * D + d) * load_row(tap[k], d, half);
  return bias;
}
INLINE void conv_row(const char **tap, int64_t taps, const float *weight, const float *bias, int64_t D, int64_t K,
                     int64_t d0, int64_t d1, int half, void *y, int64_t at) {
  for (int64_t d = d0; d < d1; d += LANES) {
    vec v = preactivation(tap, taps, weight, D, K, load(bias + d), d, half);
    store_row(y, at + d, half, v * sigmoid(v));
  }
}

/* y[t] = silu(bias + sum_k w[k] x[t-K+1+k]) without taps that would reach into another document. K <= 8.
 * weight: [K][D]; initial: [batch][K-1][D] in the dtype of the rows, or null. */
void mom_conv_forward(int64_t batch, int64_t L, int64_t D, int64_t K, int64_t ranges, int half, const void *x,
                      int64_t x_stride, const float *weight, const float *bias, const void *initial,
                      const int32_t *order, const uint8_t *position, void *y, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < ranges; r++) {
      int64_t d0 = D / LANES * r / ranges * LANES, d1 = D / LANES * (r + 1) / ranges * LANES;
      const char *tap[8];
      for (int64_t t = 0; t < L; t++) {
        int64_t taps = find_taps(tap, b, t, L, D, K, half, x, x_stride, initial, order, position);
        int64_t at = order[b * L + t] * D;
        if (taps == 4) /* a constant, so that the compiler unrolls the loop */
          conv_row(tap, 4, weight, bias, D, K, d0, d1, half, y, at);
        else
          conv_row(tap, taps, weight, bias, D, K, d0, d1, half, y, at);
      }
    }
}

/* Backward pass of one row: writes the gradient before the activation into `gpre` [d1 - d0], and adds to the gradients
 * of the weight and the bias. */
INLINE void conv_row_backward(const char **tap, int64_t taps, const float *weight, const float *bias, int64_t D,
                              int64_t K, int64_t d0, int64_t d1, int half, const void *gy, int64_t at, float *gpre,
                              float *gweight, float *gbias) {
  for (int64_t d = d0; d < d1; d += LANES) {
    vec v = preactivation(tap, taps, weight, D, K, load(bias + d), d, half), sg = sigmoid(v);
    vec g = load_row(gy, at + d, half) * (sg + v * sg * (1.f - sg));
    store(gpre + d - d0, g);
    store(gbias + d, load(gbias + d) + g);
    for (int64_t k = 0; k < taps; k++) {
      float *p = gweight + (K - 1 - k) * D + d;
      store(p, load(p) + g * load_row(tap[k], d, half));
    }
  }
}

/* Gradients of mom_conv_forward. gweight: [batch][K][D] and gbias: [batch][D] are partial sums; ginitial is like
 * initial, and null if that is. */
void mom_conv_backward(int64_t batch, int64_t L, int64_t D, int64_t K, int64_t ranges, int half, const void *x,
                       int64_t x_stride, const float *weight, const float *bias, const void *initial,
                       const int32_t *order, const uint8_t *position, const void *gy, int64_t gy_stride, void *gx,
                       float *gweight, float *gbias, void *ginitial, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < ranges; r++) {
      int64_t d0 = D / LANES * r / ranges * LANES, d1 = D / LANES * (r + 1) / ranges * LANES, n = d1 - d0;
      float *gw = gweight + b * K * D, *gb = gbias + b * D, *recent = buffer(K * n); /* `recent`: of the last K rows */
      const char *tap[8];
      for (int64_t k = 0; k < K; k++) memset(gw + k * D + d0, 0, n * 4);
      memset(gb + d0, 0, n * 4);
      for (int64_t t = 0; t < L + K - 1; t++) {
        if (t < L) {
          int64_t taps = find_taps(tap, b, t, L, D, K, half, x, x_stride, initial, order, position);
          int64_t at = order[b * L + t] * gy_stride;
          float *gpre = recent + t % K * n;
          if (taps == 4)
            conv_row_backward(tap, 4, weight, bias, D, K, d0, d1, half, gy, at, gpre, gw, gb);
          else
            conv_row_backward(tap, taps, weight, bias, D, K, d0, d1, half, gy, at, gpre, gw, gb);
        }
        /* Everything that depends on the input K-1 steps back is known now. */
        int64_t from = t - (K - 1), users = 0;
        if (from < 0 && !ginitial) continue;
        const float *w[8], *g[8];
        for (int64_t k = 0; k < K; k++)
          if (from + k >= 0 && from + k < L && position[b * L + from + k] >= k) {
            w[users] = weight + (K - 1 - k) * D + d0;
            g[users++] = recent + (from + k) % K * n;
          }
        void *to = from < 0 ? ginitial : gx;
        int64_t at = (from < 0 ? b * (K - 1) + K - 1 + from : order[b * L + from]) * D + d0;
        for (int64_t d = 0; d < n; d += LANES) {
          vec sum = {0};
          for (int64_t k = 0; k < users; k++) sum += load(w[k] + d) * load(g[k] + d);
          store_row(to, at + d, half, sum);
        }
      }
      free(recent);
    }
}
