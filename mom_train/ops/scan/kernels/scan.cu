// The selective scan for NVIDIA GPUs from compute capability 8.0, N = 16 states: see cuda.py, which compiles this file
// with ROWS_BF16 = 0 or 1 and calls its kernels. The grid is (CTAs over channels, spans, batch rows).
//
// The second number of launch bounds is how many CTAs an SM is to hold; it limits the registers.
#ifdef SCAN_ON_HOST
#include "device.h"
#else
#include "device.cuh"
#endif
#include "tile.cuh"
#include "forward.cuh"
#include "carry.cuh"
#include "backward.cuh"
#include "sums.cuh"

KERNEL(3) scan_forward(ARGUMENT Arguments a) { forward_pass<true>(a); }
KERNEL(4) scan_spans(ARGUMENT Arguments a) { forward_pass<false>(a); }
KERNEL(4) scan_carry(ARGUMENT Arguments a) { carry_pass(a); }
KERNEL(2) scan_backward(ARGUMENT Arguments a) { backward_pass(a); }
KERNEL(8) scan_sums(ARGUMENT Sums sums) { add_parts(sums); }
