// Products of bfloat16 rows with packed bfloat16 weights by the CPU's own dot product. Groups of up to 8 rows
// and 3 tiles keep their sums in registers over all columns: of each pair of columns, 3 vectors of weights
// and a broadcast pair of each row make 24 products. Weights come from memory for the first group of rows,
// from the second-level cache for the others, which meanwhile fetch those of the next tiles. Each sum is one
// chain over the columns in order, however rows and tiles are grouped. For linear_kernel.cpp alone.
#pragma once
#if defined(__AVX512BF16__)
#include <algorithm>

#include "cpu/linear.h"
#include "cpu/linear_operands.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kGroupRows = 8, kGroupTiles = 3;
constexpr int kFetchingGroups = 3;  // groups of rows, behind the first, that fetch a third each
constexpr int kPairBytes = kTileRows * 4;

struct Bf16Group {
  int64_t num_pairs;
  const BFloat* x;
  int64_t x_stride;
  const uint8_t* tiles;
  int64_t tile_bytes;
  const uint8_t* ahead;  // weights to fetch, a line a pair; null: none
  float* sums;           // [rows, tiles, kTileRows]
};

template <int kRows, int kTiles>
void multiply_group(const Bf16Group& group) {
  Floats sum[kRows][kTiles] = {};
  for (int64_t pair = 0; pair < group.num_pairs; ++pair) {
    if constexpr (kRows > kGroupRows / 2 - 1)  // fewer rows are never behind others
      if (group.ahead) _mm_prefetch(group.ahead + pair * kPairBytes, _MM_HINT_T1);
    BFloatArithmetic::Operand w[kTiles];
    for (int tile = 0; tile < kTiles; ++tile)
      w[tile] = _mm512_load_si512(group.tiles + tile * group.tile_bytes + pair * kPairBytes);
    for (int row = 0; row < kRows; ++row)
      for (int tile = 0; tile < kTiles; ++tile)
        sum[row][tile] =
            BFloatArithmetic::multiply(w[tile], group.x + row * group.x_stride + 2 * pair, sum[row][tile]);
  }
  for (int row = 0; row < kRows; ++row)
    for (int tile = 0; tile < kTiles; ++tile)
      store(group.sums + (row * kTiles + tile) * kTileRows, sum[row][tile]);
}

// The form for numbers that are only known now.
template <int kRows, int kTiles>
void multiply_group(int rows, int tiles, const Bf16Group& group) {
  if constexpr (kTiles > 1)
    if (tiles < kTiles) return multiply_group<kRows, kTiles - 1>(rows, tiles, group);
  if constexpr (kRows > 1)
    if (rows < kRows) return multiply_group<kRows - 1, kTiles>(rows, tiles, group);
  multiply_group<kRows, kTiles>(group);
}

// Calls finish(row, first output, outputs, sums) for each row and group of tiles in [first_tile, end_tile).
template <class Finish>
void multiply_bf16(const LinearParams& params, const LinearInputs& inputs, int64_t first_tile,
                   int64_t end_tile, Finish&& finish) {
  const PackedMatrix& weights = *params.weights;
  const int64_t tiles = end_tile - first_tile, rows = params.num_rows;
  // One row is bound by memory, and one stream of it is quickest.
  const int64_t most_tiles = rows == 1 ? 1 : kGroupTiles;
  const int64_t tile_groups = (tiles + most_tiles - 1) / most_tiles;
  const int64_t row_groups = (rows + kGroupRows - 1) / kGroupRows;
  alignas(64) float sums[kGroupRows * kGroupTiles * kTileRows];
  Bf16Group group{.num_pairs = weights.columns() / 2,
                  .x = nullptr,
                  .x_stride = inputs.x_stride,
                  .tiles = nullptr,
                  .tile_bytes = weights.tile_bytes(),
                  .ahead = nullptr,
                  .sums = sums};
  for (int64_t i = 0; i < tile_groups; ++i) {  // of sizes that differ by one at most, as those of rows
    const int64_t tile = first_tile + tiles * i / tile_groups;
    const int64_t next_tile = first_tile + tiles * (i + 1) / tile_groups;
    const int64_t first_output = tile * kTileRows;
    const int64_t count = std::min(next_tile * kTileRows, weights.rows()) - first_output;
    group.tiles = weights.tile(tile);
    for (int64_t j = 0; j < row_groups; ++j) {
      const int64_t row = rows * j / row_groups, next_row = rows * (j + 1) / row_groups;
      const int64_t tile_ahead = next_tile + j - 1;
      const bool fetches = j > 0 && j <= kFetchingGroups && tile_ahead < end_tile;
      group.ahead = fetches ? weights.tile(tile_ahead) : nullptr;
      group.x = static_cast<const BFloat*>(inputs.x) + row * inputs.x_stride;
      multiply_group<kGroupRows, kGroupTiles>(static_cast<int>(next_row - row),
                                              static_cast<int>(next_tile - tile), group);
      for (int64_t r = row; r < next_row; ++r)
        finish(r, first_output, static_cast<int>(count), sums + (r - row) * (next_tile - tile) * kTileRows);
    }
  }
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
#endif
