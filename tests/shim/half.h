// fp16 and bf16 by their bits, rounding to nearest even, subnormals kept.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }

inline float __half2float(__half h) {
    const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16,
                   exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
    if (exponent == 0)
        return std::copysign(static_cast<float>(mantissa) * 0x1p-24f,
                             std::bit_cast<float>(sign | 0x3f800000u));
    return std::bit_cast<float>(sign | (exponent == 31 ? 255u : exponent + 112) << 23 |
                                mantissa << 13);
}

inline __half __float2half_rn(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000u) return {0x7fff};
    // 65520 and more round to infinity
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(
                                                 std::bit_cast<float>(magnitude) * 0x1p24f)))};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13)};
}

inline float __bfloat162float(__nv_bfloat16 h) {
    return std::bit_cast<float>(static_cast<uint32_t>(h.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
