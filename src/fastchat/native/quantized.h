// Rows quantized to int8, and products with int4 weights.
#pragma once

#include "products.h"

// int8 rows of x, a scale for each, and what the products below must subtract.
struct QuantizedRows {
    int8_t* values;           // (num_rows, stride)
    float* scales;            // (num_rows,)
    int32_t* sums;            // (num_rows,)
    int32_t* unit_sums;       // (num_rows, stride / 4): of each four values, times -8; only for int4
    int64_t stride;

    QuantizedRows(int64_t num_rows, int64_t num_inputs, bool for_int4) : stride(padded(num_inputs)) {
        const int64_t values_bytes = num_rows * stride, units_bytes = for_int4 ? num_rows * stride : 0;
        values = input_scratch.take<int8_t>(values_bytes + units_bytes + num_rows * 8);
        unit_sums = reinterpret_cast<int32_t*>(values + values_bytes);
        scales = reinterpret_cast<float*>(values + values_bytes + units_bytes);
        sums = reinterpret_cast<int32_t*>(scales + num_rows);
        if (!for_int4) unit_sums = nullptr;
    }
};

template <class Element>
void quantize_row(const Element* x, int64_t num_inputs, int64_t row, const QuantizedRows& to) {
    float largest = 0.0f;
    bool has_nan = false;
    const int64_t whole = num_inputs / LANES * LANES;
    int8_t* values = to.values + row * to.stride;
#if defined(__AVX512F__)
    Floats large = zeros();
    __mmask16 nans = 0;
    for (int64_t k = 0; k < whole; k += LANES) {
        Floats value = load(x + k);
        nans |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        large = _mm512_max_ps(large, _mm512_abs_ps(value));
    }
    largest = _mm512_reduce_max_ps(large);
    has_nan = nans != 0;
#else
    Floats large = zeros(), nans = zeros();
    for (int64_t k = 0; k < whole; k += LANES) {
        Floats value = load(x + k);
        nans = _mm256_or_ps(nans, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        large = _mm256_max_ps(large, _mm256_andnot_ps(fill(-0.0f), value));
    }
    alignas(32) float lanes[LANES];
    _mm256_store_ps(lanes, large);
    for (float lane : lanes) largest = std::max(largest, lane);
    has_nan = _mm256_movemask_ps(nans) != 0;
#endif
    for (int64_t k = whole; k < num_inputs; k++) {
        const float value = to_float(x[k]);
        has_nan |= value != value;
        largest = std::max(largest, std::fabs(value));
    }
    if (has_nan) largest = std::numeric_limits<float>::quiet_NaN();
    const float scale = (largest < 1e-12f ? 1e-12f : largest) / 127;  // 1e-12: products.MIN_NONZERO
    to.scales[row] = scale;
    for (int64_t k = 0; k < whole; k += LANES) {
        Floats quotient = load(x + k) / fill(scale);
#if defined(__AVX512F__)
        __m512i integers = _mm512_cvtps_epi32(quotient);  // to nearest, ties to even
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + k), _mm512_cvtsepi32_epi8(integers));
#else
        __m256i integers = _mm256_cvtps_epi32(quotient);
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(values + k), _mm_packs_epi16(words, words));
#endif
    }
    for (int64_t k = whole; k < num_inputs; k++) {
        const float quotient = std::nearbyint(to_float(x[k]) / scale);
        values[k] = quotient == quotient ? static_cast<int8_t>(quotient) : 0;
    }
    std::memset(values + num_inputs, 0, to.stride - num_inputs);
    Bytes total = DotInt8::zero();
    for (int64_t k = 0; k < to.stride; k += sizeof(Bytes)) {
        const Bytes fours = sums_of_four(load_bytes(values + k));
        total = add(total, fours);
        if (to.unit_sums) store_bytes(to.unit_sums + (row * to.stride + k) / 4, times(fours, -8));
    }
    to.sums[row] = sum(total);
}

template <class Element>
void quantize_all(const void* x, int64_t num_rows, int64_t num_inputs, const QuantizedRows& to, int64_t num_threads) {
    for_each(num_rows, num_rows * num_inputs < WORTH_THREADS ? 1 : num_threads, [&](int64_t row) {
        quantize_row(static_cast<const Element*>(x) + row * num_inputs, num_inputs, row, to);
    });
}

QuantizedRows quantize(
    int64_t element, const void* x, int64_t num_rows, int64_t num_inputs, bool for_int4, int64_t num_threads) {
    const QuantizedRows rows(num_rows, num_inputs, for_int4);
    if (element == BFLOAT16) quantize_all<BFloat16>(x, num_rows, num_inputs, rows, num_threads);
    else if (element == FLOAT32) quantize_all<float>(x, num_rows, num_inputs, rows, num_threads);
    else quantize_all<Float16>(x, num_rows, num_inputs, rows, num_threads);
    return rows;
}

#if defined(__AVX512F__)
// A unit's nibbles in order, each in a byte.
INLINE Bytes unpacked(__m256i packed) {
    const Bytes both = _mm512_srlv_epi64(_mm512_broadcast_i64x4(packed), _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
    return _mm512_and_si512(both, _mm512_set1_epi8(15));
}
#endif

// The weight of one tile in int4. A unit of 64 inputs is 32 bytes: input i in the low nibble of byte i, 32 + i in the
// high one, both raised by 8, which `unit_sums` takes back. Each unit's whole sums are scaled in float32 lane by lane.
template <int ROWS, bool HAS_SMALL_GROUPS>
INLINE void multiply_int4_tile(
    const uint8_t* const (&columns)[COLUMNS], const float* const (&scales)[COLUMNS], int64_t units_per_group,
    const QuantizedRows& x, int64_t row, const Ahead& ahead, Floats (&sums)[ROWS][COLUMNS]) {
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = zeros();
    const int64_t num_units = x.stride / UNIT;
    int64_t group = 0, units_left = units_per_group;
    for (int64_t unit = 0; unit < num_units; unit++) {
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            const uint8_t* from = columns[c] + unit * UNIT / 2;
            ahead.fetch(from, c);
            const float* scale = scales[c] + group;
#if defined(__AVX512VNNI__)
            __m512i weight = unpacked(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
            Floats factor = HAS_SMALL_GROUPS
                ? _mm512_insertf32x8(fill(scale[0]), _mm256_set1_ps(scale[1]), 1)
                : fill(scale[0]);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const int64_t place = (row + r) * x.stride + unit * UNIT;
                __m512i sum = _mm512_dpbusd_epi32(
                    load_bytes(x.unit_sums + place / 4), weight, load_bytes(x.values + place));
                sums[r][c] = fma(_mm512_cvtepi32_ps(sum), factor, sums[r][c]);
            }
#else
            const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
            __m256i both = load_bytes(from);
            __m256i low = _mm256_and_si256(both, mask);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const int64_t place = (row + r) * x.stride + unit * UNIT;
                __m256i low_sum = _mm256_maddubs_epi16(low, load_bytes(x.values + place));
                __m256i high_sum = _mm256_maddubs_epi16(high, load_bytes(x.values + place + 32));
                low_sum = _mm256_add_epi32(_mm256_madd_epi16(low_sum, ones), load_bytes(x.unit_sums + place / 4));
                high_sum = _mm256_add_epi32(_mm256_madd_epi16(high_sum, ones), load_bytes(x.unit_sums + place / 4 + 8));
                if (HAS_SMALL_GROUPS) {
                    sums[r][c] = fma(_mm256_cvtepi32_ps(low_sum), fill(scale[0]), sums[r][c]);
                    sums[r][c] = fma(_mm256_cvtepi32_ps(high_sum), fill(scale[1]), sums[r][c]);
                } else {
                    __m256i sum = _mm256_add_epi32(low_sum, high_sum);
                    sums[r][c] = fma(_mm256_cvtepi32_ps(sum), fill(scale[0]), sums[r][c]);
                }
            }
#endif
        }
        if (HAS_SMALL_GROUPS) {
            group += 2;
        } else if (--units_left == 0) {
            group++;
            units_left = units_per_group;
        }
    }
}

void multiply_int4(
    const QuantizedRows& rows, const uint8_t* weight, const float* scales, const Output& output, int64_t num_rows,
    int64_t num_groups, int64_t num_threads) {
    constexpr int MAX_ROWS = LANES == 16 ? 4 : 2;
    const int64_t num_columns = output.num_columns;
    const int64_t row_bytes = rows.stride / 2, group_size = rows.stride / num_groups;
    const Cut cut(num_rows, num_columns, row_bytes + num_groups * 4, 2 * rows.stride, MAX_ROWS);
    for_each(cut.num_chunks, num_threads, [&](int64_t chunk) {
        const int64_t end_column = std::min(num_columns, (chunk + 1) * cut.columns_per_chunk);
        for (int64_t block = 0; block < cut.num_blocks; block++) {
            const int64_t first_row = block * cut.rows_per_block;
            const int64_t end_row = std::min(num_rows, first_row + cut.rows_per_block);
            for (int64_t column = chunk * cut.columns_per_chunk; column < end_column; column += COLUMNS) {
                const uint8_t* columns[COLUMNS];
                const float* column_scales[COLUMNS];
                const int64_t distance = column + COLUMNS < end_column ? COLUMNS * row_bytes : 1024;
                for (int c = 0; c < COLUMNS; c++) {
                    const int64_t from = std::min(column + c, num_columns - 1);
                    columns[c] = weight + from * row_bytes;
                    column_scales[c] = scales + from * num_groups;
                }
                Cut::tiles(first_row, end_row, MAX_ROWS, [&](int64_t row, int64_t tile_rows, int64_t tile, int64_t num_tiles) {
                    const Ahead ahead(distance, tile, num_tiles);
                    with_rows<MAX_ROWS>(tile_rows, [&](auto rows_of_tile) {
                        constexpr int ROWS = decltype(rows_of_tile)::value;
                        Floats sums[ROWS][COLUMNS];
                        if (group_size < UNIT)
                            multiply_int4_tile<ROWS, true>(columns, column_scales, 1, rows, row, ahead, sums);
                        else
                            multiply_int4_tile<ROWS, false>(columns, column_scales, group_size / UNIT, rows, row, ahead, sums);
                        for_row_groups(sums, [&](int r, int count, Floats results) {
                            output.put_rows(row + r, count, column, results * row_of_each(rows.scales + row + r, count));
                        });
                    });
                });
            }
        }
    });
}
