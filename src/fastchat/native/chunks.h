// Attention of chunks of prompts: many query tokens per sequence over a paged cache, causal.
#pragma once

#include "attention.h"

// A task is some neighbouring query tokens of one sequence and one KV head. Its rows, a query head of a token each, are
// lanes: queries are turned once (head_dim, rows), scores come out as (keys, rows), and the softmax is vertical. Keys and
// values are taken in tiles from the context's beginning on, so a row's result depends on nothing but its own context.

struct Chunks {
    const int64_t* counts;    // (num_sequences,) query tokens of each; they are the last of its context
    Decoding each;            // `rows` are the first of them
};

struct ChunkTask {
    int64_t sequence, first_token, num_tokens;
};

constexpr int64_t TASK_ROWS = 128, COLUMN_VECTORS = 4, COLUMN_BLOCK = COLUMN_VECTORS * LANES;
constexpr float NEARLY_LOWEST = -1e30f;  // of a row that has seen nothing yet; unlike -inf it can be subtracted from itself

// out (ROWS, VECTORS registers) = out * factors + a (ROWS, count) b (count, VECTORS registers)
template <int ROWS, int VECTORS>
INLINE void accumulate(
    const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t count, const float* factors,
    float* out, int64_t out_row) {
    Floats sums[ROWS][VECTORS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECTORS; v++)
            sums[r][v] = factors ? load(out + r * out_row + v * LANES) * fill(factors[r]) : zeros();
    for (int64_t k = 0; k < count; k++) {
        Floats columns[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) columns[v] = load(b + k * b_step + v * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Floats factor = fill(a[r * a_row + k * a_step]);
            UNROLL for (int v = 0; v < VECTORS; v++) sums[r][v] = fma(factor, columns[v], sums[r][v]);
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) store(out + r * out_row + v * LANES, sums[r][v]);
}

// The same for any number of rows, and of columns in whole registers.
INLINE void accumulate_all(
    const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t count, const float* factors,
    float* out, int64_t out_row, int64_t num_rows, int64_t num_columns) {
    for (int64_t column = 0; column < num_columns;) {
        const bool is_block = column + COLUMN_BLOCK <= num_columns;
        Cut::tiles(0, num_rows, VALUE_ROWS, [&](int64_t row, int64_t tile_rows, int64_t, int64_t) {
            with_rows<VALUE_ROWS>(tile_rows, [&](auto tile) {
                constexpr int ROWS = decltype(tile)::value;
                const float* own = factors ? factors + row : nullptr;
                float* to = out + row * out_row + column;
                if (is_block)
                    accumulate<ROWS, COLUMN_VECTORS>(a + row * a_row, a_row, a_step, b + column, b_step, count, own, to, out_row);
                else
                    accumulate<ROWS, 1>(a + row * a_row, a_row, a_step, b + column, b_step, count, own, to, out_row);
            });
        });
        column += is_block ? COLUMN_BLOCK : LANES;
    }
}

INLINE int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// The working memory of a task, all of it float32.
struct ChunkMemory {
    float *queries, *keys, *values, *scores, *sums, *largest, *total, *factors, *places;

    ChunkMemory(Scratch& scratch, int64_t num_rows, int64_t width) {
        const int64_t matrix = num_rows * width, tile = TILE * width, scored = TILE * num_rows;
        float* memory = scratch.take<float>(2 * matrix + 2 * tile + scored + 4 * num_rows);
        queries = memory;             // (width, num_rows)
        sums = queries + matrix;      // (num_rows, width)
        keys = sums + matrix;         // (TILE, width)
        values = keys + tile;         // (TILE, width)
        scores = values + tile;       // (TILE, num_rows)
        largest = scores + scored;    // each (num_rows,)
        total = largest + num_rows;
        factors = total + num_rows;
        places = factors + num_rows;
    }
};

// A row of any type as float32, filled up with zeros to whole registers.
template <class Element>
INLINE void widen(const Element* from, int64_t count, float* to) {
    const int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(to + i, load(from + i));
    for (int64_t i = whole; i < whole_vectors(count); i++) to[i] = i < count ? to_float(from[i]) : 0.0f;
}

// Scores (count, num_rows) of the keys from `first` on to weights; a row sees the keys up to its own place.
INLINE void weigh_chunk(
    const ChunkMemory& memory, int64_t num_rows, int64_t first, int64_t count, bool is_masked, float window, float scaling) {
    for (int64_t row = 0; row < num_rows; row += LANES) {
        const Floats place = load(memory.places + row), before = load(memory.largest + row);
        const Floats first_seen = place - fill(window);  // exclusive
        const Floats hidden = fill(-std::numeric_limits<float>::infinity());
        Floats highest = before;
        for (int64_t key = 0; key < count; key++) {
            float* at = memory.scores + key * num_rows + row;
            Floats score = load(at) * fill(scaling);
            if (is_masked) {
                const Floats key_place = fill(static_cast<float>(first + key));
                score = where_at_most(key_place, place, where_at_most(key_place, first_seen, hidden, score), hidden);
            }
            store(at, score);
            highest = max(score, highest);
        }
        const Floats factor = exponential(before - highest);
        Floats total = load(memory.total + row) * factor;
        for (int64_t key = 0; key < count; key++) {
            float* at = memory.scores + key * num_rows + row;
            const Floats weight = exponential(load(at) - highest);
            store(at, weight);
            total = total + weight;
        }
        store(memory.total + row, total);
        store(memory.factors + row, factor);
        store(memory.largest + row, highest);
    }
}

template <class Element>
void attend_task(const Cache& cache, const Chunks& chunks, const ChunkTask& task, int64_t kv_head, Element* output) {
    const Decoding& each = chunks.each;
    const int64_t head_dim = cache.head_dim, group = each.num_heads / cache.num_kv_heads, width = whole_vectors(head_dim);
    const int64_t used_rows = task.num_tokens * group, num_rows = whole_vectors(used_rows);
    const ChunkMemory memory(tile_scratch, num_rows, width);
    const int64_t length = each.lengths[task.sequence], first_place = length - chunks.counts[task.sequence] + task.first_token;
    std::memset(memory.queries, 0, 2 * num_rows * width * sizeof(float));  // and the sums behind them
    for (int64_t row = 0; row < num_rows; row++) {
        memory.largest[row] = NEARLY_LOWEST;
        memory.total[row] = 0.0f;
        memory.places[row] = static_cast<float>(first_place + std::min(row / group, int64_t{task.num_tokens} - 1));
        if (row >= used_rows) continue;
        const int64_t token = each.rows[task.sequence] + task.first_token + row / group;
        const Element* from = static_cast<const Element*>(each.query)
            + (kv_head * group + row % group) * each.head_stride + token * each.token_stride;
        for (int64_t d = 0; d < head_dim; d++) memory.queries[d * num_rows + row] = to_float(from[d]);
    }
    const Element* keys = static_cast<const Element*>(cache.keys) + kv_head * cache.head_stride;
    const Element* values = static_cast<const Element*>(cache.values) + kv_head * cache.head_stride;
    const int64_t* blocks = each.blocks + task.sequence * each.max_blocks;
    const int64_t end = first_place + task.num_tokens;
    const int64_t first_seen = each.window ? std::max<int64_t>(0, first_place + 1 - each.window) : 0;
    for (int64_t first = first_seen / TILE * TILE; first < end; first += TILE) {
        const int64_t count = std::min(TILE, end - first);
        for (int64_t i = 0; i < count; i++) {
            const int64_t place = first + i;
            const int64_t slot = blocks[place / cache.block_size] * cache.block_size + place % cache.block_size;
            widen(keys + slot * head_dim, head_dim, memory.keys + i * width);
            widen(values + slot * head_dim, head_dim, memory.values + i * width);
        }
        accumulate_all(
            memory.keys, width, 1, memory.queries, num_rows, head_dim, nullptr, memory.scores, num_rows, count, num_rows);
        const bool is_masked = first + count - 1 > first_place || each.window;
        const float window = each.window ? static_cast<float>(each.window) : std::numeric_limits<float>::infinity();
        weigh_chunk(memory, num_rows, first, count, is_masked, window, each.scaling);
        accumulate_all(
            memory.scores, 1, num_rows, memory.values, width, count, memory.factors, memory.sums, width, num_rows, width);
    }
    for (int64_t row = 0; row < used_rows; row++) {
        const int64_t token = each.rows[task.sequence] + task.first_token + row / group;
        Element* to = output + (token * each.num_heads + kv_head * group + row % group) * head_dim;
        for (int64_t d = 0; d < head_dim; d++) put(to + d, memory.sums[row * width + d] / memory.total[row]);
    }
}

template <class Element>
void attend_chunks(const Cache& cache, const Chunks& chunks, void* output, int64_t num_threads) {
    const int64_t group = chunks.each.num_heads / cache.num_kv_heads;
    const int64_t tokens_per_task = std::max<int64_t>(1, TASK_ROWS / group);
    std::vector<ChunkTask> tasks;
    for (int64_t s = 0; s < chunks.each.num_sequences; s++)
        for (int64_t token = 0; token < chunks.counts[s]; token += tokens_per_task)
            tasks.push_back({s, token, std::min(tokens_per_task, chunks.counts[s] - token)});
    const int64_t num_tasks = tasks.size();
    for_each(num_tasks * cache.num_kv_heads, num_threads, [&](int64_t i) {
        // Late tokens have more to see: they begin first, so that no thread is left with one at the end.
        const ChunkTask& task = tasks[num_tasks - 1 - i / cache.num_kv_heads];
        attend_task<Element>(cache, chunks, task, i % cache.num_kv_heads, static_cast<Element*>(output));
    });
}
