// Products of many rows with weights of plain numbers and of int4: the sums of products.h and quantized.h in their order,
// and so the same bits, from panels.
#pragma once

#include "panels.h"

#if defined(__AVX512F__)

// With few rows lane l of a sum takes in word l of each step (a float32, a pair of bfloat16, four int4), and the lanes
// are added up at the end. Here 16 columns have their lane l in one register, one lane after the other; so a panel holds
// for each lane its words of all steps, in the numbers that are multiplied, and x, cut into tiles of rows, is arranged
// likewise.
// MIN_ROWS and more rows make tiles of MIN_TILE_ROWS to TILE_ROWS rows of nearly equal height.
constexpr int TILE_ROWS = 12, MIN_TILE_ROWS = 8, NUM_LEVELS = 4;
constexpr int64_t MAX_BLOCK_TILES = 8;
constexpr int64_t LEVEL_SIZE = MAX_BLOCK_TILES * TILE_ROWS * PANEL_COLUMNS;
// The order in which sum_quarters and sum_rows add lanes.
constexpr int64_t LANE_ORDER[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};

// Sixteen words, zeros past the first `count` elements.
INLINE Bytes some_words(const BFloat16* from, int64_t count) {
    return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, from);
}
INLINE Bytes some_words(const float* from, int64_t count) { return _mm512_maskz_loadu_epi32(first_lanes(count), from); }
INLINE Bytes some_words(const Float16* from, int64_t count) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from)));
}

// Words of one number or, in bfloat16, of two; both are float32 in panels and tiles.
template <class Element>
struct FloatWords {
    static constexpr int X_NUMBERS = std::is_same_v<Element, BFloat16> ? 2 : 1, W_NUMBERS = X_NUMBERS;
    static constexpr int64_t STEP = 16 * X_NUMBERS, MIN_ROWS = 40;
    const Element *weight, *x;
    Output output;
    int64_t num_inputs, num_steps = (num_inputs + STEP - 1) / STEP, num_scales = 0;

    int64_t column_bytes() const { return num_inputs * sizeof(Element); }
    INLINE Bytes weight_words(int64_t column, int64_t step) const {
        return some_words(weight + column * num_inputs + step * STEP, num_inputs - step * STEP);
    }
    static INLINE void split(Bytes words, Bytes (&numbers)[W_NUMBERS]) {
        numbers[0] = W_NUMBERS == 1 ? words : raise_by_16(words);
        if constexpr (W_NUMBERS == 2) numbers[1] = keep_high_16(words);
    }
    INLINE void x_numbers(int64_t row, int64_t step, Bytes (&numbers)[X_NUMBERS]) const {
        split(some_words(x + row * num_inputs + step * STEP, num_inputs - step * STEP), numbers);
    }
    INLINE float scale(int64_t, int64_t) const { return 1.0f; }

    template <int ROWS>
    INLINE void sum_lane(
        int64_t, const int32_t* panel, const float*, const int32_t* tile, Floats (&first)[ROWS],
        Floats (&second)[ROWS]) const {
        const float* x_values = reinterpret_cast<const float*>(tile);
        for (int64_t k = 0; k < num_steps * W_NUMBERS; k++, panel += PANEL_COLUMNS, x_values += ROWS) {
            const Floats low = as_floats(load_bytes(panel)), high = as_floats(load_bytes(panel + GROUP_COLUMNS));
            UNROLL for (int r = 0; r < ROWS; r++) {
                const Floats value = fill(x_values[r]);
                first[r] = fma(low, value, first[r]);
                second[r] = fma(high, value, second[r]);
            }
        }
    }
    INLINE void keep(int64_t row, int64_t column, Floats sums) const { output.put_sixteen(row, column, sums); }
};

// Words of four int4, each in a byte and raised by 8; a row of x has four int8 for it, and what takes back the 8.
struct Int4Words {
    static constexpr int X_NUMBERS = 2, W_NUMBERS = 1;
    static constexpr int64_t MIN_ROWS = 20;
    static INLINE void split(Bytes words, Bytes (&numbers)[W_NUMBERS]) { numbers[0] = words; }
    const uint8_t* weight;
    const QuantizedRows& x;
    const float* scales;
    Output output;
    int64_t num_steps, num_scales;

    int64_t column_bytes() const { return num_steps * UNIT / 2; }
    INLINE Bytes weight_words(int64_t column, int64_t step) const {
        const uint8_t* from = weight + (column * num_steps + step) * UNIT / 2;
        return unpacked(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    INLINE void x_numbers(int64_t row, int64_t step, Bytes (&numbers)[X_NUMBERS]) const {
        const int64_t place = row * x.stride + step * UNIT;
        numbers[0] = load_bytes(x.values + place);
        numbers[1] = load_bytes(x.unit_sums + place / 4);
    }
    INLINE float scale(int64_t column, int64_t group) const { return scales[column * num_scales + group]; }

    template <int ROWS>
    INLINE void sum_lane(
        int64_t lane, const int32_t* panel, const float* factors, const int32_t* tile, Floats (&first)[ROWS],
        Floats (&second)[ROWS]) const {
        const bool has_small_groups = num_scales > num_steps;
        const int64_t steps_per_group = has_small_groups ? 1 : num_steps / num_scales;
        const int64_t groups_apart = has_small_groups ? 2 * PANEL_COLUMNS : PANEL_COLUMNS;
        if (has_small_groups && lane >= 8) factors += PANEL_COLUMNS;
        for (int64_t step = 0; step < num_steps; factors += groups_apart) {
            const Floats low_factor = load(factors), high_factor = load(factors + GROUP_COLUMNS);
            for (const int64_t end = step + steps_per_group; step < end; step++, panel += PANEL_COLUMNS, tile += 2 * ROWS) {
                const Bytes low = load_bytes(panel), high = load_bytes(panel + GROUP_COLUMNS);
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const Bytes four = _mm512_set1_epi32(tile[r]), start = _mm512_set1_epi32(tile[ROWS + r]);
                    const Bytes low_sum = _mm512_dpbusd_epi32(start, low, four);
                    const Bytes high_sum = _mm512_dpbusd_epi32(start, high, four);
                    first[r] = fma(_mm512_cvtepi32_ps(low_sum), low_factor, first[r]);
                    second[r] = fma(_mm512_cvtepi32_ps(high_sum), high_factor, second[r]);
                }
            }
        }
    }
    INLINE void keep(int64_t row, int64_t column, Floats sums) const {
        output.put_sixteen(row, column, sums * fill(x.scales[row]));
    }
};

// (lane, step, number, row) of one tile of x.
template <class Words>
void arrange_tile(const Words& words, int64_t first_row, int64_t num_rows, int32_t* to) {
    for (int64_t step = 0; step < words.num_steps; step++) {
        Bytes lanes[Words::X_NUMBERS][16];
        for (int64_t r = 0; r < 16; r++) {
            Bytes numbers[Words::X_NUMBERS];
            words.x_numbers(first_row + std::min(r, num_rows - 1), step, numbers);
            UNROLL for (int number = 0; number < Words::X_NUMBERS; number++) lanes[number][r] = numbers[number];
        }
        UNROLL for (int number = 0; number < Words::X_NUMBERS; number++) {
            transpose(lanes[number]);
            for (int64_t lane = 0; lane < 16; lane++)
                _mm512_mask_storeu_epi32(
                    to + ((lane * words.num_steps + step) * Words::X_NUMBERS + number) * num_rows, first_lanes(num_rows),
                    lanes[number][lane]);
        }
    }
}

// (lane, step, number, column), and (group, column) of the scales; a column past the last is the last one again.
template <class Words>
void fill_lane_panel(const Words& words, int64_t column, int32_t* panel, float* factors) {
    const int64_t last = words.output.num_columns - 1;
    for (int64_t group = 0; group < PANEL_COLUMNS; group += GROUP_COLUMNS)
        for (int64_t step = 0; step < words.num_steps; step++) {
            Bytes lanes[16];
            UNROLL for (int c = 0; c < 16; c++) lanes[c] = words.weight_words(std::min(column + group + c, last), step);
            transpose(lanes);
            UNROLL for (int lane = 0; lane < 16; lane++) {
                Bytes numbers[Words::W_NUMBERS];
                Words::split(lanes[lane], numbers);
                UNROLL for (int i = 0; i < Words::W_NUMBERS; i++)
                    _mm512_store_si512(
                        panel + ((lane * words.num_steps + step) * Words::W_NUMBERS + i) * PANEL_COLUMNS + group, numbers[i]);
            }
        }
    for (int64_t c = 0; c < PANEL_COLUMNS; c++)
        for (int64_t group = 0; group < words.num_scales; group++)
            factors[group * PANEL_COLUMNS + c] = words.scale(std::min(column + c, last), group);
}

// Adds the lane whose turn it is. Sums of the lanes so far wait in `levels` (NUM_LEVELS, rows, columns), each for its equal.
template <int ROWS, class Words>
INLINE void add_lane(
    const Words& words, int64_t turn, const int32_t* panel, const float* factors, const int32_t* arranged, int64_t row,
    int64_t column, float* levels) {
    const int64_t lane = LANE_ORDER[turn], lane_size = words.num_steps * Words::X_NUMBERS;
    Floats first[ROWS], second[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) first[r] = second[r] = zeros();
    words.template sum_lane<ROWS>(
        lane, panel + lane * words.num_steps * Words::W_NUMBERS * PANEL_COLUMNS, factors,
        arranged + (row * 16 + lane * ROWS) * lane_size, first, second);
    for (; turn & 1; turn >>= 1, levels += LEVEL_SIZE)
        UNROLL for (int r = 0; r < ROWS; r++) {
            first[r] = load(levels + r * PANEL_COLUMNS) + first[r];
            second[r] = load(levels + r * PANEL_COLUMNS + GROUP_COLUMNS) + second[r];
        }
    UNROLL for (int r = 0; r < ROWS; r++) {
        if (lane == LANE_ORDER[15]) {
            words.keep(row + r, column, first[r]);
            words.keep(row + r, column + GROUP_COLUMNS, second[r]);
        } else {
            store(levels + r * PANEL_COLUMNS, first[r]);
            store(levels + r * PANEL_COLUMNS + GROUP_COLUMNS, second[r]);
        }
    }
}

// Asks for the weights of the panel that this thread will likely fill next, some at a time while it multiplies, which
// reads none of them.
class NextPanel {
  public:
    // Part `number` of a weight of `end` bytes, `size` for each panel, in `num_steps`.
    NextPanel(const void* weight, int64_t number, int64_t size, int64_t end, int64_t num_steps)
        : at_(static_cast<const char*>(weight) + std::min(number * size, end)),
          end_(static_cast<const char*>(weight) + std::min((number + 1) * size, end)),
          step_((size / num_steps / 64 + 1) * 64) {}

    INLINE void fetch_some() {
        for (const char* stop = at_ + std::min(step_, end_ - at_); at_ < stop; at_ += 64)
            _mm_prefetch(at_, _MM_HINT_T1);
    }

  private:
    const char *at_, *end_;
    int64_t step_;
};

thread_local Scratch rows_scratch;

template <class Words>
void multiply_lane_panels(const Words& words, int64_t num_rows, int64_t num_threads) {
    const int64_t num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS, num_words = 16 * words.num_steps;
    const auto first_row = [&](int64_t tile) { return num_rows * tile / num_tiles; };
    int32_t* arranged = rows_scratch.take<int32_t>(num_rows * num_words * Words::X_NUMBERS);
    for_each(num_tiles, num_threads, [&](int64_t tile) {
        const int64_t row = first_row(tile);
        arrange_tile(words, row, first_row(tile + 1) - row, arranged + row * num_words * Words::X_NUMBERS);
    });
    const int64_t num_columns = words.output.num_columns, panel_size = num_words * Words::W_NUMBERS * PANEL_COLUMNS;
    // A panel that fills much of a core's second cache is read once for several tiles.
    const int64_t panel_bytes = panel_size * sizeof(int32_t);
    const int64_t block_tiles = panel_bytes <= PANELS_BYTES ? 1 : MAX_BLOCK_TILES;
    const bool has_room_for_next = panel_bytes <= PANELS_BYTES / 2;
    for_each((num_columns + PANEL_COLUMNS - 1) / PANEL_COLUMNS, num_threads, [&](int64_t number) {
        const int64_t column = number * PANEL_COLUMNS;
        float* levels = panel_scratch.take<float>(
            NUM_LEVELS * LEVEL_SIZE + words.num_scales * PANEL_COLUMNS + panel_size);
        float* factors = levels + NUM_LEVELS * LEVEL_SIZE;
        int32_t* panel = reinterpret_cast<int32_t*>(factors + words.num_scales * PANEL_COLUMNS);
        fill_lane_panel(words, column, panel, factors);
        NextPanel next(
            words.weight, number + num_threads, PANEL_COLUMNS * words.column_bytes(), num_columns * words.column_bytes(),
            16 * num_tiles);
        for (int64_t block = 0; block < num_tiles; block += block_tiles)
            for (int64_t turn = 0; turn < 16; turn++)
                for (int64_t tile = block; tile < std::min(num_tiles, block + block_tiles); tile++) {
                    const int64_t row = first_row(tile);
                    if (has_room_for_next) next.fetch_some();
                    with_rows<TILE_ROWS, MIN_TILE_ROWS>(first_row(tile + 1) - row, [&](auto rows) {
                        add_lane<decltype(rows)::value>(
                            words, turn, panel, factors, arranged, row, column,
                            levels + (row - first_row(block)) * PANEL_COLUMNS);
                    });
                }
    });
}

#endif
