// Block 0 fills a mailbox and raises a flag; block 1 waits for the flag and reads the mailbox.
#include <cstdio>

__global__ void mailbox(int* box, int* flag, int* out) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) atomicExch(flag, 1);  // too early: the box is still empty
    box[threadIdx.x] = threadIdx.x;
  } else {
    while (atomicAdd(flag, 0) == 0) {
    }
    __threadfence();
    out[threadIdx.x] = box[threadIdx.x];
  }
}

int main() {
  int *box, *flag, *out, got[32];
  cudaMalloc(&box, 128);
  cudaMalloc(&flag, 4);
  cudaMalloc(&out, 128);
  cudaMemset(flag, 0, 4);
  mailbox<<<2, 32>>>(box, flag, out);
  if (cudaMemcpy(got, out, 128, cudaMemcpyDeviceToHost) != cudaSuccess) return 1;
  std::printf("the last letter is %d\n", got[31]);
}
