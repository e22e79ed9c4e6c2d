// Products of many rows with int4 weights: sums of the groups as in quantized.h, added up in another order.
#pragma once

#include "panels.h"

#if defined(__AVX512VNNI__)

// Panels as in panels.h: a code is a byte there, raised by 8. The whole sum of a group is scaled and added in float32.
constexpr int INT4_PANEL_ROWS = 6;
constexpr int64_t MIN_INT4_PANEL_ROWS = 64;

thread_local Scratch group_scratch;

struct Int4Panels {
    const uint8_t* weight;
    const float* scales;      // (num_columns, num_groups)
    const QuantizedRows& x;
    const int32_t* group_sums;  // (num_rows, num_groups): of the values, times -8
    int64_t num_groups;
    Output output;

    int64_t panel_bytes() const { return PANEL_COLUMNS * (x.stride + num_groups * static_cast<int64_t>(sizeof(float))); }

    // Codes, and behind them the scales (num_groups, PANEL_COLUMNS).
    INLINE void fill(int64_t column, uint8_t* panel) const {
        float* panel_scales = reinterpret_cast<float*>(panel + PANEL_COLUMNS * x.stride);
        for (int64_t c = 0; c < PANEL_COLUMNS; c++) {
            const float* from = scales + std::min(column + c, output.num_columns - 1) * num_groups;
            for (int64_t group = 0; group < num_groups; group++) panel_scales[group * PANEL_COLUMNS + c] = from[group];
        }
        for (int64_t k = 0; k < x.stride; k += UNIT)
            for (int64_t group = 0; group < PANEL_COLUMNS / GROUP_COLUMNS; group++) {
                Bytes words[16];
                UNROLL for (int c = 0; c < 16; c++) {
                    const int64_t from = std::min(column + group * GROUP_COLUMNS + c, output.num_columns - 1);
                    const uint8_t* both = weight + (from * x.stride + k) / 2;
                    Bytes twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(both)));
                    twice = _mm512_srlv_epi64(twice, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
                    words[c] = _mm512_and_si512(twice, _mm512_set1_epi8(15));
                }
                transpose(words);
                UNROLL for (int i = 0; i < 16; i++)
                    _mm512_store_si512(panel + (k + 4 * i) * PANEL_COLUMNS + group * 64, words[i]);
            }
    }

    template <int ROWS>
    INLINE void multiply(const uint8_t* panel, int64_t row, int64_t column) const {
        const float* panel_scales = reinterpret_cast<const float*>(panel + PANEL_COLUMNS * x.stride);
        const int64_t group_size = x.stride / num_groups;
        Floats first[ROWS], second[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) first[r] = second[r] = zeros();
        for (int64_t group = 0; group < num_groups; group++) {
            Bytes first_sums[ROWS], second_sums[ROWS];
            UNROLL for (int r = 0; r < ROWS; r++)
                first_sums[r] = second_sums[r] = _mm512_set1_epi32(group_sums[(row + r) * num_groups + group]);
            for (int64_t k = group * group_size; k < (group + 1) * group_size; k += 4) {
                const Bytes low = load_bytes(panel + k * PANEL_COLUMNS), high = load_bytes(panel + k * PANEL_COLUMNS + 64);
                UNROLL for (int r = 0; r < ROWS; r++) {
                    int32_t four;
                    std::memcpy(&four, x.values + (row + r) * x.stride + k, 4);
                    first_sums[r] = _mm512_dpbusd_epi32(first_sums[r], low, _mm512_set1_epi32(four));
                    second_sums[r] = _mm512_dpbusd_epi32(second_sums[r], high, _mm512_set1_epi32(four));
                }
            }
            const Floats low = load(panel_scales + group * PANEL_COLUMNS);
            const Floats high = load(panel_scales + group * PANEL_COLUMNS + GROUP_COLUMNS);
            UNROLL for (int r = 0; r < ROWS; r++) {
                first[r] = fma(_mm512_cvtepi32_ps(first_sums[r]), low, first[r]);
                second[r] = fma(_mm512_cvtepi32_ps(second_sums[r]), high, second[r]);
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            alignas(64) float results[PANEL_COLUMNS];
            store(results, first[r] * ::fill(x.scales[row + r]));
            store(results + GROUP_COLUMNS, second[r] * ::fill(x.scales[row + r]));
            for (int64_t c = 0; c < std::min(PANEL_COLUMNS, output.num_columns - column); c += COLUMNS) {
                alignas(16) float four[COLUMNS];
                std::memcpy(four, results + c, sizeof four);
                output.put_four(row + r, column + c, four);
            }
        }
    }
};

INLINE void multiply_int4_panels(
    const QuantizedRows& x, const uint8_t* weight, const float* scales, const Output& output, int64_t num_rows,
    int64_t num_groups, int64_t num_threads) {
    int32_t* group_sums = group_scratch.take<int32_t>(num_rows * num_groups);
    const int64_t fours = x.stride / num_groups / 4;
    for (int64_t i = 0; i < num_rows * num_groups; i++) {
        group_sums[i] = 0;
        for (int64_t four = i * fours; four < (i + 1) * fours; four++) group_sums[i] += x.unit_sums[four];
    }
    const Int4Panels work{weight, scales, x, group_sums, num_groups, output};
    const PanelShare share(output.num_columns, work.panel_bytes(), num_threads);
    for_each(share.num_chunks, num_threads, [&](int64_t chunk) {
        const int64_t first = chunk * share.together, last = std::min(share.num_panels, first + share.together);
        uint8_t* panels = panel_scratch.take<uint8_t>(share.together * work.panel_bytes());
        for (int64_t panel = first; panel < last; panel++)
            work.fill(panel * PANEL_COLUMNS, panels + (panel - first) * work.panel_bytes());
        Cut::tiles(0, num_rows, INT4_PANEL_ROWS, [&](int64_t row, int64_t tile_rows) {
            for (int64_t panel = first; panel < last; panel++)
                with_rows<INT4_PANEL_ROWS>(tile_rows, [&](auto rows) {
                    work.multiply<decltype(rows)::value>(
                        panels + (panel - first) * work.panel_bytes(), row, panel * PANEL_COLUMNS);
                });
        });
    });
}

#endif
