// Prints CuTe's warp layouts as JSON: for every mma of sm_80 with 8-, 16- and 32-bit operands the
// (row, column) of each value of each lane, and for every ldmatrix the shared memory element that
// each value of each lane comes from. Runs on the host.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

using namespace cute;

// Four lanes per line.
const char* before(int lane) { return lane % 4 == 0 ? "    " : " "; }
const char* after(int lane) { return lane == 31 ? "\n" : lane % 4 == 3 ? ",\n" : ","; }

// Per lane, [row, column] of each value, for a matrix of `rows` rows.
template <class Layout>
void print_matrix(const char* name, Layout layout, int rows, const char* end) {
  std::printf("   \"%s\": [\n", name);
  for (int lane = 0; lane < 32; ++lane) {
    std::printf("%s[", before(lane));
    for (int value = 0; value < size<1>(layout); ++value) {
      const int index = layout(lane, value);
      std::printf("%s[%d,%d]", value ? "," : "", index % rows, index / rows);
    }
    std::printf("]%s", after(lane));
  }
  std::printf("   ]%s\n", end);
}

template <class Operation>
void print_mma(const char* name, const char* end) {
  using Traits = MMA_Traits<Operation>;
  const auto shape = typename Traits::Shape_MNK{};
  std::printf("  \"%s\": {\n", name);
  print_matrix("a", typename Traits::ALayout{}, get<0>(shape), ",");
  print_matrix("b_transposed", typename Traits::BLayout{}, get<1>(shape), ",");
  print_matrix("c", typename Traits::CLayout{}, get<0>(shape), "");
  std::printf("  }%s\n", end);
}

// Copy layouts map (lane, bit) to a bit of the data: the source of each bit of a lane's registers,
// and the lane whose address each row of 128 bits is read from.
template <class Operation>
void print_ldmatrix(const char* name, const char* end) {
  using Traits = Copy_Traits<Operation>;
  const auto source = typename Traits::SrcLayout{};
  const auto destination = typename Traits::DstLayout{};
  const int elements = size<1>(destination) / 16;
  std::printf("  \"%s\": {\n   \"address_lane\": [", name);
  for (int row = 0; row < 4 * elements; ++row) {
    int lane = 0;
    while (source(lane, 0) != row * 128) ++lane;
    std::printf("%s%d", row ? "," : "", lane);
  }
  std::printf("],\n   \"values\": [\n");
  for (int lane = 0; lane < 32; ++lane) {
    std::printf("%s[", before(lane));
    for (int value = 0; value < elements; ++value)
      std::printf("%s%d", value ? "," : "", int(destination(lane, value * 16)) / 16);
    std::printf("]%s", after(lane));
  }
  std::printf("   ]\n  }%s\n", end);
}

int main() {
  std::printf("{\n \"mma\": {\n");
  print_mma<SM80_16x8x8_F16F16F16F16_TN>("m16n8k8.f16.f16.f16.f16", ",");
  print_mma<SM80_16x8x16_F16F16F16F16_TN>("m16n8k16.f16.f16.f16.f16", ",");
  print_mma<SM80_16x8x8_F32F16F16F32_TN>("m16n8k8.f32.f16.f16.f32", ",");
  print_mma<SM80_16x8x16_F32F16F16F32_TN>("m16n8k16.f32.f16.f16.f32", ",");
  print_mma<SM80_16x8x8_F32BF16BF16F32_TN>("m16n8k8.f32.bf16.bf16.f32", ",");
  print_mma<SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16.f32.bf16.bf16.f32", ",");
  print_mma<SM80_16x8x4_F32TF32TF32F32_TN>("m16n8k4.f32.tf32.tf32.f32", ",");
  print_mma<SM80_16x8x8_F32TF32TF32F32_TN>("m16n8k8.f32.tf32.tf32.f32", ",");
  print_mma<SM80_16x8x16_S32S8S8S32_TN>("m16n8k16.s32.s8.s8.s32", ",");
  print_mma<SM80_16x8x32_S32S8S8S32_TN>("m16n8k32.s32.s8.s8.s32", "");
  std::printf(" },\n \"ldmatrix\": {\n");
  print_ldmatrix<SM75_U32x1_LDSM_N>("x1", ",");
  print_ldmatrix<SM75_U32x2_LDSM_N>("x2", ",");
  print_ldmatrix<SM75_U32x4_LDSM_N>("x4", ",");
  print_ldmatrix<SM75_U16x2_LDSM_T>("x1.trans", ",");
  print_ldmatrix<SM75_U16x4_LDSM_T>("x2.trans", ",");
  print_ldmatrix<SM75_U16x8_LDSM_T>("x4.trans", "");
  std::printf(" }\n}\n");
}
