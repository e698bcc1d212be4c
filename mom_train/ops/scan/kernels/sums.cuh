// Adds the partial gradients in their order: those of B and C over the CTAs of the channels, those of A, D and dt_bias
// over batch rows and spans.
#pragma once
#include "tile.cuh"

struct Sum {
  const float* parts;  // (terms, 4 * quads)
  void* sum;           // (4 * quads)
  long long quads;
  int terms, is_row;  // is_row: the sum has the type of the rows, else fp32
};
struct Sums {
  Sum of[5];
};

DEVICE void add_parts(const Sums& sums) {
  const Sum& s = sums.of[blockIdx.y];
  const long long i = blockIdx.x * (long long)(32 * WARPS) + threadIdx.x;
  if (i >= s.quads) return;
  const float4* parts = (const float4*)s.parts;
  float4 v = parts[i];
#pragma unroll 8
  for (int term = 1; term < s.terms; term++) {
    const float4 other = parts[term * s.quads + i];
    v.x += other.x, v.y += other.y, v.z += other.z, v.w += other.w;
  }
  if (s.is_row)
    ((four_t*)s.sum)[i] = to_rows(v);
  else
    ((float4*)s.sum)[i] = v;
}
