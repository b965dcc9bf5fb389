// Tiles of matrices in the registers of a warp: the forms of mma beyond those of ops_tensor.cpp,
// and the fragments of wmma.
#pragma once
#include <algorithm>
#include <string>

#include "ptxvm/decode.h"
#include "ptxvm/floats.h"
#include "ptxvm/machine.h"
#include "ptxvm/tensor.h"

namespace ptxvm {

// Of elements. Elements of b1 are words of 32 bits here, of which a column of A has k / 32.
enum class Type : uint8_t { f16, bf16, tf32, f32, f64, e4m3, e5m2, s8, u8, s4, u4, b1, s32 };
bool find_type(const std::string& name, Type&);
int bits_of(Type);

// Where the elements of an operand lie: as in operand A, B or C of an mma (tensor.h), in blocks of
// such operands below or beside one another, or in one of the layouts of m8n8k4 of f16, whose four
// products are blocks of a diagonal.
struct Fragment {
  enum class Role : uint8_t { a, b, c, quad_rows, quad_columns, quad_half, quad_single } role;
  Type type;
  bool transposed = false;
  int registers = 0;          // of a lane
  int unit = 0;               // of them those of one block; after the last block they repeat
  int blocks = 1;             // of such operands
  int rows = 0, columns = 0;  // from one block to the next

  int per() const { return std::max(32 / bits_of(type), 1); }  // elements of a register
  Place place(int lane, int index, int element) const;
};

// D = A B + C. `k` of the elements of a row of A are added, of sparse A those that it holds.
struct Tile {
  Fragment d, a, b, c;
  int k = 0;
  bool saturates = false, ands = false, sparse = false, ordered = false;
  int selector = 0;  // of the lanes with metadata
  Rounding rounding = Rounding::nearest;

  // Lanes of four whose metadata says where the elements of a sparse A are.
  int in_four_lanes() const {
    return k / (bits_of(a.type) == 4 ? 16 : a.type == Type::tf32 ? 4 : 8);
  }
};

// Of one mma of this shape.
Tile make_tile(int m, int n, int k, Type d, Type a, Type b, Type c);
// Of "m16n8k16"; of "rz". False for other words.
bool parse_shape(const std::string& shape, int& m, int& n, int& k);
bool take_rounding(const std::string& word, Rounding&);

// Reads "{a, b}", the registers of an operand.
void read_registers(Decoder&, const std::string& operand, const Fragment&, bool writes);

// Decodes a form of mma that ops_tensor.cpp has not. False if it is none.
bool decode_tile(Decoder&, const Statement&, Instruction&);

// A product that multiply_tile runs, by its Instruction::target; null if the instruction is none.
uint32_t add_tile(Kernel&, const Tile&);
const Tile* tile_of(const Warp&, const Instruction&);
void multiply_tile(Warp&, const Instruction&, Mask);

// The mma of one block of these types and this shape that ops_tensor.cpp has; null if there is
// none.
Handler find_mma(int k, const std::string& d, const std::string& a, const std::string& b,
                 const std::string& c, bool saturates);

// Lanes of the registers of D that depend on lanes that miss a value, of A, B, C and metadata in
// this order.
void spread_tile(const Tile&, const Mask* missing, Mask* values);

// wmma.mma: its fragments; null if the instruction is none.
const Tile* wmma_of(const Warp&, const Instruction&);

}  // namespace ptxvm
