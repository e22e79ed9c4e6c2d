// Products of many rows with bfloat16 weights: sums in float32, in another order than those of products.h.
#pragma once

#include "panels.h"

#if defined(__AVX512VNNI__)

// As in panels.h, but a register holds one input of each of 16 columns, in float32. A panel has a part of the inputs at a
// time, the sums of the parts before wait in memory.
constexpr int64_t PART_INPUTS = 512, X_STRIDE = PART_INPUTS + 16, BLOCK_ROWS = 512;
constexpr int64_t MIN_FLOAT_PANEL_ROWS = 64;
constexpr int FLOAT_PANEL_ROWS = 12;

struct FloatPanels {
    float panels[MAX_PANELS][PART_INPUTS * PANEL_COLUMNS];
    float sums[MAX_PANELS][BLOCK_ROWS * PANEL_COLUMNS];
    float x[FLOAT_PANEL_ROWS * X_STRIDE];
};

// Up to 16 numbers, zeros behind them.
INLINE Floats load_some(const BFloat16* from, int64_t count) {
    const __mmask16 is_there = count >= 16 ? 0xffff : static_cast<__mmask16>((1 << count) - 1);
    return as_floats(raise_by_16(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_there, from))));
}

INLINE void fill_float_panel(
    const BFloat16* weight, int64_t column, int64_t num_columns, int64_t num_inputs, int64_t first, int64_t count,
    float* panel) {
    for (int64_t k = 0; k < count; k += 16)
        for (int64_t group = 0; group < PANEL_COLUMNS / GROUP_COLUMNS; group++) {
            Bytes words[16];
            UNROLL for (int c = 0; c < 16; c++) {
                const int64_t from = std::min(column + group * GROUP_COLUMNS + c, num_columns - 1);
                words[c] = _mm512_castps_si512(load_some(weight + from * num_inputs + first + k, count - k));
            }
            transpose(words);
            UNROLL for (int i = 0; i < 16; i++)
                store(panel + (k + i) * PANEL_COLUMNS + group * GROUP_COLUMNS, as_floats(words[i]));
        }
}

template <int ROWS>
INLINE void add_float_panel(const float* panel, const float* x, int64_t count, bool is_first, float* to) {
    Floats first[ROWS], second[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        first[r] = is_first ? zeros() : load(to + r * PANEL_COLUMNS);
        second[r] = is_first ? zeros() : load(to + r * PANEL_COLUMNS + GROUP_COLUMNS);
    }
    for (int64_t k = 0; k < count; k++) {
        const Floats low = load(panel + k * PANEL_COLUMNS), high = load(panel + k * PANEL_COLUMNS + GROUP_COLUMNS);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Floats value = fill(x[r * X_STRIDE + k]);
            first[r] = fma(low, value, first[r]);
            second[r] = fma(high, value, second[r]);
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        store(to + r * PANEL_COLUMNS, first[r]);
        store(to + r * PANEL_COLUMNS + GROUP_COLUMNS, second[r]);
    }
}

INLINE void put_float_sums(const float* sums, int64_t row, int64_t column, const Output& to) {
    const BFloat16* bias = static_cast<const BFloat16*>(to.bias);
    BFloat16* out = static_cast<BFloat16*>(to.values) + row * to.num_columns;
    for (int64_t c = 0; c < PANEL_COLUMNS; c += GROUP_COLUMNS) {
        const int64_t at = column + c, count = to.num_columns - at;
        if (count >= GROUP_COLUMNS) {
            store(out + at, bias ? load(sums + c) + load(bias + at) : load(sums + c));
            continue;
        }
        for (int64_t i = 0; i < count; i++) put(out + at + i, bias ? sums[c + i] + to_float(bias[at + i]) : sums[c + i]);
    }
}

// One thread's panels from `first` to `last`, for all rows.
INLINE void multiply_some_float_panels(
    const BFloat16* weight, const BFloat16* x, int64_t num_rows, int64_t num_inputs, int64_t first, int64_t last,
    const Output& to, FloatPanels& work) {
    for (int64_t block = 0; block < num_rows; block += BLOCK_ROWS) {
        const int64_t end = std::min(num_rows, block + BLOCK_ROWS);
        for (int64_t k = 0; k < num_inputs; k += PART_INPUTS) {
            const int64_t count = std::min(PART_INPUTS, num_inputs - k);
            for (int64_t panel = first; panel < last; panel++)
                fill_float_panel(
                    weight, panel * PANEL_COLUMNS, to.num_columns, num_inputs, k, count, work.panels[panel - first]);
            Cut::tiles(block, end, FLOAT_PANEL_ROWS, [&](int64_t row, int64_t tile_rows) {
                for (int64_t r = 0; r < tile_rows; r++)
                    for (int64_t i = 0; i < count; i += 16)
                        store(work.x + r * X_STRIDE + i, load_some(x + (row + r) * num_inputs + k + i, count - i));
                for (int64_t panel = first; panel < last; panel++)
                    with_rows<FLOAT_PANEL_ROWS>(tile_rows, [&](auto rows) {
                        add_float_panel<decltype(rows)::value>(
                            work.panels[panel - first], work.x, count, k == 0,
                            work.sums[panel - first] + (row - block) * PANEL_COLUMNS);
                    });
            });
        }
        for (int64_t panel = first; panel < last; panel++)
            for (int64_t row = block; row < end; row++)
                put_float_sums(work.sums[panel - first] + (row - block) * PANEL_COLUMNS, row, panel * PANEL_COLUMNS, to);
    }
}

INLINE void multiply_float_panels(
    const BFloat16* weight, const BFloat16* x, int64_t num_rows, int64_t num_inputs, int64_t num_threads,
    const Output& to) {
    const PanelShare share(to.num_columns, sizeof(FloatPanels::panels[0]), num_threads);
    for_each(share.num_chunks, num_threads, [&](int64_t chunk) {
        const int64_t first = chunk * share.together;
        multiply_some_float_panels(
            weight, x, num_rows, num_inputs, first, std::min(share.num_panels, first + share.together), to,
            *panel_scratch.take<FloatPanels>(1));
    });
}

#endif
