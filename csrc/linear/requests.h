// Requests of a decode step: the slot of its state, and the tokens that the state keeps.
#pragma once
#include "core/dtype.h"

namespace tokenmill {

struct Requests {
  int64_t slots;
  const int32_t* indices;   // [B], a slot each; null: b
  const int32_t* accepted;  // [B]; null: all tokens

  // Slot of request b; < 0: its out is 0, no state changes.
  TOKENMILL_HOST_DEVICE int64_t slot(int64_t b) const {
    const int64_t found = indices ? indices[b] : b;
    return found < slots ? found : -1;
  }

  // The first tokens of request b, of seqlen, after which its state is stored.
  TOKENMILL_HOST_DEVICE int64_t kept(int64_t b, int64_t seqlen) const {
    if (!accepted) return seqlen;
    const int64_t found = accepted[b];
    return found < 0 ? 0 : found < seqlen ? found : seqlen;
  }
};

}  // namespace tokenmill
