// What the scan needs from the hardware. Tests compile the same kernels for the host with another version of this file
// (tests/ops/emulator/device.h), so nothing else in this folder uses PTX or an intrinsic of CUDA.
#pragma once
#define DEVICE static __device__ __forceinline__
#define KERNEL(ctas_per_sm) extern "C" __global__ void __launch_bounds__(32 * WARPS, ctas_per_sm)
#define ARGUMENT const __grid_constant__
#define DYNAMIC_SHARED extern __shared__ __align__(1024) char shared[]

DEVICE float exp2_of(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEVICE float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEVICE float as_float(unsigned v) { return __uint_as_float(v); }
DEVICE unsigned short to_bf16(float v) {
  unsigned short r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}

// The value of the lane whose number differs in the bits of `mask`.
DEVICE float from_lane_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
// The compiler knows that what comes from lane 0 is the same in all lanes, and branches on it without divergence.
DEVICE int warp_index() { return __shfl_sync(0xffffffffu, (int)(threadIdx.x >> 5), 0); }
DEVICE bool same_in_warp(bool condition) { return __shfl_sync(0xffffffffu, (int)condition, 0); }

DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_cta() { __syncthreads(); }
DEVICE void shared_max(int* at, int v) { atomicMax(at, v); }
DEVICE void shared_min(int* at, int v) { atomicMin(at, v); }

// Starts copying 16 bytes into shared memory, or zeros if not `valid`. They are there after wait_for_copies.
DEVICE void start_copy(void* to, const void* from, bool valid) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(to);
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Rounds and stores one value of a row; does nothing if `row` is -1. A predicate, because a branch costs more.
DEVICE void store_in_row(int row, unsigned short* to, float v) {
  asm volatile(
      "{ .reg .pred p; .reg .b16 h; cvt.rn.bf16.f32 h, %2; setp.ge.s32 p, %0, 0; @p st.global.b16 [%1], h; }"
      :
      : "r"(row), "l"(to), "f"(v)
      : "memory");
}
DEVICE void store_in_row(int row, float* to, float v) {
  asm volatile("{ .reg .pred p; setp.ge.s32 p, %0, 0; @p st.global.f32 [%1], %2; }"
               :
               : "r"(row), "l"(to), "f"(v)
               : "memory");
}

// Keeps an offset in a register; otherwise the compiler computes it again at every use.
#define KEEP_IN_REGISTER(v) asm("" : "+r"(v))
