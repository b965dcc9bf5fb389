// Runs a model that export.py compiled, from C++ without Python.
//
//   main <tokenmill>/_ops.so model.pt2
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s <tokenmill>/_ops.so model.pt2\n", argv[0]);
    return 2;
  }
  // Loading the library registers torch.ops.tokenmill.*.
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  const at::Tensor x = torch::linspace(-1, 1, 2 * 10 * 128).view({2, 10, 128});
  const std::vector<at::Tensor> outputs = loader.run({x});
  std::printf("%.6f\n", outputs[0].sum().item<double>());
  return 0;
}
