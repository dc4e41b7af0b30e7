// Attention over parts of the keys, merged by their log-sum-exps. A thread has eight dimensions of one head
// of one row, and goes through the parts in index order: each is read once, S * Hq * (D + 1) elements a row,
// and the result written once. No thread needs another. The arithmetic is that of
// csrc/cpu/attention_merge_kernel.cpp.
#pragma once
#include <cmath>

#include "common/merge_weight.h"
#include "common/params.h"
#include "cuda/element.cuh"
#include "cuda/piece.cuh"

namespace tokenstep::cuda {

constexpr int kMergeThreads = 128;

template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_attention_kernel(const __grid_constant__ MergeParams params, bool aligned) {
  const int pieces = params.head_dim / kPieceElements;
  const int64_t index = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x, head_row = index / pieces;
  const int dim = static_cast<int>(index % pieces) * kPieceElements;
  const int64_t row = head_row / params.num_heads, head = head_row % params.num_heads;
  if (row >= params.num_queries) return;
  const float* const lses = params.lses + row * params.lse_row_stride + head * params.lse_head_stride;
  const T* const outs =
      static_cast<const T*>(params.outs) + row * params.row_stride + head * params.head_stride + dim;

  const float none = -INFINITY;
  float max = none;
  for (int part = 0; part < params.num_parts; ++part) {
    const float lse = lses[part * params.lse_part_stride];
    max = lse > max ? lse : max;
  }
  double sum = 0.0;
  float outputs[kPieceElements] = {};
  for (int part = 0; part < params.num_parts; ++part) {
    const float lse = lses[part * params.lse_part_stride];
    if (lse == none) continue;  // no keys: its output is not even read
    const float weight = merge_weight(lse, max);
    const Piece<T> in = load_piece(outs + part * params.part_stride, aligned);
    sum += weight;
#pragma unroll
    for (int i = 0; i < kPieceElements; ++i) outputs[i] = add(outputs[i], mul(weight, widen(in.element[i])));
  }
  const float divisor = sum == 0.0 ? 1.0f : static_cast<float>(sum);
  Piece<T> result;
#pragma unroll
  for (int i = 0; i < kPieceElements; ++i) result.element[i] = narrow<T>(add(div(outputs[i], divisor), 0.0f));
  store_piece(static_cast<T*>(params.out) + head_row * params.head_dim + dim, result, true);
  if (dim == 0) params.lse[head_row] = sum == 0.0 ? none : static_cast<float>(max + log(sum));
}

}  // namespace tokenstep::cuda
