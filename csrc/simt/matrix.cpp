#include "simt/matrix.h"

#include <cstring>

#include "simt/exchange.h"
#include "simt/half.h"
#include "simt/machine.h"
#include "simt/memory.h"

namespace tokenstep::simt {

template <int kMatrices>
void load_matrices(uint32_t (&registers)[kMatrices], const void* row, bool transposed,
                   std::source_location where) {
  const uint32_t code = code_offset(__builtin_return_address(0));
  struct Record {
    bool transposed;
    uint16_t row[8];
    uint32_t registers[kMatrices];
  } record = {transposed, {}, {}};
  if (machine.current->lane < 8 * kMatrices) {
    if (!memory.is_shared(reinterpret_cast<uintptr_t>(row)))
      machine.fail("ldmatrix of memory that is not shared, at %s", code_tag(code).chars);
    memory.expect_aligned(row, 16, code);
    memory.access(row, 16, Access::kRead, code);
    memcpy(record.row, row, sizeof record.row);
  }
  exchange(~0u, &record,
           [](void* const* records, uint32_t lanes) {
             for_each_lane<Record>(records, lanes, [&](uint32_t lane, Record& mine) {
               for (uint32_t matrix = 0; matrix < kMatrices; ++matrix) {
                 const auto element = [&](uint32_t pair) -> uint32_t {
                   const uint32_t major = lane / 4, minor = lane % 4 * 2 + pair;
                   const uint32_t r = mine.transposed ? minor : major,
                                  column = mine.transposed ? major : minor;
                   return static_cast<const Record*>(records[matrix * 8 + r])->row[column];
                 };
                 mine.registers[matrix] = element(0) | element(1) << 16;
               }
             });
           },
           {"ldmatrix", false, where});
  memcpy(registers, record.registers, sizeof registers);
}

template void load_matrices(uint32_t (&)[2], const void*, bool, std::source_location);
template void load_matrices(uint32_t (&)[4], const void*, bool, std::source_location);

// How hardware orders and rounds its sums is not specified; here they are sums in double, rounded once.
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16,
                       std::source_location where) {
  struct Record {
    double a[8], b[4];  // fragments, pairs apart
    float c[4];
  } record;
  const auto widen = [bfloat16](uint32_t bits) -> double {
    const auto half = static_cast<uint16_t>(bits);
    return bfloat16 ? __bfloat162float({half}) : __half2float({half});
  };
  for (int i = 0; i < 8; ++i) record.a[i] = widen(a[i / 2] >> i % 2 * 16);
  for (int i = 0; i < 4; ++i) record.b[i] = widen(b[i / 2] >> i % 2 * 16);
  memcpy(record.c, c, sizeof c);
  exchange(~0u, &record,
           [](void* const* records, uint32_t) {
             double rows[16][16], columns[8][16];
             for_each_lane<Record>(records, ~0u, [&](uint32_t lane, const Record& r) {
               const uint32_t group = lane / 4, k = lane % 4 * 2;
               for (uint32_t i = 0; i < 8; ++i) rows[group + i / 2 % 2 * 8][k + i % 2 + i / 4 * 8] = r.a[i];
               for (uint32_t i = 0; i < 4; ++i) columns[group][k + i % 2 + i / 2 * 8] = r.b[i];
             });
             for_each_lane<Record>(records, ~0u, [&](uint32_t lane, Record& r) {
               for (uint32_t i = 0; i < 4; ++i) {
                 double sum = 0.0;
                 for (uint32_t k = 0; k < 16; ++k)
                   sum += rows[lane / 4 + i / 2 * 8][k] * columns[lane % 4 * 2 + i % 2][k];
                 r.c[i] = static_cast<float>(r.c[i] + sum);
               }
             });
           },
           {"mma.m16n8k16", false, where});
  memcpy(c, record.c, sizeof c);
}

}  // namespace tokenstep::simt
