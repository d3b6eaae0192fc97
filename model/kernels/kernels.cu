// All kernels, compiled as one: by nvcc to PTX, or by a C++ compiler for the emulator.
#include "attend_rows.cuh"
#include "attend_tiles.cuh"
#include "low_rank.cuh"
#include "norm.cuh"
#include "rope.cuh"
#include "rows.cuh"
#include "sample.cuh"
#include "swiglu.cuh"
