// How a thread keeps its share of sums over rows, such as a weight's gradient: V columns of a vector lie a whole row of
// vectors apart, so that neighbouring threads touch neighbouring numbers. column_sums puts them in order.
#pragma once

#include "device.h"

namespace megacore::gpu {

constexpr std::int64_t kShares = 384;  // blocks that take the rows of a backward: fixed, so that all cards add alike

template <int V>
__device__ __forceinline__ std::int64_t share_place(std::int64_t column, int i, std::int64_t width) {
    return i * (width / V) + column / V;
}

}  // namespace megacore::gpu
