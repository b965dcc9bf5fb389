// The forward on CPUs, whatever the number of rows.
#pragma once
#include "attention/params.h"

TOKENMILL_CPU_KERNEL(attention_forward_in_tiles, AttentionParams)
