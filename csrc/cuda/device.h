// What all kernels share: vectors of 16 bytes, rows that are read once, sums over the threads of a row, launching.
//
// Compiled by nvcc, or by a plain C++ compiler for the emulated device of the tests (MEGACORE_EMULATED).
#pragma once

#ifdef MEGACORE_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

#ifdef MEGACORE_EMULATED
#define MEGACORE_UNROLL
#define MEGACORE_DYNAMIC_SHARED(name) float* name = ::megacore::emulator::device().shared.data()
#else
#define MEGACORE_UNROLL _Pragma("unroll")
#define MEGACORE_DYNAMIC_SHARED(name) extern __shared__ float name[]
#endif

namespace megacore::gpu {

constexpr unsigned kWarp = 32;
constexpr unsigned kThreads = 256;   // of a block, where nothing else is said; __launch_bounds__(kThreads, blocks of a
                                     // multiprocessor) also keeps ptxas from saving registers until numbers spill
constexpr int kHeld = 4;             // vectors of a row that a thread keeps in registers
constexpr std::int64_t kPlainShared = 48 << 10;  // bytes that a block may have without asking
constexpr std::int64_t kMostShared = 96 << 10;   // bytes that we ask for at most; sm_80 has 163 KiB, sm_90 227 KiB

// ---- the device's own functions -----------------------------------------------------------------------------------

#ifdef MEGACORE_EMULATED
inline void sync_block() { emulator::sync_block(); }
template <typename T>
T shuffle_xor(T value, unsigned mask) { return emulator::shuffle_xor(value, mask); }
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float x, float y) { return x / y; }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline void atomic_max(std::uint32_t* to, std::uint32_t value) { *to = std::max(*to, value); }
#else
__device__ __forceinline__ void sync_block() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, unsigned mask) {
    return __shfl_xor_sync(0xffffffffu, value, static_cast<int>(mask));
}
// Off by some |x| / 2^23 of the result.
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
// Off by 2 ulp; 0 where y is above 2^126.
__device__ __forceinline__ float fast_divide(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ void atomic_max(std::uint32_t* to, std::uint32_t value) { atomicMax(to, value); }
#endif

// ---- vectors --------------------------------------------------------------------------------------------------------

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
    T at[V];
};

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes

template <int V, typename T>
__device__ __forceinline__ Vec<T, V> load(const T* from) {
    return *reinterpret_cast<const Vec<T, V>*>(from);
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const Vec<T, V>& value) {
    *reinterpret_cast<Vec<T, V>*>(to) = value;
}

// ---- rows -----------------------------------------------------------------------------------------------------------
// A row belongs to blockDim.x threads: a warp, or a block with blockDim.y = 1. Thread t takes vectors t, t + blockDim.x,
// ...; the same columns of every row.

// The first vectors of each thread, in registers; what is beyond is read again each time.
template <typename T, int V>
struct Held {
    Vec<T, V> own[kHeld];
    const T* row;
    std::int64_t width;

    __device__ __forceinline__ Held(const T* from, std::int64_t columns) : row(from), width(columns) {
        MEGACORE_UNROLL
        for (int k = 0; k < kHeld; ++k) {
            const std::int64_t column = place(k);
            if (column < width) own[k] = load<V>(row + column);
        }
    }

    static __device__ __forceinline__ std::int64_t place(std::int64_t k) {
        return (k * blockDim.x + threadIdx.x) * V;
    }

    // function(Vec&, column) of all vectors of this thread; changes of what is not in registers are lost.
    template <typename Function>
    __device__ __forceinline__ void each(const Function& function) {
        MEGACORE_UNROLL
        for (int k = 0; k < kHeld; ++k) {
            const std::int64_t column = place(k);
            if (column < width) function(own[k], column);
        }
        for (std::int64_t column = place(kHeld); column < width; column += std::int64_t{blockDim.x} * V) {
            Vec<T, V> values = load<V>(row + column);
            function(values, column);
        }
    }
};

struct Sum {
    template <typename T>
    static __device__ __forceinline__ T of(T a, T b) { return a + b; }
};

// nan, where there is one.
struct Largest {
    static __device__ __forceinline__ float of(float a, float b) { return a > b || a != a ? a : b; }
    static __device__ __forceinline__ std::uint32_t of(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }
};

template <typename Op, typename T>
__device__ __forceinline__ T over_warp(T value) {
    MEGACORE_UNROLL
    for (unsigned mask = kWarp / 2; mask > 0; mask /= 2) value = Op::of(value, shuffle_xor(value, mask));
    return value;
}

// Over the blockDim.x threads of a row; all get the result. `neutral` changes nothing. All threads of the block must
// come here if a row is theirs together. In a fixed order: the same bits in every run.
template <typename Op, typename T>
__device__ __forceinline__ T over_row(T value, T neutral) {
    __shared__ T scratch[kWarp];
    value = over_warp<Op>(value);
    if (blockDim.x == kWarp) return value;
    const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    sync_block();  // what was here before has been read by all
    if (lane == 0) scratch[warp] = value;
    sync_block();
    return over_warp<Op>(lane < blockDim.x / kWarp ? scratch[lane] : neutral);
}

// ---- launching ------------------------------------------------------------------------------------------------------

#ifdef MEGACORE_EMULATED
using Dim = emulator::Dim;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Dim grid, Dim block, std::int64_t shared, Stream, Arguments... arguments) {
    if (shared > kMostShared) throw std::runtime_error("emulated device: too much shared memory");
    emulator::run(grid, block, static_cast<std::size_t>(shared), [&] { kernel(Parameters(arguments)...); });
}
#else
using Dim = dim3;

inline void check(cudaError_t code) {
    if (code != cudaSuccess) throw std::runtime_error(std::string("megacore_cuda: ") + cudaGetErrorString(code));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Dim grid, Dim block, std::int64_t shared, Stream stream,
            Arguments... arguments) {
    if (shared > kPlainShared) {
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared)));
    }
    kernel<<<grid, block, static_cast<std::size_t>(shared), static_cast<cudaStream_t>(stream)>>>(
        Parameters(arguments)...);
    check(cudaGetLastError());
}
#endif

// function(T{}) with the type of a dtype.
template <typename Function>
void by_dtype(Dtype dtype, const Function& function) {
    if (dtype == Dtype::f32) return function(float{});
    if (dtype == Dtype::bf16) return function(c10::BFloat16{});
    function(c10::Half{});
}

// function(T{}, vector length) by dtype and whether whole vectors of 16 bytes can be read.
template <typename Function>
void by_vector(Dtype dtype, bool wide, const Function& function) {
    by_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        if (wide) return function(kind, std::integral_constant<int, kWide<T>>{});
        function(kind, std::integral_constant<int, 1>{});
    });
}

// Vectors of a row of `width` elements.
inline std::int64_t vectors_of(std::int64_t width, Dtype dtype, bool wide) {
    const std::int64_t vector = !wide ? 1 : dtype == Dtype::f32 ? kWide<float> : kWide<c10::Half>;
    return (width + vector - 1) / vector;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The least power of two that is no less than `count`, from 1 to `most`.
inline unsigned power_of_two(std::int64_t count, unsigned most) {
    unsigned power = 1;
    while (power < most && power < count) power *= 2;
    return power;
}

// Of a row of this many vectors: a warp if its registers hold it, else `most`.
inline Dim block_of_rows(std::int64_t vectors, unsigned most = kThreads) {
    const unsigned lanes = vectors <= std::int64_t{kWarp} * kHeld ? kWarp : most;
    return {lanes, lanes == kWarp ? kThreads / kWarp : 1, 1};
}

inline unsigned blocks_for(std::int64_t count, std::int64_t most) {
    return static_cast<unsigned>(count < most ? count : most);
}

}  // namespace megacore::gpu
