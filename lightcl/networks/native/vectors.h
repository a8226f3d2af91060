/* Vectors of fp32 numbers, and how they are read from and written to memory. Plain C with the vector types that GCC and
   Clang know; the width of a vector follows from the processor that it is compiled for. */

#ifndef LIGHTCL_VECTORS_H
#define LIGHTCL_VECTORS_H

#include <string.h>

/* LOW and HIGH take the first or second half of two vectors' numbers in turn. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
enum { LANES = 8 };
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { LANES = 4 };
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* anywhere in memory */
typedef unsigned words __attribute__((vector_size(4 * LANES)));
typedef unsigned short halves __attribute__((vector_size(2 * LANES))); /* bf16: the upper half of an fp32 number */
typedef unsigned short loose_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE long at_most(long a, long b) { return a < b ? a : b; }

/* The first `count` of a vector's numbers; the others are 0. */
INLINE vec load(const float *from, long count) {
    if (count >= LANES) return *(const loose *)from;
    vec result = {0};
    memcpy(&result, from, 4 * count);
    return result;
}

INLINE void store(float *to, vec value, long count) {
    if (count >= LANES) *(loose *)to = value;
    else memcpy(to, &value, 4 * count);
}

INLINE vec select(words mask, vec yes, vec no) { return (vec)(((words)yes & mask) | ((words)no & ~mask)); }

/* ReLU; NaN stays NaN. */
INLINE vec positive(vec value) { return select((words)(value < 0), (vec){0}, value); }

INLINE vec widened(halves h) { return (vec)(__builtin_convertvector(h, words) << 16); }

/* To the nearest bf16, at equal distance to the even one; NaN stays NaN. */
INLINE halves rounded(vec value) {
    words bits = (words)value, up = bits + 0x7fff + ((bits >> 16) & 1), nan = (words)(value != value);
    return __builtin_convertvector(((up & ~nan) | ((bits | 0x400000) & nan)) >> 16, halves);
}

INLINE float widened_one(unsigned short h) {
    unsigned bits = (unsigned)h << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE unsigned short rounded_one(float value) { return rounded((vec){value})[0]; }

/* Rows of a square of numbers become its columns: each step puts row i beside row i + LANES / 2. */
INLINE void transpose(vec *rows) {
    vec next[LANES];
#pragma GCC unroll 4
    for (int done = 1; done < LANES; done *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = SHUFFLED(rows[i], rows[i + LANES / 2], LOW);
            next[2 * i + 1] = SHUFFLED(rows[i], rows[i + LANES / 2], HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

/* Numbers `at`, `at + 1`, ... of an array in fp32, or in bf16 where `half`. */
INLINE vec load_any(int half, const void *from, long at, long count) {
    if (!half) return load((const float *)from + at, count);
    const unsigned short *place = (const unsigned short *)from + at;
    if (count >= LANES) return widened(*(const loose_halves *)place);
    halves result = {0};
    memcpy(&result, place, 2 * count);
    return widened(result);
}

INLINE void store_any(int half, void *to, long at, vec value, long count) {
    if (!half) {
        store((float *)to + at, value, count);
        return;
    }
    unsigned short *place = (unsigned short *)to + at;
    halves result = rounded(value);
    if (count >= LANES) *(loose_halves *)place = result;
    else memcpy(place, &result, 2 * count);
}

#endif
