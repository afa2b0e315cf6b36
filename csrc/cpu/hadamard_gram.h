#pragma once

#include "math/hadamard_gram.h"

namespace nestopt::cpu {

// Inner products are of D, the Gram matrix is of G.
template <class D, class G>
void add_hadamard_tile(const HadamardGramTile& tile);

}  // namespace nestopt::cpu
