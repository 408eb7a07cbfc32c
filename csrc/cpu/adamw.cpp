// The loop of Adam and AdamW (Loshchilov and Hutter 2019, algorithms 1 and 2), written once and compiled for every
// instruction set.
//
// A step streams 28 bytes per parameter through the processor (fp32), so memory sets its pace: what matters is that
// everything happens in one pass, not how the arithmetic is spelled. The compiler vectorises the plain loop.
#include "adamw.h"

#include <cmath>

#include "targets.h"

namespace megacore {
namespace {

template <bool kCopy, typename Grad, typename Moment>
MEGACORE_INLINE void loop(const Span<Grad, Moment>& span, std::int64_t begin, std::int64_t end,
                          const Factors& factors) {
    float* __restrict__ weights = span.weights;
    const Grad* __restrict__ grads = span.grads;
    Moment* __restrict__ firsts = span.first;
    Moment* __restrict__ seconds = span.second;
    BFloat16* __restrict__ copies = span.copy;
    const Factors f = factors;
    for (std::int64_t i = begin; i < end; ++i) {
        const float old = weights[i];
        const float grad = load(grads[i]) + f.pull * old;
        const float first = f.beta1 * load(firsts[i]) + f.rest1 * grad;
        const float second = f.beta2 * load(seconds[i]) + f.rest2 * grad * grad;
        const float weight = f.keep * old - f.step * first / (std::sqrt(second) * f.unbias + f.eps);
        store(first, firsts[i]);
        store(second, seconds[i]);
        weights[i] = weight;
        if (kCopy) store(weight, copies[i]);
    }
}

template <typename Grad, typename Moment>
MEGACORE_INLINE void update(const Span<Grad, Moment>& span, std::int64_t begin, std::int64_t end,
                            const Factors& factors) {
    if (span.copy) {
        loop<true>(span, begin, end, factors);
    } else {
        loop<false>(span, begin, end, factors);
    }
}

#ifdef MEGACORE_X86
template <typename Grad, typename Moment>
MEGACORE_AVX512 void adamw_avx512(const Span<Grad, Moment>& span, std::int64_t begin, std::int64_t end,
                                  const Factors& factors) {
    update(span, begin, end, factors);
}

template <typename Grad, typename Moment>
MEGACORE_AVX2 void adamw_avx2(const Span<Grad, Moment>& span, std::int64_t begin, std::int64_t end,
                              const Factors& factors) {
    update(span, begin, end, factors);
}
#endif

}  // namespace

bool supported(Isa isa) {
#ifdef MEGACORE_X86
    if (isa == Isa::avx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2");
#endif
    return isa == Isa::portable;
}

template <typename Grad, typename Moment>
void adamw(Isa isa, const Span<Grad, Moment>& span, std::int64_t begin, std::int64_t end, const Factors& factors) {
#ifdef MEGACORE_X86
    if (isa == Isa::avx512) return adamw_avx512(span, begin, end, factors);
    if (isa == Isa::avx2) return adamw_avx2(span, begin, end, factors);
#endif
    (void)isa;
    update(span, begin, end, factors);
}

template void adamw(Isa, const Span<float, float>&, std::int64_t, std::int64_t, const Factors&);
template void adamw(Isa, const Span<float, BFloat16>&, std::int64_t, std::int64_t, const Factors&);
template void adamw(Isa, const Span<BFloat16, float>&, std::int64_t, std::int64_t, const Factors&);
template void adamw(Isa, const Span<BFloat16, BFloat16>&, std::int64_t, std::int64_t, const Factors&);

}  // namespace megacore
