// RMSNorm, SwiGLU and the statistics of logits over rows, forward and backward, in the widest vectors that the processor has.
#pragma once

#include <cstdint>

#include "adamw.h"

namespace megacore {

// y = x r (weight + offset), r = 1 / sqrt(mean(x^2) + eps), of rows [begin, end) of `width` elements each.
template <typename T>
struct Norm {
    const T* x;
    const T* weight;
    T* y;
    float* inverse;
    std::int64_t width;
    float eps, offset;
};

// dx = r (g w - n mean(g w n)), n = x r; and sum of g n over the rows, added to `grad_weight` [width].
template <typename T>
struct NormBackward {
    const T* grad;
    const T* x;
    const T* weight;
    const float* inverse;
    T* grad_x;
    float* grad_weight;
    std::int64_t width;
    float offset;
};

// y = silu(gate) up of x = [gate, up], both `width` wide; with `grad`, that of x instead.
template <typename T>
struct Gated {
    const T* x;
    const T* grad;
    T* out;
    std::int64_t width;
};

// Of rows of logits, `width` wide and not empty: the largest; the sums [3, rows] of exp(logit - largest), of the
// target's logit (0 where it is no column) and of all; and the exponentials themselves.
template <typename T>
struct Statistics {
    const T* logits;
    const std::int64_t* target;
    float* largest;
    float* sums;
    T* exp;
    std::int64_t width, rows;
};

// Sums of a row have a fixed order, whatever the instruction set: all give the same bits.
template <typename T>
void norm(Isa isa, const Norm<T>& in, std::int64_t begin, std::int64_t end);
template <typename T>
void norm_backward(Isa isa, const NormBackward<T>& in, std::int64_t begin, std::int64_t end);
template <typename T>
void gated(Isa isa, const Gated<T>& in, std::int64_t begin, std::int64_t end);
template <typename T>
void gated_backward(Isa isa, const Gated<T>& in, std::int64_t begin, std::int64_t end);
template <typename T>
void statistics(Isa isa, const Statistics<T>& in, std::int64_t begin, std::int64_t end);

}  // namespace megacore
