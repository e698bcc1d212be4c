// The backward pass. Each chunk of a span, from the last to the first:
//   1. Delta, x, the gradient g behind the gate and the gradient in front of it times the gate's slope, for all steps;
//   2. forward: the states at the starts of the blocks of four steps, from the kept state before the chunk;
//   3. each block, from the last to the first: forward through its steps, keeping states and decays in registers, with
//      the gradients of z and C on the way; then backward with the gradient G of the state, and all other gradients.
#pragma once
#include "tile.cuh"

#define SUMS_BYTES (WARPS * CHUNK * STATES * 4)  // sums over the channels of each warp: [warp][step][state]
#define SNAPSHOT_BYTES 2048                      // a tile of states
#define SNAPSHOTS (CHUNK / BLOCK - 1)            // that of the last block stays in registers

// Writes the sums over the CTA's channels for one chunk: half of the threads those of C, the others those of B.
DEVICE void write_sums(const Arguments& a, const char* sums, const Steps* steps, int slot, int thread) {
  const int step = (thread & 63) >> 2, row = steps->row[slot][step], which = thread >> 6;
  const float* from = (const float*)(sums + which * SUMS_BYTES) + step * STATES + (thread & 3) * 4;
  float4 v = *(const float4*)from;
#pragma unroll
  for (int w = 1; w < WARPS; w++) {
    const float4 other = *(const float4*)(from + w * CHUNK * STATES);
    v.x += other.x, v.y += other.y, v.z += other.z, v.w += other.w;
  }
  float* to = which ? a.grad_B : a.grad_C;
  if (row >= 0) *(float4*)(to + (blockIdx.x * a.tokens + row) * STATES + (thread & 3) * 4) = v;
}

// Finishes the sums over the warp's 32 channels for two steps at once: the lanes below 16 write the first of them.
DEVICE void put_sums(char* to, int first_step, float of_first, float of_second, int lane) {
  const bool upper = lane & 16;
  const float send = upper ? of_first : of_second, keep = upper ? of_second : of_first;
  *(float*)(to + first_step * (STATES * 4)) = keep + from_lane_xor(send, 16);
}

DEVICE void backward_pass(const Arguments& a) {
  DYNAMIC_SHARED;
  const Place p = place(a, 0);
  const int warp_bytes = 2 * PAIR_BYTES + SNAPSHOTS * SNAPSHOT_BYTES + 4 * PLANE_BYTES;
  char* bc = shared;
  char* sums = bc + CHUNK * BC_BYTES_PER_STEP;  // for the gradient of C, then of B
  Steps* steps = (Steps*)(sums + 2 * SUMS_BYTES);
  char* inputs = (char*)steps + STEPS_BYTES + p.warp * warp_bytes;  // pairs: Delta and x; then the two gradients
  char* snapshots = inputs + 2 * PAIR_BYTES;
  char* planes = snapshots + SNAPSHOTS * SNAPSHOT_BYTES;  // x, dt, z, grad_y
  float* bias = (float*)((char*)steps + STEPS_BYTES + WARPS * warp_bytes);
  float* grad_bias = bias + (a.modalities + 1) * CTA_CHANNELS + p.warp * (a.modalities + 1) * 32;  // (M + 1, 32)

  const int begin = p.span * a.span, end = min(begin + a.span, a.chunks);
  stage_dt_bias(a, bias, p.thread);
  for (int m = 0; m <= a.modalities; m++) grad_bias[m * 32 + p.lane] = 0.f;
  for (int i = p.thread; i < 2 * SUMS_BYTES / 4; i += 32 * WARPS) ((float*)sums)[i] = 0.f;  // warps without channels

  const int pair = p.lane & 15, half = p.lane >> 4, own = p.channel + own_channel(p.lane);
  Tile exponents = zero_tile(), G = zero_tile(), grad_A = zero_tile(), h;
  float grad_D = 0.f, D = 0.f;
  if (p.active) {
    exponents = load_exponents(a, p);
    D = a.D[own];
    G = load_tile(a.entering + ((long long)p.batch * a.channels + p.channel) * STATES, p.lane);
    through_spans(a, p, G, a.spans - 1, -1);
  }

  const row_t *x = a.x + p.channel, *dt = a.dt + p.channel, *z = a.z + p.channel, *grad_y = a.grad_y + p.channel;
  Step next = {-1, 0, 0.f};
  if (p.thread < CHUNK) store_step(steps, 0, p.thread, load_step(a, p.batch, end - 1, begin, end, p.thread));
  sync_cta();
  if (p.active) {
    const RowNumbers rows = rows_to_copy(steps, 0, p.lane);
    start_rows(planes, x, a.x_stride, rows, p.lane);
    start_rows(planes + PLANE_BYTES, dt, a.dt_stride, rows, p.lane);
    start_rows(planes + 2 * PLANE_BYTES, z, a.z_stride, rows, p.lane);
    start_rows(planes + 3 * PLANE_BYTES, grad_y, a.grad_y_stride, rows, p.lane);
  }
  four_t next_BC = load_BC(a, steps, 0, p.thread);
  if (p.thread < CHUNK) next = load_step(a, p.batch, end - 2, begin, end, p.thread);

  int at_B = (int)(bc - shared) + B_offset(p.lane), at_inputs = (int)(inputs - shared) + channel_of(p.lane, 0) * 8;
  int at_sums = (int)(sums - shared) + p.warp * CHUNK * STATES * 4 +
                ((p.lane >> 4) * STATES + (p.lane & 12) + (p.lane & 3)) * 4;
  int at_snapshots = (int)(snapshots - shared) + p.lane * 16;
  KEEP_IN_REGISTER(at_B);
  KEEP_IN_REGISTER(at_inputs);
  KEEP_IN_REGISTER(at_sums);
  KEEP_IN_REGISTER(at_snapshots);
  const bool odd = p.lane & 4;

  for (int chunk = end - 1; chunk >= begin; chunk--) {
    const int slot = (end - 1 - chunk) & 3, next_slot = (slot + 1) & 3;
    if (p.active) h = load_own(a.states + tile_offset(a, p, chunk, a.chunks), p.lane);
    sync_cta();  // every warp is done with B, C and the sums of the chunk before
    if (chunk < end - 1) write_sums(a, sums, steps, (slot + 3) & 3, p.thread);
    store_BC(bc, p.thread, next_BC);
    if (p.thread < CHUNK) store_step(steps, next_slot, p.thread, next);
    if (p.active) {
      wait_for_copies();
      sync_warp();
#pragma unroll 4
      for (int u = 0; u < CHUNK / 2; u++) {
        const int s = 2 * u + half, i = s * 16 + pair;
        const pair_t raw_x = ((const pair_t*)planes)[i], raw_dt = ((const pair_t*)(planes + PLANE_BYTES))[i];
        const pair_t raw_z = ((const pair_t*)(planes + 2 * PLANE_BYTES))[i];
        const pair_t raw_g = ((const pair_t*)(planes + 3 * PLANE_BYTES))[i];
        const float2 b = *(const float2*)(bias + steps->modality[slot][s] * CTA_CHANNELS + p.warp * 32 + 2 * pair);
        const float z0 = first(raw_z), z1 = second(raw_z), g0 = first(raw_g), g1 = second(raw_g);
        const float sigmoid0 = sigmoid(z0), sigmoid1 = sigmoid(z1), silu0 = z0 * sigmoid0, silu1 = z1 * sigmoid1;
        ((float4*)inputs)[i] = make_float4(softplus(first(raw_dt) + b.x), softplus(second(raw_dt) + b.y),
                                           first(raw_x), second(raw_x));
        ((float4*)(inputs + PAIR_BYTES))[i] =
            make_float4(g0 * silu0, g1 * silu1, g0 * fmaf(silu0, 1.f - sigmoid0, sigmoid0),
                        g1 * fmaf(silu1, 1.f - sigmoid1, sigmoid1));
      }
    }
    sync_cta();  // B, C, the next steps and this warp's inputs are there; the sums may be written again
    if (chunk > begin) {
      if (p.active) {
        const RowNumbers rows = rows_to_copy(steps, next_slot, p.lane);
        start_rows(planes, x, a.x_stride, rows, p.lane);
        start_rows(planes + PLANE_BYTES, dt, a.dt_stride, rows, p.lane);
        start_rows(planes + 2 * PLANE_BYTES, z, a.z_stride, rows, p.lane);
        start_rows(planes + 3 * PLANE_BYTES, grad_y, a.grad_y_stride, rows, p.lane);
      }
      next_BC = load_BC(a, steps, next_slot, p.thread);
    }
    if (p.thread < CHUNK) next = load_step(a, p.batch, chunk - 2, begin, end, p.thread);
    if (!p.active) continue;

#pragma unroll 1
    for (int block = 0; block < CHUNK - BLOCK; block += BLOCK) {
      store_own((float*)(shared + at_snapshots + block / BLOCK * SNAPSHOT_BYTES), h, 0);
      const float4 reset4 = *(const float4*)&steps->reset[slot][block];
      const float resets[BLOCK] = {reset4.x, reset4.y, reset4.z, reset4.w};
#pragma unroll
      for (int u = 0; u < BLOCK; u++) {
        float delta[4], x_[4], B[4];
        load_pairs(shared, at_inputs, block + u, delta, x_);
        load_states_row(shared, at_B, block + u, B);
        FOR_TILE h.at[k][j] = fmaf(exp2_of(fmaf(delta[k], exponents.at[k][j], resets[u])), h.at[k][j],
                                   delta[k] * x_[k] * B[j]);
      }
    }

#pragma unroll 1
    for (int block = CHUNK - BLOCK; block >= 0; block -= BLOCK) {
      Tile before[BLOCK], decays[BLOCK];
      float of_last = 0.f;
      const float4 reset4 = *(const float4*)&steps->reset[slot][block];
      const float resets[BLOCK] = {reset4.x, reset4.y, reset4.z, reset4.w};
#pragma unroll
      for (int u = 0; u < BLOCK; u++) {
        const int s = block + u;
        float delta[4], x_[4], g[4], slope[4], B[4], C[4], y[4];
        load_pairs(shared, at_inputs, s, delta, x_);
        load_pairs(shared, at_inputs + PAIR_BYTES, s, g, slope);
        load_states_row(shared, at_B, s, B);
        load_states_row(shared, at_B ^ 64, s, C);
        before[u] = h;
        FOR_TILE {
          decays[u].at[k][j] = exp2_of(fmaf(delta[k], exponents.at[k][j], resets[u]));
          h.at[k][j] = fmaf(decays[u].at[k][j], h.at[k][j], delta[k] * x_[k] * B[j]);
          y[k] = j ? fmaf(h.at[k][j], C[j], y[k]) : h.at[k][j] * C[j];
        }
        const float of_C = sum_over_channels(h, g);
        if (u & 1) put_sums(shared + at_sums, s - 1, of_last, of_C, p.lane);
        of_last = of_C;
        const float own_x = odd ? x_[1] : x_[0];
        grad_D = fmaf(odd ? g[1] : g[0], own_x, grad_D);
        const int row = steps->row[slot][s];
        const long long at = row * (long long)a.grad_stride + own * (int)sizeof(row_t);  // bytes
        store_in_row(row, bytes_behind(a.grad_z, at),
                     (odd ? slope[1] : slope[0]) * fmaf(D, own_x, sum_over_states(y, odd)));
      }
      float grad_raw[BLOCK];
#pragma unroll
      for (int u = BLOCK - 1; u >= 0; u--) {
        const int s = block + u;
        float delta[4], x_[4], g[4], slope[4], B[4], C[4], input[4], grad_input[4], grad_exponent[4];
        load_pairs(shared, at_inputs, s, delta, x_);
        load_pairs(shared, at_inputs + PAIR_BYTES, s, g, slope);
        load_states_row(shared, at_B, s, B);
        load_states_row(shared, at_B ^ 64, s, C);
        const float own_x = odd ? x_[1] : x_[0], own_delta = odd ? delta[1] : delta[0];
        const float past_states = (odd ? g[1] : g[0]) * D;  // taken here, so that g needs no registers below
#pragma unroll
        for (int k = 0; k < 4; k++) input[k] = delta[k] * x_[k];
        FOR_TILE {
          G.at[k][j] = fmaf(g[k], C[j], G.at[k][j]);
          grad_input[k] = j ? fmaf(G.at[k][j], B[j], grad_input[k]) : G.at[k][j] * B[j];
        }
        const float of_B = sum_over_channels(G, input);
        if (!(u & 1)) put_sums(shared + at_sums + SUMS_BYTES, s, of_B, of_last, p.lane);
        of_last = of_B;
        FOR_TILE {
          G.at[k][j] *= decays[u].at[k][j];
          const float e = G.at[k][j] * before[u].at[k][j];  // the gradient of Delta * A
          grad_A.at[k][j] = fmaf(e, delta[k], grad_A.at[k][j]);
          grad_exponent[k] = j ? fmaf(e, exponents.at[k][j], grad_exponent[k]) : e * exponents.at[k][j];
        }
        const float of_input = sum_over_states(grad_input, odd), of_exponent = sum_over_states(grad_exponent, odd);
        grad_raw[u] = fmaf(own_x, of_input, of_exponent * LN2) * slope_of(own_delta);
        const int row = steps->row[slot][s];
        const long long at = row * (long long)a.grad_stride + own * (int)sizeof(row_t);  // bytes
        store_in_row(row, bytes_behind(a.grad_x, at), fmaf(own_delta, of_input, past_states));
        store_in_row(row, bytes_behind(a.grad_dt, at), grad_raw[u]);
      }
      if (block > 0) h = load_own((const float*)(shared + at_snapshots + (block / BLOCK - 1) * SNAPSHOT_BYTES), 0);

      const int4 m = *(const int4*)&steps->modality[slot][block];
      if (same_in_warp(m.x == m.y && m.x == m.z && m.x == m.w)) {
        grad_bias[m.x * 32 + p.lane] += (grad_raw[0] + grad_raw[1]) + (grad_raw[2] + grad_raw[3]);
      } else {
        grad_bias[m.x * 32 + p.lane] += grad_raw[0];
        grad_bias[m.y * 32 + p.lane] += grad_raw[1];
        grad_bias[m.z * 32 + p.lane] += grad_raw[2];
        grad_bias[m.w * 32 + p.lane] += grad_raw[3];
      }
    }
  }
  sync_cta();
  write_sums(a, sums, steps, (end - begin - 1) & 3, p.thread);
  if (!p.active) return;
  const long long flat = p.batch * (long long)a.spans + p.span;
  store_tile(a.grad_A + (flat * a.channels + p.channel) * STATES, grad_A, p.lane);
  a.grad_D[flat * a.channels + own] = grad_D;
  for (int m = 0; m < a.modalities; m++)
    a.grad_dt_bias[(flat * a.modalities + m) * a.channels + own] = grad_bias[m * 32 + p.lane];
  if (p.span == 0) store_tile(a.leaving + ((long long)p.batch * a.channels + p.channel) * STATES, G, p.lane);
}
