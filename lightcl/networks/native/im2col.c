/* What a 3x3 convolution with padding 1 needs beside matrix products: the patch of inputs of every output as a row of a
   matrix, such rows added up to maps, and a matrix transposed. Numbers are bf16; maps [N, H, W, C].

   The products between are PyTorch's, on processors that multiply entire matrices in bf16. */

#include "vectors.h"

enum { SIDE = 3, PLACES = SIDE * SIDE }; /* of a patch */

typedef unsigned short number;

typedef struct {
    long samples, height, width, channels, stride, rows, columns; /* rows, columns: of outputs in a map */
} Patches;

static Patches patches_of(const long *sizes) {
    Patches p = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], 0, 0};
    p.rows = (p.height - 1) / p.stride + 1;
    p.columns = (p.width - 1) / p.stride + 1;
    return p;
}

/* `patches` [N, rows, columns, 3, 3, C] from `maps`; zeros beyond the map. */
void im2col(const long *sizes, int threads, const number *maps, number *patches) {
    Patches p = patches_of(sizes);
    long line = SIDE * p.channels;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long index = 0; index < p.samples * p.rows; index++) {
        long top = index % p.rows * p.stride - 1;
        const number *map = maps + index / p.rows * p.height * p.width * p.channels;
        number *to = patches + index * p.columns * PLACES * p.channels;
        for (long column = 0; column < p.columns; column++)
            for (long y = top; y < top + SIDE; y++, to += line) {
                long left = column * p.stride - 1, from = left < 0, until = at_most(SIDE, p.width - left);
                if (y < 0 || y >= p.height) {
                    memset(to, 0, sizeof(number) * line);
                    continue;
                }
                if (from) memset(to, 0, sizeof(number) * p.channels);
                memcpy(to + from * p.channels, map + (y * p.width + left + from) * p.channels,
                       sizeof(number) * (until - from) * p.channels);
                memset(to + until * p.channels, 0, sizeof(number) * (SIDE - until) * p.channels);
            }
    }
}

/* The outputs along one side whose patches reach a place, and where in the patch it is; returns how many. */
INLINE int reached(int place, int stride, int outputs, int *output, int *within) {
    int count = 0;
    for (int i = 0; i < SIDE; i++) {
        int start = place + 1 - i; /* of the patch, plus the padding */
        if (start < 0 || start % stride || start / stride >= outputs) continue;
        output[count] = start / stride;
        within[count++] = i;
    }
    return count;
}

/* `maps`: the sum of all numbers of `patches` that come from a place, in fp32. */
void col2im(const long *sizes, int threads, const number *patches, number *maps) {
    Patches p = patches_of(sizes);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long index = 0; index < p.samples * p.height; index++) {
        int row[SIDE], i[SIDE], rows = reached(index % p.height, p.stride, p.rows, row, i);
        const number *map = patches + index / p.height * p.rows * p.columns * PLACES * p.channels;
        number *to = maps + index * p.width * p.channels;
        for (long x = 0; x < p.width; x++, to += p.channels) {
            int column[SIDE], j[SIDE], columns = reached(x, p.stride, p.columns, column, j), count = 0;
            const number *found[PLACES];
            for (int a = 0; a < rows; a++)
                for (int b = 0; b < columns; b++)
                    found[count++] = map + ((row[a] * p.columns + column[b]) * PLACES + i[a] * SIDE + j[b]) * p.channels;
            for (long at = 0; at < p.channels; at += LANES) {
                vec sum = {0};
                for (int each = 0; each < count; each++) sum += load_any(1, found[each], at, p.channels - at);
                store_any(1, to, at, sum, p.channels - at);
            }
        }
    }
}

/* The columns of `from` [rows, columns] as rows. */
void transposed(const long *sizes, int threads, const number *from, number *to) {
    long rows = sizes[0], columns = sizes[1];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row += LANES) {
        long count = at_most(LANES, rows - row);
        for (long column = 0; column < columns; column += LANES) {
            vec square[LANES] = {{0}};
            for (long i = 0; i < count; i++) square[i] = load_any(1, from, (row + i) * columns + column, columns - column);
            transpose(square);
            for (long j = 0; j < at_most(LANES, columns - column); j++)
                store_any(1, to, (column + j) * rows + row, square[j], count);
        }
    }
}
