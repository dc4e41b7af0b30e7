// What happens to parameters between steps: a slot of a Sampler gets a request or is released, and parameters
// that only the device knows go into the rows of a call.
#pragma once
#include "common/sampling_history.h"
#include "cuda/ptx.cuh"

namespace tokenstep::cuda {

// One block. The old history's counts become zero before the new one's are written.
constexpr unsigned kSlotThreads = 512;
__global__ void __launch_bounds__(kSlotThreads)
    update_slot_kernel(const __grid_constant__ SlotUpdate update) {
  const int thread = static_cast<int>(threadIdx.x);
  clear_history(*update.slot, thread, kSlotThreads);
  __syncthreads();
  fill_lists(update, thread, kSlotThreads);
  if (thread == 0) *update.slot = update.row;
}

// ---- parameters in arrays on the device: one thread a row -----------------------------------------------
struct RowFieldReader {
  const RowFieldsParams& p;
  int row;

  __device__ bool has(RowField field) const { return array(field).data != nullptr; }
  __device__ const RowFieldArray& array(RowField field) const { return p.fields[static_cast<int>(field)]; }
  template <class T>
  __device__ T at(RowField field) const {
    return static_cast<const T*>(array(field).data)[row * array(field).stride];
  }
  __device__ void read(RowField field, float& to) const {
    if (!has(field)) return;
    switch (array(field).dtype) {
      case DType::kFloat32:
        to = at<float>(field);
        break;
      case DType::kFloat64:
        to = static_cast<float>(at<double>(field));
        break;
      case DType::kInt32:
        to = static_cast<float>(at<int32_t>(field));
        break;
      default:
        to = static_cast<float>(at<int64_t>(field));
    }
  }
  // A whole number as 64 bits, and whether it is negative.
  struct Whole {
    uint64_t bits;
    bool negative;
  };
  __device__ Whole whole(RowField field) const {
    switch (array(field).dtype) {
      case DType::kInt32:
        return {static_cast<uint64_t>(int64_t{at<int32_t>(field)}), at<int32_t>(field) < 0};
      case DType::kUInt32:
        return {at<uint32_t>(field), false};
      case DType::kUInt64:
        return {at<uint64_t>(field), false};
      default:
        return {static_cast<uint64_t>(at<int64_t>(field)), at<int64_t>(field) < 0};
    }
  }
};

constexpr unsigned kFieldThreads = 64;
__global__ void __launch_bounds__(kFieldThreads)
    set_row_fields_kernel(const __grid_constant__ RowFieldsParams params) {
  const RowFieldReader reader = {params, static_cast<int>(blockIdx.x * kFieldThreads + threadIdx.x)};
  if (reader.row >= params.num_rows) return;
  RowParams& row = params.rows[reader.row];
  reader.read(RowField::kTemperature, row.temperature);
  reader.read(RowField::kTopP, row.top_p);
  reader.read(RowField::kMinP, row.min_p);
  reader.read(RowField::kRepetitionPenalty, row.repetition_penalty);
  reader.read(RowField::kFrequencyPenalty, row.frequency_penalty);
  reader.read(RowField::kPresencePenalty, row.presence_penalty);
  bool in_range = true;  // of what the rows' own types cannot hold; the sampler checks the rest
  if (reader.has(RowField::kTopK)) {
    const auto [bits, negative] = reader.whole(RowField::kTopK);
    row.top_k = negative ? -1 : static_cast<int32_t>(bits > INT32_MAX ? INT32_MAX : bits);
  }
  if (reader.has(RowField::kSeed)) row.seed = reader.whole(RowField::kSeed).bits;
  if (reader.has(RowField::kPosition)) {
    const auto [bits, negative] = reader.whole(RowField::kPosition);
    row.position = bits;
    in_range = !negative;
  }
  if (reader.has(RowField::kSubstream)) {
    const auto [bits, negative] = reader.whole(RowField::kSubstream);
    row.substream = static_cast<uint32_t>(bits);
    in_range = in_range && !negative && bits <= UINT32_MAX;
  }
  if (!in_range) row.temperature = vacant_row().temperature;
}

}  // namespace tokenstep::cuda
