// Causal attention in blocks that stay in cache (Dao et al. 2022), forward and backward.
#pragma once

#include <cstdint>

#include "adamw.h"

namespace megacore {

// q, y and their gradients [b, s, n, d], k and v [b, s, m, d], each with its own strides of samples, tokens and heads
// (dims lie together); sums [b, n, s] is the log of the sum of exp. Gradients are only there in a backward.
template <typename T>
struct Heads {
    T* data;
    std::int64_t sample, token, head;

    T* at(std::int64_t b, std::int64_t h) const { return data + b * sample + h * head; }
};

template <typename T>
struct Attention {
    Heads<const T> q, k, v;
    Heads<T> y;
    float* sums;
    Heads<const T> grad;
    Heads<T> grad_q, grad_k, grad_v;
    std::int64_t batch, length, heads, groups, dims;  // `groups` query heads share a key head
    float scale;
};

// Of tasks [begin, end): samples times query heads forward, times key heads backward.
template <typename T>
void attend(const Attention<T>& in, std::int64_t begin, std::int64_t end);
template <typename T>
void attend_backward(const Attention<T>& in, std::int64_t begin, std::int64_t end);

}  // namespace megacore
