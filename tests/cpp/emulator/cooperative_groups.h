#include "fibre_shim.h"
