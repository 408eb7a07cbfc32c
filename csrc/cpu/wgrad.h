// Weight gradients: into [o, i] += grad^T x, for grad [t, o] and x [t, i], both bfloat16 or both float32.
#pragma once

#include <cstdint>

#include "adamw.h"

namespace megacore {

// What of the gradient a thread adds goes tile by tile, kTile outputs each.
constexpr std::int64_t kTile = 6;

template <typename T>
struct WeightGradient {
    const T* x;
    const T* grad;
    float* into;
    std::int64_t tokens, inputs, outputs;
};

// Whether this processor has the instructions: AVX-512 and, for bfloat16, its dot products.
bool wgrad_supported(bool narrow);

// Adds to the rows of tiles [begin, end). Sums run over the tokens in one order, however tiles are dealt.
template <typename T>
void wgrad(const WeightGradient<T>& in, std::int64_t begin, std::int64_t end);

}  // namespace megacore
