// mom_train/ops/scan/kernels/device.cuh for the host: one CTA at a time, every thread of it a fiber.
//
// A fiber runs until it waits for others, and which one runs next is random. What real hardware would punish only now
// and then is punished always here: shared memory holds NaN until it is written, a copy into it lands when its thread
// waits for its copies and not before, and the bytes after the shared memory that was asked for are watched.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define DEVICE static inline
#define KERNEL(ctas_per_sm) static void
#define ARGUMENT const
#define DYNAMIC_SHARED char* shared = emulator::memory
#define KEEP_IN_REGISTER(v) (void)(v)
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct uint2 { unsigned x, y; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
using std::max;
using std::min;
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx;

namespace emulator {
const int MEMORY = 256 << 10, STACK = 64 << 10, LANES = 32;
struct Copy { char* to; const char* from; bool valid; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<Copy> copies;
  int thread, exchanges;
  bool done;
};
alignas(1024) static char memory[MEMORY];
static std::vector<Fiber> fibers;
static std::vector<int> ready, at_cta_barrier, at_warp_barrier[32];
static float exchanged[32][2][LANES];  // of two exchanges in turn: a lane may be one ahead of another
static ucontext_t scheduler;
static Fiber* current;
static int living;
static std::function<void()> kernel;
static const char* failure;
static uint32_t state;

static uint32_t random_number() {  // xorshift (Marsaglia, 2003)
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}
static void wait_with(std::vector<int>& barrier, int count) {
  barrier.push_back(current->thread);
  if ((int)barrier.size() == count) {
    ready.insert(ready.end(), barrier.begin(), barrier.end());
    barrier.clear();
  }
  swapcontext(&current->context, &scheduler);
}
static void run_thread() {
  kernel();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}
static void run_cta(int threads, int shared_bytes) {
  memset(memory, 0xff, MEMORY);  // NaN as floats, -1 as integers
  fibers.resize(threads);
  ready.clear();
  living = threads;
  for (int i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.thread = i, f.exchanges = 0, f.done = false;
    f.stack.resize(STACK);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = STACK, f.context.uc_link = nullptr;
    makecontext(&f.context, run_thread, 0);
    ready.push_back(i);
  }
  while (living && !failure) {
    if (ready.empty()) {
      failure = "deadlock: no thread can go on";
      return;
    }
    const size_t k = random_number() % ready.size();
    current = &fibers[ready[k]];
    ready[k] = ready.back();
    ready.pop_back();
    threadIdx = {(unsigned)current->thread, 0, 0};
    swapcontext(&scheduler, &current->context);
    if (current->done) {
      living--;
      if (!current->copies.empty()) failure = "a thread ended with copies under way";
    }
  }
  for (int i = shared_bytes; i < MEMORY; i++)
    if (memory[i] != (char)0xff) failure = "a write behind the shared memory that was asked for";
}
}  // namespace emulator

static inline void sync_cta() { emulator::wait_with(emulator::at_cta_barrier, emulator::living); }
static inline void sync_warp() {
  emulator::wait_with(emulator::at_warp_barrier[emulator::current->thread / 32], emulator::LANES);
}
static inline float from_lane_xor(float v, int mask) {
  const int turn = emulator::current->exchanges++ & 1, thread = emulator::current->thread;
  emulator::exchanged[thread / 32][turn][thread % 32] = v;
  sync_warp();
  return emulator::exchanged[thread / 32][turn][thread % 32 ^ mask];
}
static inline int warp_index() { return emulator::current->thread / 32; }
static inline bool same_in_warp(bool condition) {  // it does differ in a lane if the sum is neither 0 nor 32
  float count = condition;
  for (int mask = 1; mask < 32; mask *= 2) count += from_lane_xor(count, mask);
  if (count != 0 && count != 32) emulator::failure = "a condition that must be the same in a warp is not";
  return condition;
}
static inline void shared_max(int* at, int v) { *at = max(*at, v); }
static inline void shared_min(int* at, int v) { *at = min(*at, v); }
static inline void start_copy(void* to, const void* from, bool valid) {
  if (((uintptr_t)to | (uintptr_t)from) % 16) emulator::failure = "a copy of 16 bytes that is not aligned";
  emulator::current->copies.push_back({(char*)to, (const char*)from, valid});
}
static inline void wait_for_copies() {
  for (const auto& copy : emulator::current->copies) {
    if (copy.valid) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
  }
  emulator::current->copies.clear();
}
static inline float as_float(unsigned v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
static inline unsigned short to_bf16(float v) {  // to nearest, ties to even
  uint32_t u;
  memcpy(&u, &v, 4);
  return v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static inline float exp2_of(float v) { return exp2f(v); }
static inline float reciprocal(float v) { return 1.f / v; }
static inline void store_in_row(int row, unsigned short* to, float v) {
  if (row >= 0) *to = to_bf16(v);
}
static inline void store_in_row(int row, float* to, float v) {
  if (row >= 0) *to = v;
}
