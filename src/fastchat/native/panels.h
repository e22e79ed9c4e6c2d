// Products of many rows with int8 weights: the same whole sums as in products.h, and so the same bits, at twice the speed.
#pragma once

#include "quantized.h"

#if defined(__AVX512VNNI__)

// W is copied into panels of 32 columns (rows of W), in which one register holds four inputs of each of 16 columns, so
// that sums need no adding up of lanes. A panel serves tiles of up to PANEL_ROWS rows of x.
constexpr int64_t PANEL_COLUMNS = 32, GROUP_COLUMNS = 16, MIN_PANEL_ROWS = 16;
constexpr int PANEL_ROWS = 8;
constexpr int64_t PANELS_BYTES = 512 * 1024;  // of one thread, to stay in a core's second cache

thread_local Scratch panel_scratch;

// 16 by 16 words of 32 bits.
INLINE void transpose(Bytes (&words)[16]) {
    Bytes pairs[16], fours[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(words[i], words[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(words[i], words[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int half = 0; half < 2; half++) {
        fours[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + half + 2]);
        fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + half + 2]);
    }
    // Lane l of fours[4 i + j] is column 4 l + j of rows 4 i to 4 i + 3.
    UNROLL for (int j = 0; j < 4; j++) {
        const Bytes even_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
        const Bytes even_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
        const Bytes odd_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
        const Bytes odd_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
        words[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        words[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        words[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        words[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

// Columns from `column` on, raised by 128; a column past the last is the last one again, an input past the last is 0.
INLINE void fill_panel(
    const int8_t* weight, int64_t column, int64_t num_columns, int64_t num_inputs, int8_t* panel) {
    for (int64_t k = 0; k < num_inputs; k += UNIT) {
        const int64_t count = std::min(UNIT, num_inputs - k);
        const __mmask64 is_there = count == UNIT ? ~0ull : (1ull << count) - 1;
        for (int64_t group = 0; group < PANEL_COLUMNS / GROUP_COLUMNS; group++) {
            Bytes words[16];
            UNROLL for (int c = 0; c < 16; c++) {
                const int64_t from = std::min(column + group * GROUP_COLUMNS + c, num_columns - 1);
                words[c] = _mm512_xor_si512(
                    _mm512_maskz_loadu_epi8(is_there, weight + from * num_inputs + k), _mm512_set1_epi8(-128));
            }
            transpose(words);
            UNROLL for (int i = 0; i < 16; i++)
                _mm512_store_si512(panel + k * PANEL_COLUMNS + i * 4 * PANEL_COLUMNS + group * 64, words[i]);
        }
    }
}

// Sixteen results of one row.
INLINE void keep_sixteen(const Int8Result& to, int64_t row, int64_t column, Bytes sums) {
    sums = _mm512_sub_epi32(sums, _mm512_set1_epi32(DotInt8::OFFSET * to.row_sums[row]));
    const Floats scales = _mm512_maskz_loadu_ps(first_lanes(to.output.num_columns - column), to.scales + column);
    to.output.put_sixteen(row, column, _mm512_cvtepi32_ps(sums) * fill(to.row_scales[row]) * scales);
}

template <int ROWS>
INLINE void multiply_panel(
    const int8_t* panel, const int8_t* x, int64_t x_stride, int64_t row, int64_t column, const Int8Result& to) {
    Bytes first[ROWS], second[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) first[r] = second[r] = DotInt8::zero();
    for (int64_t k = 0; k < x_stride; k += 4) {
        const Bytes low = load_bytes(panel + k * PANEL_COLUMNS), high = load_bytes(panel + k * PANEL_COLUMNS + 64);
        UNROLL for (int r = 0; r < ROWS; r++) {
            int32_t four;
            std::memcpy(&four, x + r * x_stride + k, 4);
            first[r] = _mm512_dpbusd_epi32(first[r], low, _mm512_set1_epi32(four));
            second[r] = _mm512_dpbusd_epi32(second[r], high, _mm512_set1_epi32(four));
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        keep_sixteen(to, row + r, column, first[r]);
        keep_sixteen(to, row + r, column + GROUP_COLUMNS, second[r]);
    }
}

INLINE void multiply_panels(
    const int8_t* weight, const QuantizedRows& x, int64_t num_rows, int64_t num_columns, int64_t num_inputs,
    int64_t num_threads, const Int8Result& to) {
    const int64_t num_panels = (num_columns + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
    const int64_t panel_bytes = PANEL_COLUMNS * x.stride;
    const int64_t fair = (num_panels + 4 * num_threads - 1) / (4 * num_threads);
    const int64_t together = std::max<int64_t>(1, std::min({fair, PANELS_BYTES / panel_bytes, int64_t(4)}));
    for_each((num_panels + together - 1) / together, num_threads, [&](int64_t chunk) {
        const int64_t first = chunk * together, last = std::min(num_panels, first + together);
        int8_t* panels = panel_scratch.take<int8_t>(together * panel_bytes);
        for (int64_t panel = first; panel < last; panel++)
            fill_panel(weight, panel * PANEL_COLUMNS, num_columns, num_inputs, panels + (panel - first) * panel_bytes);
        Cut::tiles(0, num_rows, PANEL_ROWS, [&](int64_t row, int64_t tile_rows, int64_t, int64_t) {
            for (int64_t panel = first; panel < last; panel++)
                with_rows<PANEL_ROWS>(tile_rows, [&](auto rows) {
                    multiply_panel<decltype(rows)::value>(
                        panels + (panel - first) * panel_bytes, x.values + row * x.stride, x.stride, row,
                        panel * PANEL_COLUMNS, to);
                });
        });
    });
}

#endif
