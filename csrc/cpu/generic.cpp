// Whatever the compiler's baseline has (SSE2, NEON).
#include "kernels.h"

#define MIUE_LEVEL generic
#define MIUE_BYTES 16
#include "level.h"
