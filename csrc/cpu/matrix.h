// Convolutions on matrix tiles: what matrix_conv.cpp, which divides the work, asks of a processor with
// AMX (matrix_amx.cpp) or of plain C++.
#pragma once
#include <cstdint>

#include "../ops.h"

namespace miue {

// A matrix tile has 16 rows of 64 bytes: 16 images of 32 bf16 channels, or 16 x 16 f32 sums.
constexpr int64_t TILE = 16, DEPTH = 32, SIDE = 512;  // SIDE: bf16 values of a tile
// Images, and result channels, whose sums are taken together: two tiles each way.
constexpr int64_t IMAGES = 2 * TILE, RESULTS = 2 * TILE;
// [half of the images][half of the results][16][16], and a line more: powers of two would meet in the same cache sets
constexpr int64_t SUMS_STEP = IMAGES * RESULTS + 16;

// A tap of one pixel.
struct MatrixTap {
    const uint16_t* pixel;  // the pixel that meets it: images x 32 channels of the first block
    int32_t number;
};

// The sums of one pixel: over `taps` taps and `blocks` blocks of 32 channels.
struct MatrixProducts {
    const MatrixTap* tap;
    int64_t taps, blocks;
    int64_t pixel_step;     // values between a pixel's blocks
    const uint16_t* panel;  // weights [block][tap][half of the results][16][32]
    int64_t panel_step;     // values between blocks
    bool add, wide;         // to the sums that there are; both halves of the results
    float* sums;
};

// The results of one image at some pixels in a row, whose sums are SUMS_STEP values apart.
struct MatrixResults {
    const float* sums;                // of the first pixel, first panel of 32 results
    int64_t pixels, panels, results;  // results: those of all the panels, a part of the last
    int64_t panel_step;               // values between the sums of panels
    int64_t place;                    // values before the first pixel's first result
};

// Sums of a weight gradient: [tap][half of the channels][half of the results][16 channels][16 results].
constexpr int64_t TAP_SUMS = 4 * TILE * TILE;

struct MatrixKernels {
    void (*begin)(int64_t images);  // of the sums that follow, on this thread
    void (*products)(const MatrixProducts&);
    void (*results)(const MatrixConvArgs&, const float* bias, const MatrixResults&);
    void (*end)();
    // 32 images of one pixel, 32 channels each (rows `step` values apart; fewer than 32 images or channels: zeros), as the first
    // factor of a sum over images [channel][image], or as the second [image / 2][channel][image % 2].
    void (*across)(const uint16_t* from, int64_t step, int64_t images, int64_t channels,
                   uint16_t* to);
    void (*along)(const uint16_t* from, int64_t step, int64_t images, int64_t channels,
                  uint16_t* to);
    // sums += over `count` pixels of the products of x[i] and grad[i], two tiles each way.
    void (*outer)(const uint16_t* const* x, const uint16_t* const* grad, int64_t count,
                  float* sums);
};

extern const MatrixKernels amx_kernels;
bool amx_starts();  // asks the system for the tiles, once; whether this process has them

}  // namespace miue
