// Barriers of blocks and clusters.
#include <cstring>

#include "simt/device.h"
#include "simt/machine.h"

namespace tokenstep::simt {

// All threads of the block must come to the same line: CUDA leaves open what happens otherwise.
void sync_block(Where where) {
  static constexpr char kWhat[] = "__syncthreads()";
  Thread& me = *machine.current;
  Barrier& barrier = me.block->barrier;
  if (!barrier.waiting.empty() && !same_place(barrier.where, where)) {
    const uint3& other = barrier.waiting.front()->index;
    machine.fail(
        "divergent barrier: it is at %s in line %u, but thread (%u, %u, %u) waits at the one in line %u",
        kWhat, where.line(), other.x, other.y, other.z, barrier.where.line());
  }
  barrier.where = where;
  barrier.waiting.push_back(&me);
  if (barrier.waiting.size() < machine.block_threads()) {
    machine.park(kWhat, where);
    return;
  }
  machine.order(barrier.waiting);
  barrier.waiting.pop_back();
  for (Thread* thread : barrier.waiting) machine.resume(thread);
  barrier.waiting.clear();
  me.where = where;
  machine.yield();
}

void arrive_at_cluster(Where where) {
  Thread& me = *machine.current;
  Cluster& cluster = *me.block->cluster;
  SplitBarrier& barrier = cluster.barrier;
  if (me.arrived_at_cluster)
    machine.fail("it arrives twice at the cluster's barrier, in line %u", where.line());
  me.arrived_at_cluster = true;
  me.cluster_phase = barrier.phase;
  me.where = where;
  barrier.known.add(me.clock.known, me.number, me.clock.tick, machine.num_threads());
  barrier.fenced.add(me.clock.fenced, me.number, me.clock.fenced_tick, machine.num_threads());
  ++me.clock.tick;
  if (++barrier.arrived < machine.block_threads() * cluster.blocks.size()) return;
  ++barrier.phase;
  barrier.arrived = 0;
  barrier.last_known = barrier.known.take();
  barrier.last_fenced = barrier.fenced.take();
  for (Thread* thread : barrier.waiting) machine.resume(thread);
  barrier.waiting.clear();
}

void wait_for_cluster(Where where) {
  Thread& me = *machine.current;
  SplitBarrier& barrier = me.block->cluster->barrier;
  if (!me.arrived_at_cluster)
    machine.fail("it waits at the cluster's barrier without having arrived, in line %u", where.line());
  me.arrived_at_cluster = false;
  if (barrier.phase == me.cluster_phase) {
    barrier.waiting.push_back(&me);
    machine.park("the cluster's barrier", where);
  }
  me.clock.known = barrier.learn_known(me.clock.known, barrier.last_known);
  me.clock.fenced = barrier.learn_fenced(me.clock.fenced, barrier.last_fenced);
  ++me.clock.tick;
}

}  // namespace tokenstep::simt
