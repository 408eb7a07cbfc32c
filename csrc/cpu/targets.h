// How a plain loop is compiled once for every instruction set: inlined into a function for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "adamw.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MEGACORE_X86 1
#define MEGACORE_AVX2 __attribute__((target("avx2")))
#if defined(__clang__)
#define MEGACORE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define MEGACORE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#endif

// Inlined into a function for an instruction set, a loop is compiled for that set.
#define MEGACORE_INLINE inline __attribute__((always_inline))

namespace megacore {

MEGACORE_INLINE float load(float value) { return value; }

MEGACORE_INLINE float load(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
}

MEGACORE_INLINE void store(float value, float& to) { to = value; }

// To the nearest, ties to even; what is not a number stays one.
MEGACORE_INLINE void store(float value, BFloat16& to) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// exp to within two units in the last place: 2^n e^r with |r| <= ln(2) / 2, e^r by its series. Below -87.3 it is what is
// there, above 88.3 infinite. What is not a number stays one.
MEGACORE_INLINE float exp_of(float x) {
    const float clamped = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
    constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room behind the point
    const float n = (clamped * 1.44269504088896341f + round) - round;
    const float r = (clamped - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    float series = 1.0f / 5040.0f;
    series = series * r + 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = (series * r + 1.0f) * r + 1.0f;
    const std::int32_t power = (static_cast<std::int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, sizeof(scale));
    return x <= 88.3f ? series * scale : (x == x ? HUGE_VALF : x);
}

}  // namespace megacore
