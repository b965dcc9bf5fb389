// Matrix tiles in the registers of a warp: the forms of mma that ops_tensor.cpp lacks, and the
// fragments of wmma.
#pragma once
#include <algorithm>
#include <string>

#include "ptxvm/decode.h"
#include "ptxvm/floats.h"
#include "ptxvm/machine.h"
#include "ptxvm/tensor.h"

namespace ptxvm {

// Element types. b1 is handled as words of 32 bits, of which a column of A has k / 32.
enum class Type : uint8_t { f16, bf16, tf32, f32, f64, e4m3, e5m2, s8, u8, s4, u4, b1, s32 };
bool find_type(const std::string& name, Type&);
int bits_of(Type);

// Register layout of an operand: as operand A, B or C of an mma (tensor.h), as several such blocks
// side by side or one below the other, or as one of the layouts of f16 m8n8k4, whose four products
// are diagonal blocks.
struct Fragment {
  enum class Role : uint8_t { a, b, c, quad_rows, quad_columns, quad_half, quad_single } role;
  Type type;
  bool transposed = false;
  int registers = 0;          // per lane
  int unit = 0;               // registers of one block; after the last block they repeat
  int blocks = 1;             // number of such operands
  int rows = 0, columns = 0;  // offset from one block to the next

  int per() const { return std::max(32 / bits_of(type), 1); }  // elements per register
  Place place(int lane, int index, int element) const;
};

// D = A B + C. k: number of products per sum; for sparse A, of its stored elements.
struct Tile {
  Fragment d, a, b, c;
  int k = 0;
  bool saturates = false, ands = false, sparse = false, ordered = false;
  int selector = 0;  // selects the lanes that hold metadata
  Rounding rounding = Rounding::nearest;

  // Number of lanes in every four that hold metadata of a sparse A.
  int in_four_lanes() const {
    return k / (bits_of(a.type) == 4 ? 16 : a.type == Type::tf32 ? 4 : 8);
  }
};

// The tile of one mma of this shape.
Tile make_tile(int m, int n, int k, Type d, Type a, Type b, Type c);
// Parse "m16n8k16" and "rz". False for other words.
bool parse_shape(const std::string& shape, int& m, int& n, int& k);
bool take_rounding(const std::string& word, Rounding&);

// Parses "{a, b}", the registers of an operand.
void read_registers(Decoder&, const std::string& operand, const Fragment&, bool writes);

// Decodes a form of mma that ops_tensor.cpp lacks. False if it is none.
bool decode_tile(Decoder&, const Statement&, Instruction&);

// add_tile registers a product for multiply_tile and returns its Instruction::target; tile_of is
// null if the instruction is none.
uint32_t add_tile(Kernel&, const Tile&);
const Tile* tile_of(const Warp&, const Instruction&);
void multiply_tile(Warp&, const Instruction&, Mask);

// The mma of ops_tensor.cpp for one block of these types and this shape; null if there is none.
Handler find_mma(int k, const std::string& d, const std::string& a, const std::string& b,
                 const std::string& c, bool saturates);

// Lanes of the registers of D that depend on lanes without a value, in the order A, B, C, metadata.
void spread_tile(const Tile&, const Mask* missing, Mask* values);

// Fragments of a wmma.mma; null if the instruction is none.
const Tile* wmma_of(const Warp&, const Instruction&);

}  // namespace ptxvm
