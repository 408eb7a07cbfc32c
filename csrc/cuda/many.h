// Operations of torch over many tensors: tables of them, as many launches as there are tables.
#pragma once

#include "tensors.h"

namespace megacore::gpu {

// The sum of squares of each tensor, float64. See megacore/kernels/reference.py.
Tensor squares_op(std::vector<Tensor> tensors);

// See megacore/kernels/adamw.py.
void adamw_(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> first, std::vector<Tensor> second,
            std::vector<Tensor> copies, Tensor clock, Tensor taken, std::vector<double> lr,
            std::vector<double> weight_decay, bool coupled, double beta1, double beta2, double eps);

}  // namespace megacore::gpu
