// What precedes the backward pass if rows are cut into spans: the gradient of the state before each span if no gradient
// enters at its end, and the factor of what does enter.
#pragma once
#include "tile.cuh"

// The first reset in the span, or NEVER. All threads of the CTA call it and agree.
DEVICE int first_reset(const Arguments& a, int batch, int begin, int end, int thread, int* agreed) {
  if (thread == 0) *agreed = NEVER;
  sync_cta();
  const int high = min(end * CHUNK, a.length);
  int first = NEVER;
  for (int low = begin * CHUNK; low < high && first == NEVER; low += 8 * 32 * WARPS) {
    int found = NEVER;
#pragma unroll
    for (int u = 7; u >= 0; u--) {
      const int t = low + thread + u * 32 * WARPS;
      if (t < high && a.position[batch * a.length + t] == 0) found = t;
    }
    if (found != NEVER) shared_min(agreed, found);
    sync_cta();
    first = *agreed;
    sync_cta();
  }
  return first;
}

DEVICE void carry_pass(const Arguments& a) {
  DYNAMIC_SHARED;
  const Place p = place(a, 1);  // nothing needs what leaves the first span
  const int warp_bytes = PAIR_BYTES + 3 * PLANE_BYTES;
  char* bc = shared;
  Steps* steps = (Steps*)(shared + CHUNK * BC_BYTES_PER_STEP);
  char* inputs = shared + CHUNK * BC_BYTES_PER_STEP + STEPS_BYTES + p.warp * warp_bytes;
  char* planes = inputs + PAIR_BYTES;  // dt, z, grad_y
  float* bias = (float*)(shared + CHUNK * BC_BYTES_PER_STEP + STEPS_BYTES + WARPS * warp_bytes);

  const int begin = p.span * a.span;
  int end = min(begin + a.span, a.chunks);
  bool was_reset = false;
  stage_dt_bias(a, bias, p.thread);
  const int reset = first_reset(a, p.batch, begin, end, p.thread, (int*)(steps + 1));
  if (reset != NEVER) end = reset / CHUNK + 1, was_reset = true;  // no gradient passes it

  const int pair = p.lane & 15, half = p.lane >> 4;
  Tile exponents = zero_tile(), G = zero_tile();
  float total[4] = {0.f, 0.f, 0.f, 0.f};
  if (p.active) exponents = load_exponents(a, p);

  const row_t *dt = a.dt + p.channel, *z = a.z + p.channel, *grad_y = a.grad_y + p.channel;
  Step next = {-1, 0, 0.f};
  if (p.thread < CHUNK) store_step(steps, 0, p.thread, load_step(a, p.batch, end - 1, begin, end, p.thread));
  sync_cta();
  if (p.active) {
    const RowNumbers rows = rows_to_copy(steps, 0, p.lane);
    start_rows(planes, dt, a.dt_stride, rows, p.lane);
    start_rows(planes + PLANE_BYTES, z, a.z_stride, rows, p.lane);
    start_rows(planes + 2 * PLANE_BYTES, grad_y, a.grad_y_stride, rows, p.lane);
  }
  four_t next_BC = load_BC(a, steps, 0, p.thread);
  if (p.thread < CHUNK) next = load_step(a, p.batch, end - 2, begin, end, p.thread);

  int at_C = ((int)(bc - shared) + B_offset(p.lane)) ^ 64;
  int at_inputs = (int)(inputs - shared) + channel_of(p.lane, 0) * 8;
  KEEP_IN_REGISTER(at_C);
  KEEP_IN_REGISTER(at_inputs);

  for (int chunk = end - 1; chunk >= begin; chunk--) {
    const int slot = (end - 1 - chunk) & 3, next_slot = (slot + 1) & 3;
    sync_cta();  // every warp is done with C of the chunk before
    store_BC(bc, p.thread, next_BC);
    if (p.thread < CHUNK) store_step(steps, next_slot, p.thread, next);
    if (p.active) {
      wait_for_copies();
      sync_warp();
#pragma unroll 4
      for (int u = 0; u < CHUNK / 2; u++) {
        const int s = 2 * u + half, i = s * 16 + pair;
        const pair_t raw_dt = ((const pair_t*)planes)[i], raw_z = ((const pair_t*)(planes + PLANE_BYTES))[i];
        const pair_t raw_g = ((const pair_t*)(planes + 2 * PLANE_BYTES))[i];
        const float2 b = *(const float2*)(bias + steps->modality[slot][s] * CTA_CHANNELS + p.warp * 32 + 2 * pair);
        const float z0 = first(raw_z), z1 = second(raw_z);
        ((float4*)inputs)[i] =
            make_float4(softplus(first(raw_dt) + b.x), softplus(second(raw_dt) + b.y),
                        first(raw_g) * (z0 * sigmoid(z0)), second(raw_g) * (z1 * sigmoid(z1)));
      }
    }
    sync_cta();  // C, the next steps and this warp's inputs are there
    if (chunk > begin) {
      if (p.active) {
        const RowNumbers rows = rows_to_copy(steps, next_slot, p.lane);
        start_rows(planes, dt, a.dt_stride, rows, p.lane);
        start_rows(planes + PLANE_BYTES, z, a.z_stride, rows, p.lane);
        start_rows(planes + 2 * PLANE_BYTES, grad_y, a.grad_y_stride, rows, p.lane);
      }
      next_BC = load_BC(a, steps, next_slot, p.thread);
    }
    if (p.thread < CHUNK) next = load_step(a, p.batch, chunk - 2, begin, end, p.thread);
    if (!p.active) continue;

#pragma unroll 1
    for (int block = CHUNK - BLOCK; block >= 0; block -= BLOCK) {
      const float4 reset4 = *(const float4*)&steps->reset[slot][block];
      const float resets[BLOCK] = {reset4.x, reset4.y, reset4.z, reset4.w};
#pragma unroll
      for (int u = BLOCK - 1; u >= 0; u--) {
        float delta[4], g[4], C[4];  // g: the gradient behind the gate
        load_pairs(shared, at_inputs, block + u, delta, g);
        load_states_row(shared, at_C, block + u, C);
        FOR_TILE G.at[k][j] =
            exp2_of(fmaf(delta[k], exponents.at[k][j], resets[u])) * fmaf(g[k], C[j], G.at[k][j]);
#pragma unroll
        for (int k = 0; k < 4; k++) total[k] += delta[k];
      }
    }
  }
  if (!p.active) return;
  store_own(a.own + tile_offset(a, p, p.span, a.spans), G, p.lane);
  FOR_TILE G.at[k][j] = was_reset ? 0.f : exp2_of(total[k] * exponents.at[k][j]);
  store_own(a.decay + tile_offset(a, p, p.span, a.spans), G, p.lane);
}
