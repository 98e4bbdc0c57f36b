// The tensor-core product of one warp. Its host twin is in tests/shim/mma_twin.h. Inline PTX is
// here, in device.cuh and in hopper/wgmma.cuh.
#pragma once
#include "device.cuh"

namespace miue {

// d[n] += A B_n for N column tiles: A 16 x 16, B_n 16 x 8, d[n] 16 x 8, fp16 in, fp32 out, one
// warp. Fragments as the PTX ISA lays them out for mma.m16n8k16 (g = lane / 4, t = lane % 4; each
// register is two fp16, low half first):
//   a[0] = A[g][2t..], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..]
//   b[0] = B[2t..][g], b[1] = B[2t+8..][g]
//   d[0], d[1] = D[g][2t..], d[2], d[3] = D[g+8][2t..]
template <int N>
__device__ __forceinline__ void mma_row(float (&d)[N][4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[N][2]) {
#ifdef __CUDACC__
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[n][0]), "r"(b[n][1]));
    }
#else
    shim::mma_row(d, a, b);
#endif
}

}  // namespace miue
