#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define MIUE_LEVEL avx512
#define MIUE_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
