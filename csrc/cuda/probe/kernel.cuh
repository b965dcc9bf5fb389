// Loops that keep one unit busy, with results that prove the counted work was done.
//
//   shared    out[b][t] = sum over s < steps of the 4 words of thread (t + s) mod 256 in x
//   exp2      y = 2^-y, steps times, from 8 words of x; out[b][t] = their sum
//   barrier   steps times: each CTA takes the value of the next CTA and adds 1
#pragma once
#include "cuda/math.cuh"
#include "cuda/probe/params.h"

namespace tokenmill::cuda::probe {

// Neighbouring lanes read neighbouring 16 bytes: no bank conflict.
__global__ void __launch_bounds__(kProbeThreads) read_shared(ProbeParams p) {
  __shared__ float4 words[kProbeThreads];
  const unsigned t = threadIdx.x;
  words[t] = {p.x[4 * t], p.x[4 * t + 1], p.x[4 * t + 2], p.x[4 * t + 3]};
  __syncthreads();
  float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
  for (unsigned s = 0; s < p.steps; ++s) {
    const float4 w = words[(t + s) % kProbeThreads];
    sum.x += w.x, sum.y += w.y, sum.z += w.z, sum.w += w.w;
  }
  p.out[int64_t{blockIdx.x} * kProbeThreads + t] = sum.x + sum.y + sum.z + sum.w;
}

__global__ void __launch_bounds__(kProbeThreads) chain_exp2(ProbeParams p) {
  constexpr int kChains = 8;
  const unsigned t = threadIdx.x;
  float y[kChains];
#pragma unroll
  for (int j = 0; j < kChains; ++j) y[j] = p.x[(t * kChains + j) % kProbeWords];
  for (unsigned s = 0; s < p.steps; ++s) {
#pragma unroll
    for (int j = 0; j < kChains; ++j) y[j] = exp2_approx(-y[j]);
  }
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < kChains; ++j) sum += y[j];
  p.out[int64_t{blockIdx.x} * kProbeThreads + t] = sum;
}

// Grid barrier: waits until every CTA has arrived `round` times. All CTAs must be resident.
__device__ __forceinline__ void all_blocks(unsigned* arrived, unsigned round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (*static_cast<volatile unsigned*>(arrived) < round * gridDim.x) {
    }
    __threadfence();
  }
  __syncthreads();
}

// values: [2, blocks]; arrived: 0 at launch.
__global__ void __launch_bounds__(kProbeThreads)
    meet(ProbeParams p, volatile float* values, unsigned* arrived) {
  const unsigned b = blockIdx.x, blocks = gridDim.x;
  if (threadIdx.x == 0) values[b] = p.x[b % kProbeWords];
  all_blocks(arrived, 1);
  for (unsigned s = 0; s < p.steps; ++s) {
    volatile float* const from = values + s % 2 * blocks;
    volatile float* const to = values + (s + 1) % 2 * blocks;
    if (threadIdx.x == 0) to[b] = from[(b + 1) % blocks] + 1.f;
    all_blocks(arrived, s + 2);
  }
  p.out[int64_t{b} * kProbeThreads + threadIdx.x] = values[p.steps % 2 * blocks + b];
}

}  // namespace tokenmill::cuda::probe
