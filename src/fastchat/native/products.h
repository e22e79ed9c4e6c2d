// Products with weights of plain numbers and of int8.
#pragma once

#include "vectors.h"

// y = x W^T with W (N, K) as torch holds it. A tile is up to MAX_ROWS rows of x by 4 rows of W, with an accumulator in
// a register for each pair, summed over its lanes at the end: W needs no packing, and each of its bytes is read from
// memory once. A `Dot` says how one register of a row of W is multiplied with a row of x.

constexpr int COLUMNS = 4;  // rows of W per tile

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIR_PRODUCTS = true;
#else
constexpr bool HAS_PAIR_PRODUCTS = false;
#endif

struct DotBFloat16 {
    typedef BFloat16 Weight;
    typedef Floats Sum;
    static INLINE Sum zero() { return zeros(); }
#if defined(__AVX512BF16__)
    // Pairs of products straight into float32 lanes.
    typedef BFloat16 Input;
    typedef Bytes Register;
    static constexpr int STEP = 2 * LANES, MAX_ROWS = 6;
    static INLINE Register take(const Weight* from) { return load_bytes(from); }
    static INLINE Sum add(Sum sum, Register weight, const Input* x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)load_bytes(x));
    }
    static INLINE void arrange(const Weight* from, Input* to) { std::memcpy(to, from, STEP * sizeof *to); }
#else
    // A bfloat16 is the high half of a float32. A 32-bit lane holds two: an even input below, an odd one above; x is
    // float32, the even inputs of a step before the odd ones.
    typedef float Input;
    struct Register { Floats even, odd; };
    static constexpr int STEP = 2 * LANES, MAX_ROWS = LANES == 16 ? 6 : 2;
    static INLINE Register take(const Weight* from) {
        Bytes pairs = load_bytes(from);
        return {as_floats(raise_by_16(pairs)), as_floats(keep_high_16(pairs))};
    }
    static INLINE Sum add(Sum sum, Register weight, const Input* x) {
        return fma(weight.odd, load(x + LANES), fma(weight.even, load(x), sum));
    }
    static INLINE void arrange(const Weight* from, Input* to) {
        for (int i = 0; i < STEP; i++) to[i / 2 + i % 2 * LANES] = to_float(from[i]);
    }
#endif
};

template <class Element>
struct DotWidened {  // float32 and float16
    typedef Element Weight;
    typedef float Input;
    typedef Floats Sum;
    typedef Floats Register;
    static constexpr int STEP = LANES, MAX_ROWS = LANES == 16 ? 6 : 2;
    static INLINE Sum zero() { return zeros(); }
    static INLINE Register take(const Weight* from) { return load(from); }
    static INLINE Sum add(Sum sum, Register weight, const Input* x) { return fma(weight, load(x), sum); }
    static INLINE void arrange(const Weight* from, Input* to) {
        for (int i = 0; i < STEP; i++) to[i] = to_float(from[i]);
    }
};

struct DotInt8 {  // int8 with int8 into int32 lanes, exact
    typedef int8_t Weight;
    typedef int8_t Input;
    typedef Bytes Sum;
    typedef Bytes Register;
    static constexpr int STEP = sizeof(Bytes), MAX_ROWS = LANES == 16 ? 6 : 2;
#if defined(__AVX512VNNI__)
    // The instruction takes unsigned with signed bytes: weights are raised by 128, which the caller subtracts again.
    static constexpr int32_t OFFSET = 128;
    static INLINE Sum zero() { return _mm512_setzero_si512(); }
    static INLINE Register take(const Weight* from) {
        return _mm512_xor_si512(load_bytes(from), _mm512_set1_epi8(static_cast<char>(0x80)));
    }
    static INLINE Sum add(Sum sum, Register weight, const Input* x) {
        return _mm512_dpbusd_epi32(sum, weight, load_bytes(x));
    }
#else
    // |w| <= 128 and |x| <= 127, so a pair's sum fits 16 bits.
    static constexpr int32_t OFFSET = 0;
    static INLINE Sum zero() { return _mm256_setzero_si256(); }
    static INLINE Register take(const Weight* from) { return load_bytes(from); }
    static INLINE Sum add(Sum sum, Register weight, const Input* x) {
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(load_bytes(x), weight));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
#endif
};

// Pointers to the rows of W of one tile, and to copies of their ends that are filled up with zeros.
template <class Dot>
struct Columns {
    const typename Dot::Weight* rows[COLUMNS];
    alignas(64) typename Dot::Weight ends[COLUMNS][Dot::STEP];

    // `row_at(c)` is the first element of the tile's row c.
    template <class RowAt>
    INLINE Columns(int64_t num_inputs, const RowAt& row_at) {
        const int64_t whole = num_inputs / Dot::STEP * Dot::STEP;
        for (int c = 0; c < COLUMNS; c++) {
            rows[c] = row_at(c);
            if (whole == num_inputs) continue;
            std::memset(ends[c], 0, sizeof ends[c]);
            std::memcpy(ends[c], rows[c] + whole, (num_inputs - whole) * sizeof(typename Dot::Weight));
        }
    }
};

// How far ahead of its use each row of W is asked for: the same place of the chunk's next tile, or further in this row.
// The tiles of x that are multiplied with the same rows of W share the asking, so that memory is read all the time and
// not during the first one alone; the others ask for what is there.
struct Ahead {
    int64_t bytes[COLUMNS];

    Ahead(int64_t distance, int64_t tile, int64_t num_tiles) {
        for (int64_t c = 0; c < COLUMNS; c++) bytes[c] = c * num_tiles / COLUMNS == tile ? distance : 0;
    }
    INLINE void fetch(const void* from, int column) const {
        _mm_prefetch(static_cast<const char*>(from) + bytes[column], _MM_HINT_T1);
    }
};

template <class Dot, int ROWS>
INLINE void multiply_tile(
    const Columns<Dot>& columns, const typename Dot::Input* x, int64_t x_stride, int64_t num_inputs,
    const Ahead& ahead, typename Dot::Sum (&sums)[ROWS][COLUMNS]) {
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = Dot::zero();
    const int64_t whole = num_inputs / Dot::STEP * Dot::STEP;
    for (int64_t k = 0; k < whole; k += Dot::STEP) {
        typename Dot::Register weight[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            weight[c] = Dot::take(columns.rows[c] + k);
            ahead.fetch(columns.rows[c] + k, c);
        }
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < COLUMNS; c++)
                sums[r][c] = Dot::add(sums[r][c], weight[c], x + r * x_stride + k);
    }
    if (whole == num_inputs) return;
    UNROLL for (int c = 0; c < COLUMNS; c++) {
        typename Dot::Register weight = Dot::take(columns.ends[c]);
        UNROLL for (int r = 0; r < ROWS; r++)
            sums[r][c] = Dot::add(sums[r][c], weight, x + r * x_stride + whole);
    }
}

// Where results go: a matrix of the element type Python named, and a row of it to add.
struct Output {
    int64_t element;
    void* values;
    const void* bias;  // or null
    int64_t num_columns;

    // Four columns of up to GROUP_ROWS rows: lane 4 r + c is column c of row r.
    template <class Element>
    INLINE void put_rows_as(int64_t row, int64_t num_rows, int64_t column, Floats results) const {
        const int64_t count = std::min<int64_t>(COLUMNS, num_columns - column);
        if (bias) results = results + column_of_each(some_of_four(static_cast<const Element*>(bias) + column, count));
        alignas(64) Element each[LANES];
        store(each, results);
        Element* to = static_cast<Element*>(values) + row * num_columns + column;
        for (int64_t r = 0; r < num_rows; r++) {
            if (count == COLUMNS) std::memcpy(to + r * num_columns, each + r * COLUMNS, COLUMNS * sizeof(Element));
            else std::memcpy(to + r * num_columns, each + r * COLUMNS, count * sizeof(Element));
        }
    }
    INLINE void put_rows(int64_t row, int64_t num_rows, int64_t column, Floats results) const {
        if (element == BFLOAT16) put_rows_as<BFloat16>(row, num_rows, column, results);
        else if (element == FLOAT32) put_rows_as<float>(row, num_rows, column, results);
        else put_rows_as<Float16>(row, num_rows, column, results);
    }
#if defined(__AVX512F__)
    template <class Element>
    INLINE void put_sixteen_as(int64_t row, int64_t column, Floats results) const {
        Element* to = static_cast<Element*>(values) + row * num_columns + column;
        const Element* added = bias ? static_cast<const Element*>(bias) + column : nullptr;
        if (num_columns - column >= 16) return store(to, added ? results + load(added) : results);
        alignas(64) float each[16];
        store(each, results);
        for (int64_t c = 0; c < num_columns - column; c++) put(to + c, added ? each[c] + to_float(added[c]) : each[c]);
    }
    void put_sixteen(int64_t row, int64_t column, Floats results) const __attribute__((noinline)) {
        if (column >= num_columns) return;
        if (element == BFLOAT16) put_sixteen_as<BFloat16>(row, column, results);
        else if (element == FLOAT32) put_sixteen_as<float>(row, column, results);
        else put_sixteen_as<Float16>(row, column, results);
    }
#endif
};

// Calls use(r, count, sums) for groups of `count` rows from r on, with lane 4 i + c the sum of sums[r + i][c].
template <int ROWS, class Vector, class Use>
INLINE void for_row_groups(const Vector (&sums)[ROWS][COLUMNS], const Use& use) {
    UNROLL for (int r = 0; r < ROWS; r += GROUP_ROWS) {
        Vector rows[GROUP_ROWS];
        UNROLL for (int i = 0; i < GROUP_ROWS; i++) {
            const auto& row = sums[std::min(r + i, ROWS - 1)];
            rows[i] = sum_quarters(row[0], row[1], row[2], row[3]);
        }
        use(r, std::min(GROUP_ROWS, ROWS - r), sum_rows(rows));
    }
}

// What becomes of the sums of a tile: ROWS rows of x with four rows of W.
struct FloatResult {
    Output output;

    template <int ROWS>
    INLINE void keep(int64_t row, int64_t column, const Floats (&sums)[ROWS][COLUMNS]) const {
        for_row_groups(sums, [&](int r, int count, Floats results) { output.put_rows(row + r, count, column, results); });
    }
};

struct Int8Result {
    Output output;
    const float* scales;
    const float* row_scales;
    const int32_t* row_sums;

    template <int ROWS>
    INLINE void keep(int64_t row, int64_t column, const Bytes (&sums)[ROWS][COLUMNS]) const {
        const Floats column_scales = column_of_each(
            some_of_four(scales + column, std::min<int64_t>(COLUMNS, output.num_columns - column)));
        for_row_groups(sums, [&](int r, int count, Bytes whole) {
            whole = subtract(whole, times(row_of_each(row_sums + row + r, count), DotInt8::OFFSET));
            output.put_rows(
                row + r, count, column, to_floats(whole) * row_of_each(row_scales + row + r, count) * column_scales);
        });
    }
};

// Calls use(Rows<num_rows>()), which is built for MIN to MAX rows.
template <int ROWS>
struct Rows { static constexpr int value = ROWS; };

template <int MAX, int MIN = 1, class Use>
INLINE void with_rows(int64_t num_rows, const Use& use) {
    if constexpr (MAX == MIN) {
        use(Rows<MIN>());
    } else {
        if (num_rows == MAX) use(Rows<MAX>());
        else with_rows<MAX - 1, MIN>(num_rows, use);
    }
}

// How the work is cut: chunks of W for the threads, blocks of x that stay in a core's cache, tiles of equal height.
struct Cut {
    static constexpr int64_t CHUNK_BYTES = 192 * 1024, BLOCK_BYTES = 512 * 1024;
    int64_t columns_per_chunk, num_chunks, rows_per_block, num_blocks;

    Cut(int64_t num_rows, int64_t num_columns, int64_t weight_row_bytes, int64_t x_row_bytes, int max_tile_rows) {
        const int64_t wanted = CHUNK_BYTES / std::max<int64_t>(1, weight_row_bytes);
        columns_per_chunk = std::max<int64_t>(4, (wanted + COLUMNS - 1) / COLUMNS) * COLUMNS;
        num_chunks = (num_columns + columns_per_chunk - 1) / columns_per_chunk;
        rows_per_block = std::max<int64_t>(max_tile_rows, BLOCK_BYTES / std::max<int64_t>(1, x_row_bytes));
        num_blocks = (num_rows + rows_per_block - 1) / rows_per_block;
    }

    // Calls use(first_row, num_rows, tile, num_tiles) for tiles of nearly equal height over rows [first, end).
    template <class Use>
    static INLINE void tiles(int64_t first, int64_t end, int max_tile_rows, const Use& use) {
        const int64_t num_tiles = (end - first + max_tile_rows - 1) / max_tile_rows;
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            const int64_t from = first + (end - first) * tile / num_tiles;
            use(from, first + (end - first) * (tile + 1) / num_tiles - from, tile, num_tiles);
        }
    }
};

template <class Dot, class Result>
void multiply_all(
    const typename Dot::Weight* weight, const typename Dot::Input* x, int64_t x_stride, int64_t num_rows,
    int64_t num_columns, int64_t num_inputs, int64_t num_threads, const Result& result) {
    const Cut cut(
        num_rows, num_columns, num_inputs * sizeof(typename Dot::Weight), x_stride * sizeof(typename Dot::Input),
        Dot::MAX_ROWS);
    for_each(cut.num_chunks, num_threads, [&](int64_t chunk) {
        const int64_t end_column = std::min(num_columns, (chunk + 1) * cut.columns_per_chunk);
        for (int64_t block = 0; block < cut.num_blocks; block++) {
            const int64_t first_row = block * cut.rows_per_block;
            const int64_t end_row = std::min(num_rows, first_row + cut.rows_per_block);
            for (int64_t column = chunk * cut.columns_per_chunk; column < end_column; column += COLUMNS) {
                const Columns<Dot> columns(
                    num_inputs, [&](int c) { return weight + std::min(column + c, num_columns - 1) * num_inputs; });
                const int64_t row_bytes = num_inputs * sizeof(typename Dot::Weight);
                const int64_t distance = column + COLUMNS < end_column ? COLUMNS * row_bytes : 1024;
                Cut::tiles(first_row, end_row, Dot::MAX_ROWS, [&](int64_t row, int64_t tile_rows, int64_t tile, int64_t num_tiles) {
                    const Ahead ahead(distance, tile, num_tiles);
                    with_rows<Dot::MAX_ROWS>(tile_rows, [&](auto rows) {
                        typename Dot::Sum sums[decltype(rows)::value][COLUMNS];
                        multiply_tile<Dot, decltype(rows)::value>(columns, x + row * x_stride, x_stride, num_inputs, ahead, sums);
                        result.template keep<decltype(rows)::value>(row, column, sums);
                    });
                });
            }
        }
    });
}

thread_local Scratch input_scratch;

constexpr int64_t UNIT = 64;
INLINE int64_t padded(int64_t num_inputs) { return (num_inputs + UNIT - 1) / UNIT * UNIT; }

// A row of x as a Dot reads it, filled up with zeros to whole units.
template <class Dot>
INLINE void arrange_row(const typename Dot::Weight* x, int64_t num_inputs, typename Dot::Input* to) {
    for (int64_t k = 0; k < padded(num_inputs); k += Dot::STEP) {
        alignas(64) typename Dot::Weight step[Dot::STEP] = {};
        const int64_t count = std::min<int64_t>(Dot::STEP, num_inputs - k);
        if (count > 0) std::memcpy(step, x + k, count * sizeof step[0]);
        Dot::arrange(step, to + k);
    }
}

template <class Dot>
const typename Dot::Input* arrange(
    const typename Dot::Weight* x, int64_t num_rows, int64_t num_inputs, int64_t num_threads) {
    if constexpr (std::is_same_v<typename Dot::Weight, typename Dot::Input>) {
        if (num_inputs % UNIT == 0) return x;
    }
    const int64_t stride = padded(num_inputs);
    auto* arranged = input_scratch.take<typename Dot::Input>(num_rows * stride);
    for_each(num_rows, num_rows * num_inputs < WORTH_THREADS ? 1 : num_threads, [&](int64_t row) {
        arrange_row<Dot>(x + row * num_inputs, num_inputs, arranged + row * stride);
    });
    return arranged;
}

template <class Dot>
void multiply_float(
    const void* x, const void* weight, const Output& output, int64_t num_rows, int64_t num_inputs,
    int64_t num_threads) {
    typedef const typename Dot::Weight* Pointer;
    multiply_all<Dot>(
        static_cast<Pointer>(weight), arrange<Dot>(static_cast<Pointer>(x), num_rows, num_inputs, num_threads),
        padded(num_inputs), num_rows, output.num_columns, num_inputs, num_threads, FloatResult{output});
}
