// A few rows of x by tiles of 16 rows of packed weights. A lane is an output. Per block of 32 columns the
// integers (or bfloat16 values) are multiplied and summed, and the sum enters the total with its scale:
//   total = scale * sum(q x) + total,  with minima also  total = minimum * sum(x) + total
// so that no weight is ever rounded.
// Of a few rows of x, operands go from packed bytes to registers; of more, they are unpacked once for all
// into the first-level cache, a chunk of columns at a time. Weights are read once per kPanelRows rows of x,
// and nothing of their size is materialised. The order of a row's operations is the same in all cases.
#include <algorithm>
#include <type_traits>

#include "cpu/fp_environment.h"
#include "cpu/linear.h"
#include "cpu/linear_bf16.h"
#include "cpu/linear_operands.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kPanelRows = 192;  // x of a panel stays in the second-level cache
constexpr int kChunkBlocks = 8;  // operands of a chunk: 8 KiB of bfloat16 pairs, 16 KiB of floats

// Operands straight from packed bytes.
template <class Arithmetic, WeightFormat kFormat>
struct Packed {
  const uint8_t* blocks;
  __attribute__((always_inline)) auto operand(int block, int pair, int vector) const {
    return Arithmetic::template operand<kFormat>(
        blocks + kTileRows * (block * block_bytes(kFormat) + scale_bytes(kFormat)), pair, vector);
  }
};

// Operands that have been unpacked.
template <class Arithmetic>
struct Unpacked {
  const typename Arithmetic::Operand* operands;
  __attribute__((always_inline)) const auto& operand(int block, int pair, int vector) const {
    return operands[(block * kPairs + pair) * Arithmetic::kVectors + vector];
  }
};

// A run of blocks of a tile, and the rows of x that meet it.
template <class Arithmetic>
struct Run {
  int num_blocks;
  const uint8_t* scales;  // of the first block, the next ones block_bytes further
  int block_bytes;
  const typename Arithmetic::Element* x;  // at the first block's columns
  int64_t x_stride;
  const float* sums;  // of x, at the first block
  int64_t sums_stride;
  float* totals;  // [rows, kTileRows]
};

// What stands beside the values of a block.
enum class Scaling { kNone, kScales, kScalesAndMinima };

constexpr Scaling scaling_of(WeightFormat format) {
  return !has_scales(format)  ? Scaling::kNone
         : has_minima(format) ? Scaling::kScalesAndMinima
                              : Scaling::kScales;
}

template <Scaling kScaling>
TOKENSTEP_VEC Floats add_block(const uint8_t* scales, int vector, Floats sum, const float* x_sum,
                               Floats total) {
  if constexpr (kScaling == Scaling::kNone) return total + sum;
  const auto* of_vector = reinterpret_cast<const Half*>(scales) + vector * kLanes;
  total = multiply_add(load(of_vector), sum, total);
  if constexpr (kScaling == Scaling::kScalesAndMinima)
    total = multiply_add(load(of_vector + kTileRows), all(*x_sum), total);
  return total;
}

template <class Arithmetic, Scaling kScaling, int kRows, class Source>
void multiply_run(const Source& source, const Run<Arithmetic>& run) {
  constexpr int kVectors = Arithmetic::kVectors;
  Floats total[kRows][kVectors];
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) total[row][v] = load(run.totals + row * kTileRows + v * kLanes);
  for (int block = 0; block < run.num_blocks; ++block) {
    Floats sum[kRows][kVectors] = {};
    const auto* x = run.x + block * kBlockColumns;
#pragma GCC unroll 16
    for (int pair = 0; pair < kPairs; ++pair) {
      for (int v = 0; v < kVectors; ++v) {
        const auto w = source.operand(block, pair, v);
        for (int row = 0; row < kRows; ++row)
          sum[row][v] = Arithmetic::multiply(w, x + row * run.x_stride + 2 * pair, sum[row][v]);
      }
    }
    const uint8_t* scales = run.scales + block * run.block_bytes;
    for (int row = 0; row < kRows; ++row)
      for (int v = 0; v < kVectors; ++v)
        total[row][v] = add_block<kScaling>(scales, v, sum[row][v], run.sums + row * run.sums_stride + block,
                                            total[row][v]);
  }
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) store(run.totals + row * kTileRows + v * kLanes, total[row][v]);
}

// The form for a number of rows that is only known now: kLeast ... kMost.
template <class Arithmetic, Scaling kScaling, int kLeast, int kMost, class Source>
void multiply_rows(int rows, const Source& source, const Run<Arithmetic>& run) {
  if constexpr (kMost > kLeast)
    if (rows < kMost) return multiply_rows<Arithmetic, kScaling, kLeast, kMost - 1>(rows, source, run);
  multiply_run<Arithmetic, kScaling, kMost>(source, run);
}

// All blocks of a tile with a panel of rows.
template <class Arithmetic, WeightFormat kFormat>
void multiply_tile(int num_blocks, int rows, Run<Arithmetic> run) {
  constexpr Scaling kScaling = scaling_of(kFormat);
  constexpr int kMaxRows = Arithmetic::kMaxRows, kVectors = Arithmetic::kVectors;
  using Straight = Packed<Arithmetic, kFormat>;
  if (rows <= kMaxRows) {
    run.num_blocks = num_blocks;
    return multiply_rows<Arithmetic, kScaling, 1, kMaxRows>(rows, Straight{run.scales}, run);
  }
  const int groups = (rows + kMaxRows - 1) / kMaxRows;
  for (int first = 0; first < num_blocks; first += kChunkBlocks) {
    Run<Arithmetic> chunk = run;
    chunk.num_blocks = std::min(kChunkBlocks, num_blocks - first);
    chunk.scales += first * run.block_bytes;
    const auto multiply_groups = [&](const auto& source) {
      // Their sizes differ by one at most, and so are at least half of kMaxRows.
      for (int group = 0; group < groups; ++group) {
        const int begin = rows * group / groups, end = rows * (group + 1) / groups;
        Run<Arithmetic> some = chunk;
        some.x += begin * run.x_stride + first * kBlockColumns;
        some.sums += begin * run.sums_stride + first;
        some.totals += begin * kTileRows;
        multiply_rows<Arithmetic, kScaling, kMaxRows / 2, kMaxRows>(end - begin, source, some);
      }
    };
    const Straight straight{chunk.scales};
    if constexpr (Arithmetic::is_operand(kFormat)) {
      multiply_groups(straight);
    } else {
      typename Arithmetic::Operand operands[kChunkBlocks * kPairs * kVectors];
      for (int block = 0; block < chunk.num_blocks; ++block)
#pragma GCC unroll 16
        for (int pair = 0; pair < kPairs; ++pair)
          for (int v = 0; v < kVectors; ++v)
            operands[(block * kPairs + pair) * kVectors + v] = straight.operand(block, pair, v);
      multiply_groups(Unpacked<Arithmetic>{operands});
    }
  }
}

// Totals of one row and tile, with what is added, rounded once into the result.
template <class T>
void finish_row(const LinearParams& params, int64_t row, int64_t first_output, int count, float* totals) {
  if (params.bias) {
    const T* bias = static_cast<const T*>(params.bias) + first_output;
    for (int i = 0; i < count; ++i) totals[i] += widen(bias[i]);
  }
  if (params.residual) {
    const T* residual = static_cast<const T*>(params.residual) + row * params.residual_stride + first_output;
    for (int i = 0; i < count; ++i) totals[i] += widen(residual[i]);
  }
  T* out = static_cast<T*>(params.out) + row * params.weights->rows() + first_output;
  for (int i = 0; i < count; ++i) narrow(totals[i], out[i]);
}

template <class Arithmetic, WeightFormat kFormat>
void multiply_tiles(const LinearParams& params, const LinearInputs& inputs, int64_t first_tile,
                    int64_t end_tile) {
  const PackedMatrix& weights = *params.weights;
  const int64_t blocks = weights.blocks();
  alignas(64) float totals[kPanelRows * kTileRows];
  for (int64_t panel = 0; panel < params.num_rows; panel += kPanelRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, params.num_rows - panel));
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      std::fill(totals, totals + rows * kTileRows, 0.0f);
      const auto* x = static_cast<const typename Arithmetic::Element*>(inputs.x);
      multiply_tile<Arithmetic, kFormat>(static_cast<int>(blocks), rows,
                                         {.num_blocks = 0,
                                          .scales = weights.tile(tile),
                                          .block_bytes = kTileRows * block_bytes(kFormat),
                                          .x = x + panel * inputs.x_stride,
                                          .x_stride = inputs.x_stride,
                                          .sums = inputs.sums + panel * blocks,
                                          .sums_stride = has_minima(kFormat) ? blocks : 0,
                                          .totals = totals});
      const int64_t first_output = tile * kTileRows;
      const int count = static_cast<int>(std::min<int64_t>(kTileRows, weights.rows() - first_output));
      with_element_of(params.dtype, [&](auto element) {
        for (int row = 0; row < rows; ++row)
          finish_row<decltype(element)>(params, panel + row, first_output, count, totals + row * kTileRows);
      });
    }
  }
}

// x is multiplied as it is, or widened first.
bool takes_bfloat16([[maybe_unused]] const LinearParams& params) {
#if defined(__AVX512BF16__)
  return params.dtype == DType::kBFloat16;
#else
  return false;
#endif
}

template <class Arithmetic>
void multiply_tiles_of(const LinearParams& params, const LinearInputs& inputs, int64_t first_tile,
                       int64_t end_tile) {
  switch (params.weights->format()) {
    case WeightFormat::kBFloat16:
      return multiply_tiles<Arithmetic, WeightFormat::kBFloat16>(params, inputs, first_tile, end_tile);
    case WeightFormat::kQ4_0:
      return multiply_tiles<Arithmetic, WeightFormat::kQ4_0>(params, inputs, first_tile, end_tile);
    case WeightFormat::kQ4_1:
      return multiply_tiles<Arithmetic, WeightFormat::kQ4_1>(params, inputs, first_tile, end_tile);
    case WeightFormat::kQ8_0:
      return multiply_tiles<Arithmetic, WeightFormat::kQ8_0>(params, inputs, first_tile, end_tile);
  }
}

// Four chains, whatever the instruction set.
template <class T>
float sum_of_block(const T* x) {
  float sums[4] = {};
  for (int i = 0; i < kBlockColumns; i += 4)
    for (int j = 0; j < 4; ++j) sums[j] += widen(x[i + j]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

LinearScratch linear_scratch(const LinearParams& params) {
  const bool widens = !takes_bfloat16(params) && params.dtype != DType::kFloat32;
  return {widens ? params.num_rows * params.weights->columns() : 0,
          has_minima(params.weights->format()) ? params.num_rows * params.weights->blocks() : 0};
}

LinearInputs prepare_inputs(const LinearParams& params, float* widened, float* sums) {
  const FpEnvironment environment;
  const int64_t columns = params.weights->columns(), blocks = params.weights->blocks();
  const bool widens = linear_scratch(params).widened > 0;
  with_element_of(params.dtype, [&](auto element) {
    for (int64_t row = 0; row < params.num_rows; ++row) {
      const auto* x = static_cast<const decltype(element)*>(params.x) + row * params.x_stride;
      if (widens)
        for (int64_t i = 0; i < columns; ++i) widened[row * columns + i] = widen(x[i]);
      if (has_minima(params.weights->format()))
        for (int64_t block = 0; block < blocks; ++block)
          sums[row * blocks + block] = sum_of_block(x + block * kBlockColumns);
    }
  });
  return {widens ? widened : params.x, widens ? columns : params.x_stride, sums};
}

void store_floats(const float* values, int64_t count, DType dtype, void* out) {
  with_element_of(dtype, [&](auto element) {
    for (int64_t i = 0; i < count; ++i) narrow(values[i], static_cast<decltype(element)*>(out)[i]);
  });
}

void linear_tiles(const LinearParams& params, const LinearInputs& inputs, int64_t first_tile,
                  int64_t end_tile) {
  const FpEnvironment environment;
#if defined(__AVX512BF16__)
  if (takes_bfloat16(params) && params.weights->format() == WeightFormat::kBFloat16)
    return multiply_bf16(params, inputs, first_tile, end_tile,
                         [&](int64_t row, int64_t first_output, int count, float* sums) {
                           finish_row<BFloat>(params, row, first_output, count, sums);
                         });
  if (takes_bfloat16(params))
    return multiply_tiles_of<BFloatArithmetic>(params, inputs, first_tile, end_tile);
#endif
  multiply_tiles_of<FloatArithmetic>(params, inputs, first_tile, end_tile);
}

}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
