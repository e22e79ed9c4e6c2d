// The kernels of fastchat.native: matrix products, decode attention, and a layer's small operators, for x86 CPUs.
//
// Compiled on first use by build.py for one of two instruction sets, "avx512" (AVX-512 with VNNI, and BF16 where there
// is) or "avx2"; called through ctypes by the Python modules beside it, which check shapes and types. Every output
// number is computed by one thread in an order that depends only on its own row, so results do not depend on the
// number of threads nor on the other rows of a batch. Threads are those of torch's own OpenMP.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint8_t;

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// ---------------------------------------------------------------------------------------------------------- threads

// The entry of GNU OpenMP; torch's copy of it is already loaded. A second pool of threads would fight torch's for cores.
extern "C" void GOMP_parallel(void (*run)(void*), void* shared, unsigned num_threads, unsigned flags);

// Calls body(i) for every i below count; threads take the next i when they are free, since cores may be shared.
template <class Body>
void for_each(int64_t count, int64_t num_threads, const Body& body) {
    if (num_threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; i++) body(i);
        return;
    }
    struct Shared {
        const Body& body;
        int64_t count;
        std::atomic<int64_t> next;
    } shared{body, count, {0}};
    auto run = [](void* pointer) {
        auto& work = *static_cast<Shared*>(pointer);
        for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) work.body(i);
    };
    GOMP_parallel(run, &shared, static_cast<unsigned>(std::min(num_threads, count)), 0);
}

// Memory of the calling thread that is kept between calls.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }

    template <class Element>
    Element* take(int64_t count) {
        const int64_t num_bytes = (count * static_cast<int64_t>(sizeof(Element)) + 127) / 64 * 64;
        if (num_bytes > capacity_) {
            std::free(memory_);
            memory_ = std::aligned_alloc(64, num_bytes);
            if (memory_ == nullptr) std::abort();
            capacity_ = num_bytes;
        }
        return static_cast<Element*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    int64_t capacity_ = 0;
};

// ---------------------------------------------------------------------------------------------------------- vectors

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
enum : int64_t { FLOAT32, BFLOAT16, FLOAT16 };  // what Python calls them: build.py's ELEMENTS

#if defined(__AVX512F__)

constexpr int LANES = 16;
typedef __m512 Floats;
typedef __m512i Bytes;  // 64 of them

INLINE Floats zeros() { return _mm512_setzero_ps(); }
INLINE Floats fill(float value) { return _mm512_set1_ps(value); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
INLINE Floats load(const BFloat16* from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE Floats load(const Float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
INLINE Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
INLINE Bytes raise_by_16(Bytes words) { return _mm512_slli_epi32(words, 16); }
INLINE Bytes keep_high_16(Bytes words) { return _mm512_and_si512(words, _mm512_set1_epi32(~0xffff)); }
INLINE Floats as_floats(Bytes words) { return _mm512_castsi512_ps(words); }

INLINE void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
INLINE Floats rounded(Floats values, BFloat16) {  // to nearest, ties to even; not a number stays one
    __m512i bits = _mm512_castps_si512(values);
    __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i result = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), is_odd);
    __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return as_floats(keep_high_16(_mm512_mask_mov_epi32(result, is_nan, _mm512_set1_epi32(0x7fc00000))));
}
INLINE Floats rounded(Floats values, Float16) { return _mm512_cvtph_ps(_mm512_cvtps_ph(values, 0)); }
INLINE void store(BFloat16* to, Floats values) {
    __m512i high = _mm512_srli_epi32(_mm512_castps_si512(rounded(values, BFloat16())), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
}
INLINE void store(Float16* to, Floats values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(values, 0));
}
INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where either is not a number
INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats nearest(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats times_power_of_two(Floats a, Floats power) { return _mm512_scalef_ps(a, power); }

// The sums over lanes of four vectors, all in the same order.
INLINE __m128 sum_four(Floats a, Floats b, Floats c, Floats d) {
    Floats ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    Floats cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    Floats all = _mm512_castpd_ps(low) + _mm512_castpd_ps(high);
    __m256 half = _mm512_castps512_ps256(all) + _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}
INLINE __m128i sum_four(Bytes a, Bytes b, Bytes c, Bytes d) {
    Bytes ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    Bytes cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    Bytes all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

#else

constexpr int LANES = 8;
typedef __m256 Floats;
typedef __m256i Bytes;  // 32 of them

INLINE Floats zeros() { return _mm256_setzero_ps(); }
INLINE Floats fill(float value) { return _mm256_set1_ps(value); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
INLINE Floats load(const BFloat16* from) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE Floats load(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
INLINE Bytes load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINE Bytes raise_by_16(Bytes words) { return _mm256_slli_epi32(words, 16); }
INLINE Bytes keep_high_16(Bytes words) { return _mm256_and_si256(words, _mm256_set1_epi32(~0xffff)); }
INLINE Floats as_floats(Bytes words) { return _mm256_castsi256_ps(words); }

INLINE void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
INLINE Floats rounded(Floats values, BFloat16) {
    __m256i bits = _mm256_castps_si256(values);
    __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i result = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), is_odd);
    Floats is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    Floats whole = _mm256_blendv_ps(as_floats(result), as_floats(_mm256_set1_epi32(0x7fc00000)), is_nan);
    return as_floats(keep_high_16(_mm256_castps_si256(whole)));
}
INLINE Floats rounded(Floats values, Float16) { return _mm256_cvtph_ps(_mm256_cvtps_ph(values, 0)); }
INLINE void store(BFloat16* to, Floats values) {
    __m256i high = _mm256_srli_epi32(_mm256_castps_si256(rounded(values, BFloat16())), 16);
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
}
INLINE void store(Float16* to, Floats values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(values, 0));
}
INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
INLINE Floats nearest(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats times_power_of_two(Floats a, Floats power) {
    return a * as_floats(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23));
}

INLINE __m128 sum_four(Floats a, Floats b, Floats c, Floats d) {
    Floats all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1);
}
INLINE __m128i sum_four(Bytes a, Bytes b, Bytes c, Bytes d) {
    Bytes all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

#endif

INLINE Floats rounded(Floats values, float) { return values; }

INLINE float sum(Floats values) {
    __m128 result = sum_four(values, zeros(), zeros(), zeros());
    return _mm_cvtss_f32(result);
}
INLINE float largest(Floats values) {
    alignas(64) float lanes[LANES];
    store(lanes, values);
    return *std::max_element(lanes, lanes + LANES);
}

// e^x within 2 units in the last place: x = n ln 2 + r, and e^r by its series to the 7th power (|r| <= 0.35).
// Held to the range of float32 that is not subnormal; not a number stays one.
INLINE Floats exponential(Floats x) {
    x = min(fill(88.0f), max(fill(-87.0f), x));
    Floats n = nearest(x * fill(1.44269504f));
    Floats r = fma(n, fill(-0.693359375f), x);  // ln 2 in two parts, the first of few bits
    r = fma(n, fill(2.12194440e-4f), r);
    Floats series = fill(1.0f / 5040);
    series = fma(series, r, fill(1.0f / 720));
    series = fma(series, r, fill(1.0f / 120));
    series = fma(series, r, fill(1.0f / 24));
    series = fma(series, r, fill(1.0f / 6));
    series = fma(series, r, fill(0.5f));
    series = fma(series, r, fill(1.0f));
    series = fma(series, r, fill(1.0f));
    return times_power_of_two(series, n);
}

INLINE float to_float(float value) { return value; }
INLINE float to_float(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
INLINE float to_float(Float16 value) { return _cvtsh_ss(value.bits); }

INLINE void put(float* to, float value) { *to = value; }
INLINE void put(BFloat16* to, float value) {  // to nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE void put(Float16* to, float value) { to->bits = _cvtss_sh(value, 0); }

// --------------------------------------------------------------------------------------------------------- products
//
// y = x W^T with W (N, K) as torch holds it. A tile is up to MAX_ROWS rows of x by 4 rows of W, with an accumulator in
// a register for each pair, summed over its lanes at the end: W needs no packing, and each of its bytes is read from
// memory once. A `Dot` says how one register of a row of W is multiplied with a row of x.

constexpr int COLUMNS = 4;  // rows of W per tile

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

// How far ahead of its use W is asked for: the same place of the chunk's next tile, or further in this row.
INLINE int64_t bytes_ahead(int64_t row_bytes, bool is_last_tile) { return is_last_tile ? 1024 : COLUMNS * row_bytes; }

INLINE void fetch(const void* from, int64_t bytes_ahead) {
    _mm_prefetch(static_cast<const char*>(from) + bytes_ahead, _MM_HINT_T1);
}

template <class Dot, int ROWS>
INLINE void multiply_tile(
    const Columns<Dot>& columns, const typename Dot::Input* x, int64_t x_stride, int64_t num_inputs,
    int64_t ahead, typename Dot::Sum (&sums)[ROWS][COLUMNS]) {
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = Dot::zero();
    const int64_t whole = num_inputs / Dot::STEP * Dot::STEP;
    for (int64_t k = 0; k < whole; k += Dot::STEP) {
        typename Dot::Register weight[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            weight[c] = Dot::take(columns.rows[c] + k);
            fetch(columns.rows[c] + k, ahead);
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

    template <class Element>
    INLINE void put_as(int64_t row, int64_t column, const float (&results)[COLUMNS]) const {
        Element* to = static_cast<Element*>(values) + row * num_columns + column;
        const Element* added = bias ? static_cast<const Element*>(bias) + column : nullptr;
        for (int64_t c = 0; c < std::min<int64_t>(COLUMNS, num_columns - column); c++)
            put(to + c, added ? results[c] + to_float(added[c]) : results[c]);
    }
    INLINE void put_four(int64_t row, int64_t column, const float (&results)[COLUMNS]) const {
        if (element == BFLOAT16) put_as<BFloat16>(row, column, results);
        else if (element == FLOAT32) put_as<float>(row, column, results);
        else put_as<Float16>(row, column, results);
    }
};

// What becomes of the sums of one row of x with four rows of W.
struct FloatResult {
    Output output;

    INLINE void keep(int64_t row, int64_t column, const Floats (&sums)[COLUMNS]) const {
        alignas(16) float results[COLUMNS];
        _mm_store_ps(results, sum_four(sums[0], sums[1], sums[2], sums[3]));
        output.put_four(row, column, results);
    }
};

struct Int8Result {
    Output output;
    const float* scales;
    const float* row_scales;
    const int32_t* row_sums;

    INLINE void keep(int64_t row, int64_t column, const Bytes (&sums)[COLUMNS]) const {
        __m128i whole = sum_four(sums[0], sums[1], sums[2], sums[3]);
        whole = _mm_sub_epi32(whole, _mm_set1_epi32(DotInt8::OFFSET * row_sums[row]));
        alignas(16) float results[COLUMNS];
        _mm_store_ps(results, _mm_cvtepi32_ps(whole) * _mm_set1_ps(row_scales[row]));
        for (int64_t c = 0; c < std::min<int64_t>(COLUMNS, output.num_columns - column); c++)
            results[c] *= scales[column + c];
        output.put_four(row, column, results);
    }
};

// Calls use(Rows<num_rows>()).
template <int ROWS>
struct Rows { static constexpr int value = ROWS; };

template <int MAX, class Use>
INLINE void with_rows(int64_t num_rows, const Use& use) {
    if constexpr (MAX == 1) {
        use(Rows<1>());
    } else {
        if (num_rows == MAX) use(Rows<MAX>());
        else with_rows<MAX - 1>(num_rows, use);
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

    // Calls use(first_row, num_rows) for tiles of nearly equal height over rows [first, end).
    template <class Use>
    static INLINE void tiles(int64_t first, int64_t end, int max_tile_rows, const Use& use) {
        const int64_t num_tiles = (end - first + max_tile_rows - 1) / max_tile_rows;
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            const int64_t from = first + (end - first) * tile / num_tiles;
            use(from, first + (end - first) * (tile + 1) / num_tiles - from);
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
                const int64_t ahead = bytes_ahead(row_bytes, column + COLUMNS >= end_column);
                Cut::tiles(first_row, end_row, Dot::MAX_ROWS, [&](int64_t row, int64_t tile_rows) {
                    with_rows<Dot::MAX_ROWS>(tile_rows, [&](auto rows) {
                        typename Dot::Sum sums[decltype(rows)::value][COLUMNS];
                        multiply_tile<Dot, decltype(rows)::value>(columns, x + row * x_stride, x_stride, num_inputs, ahead, sums);
                        UNROLL for (int r = 0; r < decltype(rows)::value; r++) result.keep(row + r, column, sums[r]);
                    });
                });
            }
        }
    });
}

thread_local Scratch input_scratch;

constexpr int64_t UNIT = 64;
constexpr int64_t WORTH_THREADS = 1 << 15;  // elements of small work; below this the threads cost more
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
    int32_t sum = 0;
    for (int64_t k = 0; k < num_inputs; k++) sum += values[k];
    to.sums[row] = sum;
    if (to.unit_sums == nullptr) return;
    for (int64_t k = 0; k < to.stride; k += 4)
        to.unit_sums[(row * to.stride + k) / 4] = -8 * (values[k] + values[k + 1] + values[k + 2] + values[k + 3]);
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

// The weight of one tile in int4. A unit of 64 inputs is 32 bytes: input i in the low nibble of byte i, 32 + i in the
// high one, both raised by 8, which `unit_sums` takes back. Each unit's whole sums are scaled in float32 lane by lane.
template <int ROWS, bool HAS_SMALL_GROUPS>
INLINE void multiply_int4_tile(
    const uint8_t* const (&columns)[COLUMNS], const float* const (&scales)[COLUMNS], int64_t units_per_group,
    const QuantizedRows& x, int64_t row, int64_t ahead, Floats (&sums)[ROWS][COLUMNS]) {
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = zeros();
    const int64_t num_units = x.stride / UNIT;
    int64_t group = 0, units_left = units_per_group;
    for (int64_t unit = 0; unit < num_units; unit++) {
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            const uint8_t* from = columns[c] + unit * UNIT / 2;
            fetch(from, ahead);
            const float* scale = scales[c] + group;
#if defined(__AVX512VNNI__)
            __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
            both = _mm512_srlv_epi64(both, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
            __m512i weight = _mm512_and_si512(both, _mm512_set1_epi8(15));
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
                const int64_t ahead = bytes_ahead(row_bytes, column + COLUMNS >= end_column);
                for (int c = 0; c < COLUMNS; c++) {
                    const int64_t from = std::min(column + c, num_columns - 1);
                    columns[c] = weight + from * row_bytes;
                    column_scales[c] = scales + from * num_groups;
                }
                Cut::tiles(first_row, end_row, MAX_ROWS, [&](int64_t row, int64_t tile_rows) {
                    with_rows<MAX_ROWS>(tile_rows, [&](auto tile) {
                        constexpr int ROWS = decltype(tile)::value;
                        Floats sums[ROWS][COLUMNS];
                        if (group_size < UNIT)
                            multiply_int4_tile<ROWS, true>(columns, column_scales, 1, rows, row, ahead, sums);
                        else
                            multiply_int4_tile<ROWS, false>(columns, column_scales, group_size / UNIT, rows, row, ahead, sums);
                        UNROLL for (int r = 0; r < ROWS; r++) {
                            alignas(16) float results[COLUMNS];
                            __m128 all = sum_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
                            _mm_store_ps(results, all * _mm_set1_ps(rows.scales[row + r]));
                            output.put_four(row + r, column, results);
                        }
                    });
                });
            }
        }
    });
}

// -------------------------------------------------------------------------------------------------------- attention
//
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
    const int32_t* rows;      // (num_sequences,) the sequences' tokens in query and output
    const int32_t* lengths;   // (num_sequences,) their contexts
    const int32_t* blocks;    // (num_sequences, max_blocks) their block tables
    int64_t num_sequences;
    int64_t max_blocks;
    int64_t num_heads;
    int64_t window;           // 0: none
    float scaling;
};

constexpr int64_t PART = 512, TILE = 64;
constexpr int VALUE_ROWS = LANES == 16 ? 6 : 2;  // by 4 registers of values

struct Part {
    int32_t sequence, index, num_parts;
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
        Cut::tiles(0, group, Dot::MAX_ROWS, [&](int64_t row, int64_t tile_rows) {
            with_rows<Dot::MAX_ROWS>(tile_rows, [&](auto tile) {
                constexpr int ROWS = decltype(tile)::value;
                Floats sums[ROWS][COLUMNS];
                const int64_t stride = padded(head_dim);
                multiply_tile<Dot, ROWS>(columns, query + row * stride, stride, head_dim, TILE * head_dim, sums);
                UNROLL for (int r = 0; r < ROWS; r++)
                    _mm_storeu_ps(
                        scores + (row + r) * TILE + token,
                        sum_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
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
    const int32_t* blocks = decoding.blocks + part.sequence * decoding.max_blocks;
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
        Cut::tiles(0, group, VALUE_ROWS, [&](int64_t row, int64_t tile_rows) {
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
    for (int32_t s = 0; s < decoding.num_sequences; s++) {
        const int32_t num_parts = (decoding.lengths[s] + PART - 1) / PART;
        for (int32_t index = 0; index < num_parts; index++) parts.push_back({s, index, num_parts});
    }
    const int64_t num_parts = parts.size();
    float* states = part_scratch.take<float>(num_parts * cache.num_kv_heads * stride);
    auto write = [&](int32_t sequence, int64_t kv_head, const float* state) {
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

// ------------------------------------------------------------------------------------------------- a layer's operators
//
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

// Calls run with an element of the type that Python numbers so.
template <class Run>
INLINE void with_element(int64_t element, const Run& run) {
    if (element == BFLOAT16) run(BFloat16());
    else if (element == FLOAT32) run(float());
    else run(Float16());
}

extern "C" {

// The shapes are those of products.py, whose functions check them: x (num_rows, num_inputs), output (num_rows,
// num_columns). `bias` may be null.

void fastchat_multiply(
    int64_t element, const void* x, const void* weight, const void* bias, void* output, int64_t num_rows,
    int64_t num_columns, int64_t num_inputs, int64_t num_threads) {
    const Output to{element, output, bias, num_columns};
    if (element == BFLOAT16) multiply_float<DotBFloat16>(x, weight, to, num_rows, num_inputs, num_threads);
    else if (element == FLOAT32) multiply_float<DotWidened<float>>(x, weight, to, num_rows, num_inputs, num_threads);
    else multiply_float<DotWidened<Float16>>(x, weight, to, num_rows, num_inputs, num_threads);
}

void fastchat_multiply_int8(
    int64_t element, const void* x, const int8_t* weight, const float* scales, const void* bias, void* output,
    int64_t num_rows, int64_t num_columns, int64_t num_inputs, int64_t num_threads) {
    const QuantizedRows rows = quantize(element, x, num_rows, num_inputs, false, num_threads);
    multiply_all<DotInt8>(
        weight, rows.values, rows.stride, num_rows, num_columns, num_inputs, num_threads,
        Int8Result{{element, output, bias, num_columns}, scales, rows.scales, rows.sums});
}

void fastchat_multiply_int4(
    int64_t element, const void* x, const uint8_t* weight, const float* scales, const void* bias, void* output,
    int64_t num_rows, int64_t num_columns, int64_t num_inputs, int64_t num_groups, int64_t num_threads) {
    const QuantizedRows rows = quantize(element, x, num_rows, num_inputs, true, num_threads);
    multiply_int4(rows, weight, scales, {element, output, bias, num_columns}, num_rows, num_groups, num_threads);
}

void fastchat_attend(
    int64_t element, const void* query, const void* keys, const void* values, void* output, const int32_t* rows,
    const int32_t* lengths, const int32_t* blocks, int64_t num_sequences, int64_t max_blocks, int64_t num_heads,
    int64_t num_kv_heads, int64_t head_dim, int64_t query_head_stride, int64_t query_token_stride,
    int64_t cache_head_stride, int64_t block_size, int64_t window, float scaling, int64_t num_threads) {
    const Cache cache{keys, values, cache_head_stride, num_kv_heads, head_dim, block_size};
    const Decoding decoding{
        query, query_head_stride, query_token_stride, rows, lengths, blocks,
        num_sequences, max_blocks, num_heads, window, scaling};
    if (element == BFLOAT16) attend<DotBFloat16>(cache, decoding, output, num_threads);
    else if (element == FLOAT32) attend<DotWidened<float>>(cache, decoding, output, num_threads);
    else attend<DotWidened<Float16>>(cache, decoding, output, num_threads);
}

// `added` may be null.
void fastchat_normalize(
    int64_t element, const void* x, void* added, const void* weight, void* output, int64_t num_rows, int64_t size,
    float epsilon, int64_t num_threads) {
    with_element(element, [&](auto zero) {
        typedef decltype(zero) Element;
        for_each(num_rows, num_rows * size < WORTH_THREADS ? 1 : num_threads, [&](int64_t row) {
            normalize_row(
                static_cast<const Element*>(x) + row * size, added ? static_cast<Element*>(added) + row * size : nullptr,
                static_cast<const Element*>(weight), static_cast<Element*>(output) + row * size, size, epsilon);
        });
    });
}

// x (num_rows, 2 size): gates, then what they gate.
void fastchat_silu_and_multiply(
    int64_t element, const void* x, void* output, int64_t num_rows, int64_t size, int64_t num_threads) {
    with_element(element, [&](auto zero) {
        typedef decltype(zero) Element;
        for_each(num_rows, num_rows * size < WORTH_THREADS ? 1 : num_threads, [&](int64_t row) {
            const Element* gate = static_cast<const Element*>(x) + row * 2 * size;
            gate_row(gate, gate + size, static_cast<Element*>(output) + row * size, size);
        });
    });
}

// heads (num_tokens, num_heads, head_dim) with tokens `token_stride` apart; cosines and sines (num_tokens, half).
void fastchat_rotate(
    int64_t element, void* heads, const void* cosines, const void* sines, int64_t num_tokens, int64_t num_heads,
    int64_t head_dim, int64_t token_stride, int64_t half, int64_t is_interleaved, int64_t num_threads) {
    with_element(element, [&](auto zero) {
        typedef decltype(zero) Element;
        const bool is_small = num_tokens * num_heads * half < WORTH_THREADS;
        for_each(num_tokens, is_small ? 1 : num_threads, [&](int64_t token) {
            for (int64_t head = 0; head < num_heads; head++)
                rotate_head(
                    static_cast<Element*>(heads) + token * token_stride + head * head_dim,
                    static_cast<const Element*>(cosines) + token * half,
                    static_cast<const Element*>(sines) + token * half, half, is_interleaved != 0);
        });
    });
}

}  // extern "C"
