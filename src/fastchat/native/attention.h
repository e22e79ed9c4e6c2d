// Attention over a paged cache.
#pragma once

#include "products.h"

// One query token per sequence over a paged cache. The query heads that share a KV head are rows against its keys. The
// context is cut into parts of fixed places, so that a long one is shared by threads and the result is always the same:
// a part gives its largest score, its sum of weights and its weighted sum of values, which are put together in order.

struct Cache {
    const void* keys;         // (num_kv_heads, num_slots, head_dim)
    const void* values;
    int64_t head_stride;      // in elements
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_size;
};

struct Decoding {
    const void* query;        // (num_heads, num_tokens, head_dim), of these strides in elements
    int64_t head_stride;
    int64_t token_stride;
    const int64_t* rows;      // (num_sequences,) the sequences' tokens in query and output
    const int64_t* lengths;   // (num_sequences,) their contexts
    const int64_t* blocks;    // (num_sequences, max_blocks) their block tables
    int64_t num_sequences;
    int64_t max_blocks;
    int64_t num_heads;
    int64_t window;           // 0: none
    float scaling;
};

constexpr int64_t PART = 512, TILE = 64;
constexpr int VALUE_ROWS = LANES == 16 ? 6 : 2;  // by 4 registers of values

struct Part {
    int64_t sequence, index, num_parts;
};

// The running softmax of a group of query rows.
struct Softmax {
    float* largest;           // (group,)
    float* total;             // (group,)
    float* sums;              // (group, head_dim)

    Softmax(float* memory, int64_t group) : largest(memory), total(memory + group), sums(memory + 2 * group) {}
    static int64_t size(int64_t group, int64_t head_dim) { return group * (head_dim + 2); }
};

// sums = sums * factors + weights (group, TILE) of `count` tokens times their values.
template <class Element, int ROWS, int VECTORS>
INLINE void add_values(
    const Element* values, const int64_t* slots, int64_t count, int64_t head_dim, const float* weights,
    const float* factors, float* sums) {
    Floats added[ROWS][VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECTORS; v++)
            added[r][v] = load(sums + r * head_dim + v * LANES) * fill(factors[r]);
    for (int64_t token = 0; token < count; token++) {
        Floats value[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) value[v] = load(values + slots[token] * head_dim + v * LANES);
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                added[r][v] = fma(fill(weights[r * TILE + token]), value[v], added[r][v]);
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) store(sums + r * head_dim + v * LANES, added[r][v]);
}

template <class Element, int ROWS>
INLINE void add_all_values(
    const Element* values, const int64_t* slots, int64_t count, int64_t head_dim, const float* weights,
    const float* factors, float* sums) {
    int64_t d = 0;
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES)
        add_values<Element, ROWS, 4>(values + d, slots, count, head_dim, weights, factors, sums + d);
    for (; d + LANES <= head_dim; d += LANES)
        add_values<Element, ROWS, 1>(values + d, slots, count, head_dim, weights, factors, sums + d);
    for (; d < head_dim; d++)
        for (int r = 0; r < ROWS; r++) {
            float added = sums[r * head_dim + d] * factors[r];
            for (int64_t token = 0; token < count; token++)
                added += weights[r * TILE + token] * to_float(values[slots[token] * head_dim + d]);
            sums[r * head_dim + d] = added;
        }
}

template <class Dot>
void score_tile(
    const typename Dot::Input* query, int64_t group, const typename Dot::Weight* keys, const int64_t* slots,
    int64_t count, int64_t head_dim, float* scores) {
    for (int64_t token = 0; token < count; token += COLUMNS) {
        const Columns<Dot> columns(
            head_dim, [&](int c) { return keys + slots[std::min(token + c, count - 1)] * head_dim; });
        Cut::tiles(0, group, Dot::MAX_ROWS, [&](int64_t row, int64_t tile_rows, int64_t number, int64_t num_tiles) {
            const Ahead ahead(TILE * head_dim, number, num_tiles);
            with_rows<Dot::MAX_ROWS>(tile_rows, [&](auto tile) {
                constexpr int ROWS = decltype(tile)::value;
                Floats sums[ROWS][COLUMNS];
                const int64_t stride = padded(head_dim);
                multiply_tile<Dot, ROWS>(columns, query + row * stride, stride, head_dim, ahead, sums);
                for_row_groups(sums, [&](int r, int count, Floats results) {
                    alignas(64) float each[LANES];
                    store(each, results);
                    for (int i = 0; i < count; i++)
                        std::memcpy(scores + (row + r + i) * TILE + token, each + i * COLUMNS, COLUMNS * sizeof(float));
                });
            });
        });
    }
}

// Scores of a tile to weights; the sums so far must be multiplied by `factors`.
INLINE void weigh_tile(float* scores, int64_t group, int64_t count, float scaling, const Softmax& state, float* factors) {
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    for (int64_t g = 0; g < group; g++) {
        float* row = scores + g * TILE;
        for (int64_t token = count; token < TILE; token++) row[token] = LOWEST;
        Floats highest = fill(LOWEST);
        for (int64_t token = 0; token < count; token += LANES) {
            store(row + token, load(row + token) * fill(scaling));
            highest = max(highest, load(row + token));
        }
        const float new_largest = std::max(state.largest[g], largest(highest));
        factors[g] = state.largest[g] == LOWEST ? 0.0f : std::exp(state.largest[g] - new_largest);
        Floats total = zeros();
        for (int64_t token = 0; token < count; token += LANES) {
            Floats weights = exponential(load(row + token) - fill(new_largest));
            store(row + token, weights);
            total = total + weights;  // those beyond `count` are e^-87
        }
        state.total[g] = state.total[g] * factors[g] + sum(total);
        state.largest[g] = new_largest;
    }
}

template <class Element>
void write_result(const Softmax& state, int64_t group, int64_t head_dim, Element* output) {
    for (int64_t g = 0; g < group; g++)
        for (int64_t d = 0; d < head_dim; d++)
            put(output + g * head_dim + d, state.sums[g * head_dim + d] / state.total[g]);
}

thread_local Scratch part_scratch, tile_scratch;

template <class Dot>
void attend_part(const Cache& cache, const Decoding& decoding, const Part& part, int64_t kv_head, const Softmax& state) {
    typedef typename Dot::Weight Element;
    typedef typename Dot::Input Input;
    const int64_t head_dim = cache.head_dim, group = decoding.num_heads / cache.num_kv_heads, stride = padded(head_dim);
    const int64_t floats = group * (TILE + 1);
    float* scores = tile_scratch.take<float>(floats + group * stride);
    float* factors = scores + group * TILE;
    Input* query = reinterpret_cast<Input*>(factors + group);
    for (int64_t g = 0; g < group; g++) {
        const Element* from = static_cast<const Element*>(decoding.query)
            + (kv_head * group + g) * decoding.head_stride + decoding.rows[part.sequence] * decoding.token_stride;
        arrange_row<Dot>(from, head_dim, query + g * stride);
        state.largest[g] = -std::numeric_limits<float>::infinity();
        state.total[g] = 0.0f;
    }
    std::memset(state.sums, 0, group * head_dim * sizeof(float));
    const Element* keys = static_cast<const Element*>(cache.keys) + kv_head * cache.head_stride;
    const Element* values = static_cast<const Element*>(cache.values) + kv_head * cache.head_stride;
    const int64_t* blocks = decoding.blocks + part.sequence * decoding.max_blocks;
    const int64_t length = decoding.lengths[part.sequence];
    const int64_t first_seen = decoding.window ? std::max<int64_t>(0, length - decoding.window) : 0;
    const int64_t end = std::min(length, (part.index + 1) * PART);
    for (int64_t first = std::max(first_seen, part.index * PART); first < end; first += TILE) {
        const int64_t count = std::min(TILE, end - first);
        int64_t slots[TILE];
        for (int64_t i = 0; i < count; i++)
            slots[i] = blocks[(first + i) / cache.block_size] * cache.block_size + (first + i) % cache.block_size;
        score_tile<Dot>(query, group, keys, slots, count, head_dim, scores);
        weigh_tile(scores, group, count, decoding.scaling, state, factors);
        Cut::tiles(0, group, VALUE_ROWS, [&](int64_t row, int64_t tile_rows, int64_t, int64_t) {
            with_rows<VALUE_ROWS>(tile_rows, [&](auto tile) {
                add_all_values<Element, decltype(tile)::value>(
                    values, slots, count, head_dim, scores + row * TILE, factors + row, state.sums + row * head_dim);
            });
        });
    }
}

// Puts the parts' states together, in order, into the first.
INLINE void merge_parts(float* states, int64_t num_parts, int64_t stride, int64_t group, int64_t head_dim) {
    const Softmax whole(states, group);
    for (int64_t index = 1; index < num_parts; index++) {
        const Softmax part(states + index * stride, group);
        for (int64_t g = 0; g < group; g++) {
            if (part.total[g] == 0.0f) continue;  // all of it is before the window
            const float largest = std::max(whole.largest[g], part.largest[g]);
            const float of_whole = whole.total[g] == 0.0f ? 0.0f : std::exp(whole.largest[g] - largest);
            const float of_part = std::exp(part.largest[g] - largest);
            for (int64_t d = g * head_dim; d < (g + 1) * head_dim; d++)
                whole.sums[d] = whole.sums[d] * of_whole + part.sums[d] * of_part;
            whole.total[g] = whole.total[g] * of_whole + part.total[g] * of_part;
            whole.largest[g] = largest;
        }
    }
}

template <class Dot>
void attend(const Cache& cache, const Decoding& decoding, void* output, int64_t num_threads) {
    typedef typename Dot::Weight Element;
    const int64_t group = decoding.num_heads / cache.num_kv_heads, head_dim = cache.head_dim;
    const int64_t stride = Softmax::size(group, head_dim);
    std::vector<Part> parts;
    for (int64_t s = 0; s < decoding.num_sequences; s++) {
        const int64_t num_parts = (decoding.lengths[s] + PART - 1) / PART;
        for (int64_t index = 0; index < num_parts; index++) parts.push_back({s, index, num_parts});
    }
    const int64_t num_parts = parts.size();
    float* states = part_scratch.take<float>(num_parts * cache.num_kv_heads * stride);
    auto write = [&](int64_t sequence, int64_t kv_head, const float* state) {
        Element* to = static_cast<Element*>(output)
            + (decoding.rows[sequence] * decoding.num_heads + kv_head * group) * head_dim;
        write_result(Softmax(const_cast<float*>(state), group), group, head_dim, to);
    };
    for_each(num_parts * cache.num_kv_heads, num_threads, [&](int64_t task) {
        const int64_t kv_head = task / num_parts;
        const Part& part = parts[task % num_parts];
        float* state = states + task * stride;
        attend_part<Dot>(cache, decoding, part, kv_head, Softmax(state, group));
        if (part.num_parts == 1) write(part.sequence, kv_head, state);
    });
    for (int64_t task = 0; task < num_parts * cache.num_kv_heads; task++) {
        const Part& part = parts[task % num_parts];
        if (part.num_parts == 1 || part.index > 0) continue;
        merge_parts(states + task * stride, part.num_parts, stride, group, head_dim);
        write(part.sequence, task / num_parts, states + task * stride);
    }
}
