// The loops of RMSNorm, SwiGLU and logits, written once and compiled for every instruction set.
//
// A row is read again while it is still in cache, so each passes through memory once. Sums run in kLanes parts, which
// vectors of any width can keep, and these are added in one order.
#include "rows.h"

#include <cmath>
#include <type_traits>

#include "targets.h"

namespace megacore {
namespace {

constexpr std::int64_t kLanes = 64;

MEGACORE_INLINE float sum_of(const float (&lanes)[kLanes]) {
    float parts[kLanes];
    for (std::int64_t i = 0; i < kLanes; ++i) parts[i] = lanes[i];
    for (std::int64_t half = kLanes / 2; half; half /= 2) {
        for (std::int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
    }
    return parts[0];
}

// The sum of term(i) for i in [0, width).
template <typename Term>
MEGACORE_INLINE float sum_over(std::int64_t width, const Term& term) {
    float lanes[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
    }
    for (std::int64_t lane = 0; i + lane < width; ++lane) lanes[lane] += term(i + lane);
    return sum_of(lanes);
}

template <typename T>
MEGACORE_INLINE void norm_rows(const Norm<T>& in, std::int64_t begin, std::int64_t end) {
    const std::int64_t width = in.width;
    const float eps = in.eps, offset = in.offset;
    const T* __restrict__ weight = in.weight;
    for (std::int64_t row = begin; row < end; ++row) {
        const T* __restrict__ x = in.x + row * width;
        T* __restrict__ y = in.y + row * width;
        const float squares = sum_over(width, [x](std::int64_t i) { return load(x[i]) * load(x[i]); });
        const float r = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
        in.inverse[row] = r;
        for (std::int64_t i = 0; i < width; ++i) store(load(x[i]) * r * (load(weight[i]) + offset), y[i]);
    }
}

template <typename T>
MEGACORE_INLINE void norm_rows_backward(const NormBackward<T>& in, std::int64_t begin, std::int64_t end) {
    const std::int64_t width = in.width;
    const float offset = in.offset;
    const T* __restrict__ weight = in.weight;
    float* __restrict__ grad_weight = in.grad_weight;
    for (std::int64_t row = begin; row < end; ++row) {
        const T* __restrict__ x = in.x + row * width;
        const T* __restrict__ grad = in.grad + row * width;
        T* __restrict__ grad_x = in.grad_x + row * width;
        const float r = in.inverse[row];
        const float product = sum_over(width, [=](std::int64_t i) {
            return load(grad[i]) * (load(weight[i]) + offset) * load(x[i]);
        });
        const float share = product * r * r / static_cast<float>(width);
        for (std::int64_t i = 0; i < width; ++i) {
            const float g = load(grad[i]), n = load(x[i]);
            grad_weight[i] += g * (n * r);
            store((g * (load(weight[i]) + offset) - n * share) * r, grad_x[i]);
        }
    }
}

template <typename T>
MEGACORE_INLINE void gated_rows(const Gated<T>& in, std::int64_t begin, std::int64_t end) {
    const std::int64_t width = in.width;
    for (std::int64_t row = begin; row < end; ++row) {
        const T* __restrict__ gate = in.x + 2 * row * width;
        const T* __restrict__ up = gate + width;
        T* __restrict__ out = in.out + row * width;
        for (std::int64_t i = 0; i < width; ++i) {
            const float u = load(gate[i]);
            store(u / (1.0f + exp_of(-u)) * load(up[i]), out[i]);
        }
    }
}

MEGACORE_INLINE void pull(float gate, float up, float grad, float& of_gate, float& of_up) {
    const float s = 1.0f / (1.0f + exp_of(-gate));
    of_gate = grad * up * s * (1.0f + gate * (1.0f - s));
    of_up = grad * gate * s;
}

template <typename T>
MEGACORE_INLINE void gated_rows_backward(const Gated<T>& in, std::int64_t begin, std::int64_t end) {
    const std::int64_t width = in.width;
    for (std::int64_t row = begin; row < end; ++row) {
        const T* __restrict__ gate = in.x + 2 * row * width;
        const T* __restrict__ up = gate + width;
        const T* __restrict__ grad = in.grad + row * width;
        T* __restrict__ of_gate = in.out + 2 * row * width;
        T* __restrict__ of_up = of_gate + width;
        if constexpr (std::is_same_v<T, float>) {
            for (std::int64_t i = 0; i < width; ++i) pull(gate[i], up[i], grad[i], of_gate[i], of_up[i]);
        } else {
            // Stores of 16 bits to two places would keep the loop from vectors: it works on float, run by run.
            for (std::int64_t start = 0; start < width; start += kLanes) {
                const std::int64_t count = width - start < kLanes ? width - start : kLanes;
                float gates[kLanes] = {}, ups[kLanes] = {}, grads[kLanes] = {};
                for (std::int64_t i = 0; i < count; ++i) gates[i] = load(gate[start + i]);
                for (std::int64_t i = 0; i < count; ++i) ups[i] = load(up[start + i]);
                for (std::int64_t i = 0; i < count; ++i) grads[i] = load(grad[start + i]);
                float to_gate[kLanes], to_up[kLanes];
                for (std::int64_t i = 0; i < kLanes; ++i) pull(gates[i], ups[i], grads[i], to_gate[i], to_up[i]);
                for (std::int64_t i = 0; i < count; ++i) store(to_gate[i], of_gate[start + i]);
                for (std::int64_t i = 0; i < count; ++i) store(to_up[i], of_up[start + i]);
            }
        }
    }
}

template <typename T>
MEGACORE_INLINE void statistics_rows(const Statistics<T>& in, std::int64_t begin, std::int64_t end) {
    const std::int64_t width = in.width;
    for (std::int64_t row = begin; row < end; ++row) {
        const T* __restrict__ logits = in.logits + row * width;
        T* __restrict__ out = in.exp + row * width;
        float lanes[kLanes], plain[kLanes] = {}, sums[kLanes] = {};
        for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = -HUGE_VALF;
        std::int64_t start = 0;
        for (; start + kLanes <= width; start += kLanes) {
            for (std::int64_t lane = 0; lane < kLanes; ++lane) {
                const float x = load(logits[start + lane]);
                lanes[lane] = x > lanes[lane] ? x : lanes[lane];
                plain[lane] += x;
            }
        }
        for (std::int64_t lane = 0; start + lane < width; ++lane) {
            const float x = load(logits[start + lane]);
            lanes[lane] = x > lanes[lane] ? x : lanes[lane];
            plain[lane] += x;
        }
        float largest = -HUGE_VALF;
        for (const float each : lanes) largest = each > largest ? each : largest;
        for (start = 0; start + kLanes <= width; start += kLanes) {
            float made[kLanes];
            for (std::int64_t lane = 0; lane < kLanes; ++lane) made[lane] = exp_of(load(logits[start + lane]) - largest);
            for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += made[lane];
            for (std::int64_t lane = 0; lane < kLanes; ++lane) store(made[lane], out[start + lane]);
        }
        for (std::int64_t lane = 0; start + lane < width; ++lane) {
            const float made = exp_of(load(logits[start + lane]) - largest);
            sums[lane] += made;
            store(made, out[start + lane]);
        }
        const std::int64_t target = in.target[row];
        in.largest[row] = largest;
        in.sums[row] = sum_of(sums);
        in.sums[in.rows + row] = target >= 0 && target < width ? load(logits[target]) : 0.0f;
        in.sums[2 * in.rows + row] = sum_of(plain);
    }
}

}  // namespace

#ifdef MEGACORE_X86
#define MEGACORE_DISPATCH(name, loop, Arguments)                                                               \
    template <typename T>                                                                                      \
    MEGACORE_AVX512 static void loop##_avx512(const Arguments<T>& in, std::int64_t begin, std::int64_t end) {  \
        loop(in, begin, end);                                                                                  \
    }                                                                                                          \
    template <typename T>                                                                                      \
    MEGACORE_AVX2 static void loop##_avx2(const Arguments<T>& in, std::int64_t begin, std::int64_t end) {      \
        loop(in, begin, end);                                                                                  \
    }                                                                                                          \
    template <typename T>                                                                                      \
    void name(Isa isa, const Arguments<T>& in, std::int64_t begin, std::int64_t end) {                         \
        if (isa == Isa::avx512) return loop##_avx512(in, begin, end);                                          \
        if (isa == Isa::avx2) return loop##_avx2(in, begin, end);                                              \
        loop(in, begin, end);                                                                                  \
    }                                                                                                          \
    template void name(Isa, const Arguments<float>&, std::int64_t, std::int64_t);                              \
    template void name(Isa, const Arguments<BFloat16>&, std::int64_t, std::int64_t);
#else
#define MEGACORE_DISPATCH(name, loop, Arguments)                                          \
    template <typename T>                                                                 \
    void name(Isa, const Arguments<T>& in, std::int64_t begin, std::int64_t end) {        \
        loop(in, begin, end);                                                             \
    }                                                                                     \
    template void name(Isa, const Arguments<float>&, std::int64_t, std::int64_t);         \
    template void name(Isa, const Arguments<BFloat16>&, std::int64_t, std::int64_t);
#endif

MEGACORE_DISPATCH(norm, norm_rows, Norm)
MEGACORE_DISPATCH(norm_backward, norm_rows_backward, NormBackward)
MEGACORE_DISPATCH(gated, gated_rows, Gated)
MEGACORE_DISPATCH(gated_backward, gated_rows_backward, Gated)
MEGACORE_DISPATCH(statistics, statistics_rows, Statistics)

}  // namespace megacore
