// Publishing, merging and acquiring knowledge; used only by clocks.cpp and synchronise.cpp.
#pragma once
#include "ptxvm/clocks.h"

namespace ptxvm {

void raise(Known&, const Known&);
bool holds(const Published&, const Segment&);

// Element-wise maximum, here and above.
Published merge(const Published&, const Published&);
Published publish(uint32_t cluster, const Known& near, const Published& far);
Published publish(const Timeline&);
void take(uint32_t cluster, Known& near, Published& far, const Published&);
void take(Timeline&, const Published&);
void take(Timeline&, const Gathered&);
void gather(Gathered&, const Timeline&);
// Starts a new segment: later accesses of the warp are not published yet.
void tick(Timeline&);
// Before a release of the lanes that run: it does not cover what other lanes did since they met.
void release_part(Timeline&);
// Records a release that does not order, for reports.
void refuse(std::vector<Timeline::Refused>&, const Published&, uint8_t has, uint8_t needs);

// Narrowest scope that includes the warp and a block.
uint8_t distance(const Warp&, uint32_t cluster, uint8_t rank);

// Start of a launch; start of a block.
void forget_flags();
void forget_flags(const Block&);

}  // namespace ptxvm
