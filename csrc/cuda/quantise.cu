// A tensor in FP8 with one scale, and its largest element: both in one pass over it.
//
// Codes are made by the device's own conversion from sm_89 on, elsewhere by torch's arithmetic on bits; both round to
// nearest, ties to even. Numbers beyond the format's range are cut first; what is not finite becomes nan.
#include "device.h"

#ifndef MEGACORE_EMULATED
#include <cuda_fp8.h>
#endif
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Float8_e5m2.h>

namespace megacore::gpu {
namespace {

template <bool kGradient>
__device__ __forceinline__ std::uint8_t code_of(float within) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return __nv_cvt_float_to_fp8(within, __NV_NOSAT, kGradient ? __NV_E5M2 : __NV_E4M3);
#else
    return kGradient ? c10::Float8_e5m2(within).x : c10::Float8_e4m3fn(within).x;
#endif
}

template <typename T, int V, bool kGradient>
__device__ __forceinline__ std::uint32_t encode(const T* x, std::uint8_t* codes, float scale) {
    constexpr float kMost = kGradient ? 57344.0f : 448.0f;
    const Vec<T, V> values = load<V>(x);
    Vec<std::uint8_t, V> out;
    std::uint32_t largest = 0;
    MEGACORE_UNROLL
    for (int i = 0; i < V; ++i) {
        const float value = static_cast<float>(values.at[i]), scaled = value * scale;
        const std::uint32_t bits = c10::bit_cast<std::uint32_t>(value) & 0x7fffffffu;  // in order, nan above all
        largest = Largest::of(largest, bits);
        const float within = scaled > kMost ? kMost : scaled < -kMost ? -kMost : scaled;
        out.at[i] = bits < 0x7f800000u && scaled == scaled ? code_of<kGradient>(within) : std::uint8_t{0x7f};
    }
    store<V>(codes, out);
    return largest;
}

template <typename T, int V, bool kGradient>
__global__ void __launch_bounds__(kThreads) quantise_kernel(Quantise in) {
    const T* x = static_cast<const T*>(in.x);
    const float scale = *in.scale;
    std::uint32_t largest = 0;
    const std::int64_t thread = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x, vectors = in.numel / V;
    for (std::int64_t i = thread; i < vectors; i += threads) {
        largest = Largest::of(largest, encode<T, V, kGradient>(x + i * V, in.codes + i * V, scale));
    }
    for (std::int64_t i = vectors * V + thread; i < in.numel; i += threads) {
        largest = Largest::of(largest, encode<T, 1, kGradient>(x + i, in.codes + i, scale));
    }
    largest = over_row<Largest>(largest, std::uint32_t{0});
    if (threadIdx.x == 0) atomic_max(in.largest, largest);
}

constexpr std::int64_t kMostQuantising = 2048;  // blocks

}  // namespace

void quantise(const Quantise& in, Dtype dtype, bool wide, Stream stream) {
    if (in.numel == 0) return;
    const std::int64_t vectors = vectors_of(in.numel, dtype, wide);
    const Dim grid = {blocks_for(ceil_div(vectors, kThreads), kMostQuantising), 1, 1}, block = {kThreads, 1, 1};
    by_vector(dtype, wide, [&](auto kind, auto vector) {
        using T = decltype(kind);
        if (in.gradient) return launch(quantise_kernel<T, vector(), true>, grid, block, 0, stream, in);
        launch(quantise_kernel<T, vector(), false>, grid, block, 0, stream, in);
    });
}

}  // namespace megacore::gpu
