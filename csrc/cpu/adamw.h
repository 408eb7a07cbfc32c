// One Adam or AdamW step of a contiguous span of elements, in the widest vectors that the processor has.
#pragma once

#include <cstdint>

namespace megacore {

// A bfloat16: the upper half of a float.
struct BFloat16 {
    std::uint16_t bits;
};

// The arrays of a span, and its step. `copy` is null where no bfloat16 copy of the weights is wanted.
template <typename Grad, typename Moment>
struct Span {
    float* weights;
    const Grad* grads;
    Moment* first;
    Moment* second;
    BFloat16* copy;
};

// What is equal for all elements of a span, already rounded to float.
struct Factors {
    float keep;         // AdamW: 1 - lr * weight decay; Adam: 1
    float pull;         // AdamW: 0; Adam: weight decay, which pulls on the gradient
    float step;         // lr / (1 - beta1^t)
    float unbias;       // 1 / sqrt(1 - beta2^t)
    float eps;
    float beta1, rest1;  // rest1 = 1 - beta1
    float beta2, rest2;
};

// In order of preference; what a processor lacks is not chosen. All compute the same bits: nothing is contracted to
// fused multiply-adds, and square roots and quotients are correctly rounded in vectors too.
enum class Isa { avx512, avx2, portable };

bool supported(Isa isa);

template <typename Grad, typename Moment>
void adamw(Isa isa, const Span<Grad, Moment>& span, std::int64_t begin, std::int64_t end, const Factors& factors);

}  // namespace megacore
