#include "sparse/bilevel_routing_attention/cpu_regions.h"
#include "sparse/cpu_forward.h"

namespace tokenmill::TOKENMILL_ISA {

void bilevel_routing_attention_forward(const BilevelParams& d) {
  const RegionWalk walk(d);
  listed_forward(&walk, 1);
}

}  // namespace tokenmill::TOKENMILL_ISA
