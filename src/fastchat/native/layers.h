// A layer's small operators.
#pragma once

#include "vectors.h"

// Each rounds to the element type where transformers' modules do, so that float32 and bfloat16 agree with them.

// x (+ added, which becomes the sum) divided by its root mean square, times weight.
template <class Element>
void normalize_row(const Element* x, Element* added, const Element* weight, Element* output, int64_t size, float epsilon) {
    const int64_t whole = size / LANES * LANES;
    Floats squares = zeros();
    float more_squares = 0.0f;
    for (int64_t i = 0; i < whole; i += LANES) {
        Floats value = load(x + i);
        if (added) {
            value = rounded(value + load(added + i), Element());
            store(added + i, value);
        }
        squares = fma(value, value, squares);
    }
    for (int64_t i = whole; i < size; i++) {
        if (added) put(added + i, to_float(x[i]) + to_float(added[i]));
        const float value = to_float(added ? added[i] : x[i]);
        more_squares += value * value;
    }
    const float factor = 1.0f / std::sqrt((sum(squares) + more_squares) / size + epsilon);
    const Element* from = added ? added : x;
    for (int64_t i = 0; i < whole; i += LANES)
        store(output + i, rounded(load(from + i) * fill(factor), Element()) * load(weight + i));
    for (int64_t i = whole; i < size; i++) {
        Element normalized;
        put(&normalized, to_float(from[i]) * factor);
        put(output + i, to_float(normalized) * to_float(weight[i]));
    }
}

INLINE Floats silu(Floats x) { return x / (fill(1.0f) + exponential(zeros() - x)); }

template <class Element>
void gate_row(const Element* gate, const Element* up, Element* output, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, size - i);
        if (count == LANES) {
            store(output + i, rounded(silu(load(gate + i)), Element()) * load(up + i));
            continue;
        }
        Element gates[LANES] = {}, ups[LANES] = {}, results[LANES];
        std::memcpy(gates, gate + i, count * sizeof(Element));
        std::memcpy(ups, up + i, count * sizeof(Element));
        store(results, rounded(silu(load(gates)), Element()) * load(ups));
        std::memcpy(output + i, results, count * sizeof(Element));
    }
}

// Turns pairs of a head's elements: (i, i + half) or, interleaved, (2i, 2i + 1).
template <class Element>
void rotate_head(Element* head, const Element* cosines, const Element* sines, int64_t half, bool is_interleaved) {
    int64_t i = 0;
    if (!is_interleaved)
        for (; i + LANES <= half; i += LANES) {
            Floats a = load(head + i), b = load(head + half + i), cosine = load(cosines + i), sine = load(sines + i);
            store(head + i, rounded(a * cosine, Element()) - rounded(b * sine, Element()));
            store(head + half + i, rounded(b * cosine, Element()) + rounded(a * sine, Element()));
        }
    auto product = [](Element a, Element b) {
        Element result;
        put(&result, to_float(a) * to_float(b));
        return to_float(result);
    };
    for (; i < half; i++) {
        Element* first = is_interleaved ? head + 2 * i : head + i;
        Element* second = is_interleaved ? first + 1 : first + half;
        const Element a = *first, b = *second;
        put(first, product(a, cosines[i]) - product(b, sines[i]));
        put(second, product(b, cosines[i]) + product(a, sines[i]));
    }
}

template <class Element>
void add_to(Element* x, const Element* added, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, load(x + i) + load(added + i));
    for (; i < count; i++) put(x + i, to_float(x[i]) + to_float(added[i]));
}
