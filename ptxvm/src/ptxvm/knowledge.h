// How what is known is published, brought together and taken over: of clocks.cpp and
// synchronise.cpp alone.
#pragma once
#include "ptxvm/clocks.h"

namespace ptxvm {

void raise(Known&, const Known&);
bool holds(const Published&, const Segment&);

// The later of each time, here and above.
Published merge(const Published&, const Published&);
Published publish(uint32_t cluster, const Known& near, const Published& far);
Published publish(const Timeline&);
void take(uint32_t cluster, Known& near, Published& far, const Published&);
void take(Timeline&, const Published&);
void take(Timeline&, const Gathered&);
void gather(Gathered&, const Timeline&);
// What the warp does from now on has not been published.
void tick(Timeline&);
// Remembers a release that does not order, for reports.
void refuse(std::vector<Timeline::Refused>&, const Published&, uint8_t has, uint8_t needs);

// The scope that holds the warp and a block.
uint8_t distance(const Warp&, uint32_t cluster, uint8_t rank);

// Of a launch, of a block that starts.
void forget_flags();
void forget_flags(const Block&);

}  // namespace ptxvm
