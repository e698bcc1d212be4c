// A library that runs the kernels of mom_train/ops/scan/kernels/scan.cu on the host. Compile it with -I of that folder
// and -DROWS_BF16=0 or 1.
#define SCAN_ON_HOST
#include "device.h"
#include "scan.cu"

template <typename Argument>
static std::function<void()> call(void (*kernel)(Argument), const void* argument) {
  return [=] { kernel(*(const Argument*)argument); };
}

// Runs one kernel, its CTAs one after the other. Returns null, or what went wrong.
extern "C" const char* launch(const char* name, int gx, int gy, int gz, int threads, int shared_bytes,
                              const void* argument, unsigned seed) {
  const struct {
    const char* name;
    std::function<void()> kernel;
  } kernels[] = {{"scan_forward", call(scan_forward, argument)}, {"scan_spans", call(scan_spans, argument)},
                 {"scan_carry", call(scan_carry, argument)},     {"scan_backward", call(scan_backward, argument)},
                 {"scan_sums", call(scan_sums, argument)}};
  emulator::kernel = nullptr;
  for (const auto& k : kernels)
    if (!strcmp(k.name, name)) emulator::kernel = k.kernel;
  if (!emulator::kernel) return "no kernel of that name";
  emulator::failure = nullptr;
  emulator::state = seed | 1;
  for (int z = 0; z < gz; z++)
    for (int y = 0; y < gy; y++)
      for (int x = 0; x < gx && !emulator::failure; x++) {
        blockIdx = {(unsigned)x, (unsigned)y, (unsigned)z};
        emulator::run_cta(threads, shared_bytes);
      }
  return emulator::failure;
}

extern "C" int arguments_bytes() { return sizeof(Arguments); }
extern "C" int sums_bytes() { return sizeof(Sums); }
