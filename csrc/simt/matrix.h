// Tensor-core operations in software: ldmatrix and mma.sync.
#pragma once
#include "simt/device.h"

namespace tokenstep::simt {

void check_matrix_row(const void* address);  // 16 bytes of shared memory

// Which of the eight 16-bit values of which row of an 8x8 matrix: register `half` of lane `lane`.
template <bool kTransposed>
void load_matrices(uint32_t (&registers)[4], const void* row, Where where) {
  check_matrix_row(row);
  struct Record {
    uint16_t row[8];
    uint32_t registers[4];
  } record;
  memcpy(record.row, row, sizeof record.row);
  exchange(~0u, &record,
           [](void* const* records, uint32_t lanes) {
             for_each_lane<Record>(records, lanes, [&](uint32_t lane, Record& mine) {
               for (uint32_t matrix = 0; matrix < 4; ++matrix) {
                 const auto element = [&](uint32_t pair) -> uint32_t {
                   const uint32_t major = lane / 4, minor = lane % 4 * 2 + pair;
                   const uint32_t r = kTransposed ? minor : major, column = kTransposed ? major : minor;
                   return static_cast<const Record*>(records[matrix * 8 + r])->row[column];
                 };
                 mine.registers[matrix] = element(0) | element(1) << 16;
               }
             });
           },
           {"ldmatrix", false, where});
  memcpy(registers, record.registers, sizeof registers);
}

// c += a * b on 16x8x16; sums in double, rounded once: the order in which hardware adds is not specified.
template <class Half, class ToFloat>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ToFloat, Where where) {
  struct Record {
    uint32_t a[4], b[2];
    float c[4];
  } record;
  memcpy(record.a, a, sizeof a);
  memcpy(record.b, b, sizeof b);
  memcpy(record.c, c, sizeof c);
  exchange(~0u, &record,
           [](void* const* records, uint32_t lanes) {
             const auto value = [](uint32_t pair, uint32_t odd) -> double {
               return ToFloat()(Half{static_cast<uint16_t>(pair >> (odd ? 16 : 0))});
             };
             for_each_lane<Record>(records, lanes, [&](uint32_t lane, Record& mine) {
               for (uint32_t i = 0; i < 4; ++i) {
                 const uint32_t row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                 double sum = mine.c[i];
                 for (uint32_t k = 0; k < 16; ++k) {
                   const auto& of_a = *static_cast<const Record*>(records[row % 8 * 4 + k % 8 / 2]);
                   const auto& of_b = *static_cast<const Record*>(records[column * 4 + k % 8 / 2]);
                   sum += value(of_a.a[row / 8 + k / 8 * 2], k % 2) * value(of_b.b[k / 8], k % 2);
                 }
                 mine.c[i] = static_cast<float>(sum);
               }
             });
           },
           {"mma.m16n8k16", false, where});
  memcpy(c, record.c, sizeof c);
}

}  // namespace tokenstep::simt
