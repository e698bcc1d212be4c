/* Selective scan and causal convolution for the CPU: fp32, channel-last, rows read through `order`.
 *
 * Plain C with GCC/Clang vector extensions, called through ctypes; needs no headers of torch. One vector is 16
 * channels (one AVX-512 register, two AVX2 ones); the STATE recurrences of a channel block live in registers, so
 * nothing is reduced across lanes except dB and dC, once per chunk.
 *
 * Work is split over (batch row, channel range). Every item owns its slice of the outputs, and partial sums are
 * added by the caller in a fixed order: the result does not depend on the number of threads.
 *
 * Never compile this with -ffast-math: exp2_nonpositive relies on the rounding of t + MAGIC.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef STATE
#define STATE 16
#endif
#define LANES 16
#define LOG2E 1.44269504088896340736f

typedef float vec_u __attribute__((vector_size(64), aligned(4)));
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));

static inline vec load(const float *p) { return *(const vec_u *)p; }
static inline void store(float *p, vec v) { *(vec_u *)p = v; }
static inline vec select_vec(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }
static inline vec absolute(vec v) { return (vec)((ivec)v & 0x7fffffff); }
static inline float lane_sum(vec v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

/* 2^t for t <= 0, clamped at 2^-126: degree-7 polynomial on [-1/2, 1/2], relative error about 1e-7. */
static inline vec exp2_nonpositive(vec t) {
  const float MAGIC = 12582912.f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
  vec low = (vec){0} - 126.f;
  t = select_vec(t < low, low, t);
  vec k = t + MAGIC;
  vec f = t - (k - MAGIC);
  vec p = 1.5403530393381606e-4f * f + 1.3333558146428443e-3f;
  p = p * f + 9.6181291076284770e-3f;
  p = p * f + 5.5504108664821580e-2f;
  p = p * f + 2.4022650695910072e-1f;
  p = p * f + 6.9314718055994531e-1f;
  p = p * f + 1.0f;
  return p * (vec)(((ivec)k << 23) + 0x3f800000);
}
/* log(1 + u) for 0 <= u <= 1, by atanh(u / (u + 2)). */
static inline vec log1p_unit(vec u) {
  vec s = u / (u + 2.f), q = s * s;
  vec p = 0.09090909f * q + 0.11111111f;
  p = p * q + 0.14285714f;
  p = p * q + 0.2f;
  p = p * q + 0.33333333f;
  return 2.f * s * (p * q + 1.f);
}
static inline vec softplus(vec v) {
  vec zero = {0};
  return select_vec(v > zero, v, zero) + log1p_unit(exp2_nonpositive(absolute(v) * -LOG2E));
}
static inline vec sigmoid(vec v) {
  vec zero = {0}, u = exp2_nonpositive(absolute(v) * -LOG2E), r = 1.f / (1.f + u);
  return select_vec(v > zero, r, u * r);
}
static float *buffer(size_t floats) { return aligned_alloc(64, (floats * 4 + 63) / 64 * 64); }

/* A*log2(e) of one channel range, transposed to [block][state][lane]; so are all states below. */
static void load_decay(float *out, const float *A, int64_t q0, int64_t q1) {
  for (int64_t q = q0; q < q1; q++)
    for (int n = 0; n < STATE; n++)
      for (int j = 0; j < LANES; j++)
        out[((q - q0) * STATE + n) * LANES + j] = A[(q * LANES + j) * STATE + n] * LOG2E;
}
static void load_state(float *out, const float *h, int64_t b, int64_t D, int64_t q0, int64_t q1) {
  for (int64_t q = q0; q < q1; q++)
    for (int n = 0; n < STATE; n++)
      for (int j = 0; j < LANES; j++)
        out[((q - q0) * STATE + n) * LANES + j] = h ? h[(b * D + q * LANES + j) * STATE + n] : 0.f;
}
static void store_state(float *h, const float *in, int64_t b, int64_t D, int64_t q0, int64_t q1) {
  for (int64_t q = q0; q < q1; q++)
    for (int n = 0; n < STATE; n++)
      for (int j = 0; j < LANES; j++)
        h[(b * D + q * LANES + j) * STATE + n] = in[((q - q0) * STATE + n) * LANES + j];
}

/* y = (C.h + D u) silu(z), h = exp(delta A) h + delta B u, delta = softplus(dt + bias[modality]).
 * states: [batch][chunks][D * STATE], the state before each chunk (null when no gradient is wanted). */
void mom_scan_forward(int64_t batch, int64_t L, int64_t D, int64_t chunk, int64_t ranges, const float *dt,
                      const float *x, const float *A, const float *B, const float *C, int64_t bc_stride,
                      const float *Dskip, const float *z, int64_t z_stride, const float *bias,
                      const int32_t *order, const uint8_t *modality, const uint8_t *position, const float *h0,
                      float *y, float *hT, float *states, int threads) {
  int64_t blocks = D / LANES, chunks = (L + chunk - 1) / chunk;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < ranges; r++) {
      int64_t q0 = blocks * r / ranges, q1 = blocks * (r + 1) / ranges;
      size_t size = (size_t)(q1 - q0) * STATE * LANES;
      float *H = buffer(size), *decay = buffer(size);
      load_decay(decay, A, q0, q1);
      load_state(H, h0, b, D, q0, q1);
      for (int64_t c = 0; c < chunks; c++) {
        int64_t s = c * chunk, e = s + chunk < L ? s + chunk : L;
        if (states) memcpy(states + ((b * chunks + c) * D + q0 * LANES) * STATE, H, size * 4);
        for (int64_t q = q0; q < q1; q++) {
          int64_t d0 = q * LANES;
          float *hp = H + (q - q0) * STATE * LANES;
          const float *ap = decay + (q - q0) * STATE * LANES;
          vec h[STATE], skip = load(Dskip + d0);
          for (int n = 0; n < STATE; n++) h[n] = load(hp + n * LANES);
          for (int64_t t = s; t < e; t++) {
            int64_t at = b * L + t, row = order[at];
            vec u = load(x + row * D + d0);
            vec delta = softplus(load(dt + row * D + d0) + load(bias + modality[at] * D + d0)), du = delta * u;
            vec out = skip * u, out2 = {0};
            const float *Bt = B + row * bc_stride, *Ct = C + row * bc_stride;
            if (position[at] == 0)
              for (int n = 0; n < STATE; n++) h[n] = (vec){0};
            for (int n = 0; n + 1 < STATE; n += 2) {
              vec e0 = exp2_nonpositive(delta * load(ap + n * LANES));
              vec e1 = exp2_nonpositive(delta * load(ap + (n + 1) * LANES));
              h[n] = e0 * h[n] + du * Bt[n];
              h[n + 1] = e1 * h[n + 1] + du * Bt[n + 1];
              out += h[n] * Ct[n];
              out2 += h[n + 1] * Ct[n + 1];
            }
            vec gate = load(z + row * z_stride + d0);
            store(y + row * D + d0, (out + out2) * gate * sigmoid(gate));
          }
          for (int n = 0; n < STATE; n++) store(hp + n * LANES, h[n]);
        }
      }
      store_state(hT, H, b, D, q0, q1);
      free(H);
      free(decay);
    }
}

/* Gradients of mom_scan_forward; states of a chunk are recomputed from the one stored before it.
 * gB, gC: [ranges][T][STATE]; gA: [batch][D][STATE]; gD: [batch][D]; gbias: [batch][modalities][D], all partial. */
void mom_scan_backward(int64_t batch, int64_t L, int64_t D, int64_t chunk, int64_t ranges, int64_t modalities,
                       const float *dt, const float *x, const float *A, const float *B, const float *C,
                       int64_t bc_stride, const float *Dskip, const float *z, int64_t z_stride, const float *bias,
                       const int32_t *order, const uint8_t *modality, const uint8_t *position,
                       const float *states, const float *gy, const float *ghT, float *gdt, float *gx, float *gz,
                       float *gA, float *gB, float *gC, float *gD, float *gbias, float *gh0, int threads) {
  int64_t blocks = D / LANES, chunks = (L + chunk - 1) / chunk, T = batch * L;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < ranges; r++) {
      int64_t q0 = blocks * r / ranges, q1 = blocks * (r + 1) / ranges, nq = q1 - q0;
      size_t size = (size_t)nq * STATE * LANES, tile = (size_t)chunk * STATE * LANES;
      float *decay = buffer(size), *G = buffer(size), *gAr = buffer(size), *gDr = buffer(nq * LANES);
      float *gbr = buffer(modalities * nq * LANES);
      float *hb = buffer(tile + STATE * LANES), *eb = buffer(tile), *db = buffer(chunk * LANES);
      float *yb = buffer(chunk * LANES), *gBb = buffer(tile), *gCb = buffer(tile);
      load_decay(decay, A, q0, q1);
      load_state(G, ghT, b, D, q0, q1);
      memset(gAr, 0, size * 4);
      memset(gDr, 0, nq * LANES * 4);
      memset(gbr, 0, modalities * nq * LANES * 4);
      for (int64_t c = chunks - 1; c >= 0; c--) {
        int64_t s = c * chunk, e = s + chunk < L ? s + chunk : L;
        memset(gBb, 0, (e - s) * STATE * LANES * 4);
        memset(gCb, 0, (e - s) * STATE * LANES * 4);
        for (int64_t q = q0; q < q1; q++) {
          int64_t d0 = q * LANES, o = (q - q0) * STATE * LANES;
          const float *ap = decay + o;
          vec h[STATE], skip = load(Dskip + d0);
          const float *before = states + ((b * chunks + c) * D + d0) * STATE;
          for (int n = 0; n < STATE; n++) {
            h[n] = load(before + n * LANES);
            store(hb + n * LANES, h[n]);
          }
          for (int64_t t = s; t < e; t++) {
            int64_t at = b * L + t, row = order[at];
            vec u = load(x + row * D + d0);
            vec delta = softplus(load(dt + row * D + d0) + load(bias + modality[at] * D + d0)), du = delta * u;
            vec out = skip * u;
            const float *Bt = B + row * bc_stride, *Ct = C + row * bc_stride;
            float *hp = hb + (t - s + 1) * STATE * LANES, *ep = eb + (t - s) * STATE * LANES;
            for (int n = 0; n < STATE; n++) {
              vec ee = exp2_nonpositive(delta * load(ap + n * LANES));
              if (position[at] == 0) ee = (vec){0};
              h[n] = ee * h[n] + du * Bt[n];
              out += h[n] * Ct[n];
              store(hp + n * LANES, h[n]);
              store(ep + n * LANES, ee);
            }
            store(db + (t - s) * LANES, delta);
            store(yb + (t - s) * LANES, out);
          }
          vec g[STATE], gd_sum = load(gDr + (q - q0) * LANES);
          for (int n = 0; n < STATE; n++) g[n] = load(G + o + n * LANES);
          for (int64_t t = e - 1; t >= s; t--) {
            int64_t at = b * L + t, row = order[at], i = t - s;
            vec delta = load(db + i * LANES), u = load(x + row * D + d0), du = delta * u;
            vec gate = load(z + row * z_stride + d0), sg = sigmoid(gate), silu = gate * sg;
            vec go = load(gy + row * D + d0);
            store(gz + row * D + d0, go * load(yb + i * LANES) * (sg + silu * (1.f - sg)));
            go *= silu;
            const float *Bt = B + row * bc_stride, *Ct = C + row * bc_stride;
            float *hp = hb + i * STATE * LANES, *ep = eb + i * STATE * LANES;
            float *gBp = gBb + i * STATE * LANES, *gCp = gCb + i * STATE * LANES;
            vec gB_dot = {0}, gdecay = {0};
            gd_sum += go * u;
            for (int n = 0; n < STATE; n++) {
              vec gn = g[n] + go * Ct[n];
              store(gCp + n * LANES, load(gCp + n * LANES) + go * load(hp + (STATE + n) * LANES));
              store(gBp + n * LANES, load(gBp + n * LANES) + du * gn);
              gB_dot += gn * Bt[n];
              vec ge = gn * load(ep + n * LANES), da = ge * load(hp + n * LANES);
              gdecay += da * load(ap + n * LANES);
              store(gAr + o + n * LANES, load(gAr + o + n * LANES) + da * delta);
              g[n] = ge;
            }
            vec raw = load(dt + row * D + d0) + load(bias + modality[at] * D + d0);
            vec graw = (gdecay * (1.f / LOG2E) + u * gB_dot) * sigmoid(raw);
            float *gb = gbr + (modality[at] * nq + q - q0) * LANES;
            store(gb, load(gb) + graw);
            store(gx + row * D + d0, delta * gB_dot + go * skip);
            store(gdt + row * D + d0, graw);
          }
          store(gDr + (q - q0) * LANES, gd_sum);
          for (int n = 0; n < STATE; n++) store(G + o + n * LANES, g[n]);
        }
        for (int64_t t = s; t < e; t++)
          for (int n = 0; n < STATE; n++) {
            int64_t at = (r * T + order[b * L + t]) * STATE + n, i = ((t - s) * STATE + n) * LANES;
            gB[at] = lane_sum(load(gBb + i));
            gC[at] = lane_sum(load(gCb + i));
          }
      }
      store_state(gA, gAr, b, D, q0, q1);
      if (gh0) store_state(gh0, G, b, D, q0, q1);
      memcpy(gD + b * D + q0 * LANES, gDr, nq * LANES * 4);
      for (int64_t m = 0; m < modalities; m++)
        memcpy(gbias + (b * modalities + m) * D + q0 * LANES, gbr + m * nq * LANES, nq * LANES * 4);
      free(decay), free(G), free(gAr), free(gDr), free(gbr), free(hb), free(eb), free(db), free(yb), free(gBb),
          free(gCb);
    }
}

/* y[t] = silu(bias + sum_k w[k] x[t-K+1+k]), taps that would reach into another document left out.
 * weight: [K][D]. */
void mom_conv_forward(int64_t batch, int64_t L, int64_t D, int64_t K, const float *x, int64_t x_stride,
                      const float *weight, const float *bias, const int32_t *order, const uint8_t *position,
                      float *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t at = 0; at < batch * L; at++) {
    int64_t t = at % L, row = order[at], taps = position[at] + 1 < K ? position[at] + 1 : K;
    if (t + 1 < taps) taps = t + 1;
    for (int64_t d0 = 0; d0 < D; d0 += LANES) {
      vec v = load(bias + d0);
      for (int64_t k = 0; k < taps; k++)
        v += load(weight + (K - 1 - k) * D + d0) * load(x + order[at - k] * x_stride + d0);
      store(y + row * D + d0, v * sigmoid(v));
    }
  }
}

/* gweight: [batch][ranges][K][D] and gbias: [batch][ranges][D] are partial over time ranges of each row.
 * gpre: [T][D] scratch, the gradient before the activation, in row order. */
void mom_conv_backward(int64_t batch, int64_t L, int64_t D, int64_t K, int64_t ranges, const float *x,
                       int64_t x_stride, const float *weight, const float *bias, const int32_t *order,
                       const uint8_t *position, const float *gy, float *gpre, float *gx, float *gweight,
                       float *gbias, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < ranges; r++) {
      float *gw = gweight + (b * ranges + r) * K * D, *gb = gbias + (b * ranges + r) * D;
      memset(gw, 0, K * D * 4);
      memset(gb, 0, D * 4);
      for (int64_t t = L * r / ranges; t < L * (r + 1) / ranges; t++) {
        int64_t at = b * L + t, row = order[at], taps = position[at] + 1 < K ? position[at] + 1 : K;
        if (t + 1 < taps) taps = t + 1;
        for (int64_t d0 = 0; d0 < D; d0 += LANES) {
          vec v = load(bias + d0);
          for (int64_t k = 0; k < taps; k++)
            v += load(weight + (K - 1 - k) * D + d0) * load(x + order[at - k] * x_stride + d0);
          vec sg = sigmoid(v), g = load(gy + row * D + d0) * (sg + v * sg * (1.f - sg));
          store(gpre + row * D + d0, g);
          store(gb + d0, load(gb + d0) + g);
          for (int64_t k = 0; k < taps; k++) {
            float *p = gw + (K - 1 - k) * D + d0;
            store(p, load(p) + g * load(x + order[at - k] * x_stride + d0));
          }
        }
      }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t at = 0; at < batch * L; at++) {
    int64_t t = at % L, row = order[at];
    for (int64_t d0 = 0; d0 < D; d0 += LANES) {
      vec g = {0};
      for (int64_t k = 0; k < K && t + k < L; k++)
        if (position[at + k] >= k)
          g += load(weight + (K - 1 - k) * D + d0) * load(gpre + order[at + k] * D + d0);
      store(gx + row * D + d0, g);
    }
  }
}
