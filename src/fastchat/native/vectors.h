// Threads, scratch memory, and vectors of floats and bytes in two instruction sets.
#pragma once

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

constexpr int64_t WORTH_THREADS = 1 << 15;  // elements of small work; below this the threads cost more

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
INLINE void store_bytes(void* to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }
INLINE __mmask16 first_lanes(int64_t count) {  // `count` of them, none below 1
    return static_cast<__mmask16>(count >= 16 ? 0xffff : count < 1 ? 0 : (1 << count) - 1);
}
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
INLINE Floats where_at_most(Floats a, Floats b, Floats yes, Floats no) {  // yes where a <= b
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), no, yes);
}
INLINE Floats nearest(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats times_power_of_two(Floats a, Floats power) { return _mm512_scalef_ps(a, power); }

// The sums over lanes of four vectors, all in the same order: of pairs of lanes in each quarter of a register, ...
INLINE Floats sum_quarters(Floats a, Floats b, Floats c, Floats d) {
    Floats ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    Floats cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    return _mm512_castpd_ps(low) + _mm512_castpd_ps(high);
}
INLINE Bytes sum_quarters(Bytes a, Bytes b, Bytes c, Bytes d) {
    Bytes ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    Bytes cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
// ... and of the quarters. Four rows of them at once: quarter r of the result is that of `rows[r]`.
INLINE Floats sum_rows(const Floats (&rows)[4]) {
    Floats first = _mm512_shuffle_f32x4(rows[0], rows[1], 0x44) + _mm512_shuffle_f32x4(rows[0], rows[1], 0xee);
    Floats second = _mm512_shuffle_f32x4(rows[2], rows[3], 0x44) + _mm512_shuffle_f32x4(rows[2], rows[3], 0xee);
    return _mm512_shuffle_f32x4(first, second, 0x88) + _mm512_shuffle_f32x4(first, second, 0xdd);
}
INLINE Bytes sum_rows(const Bytes (&rows)[4]) {
    Bytes first = _mm512_add_epi32(
        _mm512_shuffle_i32x4(rows[0], rows[1], 0x44), _mm512_shuffle_i32x4(rows[0], rows[1], 0xee));
    Bytes second = _mm512_add_epi32(
        _mm512_shuffle_i32x4(rows[2], rows[3], 0x44), _mm512_shuffle_i32x4(rows[2], rows[3], 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(first, second, 0x88), _mm512_shuffle_i32x4(first, second, 0xdd));
}

// Lane 4 r + c is number r, or number c, of up to four.
INLINE Floats row_of_each(const float* numbers, int64_t count) {
    return _mm512_permutexvar_ps(
        _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0),
        _mm512_maskz_loadu_ps(first_lanes(count), numbers));
}
INLINE Bytes row_of_each(const int32_t* numbers, int64_t count) {
    return _mm512_castps_si512(row_of_each(reinterpret_cast<const float*>(numbers), count));
}
INLINE Floats column_of_each(__m128 numbers) { return _mm512_broadcast_f32x4(numbers); }
INLINE float first_of(Floats values) { return _mm512_cvtss_f32(values); }
INLINE int32_t first_of(Bytes values) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(values)); }
INLINE Bytes subtract(Bytes a, Bytes b) { return _mm512_sub_epi32(a, b); }
INLINE Bytes times(Bytes a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
INLINE Bytes add(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
INLINE Floats to_floats(Bytes integers) { return _mm512_cvtepi32_ps(integers); }
INLINE Bytes sums_of_four(Bytes values) {  // of int8 each
    const Bytes pairs = _mm512_maddubs_epi16(_mm512_set1_epi8(1), values);
    return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
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
INLINE void store_bytes(void* to, Bytes bytes) { _mm256_storeu_si256(static_cast<__m256i*>(to), bytes); }
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
INLINE Floats where_at_most(Floats a, Floats b, Floats yes, Floats no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
}
INLINE Floats nearest(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats times_power_of_two(Floats a, Floats power) {
    return a * as_floats(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23));
}

INLINE Floats sum_quarters(Floats a, Floats b, Floats c, Floats d) {
    return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
}
INLINE Bytes sum_quarters(Bytes a, Bytes b, Bytes c, Bytes d) {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
}
INLINE Floats sum_rows(const Floats (&rows)[2]) {
    return _mm256_permute2f128_ps(rows[0], rows[1], 0x20) + _mm256_permute2f128_ps(rows[0], rows[1], 0x31);
}
INLINE Bytes sum_rows(const Bytes (&rows)[2]) {
    return _mm256_add_epi32(
        _mm256_permute2x128_si256(rows[0], rows[1], 0x20), _mm256_permute2x128_si256(rows[0], rows[1], 0x31));
}
INLINE Floats row_of_each(const float* numbers, int64_t count) {
    return _mm256_set_m128(_mm_set1_ps(numbers[count > 1]), _mm_set1_ps(numbers[0]));
}
INLINE Bytes row_of_each(const int32_t* numbers, int64_t count) {
    return _mm256_set_m128i(_mm_set1_epi32(numbers[count > 1]), _mm_set1_epi32(numbers[0]));
}
INLINE Floats column_of_each(__m128 numbers) { return _mm256_set_m128(numbers, numbers); }
INLINE float first_of(Floats values) { return _mm256_cvtss_f32(values); }
INLINE int32_t first_of(Bytes values) { return _mm_cvtsi128_si32(_mm256_castsi256_si128(values)); }
INLINE Bytes subtract(Bytes a, Bytes b) { return _mm256_sub_epi32(a, b); }
INLINE Bytes times(Bytes a, int32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(b)); }
INLINE Bytes add(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
INLINE Floats to_floats(Bytes integers) { return _mm256_cvtepi32_ps(integers); }
INLINE Bytes sums_of_four(Bytes values) {
    const Bytes pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), values);
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

#endif

INLINE Floats rounded(Floats values, float) { return values; }

constexpr int GROUP_ROWS = LANES / 4;  // whose sums with four vectors fill a register

template <class Vector>
INLINE auto sum(Vector values) {
    Vector rows[GROUP_ROWS];
    UNROLL for (Vector& row : rows) row = sum_quarters(values, values, values, values);
    return first_of(sum_rows(rows));
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

// The first `count` of four numbers, zeros for the others.
template <class Element>
INLINE __m128 some_of_four(const Element* from, int64_t count) {
    alignas(16) float each[4] = {};
    for (int64_t i = 0; i < count; i++) each[i] = to_float(from[i]);
    return _mm_load_ps(each);
}
INLINE __m128 some_of_four(const float* from, int64_t count) {
    return _mm_maskload_ps(from, _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int32_t>(count)), _mm_set_epi32(3, 2, 1, 0)));
}
