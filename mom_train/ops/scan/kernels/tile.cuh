// How states and channels lie over the lanes of a warp, and how rows, B and C come into shared memory.
//
// A warp has 32 channels x 16 states, a lane 4 x 4 of them: lane = 16*half + 4*q + c. Its register [k][j] belongs to
//   channel(lane, k) = 16*half + 4*c + (k ^ (q & 2)), and state 4*q + (j ^ c).
// So a sum over states goes over lanes 8 and 4 apart and halves the number of channels each time, after which a lane
// has the sum for its own channel, 16*half + 4*c + q. A sum over channels goes over lanes 2, 1 and 16 apart and halves
// the number of states, after which a lane has state 4*q + c. Hardly a register is selected by lane number on the way.
#pragma once

#define STATES 16
#define CHUNK 16  // steps whose rows are in shared memory at a time, and between kept states
#define BLOCK 4   // steps of a chunk that the inner loops unroll, and whose states the backward pass has in registers
#define WARPS 4
#define CTA_CHANNELS (32 * WARPS)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define RESET -1e30f  // an exponent whose exp2 is 0, and a raw time step whose softplus is 0
#define NEVER 0x7fffffff

#if ROWS_BF16
typedef unsigned short row_t;
typedef unsigned pair_t;  // two channels of a row
typedef uint2 four_t;     // four states of a row of B or C
DEVICE float first(pair_t v) { return as_float(v << 16); }
DEVICE float second(pair_t v) { return as_float(v & 0xffff0000u); }
DEVICE float4 to_float4(four_t v) { return make_float4(first(v.x), second(v.x), first(v.y), second(v.y)); }
DEVICE four_t no_states() { return make_uint2(0u, 0u); }
DEVICE four_t to_rows(float4 v) {
  return make_uint2(to_bf16(v.x) | (unsigned)to_bf16(v.y) << 16, to_bf16(v.z) | (unsigned)to_bf16(v.w) << 16);
}
#else
typedef float row_t;
typedef float2 pair_t;
typedef float4 four_t;
DEVICE float first(pair_t v) { return v.x; }
DEVICE float second(pair_t v) { return v.y; }
DEVICE float4 to_float4(four_t v) { return v; }
DEVICE four_t no_states() { return make_float4(0.f, 0.f, 0.f, 0.f); }
DEVICE four_t to_rows(float4 v) { return v; }
#endif

// Arguments of all kernels but scan_sums. cuda.py has the same structure.
struct Arguments {
  const row_t *x, *dt, *z, *B, *C, *grad_y;
  const float *A, *D, *dt_bias;
  const float* entering;  // (batch, D, N): the state before the first step, or the gradient of the one after the last
  const int* order;
  const unsigned char *modality, *position;
  row_t* y;
  float* states;      // (batch, chunks, D/32, 512): the state before each chunk, in the order of lanes; may be null
  float* leaving;     // (batch, D, N): the state after the last step, or the gradient of the one before the first
  float *own, *decay; // (batch, spans, D/32, 512): how a span ends if zero enters, and the factor of what enters
  row_t *grad_x, *grad_dt, *grad_z;
  float *grad_B, *grad_C;                 // (CTAs over channels, T, N)
  float *grad_A, *grad_D, *grad_dt_bias;  // (batch * spans, D, N), (batch * spans, D), (batch * spans, M, D)
  long long tokens;
  int x_stride, dt_stride, z_stride, B_stride, C_stride, y_stride, grad_y_stride, grad_stride;  // bytes between rows
  int length, channels, modalities, chunks, span, spans;  // span: chunks per span
};

// Where a warp works.
struct Place {
  int thread, warp, lane;
  int batch, span;
  int channel;  // its first one
  bool active;  // the last CTA may have fewer than four warps with channels
};
DEVICE Place place(const Arguments& a, int first_span) {
  Place p;
  p.thread = threadIdx.x, p.warp = warp_index(), p.lane = p.thread & 31;
  p.batch = blockIdx.z, p.span = blockIdx.y + first_span;
  p.channel = blockIdx.x * CTA_CHANNELS + p.warp * 32;
  p.active = p.channel < a.channels;
  return p;
}
DEVICE int own_channel(int lane) { return (lane & 16) | (lane & 3) << 2 | (lane >> 2 & 3); }
DEVICE int channel_of(int lane, int k) { return (lane & 16) | (lane & 3) << 2 | ((k ^ lane >> 2) & 2) | (k & 1); }

template <typename T>
DEVICE T* bytes_behind(T* base, long long bytes) {
  return (T*)((char*)base + bytes);
}
template <typename T>
DEVICE T* row_at(T* base, int row, int stride) {
  return bytes_behind(base, (long long)row * stride);
}
DEVICE float4 load4(const char* from) { return *(const float4*)from; }

// ------------------------------------------------------------------------------------------- a warp's tile of states
struct Tile {
  float at[4][4];  // [k][j]
};
#define FOR_TILE                                      \
  _Pragma("unroll") for (int k = 0; k < 4; k++)       \
      _Pragma("unroll") for (int j = 0; j < 4; j++)

DEVICE Tile zero_tile() {
  Tile t;
  FOR_TILE t.at[k][j] = 0.f;
  return t;
}
DEVICE void exclusive_or_states(float* v, int c) {  // v[j] becomes v[j ^ c]
  const bool high = c & 2, low = c & 1;
  const float a = high ? v[2] : v[0], b = high ? v[3] : v[1], d = high ? v[0] : v[2], e = high ? v[1] : v[3];
  v[0] = low ? b : a, v[1] = low ? a : b, v[2] = low ? e : d, v[3] = low ? d : e;
}
DEVICE Tile load_tile(const float* from_DN, int lane) {  // (32 channels, N)
  Tile t;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const float4 v = *(const float4*)(from_DN + channel_of(lane, k) * STATES + (lane & 12));
    t.at[k][0] = v.x, t.at[k][1] = v.y, t.at[k][2] = v.z, t.at[k][3] = v.w;
    exclusive_or_states(t.at[k], lane & 3);
  }
  return t;
}
DEVICE void store_tile(float* to_DN, Tile t, int lane) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    exclusive_or_states(t.at[k], lane & 3);
    *(float4*)(to_DN + channel_of(lane, k) * STATES + (lane & 12)) =
        make_float4(t.at[k][0], t.at[k][1], t.at[k][2], t.at[k][3]);
  }
}
// In the order of lanes: 512 floats of which only the same lane reads back what it wrote.
DEVICE Tile load_own(const float* from, int lane) {
  Tile t;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const float4 v = *(const float4*)(from + k * 128 + lane * 4);
    t.at[k][0] = v.x, t.at[k][1] = v.y, t.at[k][2] = v.z, t.at[k][3] = v.w;
  }
  return t;
}
DEVICE void store_own(float* to, const Tile& t, int lane) {
#pragma unroll
  for (int k = 0; k < 4; k++)
    *(float4*)(to + k * 128 + lane * 4) = make_float4(t.at[k][0], t.at[k][1], t.at[k][2], t.at[k][3]);
}
// A times log2(e): the exponent of a decay is Delta times it, because the hardware has exp2.
DEVICE Tile load_exponents(const Arguments& a, const Place& p) {
  Tile t = load_tile(a.A + (long long)p.channel * STATES, p.lane);
  FOR_TILE t.at[k][j] *= LOG2E;
  return t;
}
DEVICE long long tile_offset(const Arguments& a, const Place& p, int i, int of) {  // in a tensor (batch, of, D/32, 512)
  return ((p.batch * (long long)of + i) * (a.channels / 32) + p.channel / 32) * 512;
}
// Takes what enters the row through the spans before this one (`step` 1), or after it (-1).
DEVICE void through_spans(const Arguments& a, const Place& p, Tile& t, int from, int step) {
  for (int s = from; s != p.span; s += step) {
    const Tile own = load_own(a.own + tile_offset(a, p, s, a.spans), p.lane);
    const Tile decay = load_own(a.decay + tile_offset(a, p, s, a.spans), p.lane);
    FOR_TILE t.at[k][j] = fmaf(decay.at[k][j], t.at[k][j], own.at[k][j]);
  }
}

// The sum over all states for the lane's own channel, from each lane's sums over its four states of each channel.
// `odd`: whether the own channel is register 1 or 3.
DEVICE float sum_over_states(const float* v, bool odd) {
  const float even_sum = v[0] + from_lane_xor(v[2], 8), odd_sum = v[1] + from_lane_xor(v[3], 8);
  return (odd ? odd_sum : even_sum) + from_lane_xor(odd ? even_sum : odd_sum, 4);
}
// The sum of weight[k] * tile[k][.] over the 16 channels of this half of the warp, for state 4*q + c.
DEVICE float sum_over_channels(const Tile& t, const float* weight) {
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; j++)
    v[j] = fmaf(t.at[3][j], weight[3],
                fmaf(t.at[2][j], weight[2], fmaf(t.at[1][j], weight[1], t.at[0][j] * weight[0])));
  const float a = v[0] + from_lane_xor(v[2], 2), b = v[1] + from_lane_xor(v[3], 2);
  return a + from_lane_xor(b, 1);
}

// --------------------------------------------------------------------------------------------- the steps of a chunk
// A ring of four chunks: the one before (its sums are still to be written), this one, and the next.
struct Steps {
  int row[4][CHUNK];  // in row order, or -1 after the end
  int modality[4][CHUNK];
  float reset[4][CHUNK];  // added to the exponent of the decay
};
#define STEPS_BYTES 1024  // Steps, and one int to agree on a reset
struct Step {
  int row, modality;
  float reset;
};
DEVICE Step load_step(const Arguments& a, int batch, int chunk, int begin, int end, int i) {
  Step s = {-1, a.modalities, 0.f};
  int t = chunk * CHUNK + i;
  if (begin <= chunk && chunk < end && t < a.length) {
    t += batch * a.length;
    s = {a.order[t], a.modality[t], a.position[t] == 0 ? RESET : 0.f};
  }
  return s;
}
DEVICE void store_step(Steps* steps, int slot, int i, const Step& s) {
  steps->row[slot][i] = s.row, steps->modality[slot][i] = s.modality, steps->reset[slot][i] = s.reset;
}

// (M + 1, channels of the CTA). Steps after the end have modality M, whose bias makes Delta zero.
DEVICE void stage_dt_bias(const Arguments& a, float* bias, int thread) {
  for (int i = thread; i < (a.modalities + 1) * CTA_CHANNELS; i += 32 * WARPS) {
    const int m = i / CTA_CHANNELS, d = blockIdx.x * CTA_CHANNELS + i % CTA_CHANNELS;
    bias[i] = m < a.modalities && d < a.channels ? a.dt_bias[m * a.channels + d] : RESET;
  }
}

// B and C of a chunk as fp32. Each of the four orders of the states within a lane (j ^ c) has a copy, placed so that
// the lanes of a warp read from different banks. A thread brings four states of B or of C of one step.
#define BC_BYTES_PER_STEP 512
DEVICE four_t load_BC(const Arguments& a, const Steps* steps, int slot, int thread) {
  const int row = steps->row[slot][thread >> 3];
  if (row < 0) return no_states();
  const row_t* from = (thread & 4) ? row_at(a.C, row, a.C_stride) : row_at(a.B, row, a.B_stride);
  return *(const four_t*)(from + 4 * (thread & 3));
}
DEVICE void store_BC(char* bc, int thread, four_t four) {
  const float4 v = to_float4(four);
  const float f[4] = {v.x, v.y, v.z, v.w};
  const int which = (thread >> 2) & 1, q = thread & 3;
  char* step = bc + (thread >> 3) * BC_BYTES_PER_STEP;
#pragma unroll
  for (int c = 0; c < 4; c++)
    *(float4*)(step + c * 128 + ((which ^ (c & 1)) * 64) + (q ^ (c & 2)) * 16) =
        make_float4(f[0 ^ c], f[1 ^ c], f[2 ^ c], f[3 ^ c]);
}
DEVICE int B_offset(int lane) {  // of the lane's four states in a step; those of C are at this offset ^ 64
  const int c = lane & 3, q = (lane >> 2) & 3;
  return c * 128 + (c & 1) * 64 + (q ^ (c & 2)) * 16;
}

// Rows of a chunk: 32 channels of 16 steps, [step][channel], copied while the chunk before is computed.
#define PLANE_BYTES (CHUNK * 32 * (int)sizeof(row_t))
#define COPIES_PER_ROW (32 * (int)sizeof(row_t) / 16)
#define COPIES (CHUNK * COPIES_PER_ROW / 32)  // per lane
struct RowNumbers {
  int at[COPIES];
};
DEVICE RowNumbers rows_to_copy(const Steps* steps, int slot, int lane) {
  RowNumbers rows;
#pragma unroll
  for (int i = 0; i < COPIES; i++) rows.at[i] = steps->row[slot][lane / COPIES_PER_ROW + i * (32 / COPIES_PER_ROW)];
  return rows;
}
DEVICE void start_rows(char* plane, const row_t* from, int stride, const RowNumbers& rows, int lane) {
  from += lane % COPIES_PER_ROW * (16 / (int)sizeof(row_t));
  plane += lane * 16;
#pragma unroll
  for (int i = 0; i < COPIES; i++)
    start_copy(plane + i * 512, row_at(from, max(rows.at[i], 0), stride), rows.at[i] >= 0);
}

// ------------------------------------------------------------------------------------------ functions of one number
// log(1 + e^v): log1p(e^-|v|) by a polynomial, to a relative error of 1e-6 for bf16 rows and 1e-7 for fp32 rows,
// however small it is.
DEVICE float softplus(float v) {
  const float e = exp2_of(-LOG2E * fabsf(v));
#if ROWS_BF16
  const float coefficients[] = {1.414092248e-02f, -6.640149535e-02f, 1.492235312e-01f, -2.350384249e-01f,
                                3.310944476e-01f, -4.998696528e-01f, 9.999987315e-01f};
#else
  const float coefficients[] = {5.232654882e-03f, -2.950508096e-02f, 7.822569489e-02f,
                                -1.366322400e-01f, 1.910599651e-01f, -2.484297960e-01f,
                                3.331909648e-01f, -4.999949312e-01f, 9.999999699e-01f};
#endif
  float s = coefficients[0];
#pragma unroll
  for (int i = 1; i < (int)(sizeof(coefficients) / sizeof(float)); i++) s = fmaf(s, e, coefficients[i]);
  return fmaf(s, e, fmaxf(v, 0.f));
}
// The derivative of softplus, from its value: sigmoid(v) = 1 - e^-softplus(v).
DEVICE float slope_of(float delta) {
  float s = 1.f - exp2_of(-LOG2E * delta);
#if !ROWS_BF16  // by the series where the subtraction cancels
  const float t = delta * (1.f + delta * (-0.5f + delta * (1.f / 6 + delta * (-1.f / 24 + delta * (1.f / 120)))));
  s = delta < 0.125f ? t : s;
#endif
  return s;
}
DEVICE float sigmoid(float v) { return reciprocal(1.f + exp2_of(-LOG2E * v)); }

// Shared memory [step][pair of channels] of float4: two values of either channel. A lane reads those of its channels,
// `offset` being that of its first pair in step 0; the second pair is at this offset ^ 16.
#define PAIR_BYTES_PER_STEP 256
#define PAIR_BYTES (CHUNK * PAIR_BYTES_PER_STEP)
DEVICE void load_pairs(const char* shared, int offset, int step, float* first_value, float* second_value) {
  const float4 low = load4(shared + offset + step * PAIR_BYTES_PER_STEP);
  const float4 high = load4(shared + (offset ^ 16) + step * PAIR_BYTES_PER_STEP);
  first_value[0] = low.x, first_value[1] = low.y, first_value[2] = high.x, first_value[3] = high.y;
  second_value[0] = low.z, second_value[1] = low.w, second_value[2] = high.z, second_value[3] = high.w;
}
DEVICE void load_states_row(const char* shared, int offset, int step, float* v) {  // of B or C
  const float4 four = load4(shared + offset + step * BC_BYTES_PER_STEP);
  v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}
