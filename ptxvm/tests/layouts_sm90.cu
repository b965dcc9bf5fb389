// Prints a line of JSON for each shared memory layout of 16-bit wgmma operands: CuTe's position of
// element (mn, k), in row-major order of mn, and the descriptor of the first 16 columns of k at
// address 0. Runs on the host.
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
using Element = cute::half_t;

template <GMMA::Major major, class Atom, int mn, int k>
void print_layout(int swizzle) {
  const auto layout = tile_to_shape(Atom{}, Shape<Int<mn>, Int<k>>{});
  const auto plain = as_position_independent_swizzle_layout(layout);
  const auto tensor = make_tensor(make_smem_ptr(static_cast<Element*>(nullptr)), layout);
  const auto slice = local_tile(tensor, Shape<Int<mn>, Int<16>>{}, make_coord(0, 0));
  const auto descriptor = SM90::GMMA::make_gmma_desc<major>(slice);
  std::printf("\n{\"transposed\": %s, \"swizzle\": %d, \"shape\": [%d, %d], \"descriptor\": %llu,",
              major == GMMA::Major::MN ? "true" : "false", swizzle, mn, k,
              static_cast<unsigned long long>(static_cast<uint64_t>(descriptor)));
  std::printf(" \"offsets\": [");
  for (int i = 0; i < mn; ++i)
    for (int j = 0; j < k; ++j) std::printf("%s%d", i + j ? "," : "", int(plain(i, j)));
  std::printf("]}\n");
}

int main() {
  constexpr auto K = GMMA::Major::K, MN = GMMA::Major::MN;
  print_layout<K, GMMA::Layout_K_INTER_Atom<Element>, 64, 16>(0);
  print_layout<K, GMMA::Layout_K_SW32_Atom<Element>, 64, 16>(1);
  print_layout<K, GMMA::Layout_K_SW64_Atom<Element>, 64, 32>(2);
  print_layout<K, GMMA::Layout_K_SW128_Atom<Element>, 64, 64>(3);
  print_layout<MN, GMMA::Layout_MN_INTER_Atom<Element>, 64, 16>(0);
  print_layout<MN, GMMA::Layout_MN_SW32_Atom<Element>, 64, 16>(1);
  print_layout<MN, GMMA::Layout_MN_SW64_Atom<Element>, 64, 16>(2);
  print_layout<MN, GMMA::Layout_MN_SW128_Atom<Element>, 128, 16>(3);
}
