// What is done to many tensors in one launch: sums of squares, and a step of Adam or AdamW (Loshchilov and Hutter 2019,
// algorithms 1 and 2). Each block takes some thousand elements of one tensor, which it finds in the launch's table.
#include "device.h"

namespace megacore::gpu {
namespace {

constexpr int kEach = 4;  // elements that a thread takes at once
constexpr std::int64_t kOfStep = std::int64_t{kThreads} * kEach * 4;      // elements of a block
constexpr std::int64_t kOfSquares = std::int64_t{kThreads} * kEach * 16;

// The tensor of a block: the last one that begins with it or before (empty ones begin with their follower).
__device__ __forceinline__ int tensor_of(const std::int32_t* first, int count, std::int32_t block) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first[middle] <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// A thread's squares in float32, and all others in double.
template <typename T>
__device__ __forceinline__ double sum_squares(const T* x, std::int64_t begin, std::int64_t end) {
    float sum = 0;
    for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const float value = static_cast<float>(x[i]);
        sum += value * value;
    }
    return static_cast<double>(sum);
}

template <typename T>
__device__ __forceinline__ double sum_squares_wide(const T* x, std::int64_t begin, std::int64_t end) {
    constexpr int V = kWide<T>;
    float sum = 0;
    const std::int64_t whole = begin + (end - begin) / V * V;
    for (std::int64_t i = begin + std::int64_t{threadIdx.x} * V; i < whole; i += std::int64_t{kThreads} * V) {
        const Vec<T, V> values = load<V>(x + i);
        MEGACORE_UNROLL
        for (int j = 0; j < V; ++j) {
            const float value = static_cast<float>(values.at[j]);
            sum += value * value;
        }
    }
    return static_cast<double>(sum) + sum_squares(x, whole, end);
}

template <typename T>
__device__ __forceinline__ double sum_squares(const void* x, std::int64_t begin, std::int64_t end) {
    const T* from = static_cast<const T*>(x);
    const bool wide = reinterpret_cast<std::uintptr_t>(x) % 16 == 0;  // blocks begin at whole vectors
    return wide ? sum_squares_wide(from, begin, end) : sum_squares(from, begin, end);
}

__global__ void __launch_bounds__(kThreads) squares_kernel(Squares in, double* parts) {
    const std::int32_t block = static_cast<std::int32_t>(blockIdx.x);
    const int own = tensor_of(in.first, in.count, block);
    const std::int64_t begin = (block - in.first[own]) * kOfSquares;
    const std::int64_t end = begin + kOfSquares < in.numel[own] ? begin + kOfSquares : in.numel[own];
    const Dtype dtype = static_cast<Dtype>(in.dtype[own]);
    double sum = 0;
    if (dtype == Dtype::f32) {
        sum = sum_squares<float>(in.tensors[own], begin, end);
    } else if (dtype == Dtype::bf16) {
        sum = sum_squares<c10::BFloat16>(in.tensors[own], begin, end);
    } else {
        sum = sum_squares<c10::Half>(in.tensors[own], begin, end);
    }
    sum = over_row<Sum>(sum, 0.0);
    if (threadIdx.x == 0) parts[block] = sum;
}

// A block for each tensor.
__global__ void __launch_bounds__(kThreads) squares_of_tensors_kernel(Squares in, const double* parts, double* out) {
    double sum = 0;
    for (std::int32_t i = in.first[blockIdx.x] + static_cast<std::int32_t>(threadIdx.x); i < in.first[blockIdx.x + 1];
         i += static_cast<std::int32_t>(kThreads)) {
        sum += parts[i];
    }
    sum = over_row<Sum>(sum, 0.0);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

struct Factors {
    float keep, pull, step, unbias, eps, beta1, rest1, beta2, rest2;
};

template <int V, typename Grad, typename Moment>
__device__ __forceinline__ void update(float* weights, const Grad* grads, Moment* firsts, Moment* seconds,
                                       c10::BFloat16* copies, const Factors& f) {
    Vec<float, V> weight = load<V>(weights);
    Vec<Moment, V> first = load<V>(firsts), second = load<V>(seconds);
    const Vec<Grad, V> grad = load<V>(grads);
    Vec<c10::BFloat16, V> copy;
    MEGACORE_UNROLL
    for (int i = 0; i < V; ++i) {
        const float g = static_cast<float>(grad.at[i]) + f.pull * weight.at[i];
        const float mean = f.beta1 * static_cast<float>(first.at[i]) + f.rest1 * g;
        const float square = f.beta2 * static_cast<float>(second.at[i]) + f.rest2 * g * g;
        weight.at[i] = f.keep * weight.at[i] - f.step * mean / (sqrtf(square) * f.unbias + f.eps);
        first.at[i] = Moment(mean);
        second.at[i] = Moment(square);
        copy.at[i] = c10::BFloat16(weight.at[i]);
    }
    store<V>(weights, weight);
    store<V>(firsts, first);
    store<V>(seconds, second);
    if (copies) store<V>(copies, copy);
}

template <typename Grad, typename Moment>
__global__ void __launch_bounds__(kThreads, 4) adamw_kernel(AdamW in) {
    __shared__ float corrections[2];
    if (*in.taken == 0) return;  // for all threads, or for none
    const std::int32_t block = static_cast<std::int32_t>(blockIdx.x);
    const int own = tensor_of(in.first, in.count, block);
    if (threadIdx.x == 0) {
        const double clock = static_cast<double>(*in.clock);
        corrections[0] = static_cast<float>(in.lr[own] / (1.0 - pow(in.beta1, clock)));
        corrections[1] = static_cast<float>(1.0 / sqrt(1.0 - pow(in.beta2, clock)));
    }
    sync_block();
    const Factors factors = {in.keep[own], in.pull[own], corrections[0], corrections[1], in.eps,
                             static_cast<float>(in.beta1), static_cast<float>(1.0 - in.beta1),
                             static_cast<float>(in.beta2), static_cast<float>(1.0 - in.beta2)};
    const std::int64_t begin = (block - in.first[own]) * kOfStep;
    const std::int64_t end = begin + kOfStep < in.numel[own] ? begin + kOfStep : in.numel[own];
    float* weights = in.weights[own];
    const Grad* grads = static_cast<const Grad*>(in.grads[own]);
    Moment* firsts = static_cast<Moment*>(in.first_moments[own]);
    Moment* seconds = static_cast<Moment*>(in.second_moments[own]);
    c10::BFloat16* copies = static_cast<c10::BFloat16*>(in.copies[own]);
    const std::int64_t whole = in.wide[own] ? begin + (end - begin) / kEach * kEach : begin;
    for (std::int64_t i = begin + std::int64_t{threadIdx.x} * kEach; i < whole; i += std::int64_t{kThreads} * kEach) {
        update<kEach>(weights + i, grads + i, firsts + i, seconds + i, copies ? copies + i : nullptr, factors);
    }
    for (std::int64_t i = whole + threadIdx.x; i < end; i += kThreads) {
        update<1>(weights + i, grads + i, firsts + i, seconds + i, copies ? copies + i : nullptr, factors);
    }
}

}  // namespace

std::int64_t squares_blocks(std::int64_t numel) { return ceil_div(numel, kOfSquares); }

void squares(const Squares& in, double* parts, double* out, Stream stream) {
    if (in.count == 0) return;
    const unsigned blocks = static_cast<unsigned>(in.first[in.count]);
    const Dim block = {kThreads, 1, 1};
    if (blocks) launch(squares_kernel, Dim{blocks, 1, 1}, block, 0, stream, in, parts);
    launch(squares_of_tensors_kernel, Dim{static_cast<unsigned>(in.count), 1, 1}, block, 0, stream, in, parts, out);
}

std::int64_t adamw_blocks(std::int64_t numel) { return ceil_div(numel, kOfStep); }

void adamw(const AdamW& in, Dtype grad, Dtype moment, Stream stream) {
    if (in.count == 0 || in.first[in.count] == 0) return;
    const Dim grid = {static_cast<unsigned>(in.first[in.count]), 1, 1}, block = {kThreads, 1, 1};
    by_dtype(grad, [&](auto kind) {
        using Grad = decltype(kind);
        if (moment == Dtype::f32) return launch(adamw_kernel<Grad, float>, grid, block, 0, stream, in);
        launch(adamw_kernel<Grad, c10::BFloat16>, grid, block, 0, stream, in);
    });
}

}  // namespace megacore::gpu
