// Low-rank changes of a linear's output, as Python lists them: 64-bit numbers, the pieces behind their group.
#pragma once

#include "products.h"

struct LowRankPiece { int64_t start, first, size, rank; const void* up; };
struct LowRankGroup { int64_t row_start, row_stop, rank; const void* down; int64_t num_pieces; };

constexpr int64_t LOW_RANK_ROWS = 4;  // of one group, which share what is read of its change; one thread's work

// h[r * h_stride] = the sum of x[r * x_stride + i] w[i], in the same order for any number of rows.
template <int ROWS, class Element>
INLINE void dot_rows(const Element* x, int64_t x_stride, const Element* w, int64_t size, float* h, int64_t h_stride) {
    Floats first[ROWS], second[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) first[r] = second[r] = zeros();
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        const Floats low = load(w + i), high = load(w + i + LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            first[r] = fma(load(x + r * x_stride + i), low, first[r]);
            second[r] = fma(load(x + r * x_stride + i + LANES), high, second[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        alignas(64) float lanes[LANES];
        store(lanes, first[r] + second[r]);
        float sum = 0.0f;
        for (float lane : lanes) sum += lane;
        for (int64_t k = i; k < size; k++) sum += to_float(x[r * x_stride + k]) * to_float(w[k]);
        h[r * h_stride] = sum;
    }
}

// Rows of output += rows of h times up (rank, size).
template <int ROWS, class Element>
INLINE void add_combinations(
    Element* output, int64_t output_stride, const float* h, int64_t h_stride, const Element* up, int64_t rank, int64_t size) {
    int64_t n = 0;
    for (; n + LANES <= size; n += LANES) {
        Floats sums[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) sums[r] = load(output + r * output_stride + n);
        for (int64_t k = 0; k < rank; k++) {
            const Floats part = load(up + k * size + n);
            UNROLL for (int r = 0; r < ROWS; r++) sums[r] = fma(fill(h[r * h_stride + k]), part, sums[r]);
        }
        UNROLL for (int r = 0; r < ROWS; r++) store(output + r * output_stride + n, sums[r]);
    }
    for (; n < size; n++)
        for (int r = 0; r < ROWS; r++) {
            float sum = to_float(output[r * output_stride + n]);
            for (int64_t k = 0; k < rank; k++) sum += h[r * h_stride + k] * to_float(up[k * size + n]);
            put(output + r * output_stride + n, sum);
        }
}

template <class Element>
void add_low_rank(
    const Element* x, Element* output, const int64_t* groups, int64_t num_groups, int64_t num_inputs,
    int64_t num_columns, int64_t num_threads) {
    struct Task { const LowRankGroup* group; int64_t row, num_rows; };
    std::vector<Task> tasks;
    for (int64_t number = 0; number < num_groups; number++) {
        const auto* group = reinterpret_cast<const LowRankGroup*>(groups);
        groups += 5 * (1 + group->num_pieces);
        for (int64_t row = group->row_start; row < group->row_stop; row += LOW_RANK_ROWS)
            tasks.push_back({group, row, std::min(LOW_RANK_ROWS, group->row_stop - row)});
    }
    for_each(tasks.size(), num_threads, [&](int64_t number) {
        const Task& task = tasks[number];
        const LowRankGroup& group = *task.group;
        const auto* pieces = reinterpret_cast<const LowRankPiece*>(&group + 1);
        const Element* down = static_cast<const Element*>(group.down);
        float* h = input_scratch.take<float>(LOW_RANK_ROWS * group.rank);
        with_rows<LOW_RANK_ROWS>(task.num_rows, [&](auto rows) {
            constexpr int ROWS = decltype(rows)::value;
            for (int64_t k = 0; k < group.rank; k++)
                dot_rows<ROWS>(
                    x + task.row * num_inputs, num_inputs, down + k * num_inputs, num_inputs, h + k, group.rank);
            for (int64_t i = 0; i < group.num_pieces; i++)
                add_combinations<ROWS>(
                    output + task.row * num_columns + pieces[i].start, num_columns, h + pieces[i].first, group.rank,
                    static_cast<const Element*>(pieces[i].up), pieces[i].rank, pieces[i].size);
        });
    });
}
