#include "sparse/cpu_backward.h"

#include "sparse/bilevel_routing_attention/cpu_regions.h"

namespace tokenmill::TOKENMILL_ISA {

void bilevel_routing_attention_backward(const BilevelBackwardParams& g) {
  const RegionWalk walk(g.forward);
  listed_backward(&walk, &g, 1);
}

}  // namespace tokenmill::TOKENMILL_ISA
