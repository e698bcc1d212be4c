// The forward pass: y, the states before each chunk, and the last state. And, with OUTPUT false, the pass that precedes
// it if rows are cut into spans: the state after each span if zero enters, and the factor of what does enter.
#pragma once
#include "tile.cuh"


// The last reset in the span, or -1. All threads of the CTA call it and agree.
DEVICE int last_reset(const Arguments& a, int batch, int begin, int end, int thread, int* agreed) {
  if (thread == 0) *agreed = -1;
  sync_cta();
  const int low = begin * CHUNK;
  int last = -1;
  for (int high = min(end * CHUNK, a.length); high > low && last < 0; high -= 8 * 32 * WARPS) {
    int found = -1;
#pragma unroll
    for (int u = 7; u >= 0; u--) {
      const int t = high - 1 - thread - u * 32 * WARPS;
      if (t >= low && a.position[batch * a.length + t] == 0) found = t;
    }
    if (found >= 0) shared_max(agreed, found);
    sync_cta();
    last = *agreed;
    sync_cta();
  }
  return last;
}

template <bool OUTPUT>
DEVICE void forward_pass(const Arguments& a) {
  DYNAMIC_SHARED;
  const Place p = place(a, 0);
  const int warp_bytes = (OUTPUT ? 2 * PAIR_BYTES + 3 * PLANE_BYTES : PAIR_BYTES + 2 * PLANE_BYTES);
  char* bc = shared;
  Steps* steps = (Steps*)(shared + CHUNK * BC_BYTES_PER_STEP);
  char* inputs = shared + CHUNK * BC_BYTES_PER_STEP + STEPS_BYTES + p.warp * warp_bytes;  // pairs of Delta and Delta x
  char* gates = inputs + PAIR_BYTES;  // OUTPUT: for each channel of a pair, silu(z) and D x
  char* planes = inputs + (OUTPUT ? 2 : 1) * PAIR_BYTES;  // x, dt and, if OUTPUT, z
  float* bias = (float*)(shared + CHUNK * BC_BYTES_PER_STEP + STEPS_BYTES + WARPS * warp_bytes);

  int begin = p.span * a.span;
  const int end = min(begin + a.span, a.chunks);
  bool was_reset = false;
  stage_dt_bias(a, bias, p.thread);
  if (!OUTPUT) {  // what comes before the last reset does not matter
    const int last = last_reset(a, p.batch, begin, end, p.thread, (int*)(steps + 1));
    if (last >= 0) begin = last / CHUNK, was_reset = true;
  }

  const int pair = p.lane & 15, half = p.lane >> 4;  // who computes what belongs to a channel, not to a state
  Tile exponents = zero_tile(), h = zero_tile();
  float total[4] = {0.f, 0.f, 0.f, 0.f}, D0 = 0.f, D1 = 0.f;
  if (p.active) {
    exponents = load_exponents(a, p);
    if (OUTPUT) {
      D0 = a.D[p.channel + 2 * pair], D1 = a.D[p.channel + 2 * pair + 1];
      if (a.entering) h = load_tile(a.entering + ((long long)p.batch * a.channels + p.channel) * STATES, p.lane);
      through_spans(a, p, h, 0, 1);
    }
  }

  const row_t *x = a.x + p.channel, *dt = a.dt + p.channel, *z = a.z + p.channel;
  Step next = {-1, 0, 0.f};
  if (p.thread < CHUNK) store_step(steps, 0, p.thread, load_step(a, p.batch, begin, begin, end, p.thread));
  sync_cta();
  if (p.active) {
    const RowNumbers rows = rows_to_copy(steps, 0, p.lane);
    start_rows(planes, x, a.x_stride, rows, p.lane);
    start_rows(planes + PLANE_BYTES, dt, a.dt_stride, rows, p.lane);
    if (OUTPUT) start_rows(planes + 2 * PLANE_BYTES, z, a.z_stride, rows, p.lane);
  }
  four_t next_BC = load_BC(a, steps, 0, p.thread);
  if (p.thread < CHUNK) next = load_step(a, p.batch, begin + 1, begin, end, p.thread);

  int at_B = (int)(bc - shared) + B_offset(p.lane), at_inputs = (int)(inputs - shared) + channel_of(p.lane, 0) * 8;
  int at_gate = (int)(gates - shared) + own_channel(p.lane) * 8;
  KEEP_IN_REGISTER(at_B);
  KEEP_IN_REGISTER(at_inputs);
  KEEP_IN_REGISTER(at_gate);
  const bool odd = p.lane & 4;
  row_t* y = a.y + p.channel + own_channel(p.lane);

  for (int chunk = begin; chunk < end; chunk++) {
    const int slot = (chunk - begin) & 3, next_slot = (slot + 1) & 3;
    sync_cta();  // every warp is done with B and C of the chunk before
    store_BC(bc, p.thread, next_BC);
    if (p.thread < CHUNK) store_step(steps, next_slot, p.thread, next);
    if (p.active) {
      if (OUTPUT && a.states) store_own(a.states + tile_offset(a, p, chunk, a.chunks), h, p.lane);
      wait_for_copies();
      sync_warp();
#pragma unroll 4
      for (int u = 0; u < CHUNK / 2; u++) {
        const int s = 2 * u + half, i = s * 16 + pair;
        const pair_t raw_x = ((const pair_t*)planes)[i], raw_dt = ((const pair_t*)(planes + PLANE_BYTES))[i];
        const float2 b = *(const float2*)(bias + steps->modality[slot][s] * CTA_CHANNELS + p.warp * 32 + 2 * pair);
        const float x0 = first(raw_x), x1 = second(raw_x);
        const float delta0 = softplus(first(raw_dt) + b.x), delta1 = softplus(second(raw_dt) + b.y);
        ((float4*)inputs)[i] = make_float4(delta0, delta1, delta0 * x0, delta1 * x1);
        if (OUTPUT) {
          const pair_t raw_z = ((const pair_t*)(planes + 2 * PLANE_BYTES))[i];
          const float z0 = first(raw_z), z1 = second(raw_z);
          ((float4*)gates)[i] = make_float4(z0 * sigmoid(z0), D0 * x0, z1 * sigmoid(z1), D1 * x1);
        }
      }
    }
    sync_cta();  // B, C, the next steps and this warp's inputs are there
    if (chunk + 1 < end) {
      if (p.active) {
        const RowNumbers rows = rows_to_copy(steps, next_slot, p.lane);
        start_rows(planes, x, a.x_stride, rows, p.lane);
        start_rows(planes + PLANE_BYTES, dt, a.dt_stride, rows, p.lane);
        if (OUTPUT) start_rows(planes + 2 * PLANE_BYTES, z, a.z_stride, rows, p.lane);
      }
      next_BC = load_BC(a, steps, next_slot, p.thread);
    }
    if (p.thread < CHUNK) next = load_step(a, p.batch, chunk + 2, begin, end, p.thread);
    if (!p.active) continue;

#pragma unroll 1
    for (int block = 0; block < CHUNK; block += BLOCK) {
      const float4 reset4 = *(const float4*)&steps->reset[slot][block];
      const int4 row4 = *(const int4*)&steps->row[slot][block];
      const float resets[BLOCK] = {reset4.x, reset4.y, reset4.z, reset4.w};
      const int rows[BLOCK] = {row4.x, row4.y, row4.z, row4.w};
#pragma unroll
      for (int u = 0; u < BLOCK; u++) {
        const int s = block + u;
        float delta[4], input[4], B[4];
        load_pairs(shared, at_inputs, s, delta, input);
        load_states_row(shared, at_B, s, B);
        FOR_TILE {
          const float decay = exp2_of(fmaf(delta[k], exponents.at[k][j], resets[u]));
          h.at[k][j] = fmaf(decay, h.at[k][j], input[k] * B[j]);
        }
        if (OUTPUT) {
          float C[4], sums[4];
          load_states_row(shared, at_B ^ 64, s, C);
          FOR_TILE sums[k] = j ? fmaf(h.at[k][j], C[j], sums[k]) : h.at[k][j] * C[j];
          const float2 gate = *(const float2*)(shared + at_gate + s * PAIR_BYTES_PER_STEP);
          store_in_row(rows[u], row_at(y, rows[u], a.y_stride), (sum_over_states(sums, odd) + gate.y) * gate.x);
        } else {
#pragma unroll
          for (int k = 0; k < 4; k++) total[k] += delta[k];
        }
      }
    }
  }
  if (!p.active) return;
  if (OUTPUT) {
    if (end == a.chunks) store_tile(a.leaving + ((long long)p.batch * a.channels + p.channel) * STATES, h, p.lane);
  } else {
    store_own(a.own + tile_offset(a, p, p.span, a.spans), h, p.lane);
    FOR_TILE h.at[k][j] = was_reset ? 0.f : exp2_of(total[k] * exponents.at[k][j]);
    store_own(a.decay + tile_offset(a, p, p.span, a.spans), h, p.lane);
  }
}
