#include "simt/exchange.h"

#include "simt/machine.h"

namespace tokenstep::simt {

void exchange(uint32_t mask, void* record, Combine combine, const Operation& operation) {
  Thread& me = *machine.current;
  Warp& warp = *me.warp;
  if (!(mask >> me.lane & 1))
    machine.fail("%s in line %u with mask 0x%08x, which leaves out the calling lane %u", operation.name,
                 operation.where.line(), mask, me.lane);
  mask &= warp.lanes;  // a block's last warp may be short of lanes

  Exchange* mine = nullptr;
  for (Exchange& pending : warp.pending)
    if (pending.mask == mask) mine = &pending;
  if (!mine) {
    mine = &warp.pending.emplace_back();
    mine->mask = mask;
    mine->what = operation.name;
    mine->where = operation.where;
  } else if (!same_text(mine->what, operation.name) || !same_place(mine->where, operation.where)) {
    machine.fail(
        "divergent warp: lane %u is at %s in line %u, but other lanes of its mask 0x%08x are at %s in line "
        "%u",
        me.lane, operation.name, operation.where.line(), mask, mine->what, mine->where.line());
  }
  mine->lane[me.lane] = record;
  mine->arrived |= 1u << me.lane;
  if (mine->arrived != mask) {
    machine.park(operation.name, operation.where);
    return;
  }

  const Exchange complete = *mine;
  *mine = warp.pending.back();
  warp.pending.pop_back();
  combine(complete.lane, mask);
  if (operation.orders_memory) {
    Thread* threads[32];
    size_t count = 0;
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) threads[count++] = warp.lane[__builtin_ctz(lanes)];
    machine.order({threads, count});
  }
  for (uint32_t others = mask & ~(1u << me.lane); others; others &= others - 1)
    machine.resume(warp.lane[__builtin_ctz(others)]);
  me.where = operation.where;
  machine.yield();
}

}  // namespace tokenstep::simt
