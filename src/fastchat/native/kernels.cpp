// The kernels of fastchat.native: matrix products, attention over a paged cache, and a layer's small operators, for x86 CPUs.
//
// Compiled on first use by build.py for one of two instruction sets, "avx512" (AVX-512 with VNNI, and BF16 where there
// is) or "avx2"; called through ctypes by the Python modules beside it, which check shapes and types. Every output
// number is computed by one thread in an order that depends only on its own row, so results do not depend on the
// number of threads nor on the other rows of a batch. Threads are those of torch's own OpenMP.

#include <tuple>

#include "chunks.h"
#include "lane_panels.h"
#include "layers.h"
#include "low_rank.h"
#include "stored_weights.h"

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
#if defined(__AVX512F__)
    if (num_rows >= FloatWords<float>::MIN_ROWS && (element != BFLOAT16 || !HAS_PAIR_PRODUCTS))
        return with_element(element, [&](auto zero) {
            typedef const decltype(zero)* Pointer;
            const FloatWords<decltype(zero)> words{
                static_cast<Pointer>(weight), static_cast<Pointer>(x), to, num_inputs};
            multiply_lane_panels(words, num_rows, num_threads);
        });
#endif
    if (element == BFLOAT16) multiply_float<DotBFloat16>(x, weight, to, num_rows, num_inputs, num_threads);
    else if (element == FLOAT32) multiply_float<DotWidened<float>>(x, weight, to, num_rows, num_inputs, num_threads);
    else multiply_float<DotWidened<Float16>>(x, weight, to, num_rows, num_inputs, num_threads);
}

void fastchat_multiply_int8(
    int64_t element, const void* x, const int8_t* weight, const float* scales, const void* bias, void* output,
    int64_t num_rows, int64_t num_columns, int64_t num_inputs, int64_t num_threads) {
    const QuantizedRows rows = quantize(element, x, num_rows, num_inputs, false, num_threads);
    const Int8Result result{{element, output, bias, num_columns}, scales, rows.scales, rows.sums};
#if defined(__AVX512VNNI__)
    if (num_rows >= MIN_PANEL_ROWS)
        return multiply_panels(weight, rows, num_rows, num_columns, num_inputs, num_threads, result);
#endif
    multiply_all<DotInt8>(
        weight, rows.values, rows.stride, num_rows, num_columns, num_inputs, num_threads, result);
}

void fastchat_multiply_int4(
    int64_t element, const void* x, const uint8_t* weight, const float* scales, const void* bias, void* output,
    int64_t num_rows, int64_t num_columns, int64_t num_inputs, int64_t num_groups, int64_t num_threads) {
    const QuantizedRows rows = quantize(element, x, num_rows, num_inputs, true, num_threads);
    const Output to{element, output, bias, num_columns};
#if defined(__AVX512VNNI__)
    if (num_rows >= Int4Words::MIN_ROWS)
        return multiply_lane_panels(
            Int4Words{weight, rows, scales, to, rows.stride / UNIT, num_groups}, num_rows, num_threads);
#endif
    multiply_int4(rows, weight, scales, to, num_rows, num_groups, num_threads);
}

// A weight (num_rows, num_inputs) to the stored forms of products.py.
void fastchat_store_int8(
    int64_t element, const void* source, int8_t* weight, float* scales, int64_t num_rows, int64_t num_inputs,
    int64_t num_threads) {
    with_element(element, [&](auto zero) {
        store_int8(static_cast<const decltype(zero)*>(source), weight, scales, num_rows, num_inputs, num_threads);
    });
}

void fastchat_store_int4(
    int64_t element, const void* source, uint8_t* packed, float* scales, int64_t num_rows, int64_t num_inputs,
    int64_t group_size, int64_t num_threads) {
    with_element(element, [&](auto zero) {
        store_int4(
            static_cast<const decltype(zero)*>(source), packed, scales, num_rows, num_inputs, group_size, num_threads);
    });
}

// The new tokens' keys and values (num_kv_heads, num_tokens, head_dim) go to their slots; then the first `num_decoding`
// entries of rows, lengths and blocks are single tokens, the `num_chunks` behind them are `counts` tokens each.
void fastchat_attend(
    int64_t element, const void* query, const void* new_keys, const void* new_values, void* keys, void* values,
    void* output, const int64_t* slots, const int64_t* rows, const int64_t* counts, const int64_t* lengths,
    const int64_t* blocks, int64_t num_decoding, int64_t num_chunks, int64_t max_blocks, int64_t num_tokens,
    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t query_head_stride, int64_t query_token_stride,
    int64_t new_head_stride, int64_t new_token_stride, int64_t cache_head_stride, int64_t block_size, int64_t window,
    float scaling, int64_t num_threads) {
    const Cache cache{keys, values, cache_head_stride, num_kv_heads, head_dim, block_size};
    const Decoding decoding{
        query, query_head_stride, query_token_stride, rows, lengths, blocks,
        num_decoding, max_blocks, num_heads, window, scaling};
    Chunks chunks{counts + num_decoding, decoding};
    chunks.each.rows += num_decoding;
    chunks.each.lengths += num_decoding;
    chunks.each.blocks += num_decoding * max_blocks;
    chunks.each.num_sequences = num_chunks;
    with_element(element, [&](auto zero) {
        typedef decltype(zero) Element;
        typedef std::conditional_t<std::is_same_v<Element, BFloat16>, DotBFloat16, DotWidened<Element>> Dot;
        for_each(num_tokens, num_tokens * num_kv_heads * head_dim < WORTH_THREADS ? 1 : num_threads, [&](int64_t token) {
            for (int64_t head = 0; head < num_kv_heads; head++) {
                const int64_t from = head * new_head_stride + token * new_token_stride;
                const int64_t to = head * cache_head_stride + slots[token] * head_dim;
                std::memcpy(
                    static_cast<Element*>(keys) + to, static_cast<const Element*>(new_keys) + from,
                    head_dim * sizeof(Element));
                std::memcpy(
                    static_cast<Element*>(values) + to, static_cast<const Element*>(new_values) + from,
                    head_dim * sizeof(Element));
            }
        });
        attend<Dot>(cache, decoding, output, num_threads);
        attend_chunks<Element>(cache, chunks, output, num_threads);
    });
}

// Rows of x and output lie side by side in groups of `group_size`, which are `group_stride` elements apart; output may
// be x. `added` may be null.
void fastchat_normalize(
    int64_t element, const void* x, void* added, const void* weight, void* output, int64_t num_rows, int64_t size,
    int64_t group_size, int64_t group_stride, float epsilon, int64_t num_threads) {
    with_element(element, [&](auto zero) {
        typedef decltype(zero) Element;
        for_each(num_rows, num_rows * size < WORTH_THREADS ? 1 : num_threads, [&](int64_t row) {
            const int64_t place = row / group_size * group_stride + row % group_size * size;
            normalize_row(
                static_cast<const Element*>(x) + place, added ? static_cast<Element*>(added) + place : nullptr,
                static_cast<const Element*>(weight), static_cast<Element*>(output) + place, size, epsilon);
        });
    });
}

// x += added
void fastchat_add(int64_t element, void* x, const void* added, int64_t count, int64_t num_threads) {
    with_element(element, [&](auto zero) {
        typedef decltype(zero) Element;
        const int64_t num_parts = (count + WORTH_THREADS - 1) / WORTH_THREADS;
        for_each(num_parts, num_threads, [&](int64_t part) {
            const int64_t begin = part * WORTH_THREADS;
            add_to(
                static_cast<Element*>(x) + begin, static_cast<const Element*>(added) + begin,
                std::min(WORTH_THREADS, count - begin));
        });
    });
}

// For each group: h = down x for its rows, then output[start:] += h[first:] up for each of its pieces.
void fastchat_add_low_rank(
    int64_t element, const void* x, void* output, const int64_t* groups, int64_t num_groups, int64_t num_inputs,
    int64_t num_columns, int64_t num_threads) {
    with_element(element, [&](auto zero) {
        typedef decltype(zero) Element;
        add_low_rank(
            static_cast<const Element*>(x), static_cast<Element*>(output), groups, num_groups, num_inputs, num_columns,
            num_threads);
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

// ------------------------------------------------------------------------------------------------- recorded calls

// A call's number among these, and its arguments but for the number of threads, which is the last of all of them.
// recording.py has the same order.
constexpr auto FUNCTIONS = std::make_tuple(
    &fastchat_multiply, &fastchat_multiply_int8, &fastchat_multiply_int4, &fastchat_attend, &fastchat_normalize,
    &fastchat_add, &fastchat_silu_and_multiply, &fastchat_rotate);
constexpr int64_t RECORD_SIZE = 32;

template <class Argument>
Argument argument(int64_t bits) {
    if constexpr (std::is_pointer_v<Argument>) return reinterpret_cast<Argument>(bits);
    else if constexpr (std::is_same_v<Argument, float>) {
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    } else return bits;
}

template <class... Arguments, size_t... I>
void call(void (*function)(Arguments...), const int64_t* bits, int64_t num_threads, std::index_sequence<I...>) {
    constexpr size_t LAST = sizeof...(Arguments) - 1;
    static_assert(LAST < RECORD_SIZE);
    function(argument<Arguments>(I == LAST ? num_threads : bits[I])...);
}

template <class... Arguments>
void call(void (*function)(Arguments...), const int64_t* bits, int64_t num_threads) {
    call(function, bits, num_threads, std::make_index_sequence<sizeof...(Arguments)>());
}

template <size_t... I>
void call_number(int64_t number, const int64_t* bits, int64_t num_threads, std::index_sequence<I...>) {
    ((number == int64_t(I) ? call(std::get<I>(FUNCTIONS), bits, num_threads) : void()), ...);
}

// records (num_calls, RECORD_SIZE)
extern "C" void fastchat_replay(const int64_t* records, int64_t num_calls, int64_t num_threads) {
    for (const int64_t* record = records; record < records + num_calls * RECORD_SIZE; record += RECORD_SIZE)
        call_number(
            record[0], record + 1, num_threads, std::make_index_sequence<std::tuple_size_v<decltype(FUNCTIONS)>>());
}
