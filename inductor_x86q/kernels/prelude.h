// int8 kernels for x86. A kernel is named by what decides its machine code, and holds nothing of a layer: sizes, strides and
// threads are arguments, and scales, zero points, bias and weight are data.
#include <immintrin.h>
#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#define X86Q_INLINE inline __attribute__((always_inline))
#define X86Q_LAMBDA __attribute__((always_inline))
