// Weights quantized to the stored forms, with the bits that fastchat/models/quantize.py gives them in torch.
#pragma once

#include "quantized.h"

template <class Element>
void store_int8(const Element* source, int8_t* weight, float* scales, int64_t num_rows, int64_t num_inputs, int64_t num_threads) {
    for_each(num_rows, num_threads, [&](int64_t row) {
        const QuantizedRows one(1, num_inputs, false);
        quantize_row(source + row * num_inputs, num_inputs, 0, one);
        std::memcpy(weight + row * num_inputs, one.values, num_inputs);
        scales[row] = *one.scales;
    });
}

// A sum of float32 numbers in float64. For those summed here, products with codes of four bits, it is exact, and so the
// same in any order.
struct ExactSum {
#if defined(__AVX512F__)
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    INLINE void add(Floats values) {
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(values)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1)));
    }
    INLINE double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
#else
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    INLINE void add(Floats values) {
        low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(values)));
        high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1)));
    }
    INLINE double total() const {
        alignas(32) double lanes[4];
        _mm256_store_pd(lanes, _mm256_add_pd(low, high));
        return lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
#endif
};

// Codes of a group for one factor, and how well they go along with it: sums of products.
struct Int4Group {
    const float* values;
    int64_t size;

    struct Fit { double along, square; };

    static INLINE Floats codes(Floats values, Floats factor) {
        return min(max(nearest(values * factor), fill(-8.0f)), fill(7.0f));
    }

    INLINE Fit fit(float factor) const {
        ExactSum along, square;
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats value = load(values + i), code = codes(value, fill(factor));
            along.add(value * code);
            square.add(code * code);
        }
        return {along.total(), std::max(square.total(), 1.0)};
    }

    // Writes the codes, raised by 8, and returns their scale.
    INLINE float store(uint8_t* to) const {
        Floats low = load(values), high = low;
        for (int64_t i = LANES; i < size; i += LANES) {
            low = min(low, load(values + i));
            high = max(high, load(values + i));
        }
        const float lowest = -::largest(-low), highest = ::largest(high);
        const float largest = -lowest > highest ? lowest : highest;
        const float inverse = std::fabs(largest) < 1e-12f ? 0.0f : 1.0f / largest;  // 1e-12: products.MIN_NONZERO
        float best_factor = 0.0f;
        double best_gain = -1.0;
        for (float divisor : {-8.0f, -8.8f, -7.3f}) {  // quantize.DIVISORS
            const Fit found = fit(inverse * divisor);
            const double gain = found.along * found.along / found.square;
            if (gain <= best_gain) continue;
            best_gain = gain;
            best_factor = inverse * divisor;
        }
        alignas(64) float code[LANES];
        for (int64_t i = 0; i < size; i += LANES) {
            ::store(code, codes(load(values + i), fill(best_factor)));
            for (int64_t lane = 0; lane < LANES; lane++) to[i + lane] = static_cast<uint8_t>(code[lane] + 8.0f);
        }
        const Fit found = fit(best_factor);
        return static_cast<float>(found.along / found.square);
    }
};

template <class Element>
void store_int4_row(const Element* source, uint8_t* packed, float* scales, int64_t num_inputs, int64_t group_size) {
    const int64_t stride = padded(num_inputs);
    float* values = input_scratch.take<float>(stride + stride / 4);
    uint8_t* codes = reinterpret_cast<uint8_t*>(values + stride);
    const int64_t whole = num_inputs / LANES * LANES;
    Floats zeroes = zeros();  // times zero, all but infinity and what is not a number is zero
    float last_zeroes = 0.0f;
    for (int64_t k = 0; k < whole; k += LANES) {
        const Floats value = load(source + k);
        zeroes = fma(value, zeros(), zeroes);
        store(values + k, value);
    }
    for (int64_t k = whole; k < num_inputs; k++) last_zeroes += (values[k] = to_float(source[k])) * 0.0f;
    const bool is_sound = sum(zeroes) + last_zeroes == 0.0f;
    std::fill(values + num_inputs, values + stride, 0.0f);
    for (int64_t group = 0; group < stride / group_size; group++) {
        const float scale = Int4Group{values + group * group_size, group_size}.store(codes + group * group_size);
        scales[group] = is_sound ? scale : std::numeric_limits<float>::quiet_NaN();
    }
    for (int64_t unit = 0; unit < stride; unit += UNIT)
        for (int64_t i = 0; i < UNIT / 2; i++)
            packed[unit / 2 + i] = static_cast<uint8_t>(codes[unit + i] | codes[unit + UNIT / 2 + i] << 4);
}

template <class Element>
void store_int4(
    const Element* source, uint8_t* packed, float* scales, int64_t num_rows, int64_t num_inputs, int64_t group_size,
    int64_t num_threads) {
    const int64_t stride = padded(num_inputs);
    for_each(num_rows, num_threads, [&](int64_t row) {
        store_int4_row(
            source + row * num_inputs, packed + row * stride / 2, scales + row * (stride / group_size), num_inputs,
            group_size);
    });
}
