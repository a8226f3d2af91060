/* 3x3 convolutions of stride 1 or 2 by Winograd's algorithm, forward and backward, for maps [N, H, W, C] in fp32 or bf16.

   For stride 1 it is F(4x4, 3x3), which stands in ../winograd.py with its transforms. For stride 2, of the inputs along one
   side those between two outputs' middles meet the outer two weights, which is F(4, 2) with the points 0, 1, -1, 2 and
   infinity, and the middles meet the middle weight, one multiplication for each output: 5 + 4 places along a side, where
   four outputs take 12 multiplications directly. The last four share a weight, so there are six along a side in both.

   Nothing is copied to suit a library's matrix product, and little has to leave the processor's second-level cache. Of the
   maps that are multiplied, all channels are transformed at first; then a task takes one or two vectors of the other
   side's channels through everything that is left: it transforms their weights, a few places at a time, multiplies, and
   transforms back. Large maps are computed a few at a time. Maps in bf16 are widened where they are read and rounded where
   they are written; all arithmetic is in fp32.

   Every number is computed in the same order for any number of threads. */

#include "vectors.h"

#if defined(__AVX512F__)
enum { ROWS = 12 }; /* 12 x 2 sums, in 24 of 32 registers */
#elif defined(__AVX__)
enum { ROWS = 5 }; /* 5 x 2 sums, in 10 of 16 registers */
#else
enum { ROWS = 8 }; /* 8 x 2 sums, in 16 of the 32 registers of an ARM processor */
#endif

enum { TILE = 4, SIDE = 6, TAPS = 9, PLACES = SIDE * SIDE }; /* of a tile: outputs along a side, and weights' places */
enum { FAR = 9, MOST = FAR * FAR }; /* inputs and places with stride 2: along a side, and of a tile */
enum { BLOCK = 2 * LANES, TALL = 2 * ROWS, WITHIN = TALL * BLOCK + 16 };
enum { GROUP = 128, LARGEST = 1024 }; /* tiles that are computed together; positions of a map, at most */

typedef struct {
    long maps, height, width, inputs, outputs; /* as in [N, H, W, C] and [N, H / stride, W / stride, C'] */
    long tiles;                                /* of all maps */
    long padded_inputs, padded_outputs;        /* channels in scratch memory, where vectors are full */
    int half, stride;                          /* maps are in bf16, else in fp32 */
} Shape;

static long padded(long channels) { return (channels + LANES - 1) / LANES * LANES; }

/* Not less than `numbers`, and an odd number of cache lines: the 36 places of a tile are used together, and in a distance
   of a power of two they would fight for the same few lines of the first-level cache. */
static long apart(long numbers) { return ((numbers + 15) / 16 | 1) * 16; }

/* ---- Transforms along one side; `step` is the distance of an array's elements ---- */

INLINE void input_side(int stride, const vec *d, int from, vec *t, int to) { /* B^T */
    if (stride == 2) {
        vec rest = d[6 * from] - d[4 * from];
        t[0] = 2 * d[0] - d[2 * from] - 2 * d[4 * from] + d[6 * from];
        t[to] = rest - 2 * d[2 * from];
        t[2 * to] = rest + 2 * (d[2 * from] - d[4 * from]);
        t[3 * to] = d[6 * from] - d[2 * from];
        t[4 * to] = d[8 * from] - d[4 * from] - 2 * t[3 * to];
        for (int i = 0; i < TILE; i++) t[(5 + i) * to] = d[(2 * i + 1) * from];
        return;
    }
    vec even = d[4 * from] - 4 * d[2 * from], odd = d[3 * from] - 4 * d[from];
    vec wide = d[4 * from] - d[2 * from], bent = 2 * (d[3 * from] - d[from]);
    t[0] = 4 * d[0] - 5 * d[2 * from] + d[4 * from];
    t[to] = even + odd;
    t[2 * to] = even - odd;
    t[3 * to] = wide + bent;
    t[4 * to] = wide - bent;
    t[5 * to] = 4 * d[from] - 5 * d[3 * from] + d[5 * from];
}

INLINE void input_side_back(int stride, const vec *t, int from, vec *d, int to) { /* B */
    if (stride == 2) {
        vec last = t[4 * from];
        d[0] = 2 * t[0];
        d[2 * to] = 2 * (t[2 * from] - t[from] + last) - t[0] - t[3 * from];
        d[4 * to] = -2 * t[0] - t[from] - 3 * t[2 * from] - last;
        d[6 * to] = t[0] + t[from] + t[2 * from] + t[3 * from] - 2 * last;
        d[8 * to] = last;
        for (int i = 0; i < TILE; i++) d[(2 * i + 1) * to] = t[(5 + i) * from];
        return;
    }
    vec near = t[from] + t[2 * from], far = t[3 * from] + t[4 * from];
    vec tilt = t[from] - t[2 * from], bend = t[3 * from] - t[4 * from];
    d[0] = 4 * t[0];
    d[to] = 4 * (t[5 * from] - tilt) - 2 * bend;
    d[2 * to] = -5 * t[0] - 4 * near - far;
    d[3 * to] = tilt + 2 * bend - 5 * t[5 * from];
    d[4 * to] = t[0] + near + far;
    d[5 * to] = t[5 * from];
}

INLINE void output_side(int stride, const vec *m, int from, vec *y, int to) { /* A^T */
    if (stride == 2) {
        vec near = m[from] + m[2 * from], tilt = m[from] - m[2 * from], far = m[3 * from];
        y[0] = m[0] + near + far + m[5 * from];
        y[to] = tilt + 2 * far + m[6 * from];
        y[2 * to] = near + 4 * far + m[7 * from];
        y[3 * to] = tilt + 8 * far + m[4 * from] + m[8 * from];
        return;
    }
    vec near = m[from] + m[2 * from], far = m[3 * from] + m[4 * from];
    vec tilt = m[from] - m[2 * from], bend = m[3 * from] - m[4 * from];
    y[0] = m[0] + near + far;
    y[to] = tilt + 2 * bend;
    y[2 * to] = near + 4 * far;
    y[3 * to] = tilt + 8 * bend + m[5 * from];
}

INLINE void output_side_back(int stride, const vec *y, int from, vec *m, int to) { /* A */
    if (stride == 2) {
        vec even = y[0] + y[2 * from], odd = y[from] + y[3 * from];
        m[0] = y[0];
        m[to] = even + odd;
        m[2 * to] = even - odd;
        m[3 * to] = y[0] + 2 * y[from] + 4 * y[2 * from] + 8 * y[3 * from];
        m[4 * to] = y[3 * from];
        for (int i = 0; i < TILE; i++) m[(5 + i) * to] = y[i * from];
        return;
    }
    vec even = y[0] + y[2 * from], odd = y[from] + y[3 * from];
    vec wide = y[0] + 4 * y[2 * from], bent = 2 * y[from] + 8 * y[3 * from];
    m[0] = y[0];
    m[to] = even + odd;
    m[2 * to] = even - odd;
    m[3 * to] = wide + bent;
    m[4 * to] = wide - bent;
    m[5 * to] = y[3 * from];
}

/* G; with stride 2 the last place stands for the four that share it. */
INLINE void weight_side(int stride, vec a, vec b, vec c, vec *r) {
    if (stride == 2) {
        r[0] = a * 0.5f;
        r[1] = (a + c) * -0.5f;
        r[2] = (c - a) * (1.0f / 6);
        r[3] = a * (1.0f / 6) + c * (1.0f / 3);
        r[4] = c;
        r[5] = b;
        return;
    }
    vec sum = (a + c) * (-1.0f / 6), middle = b * (1.0f / 6);
    vec wide = a * (1.0f / 24) + c * (1.0f / 6), half = b * (1.0f / 12);
    r[0] = a * 0.25f;
    r[1] = sum - middle;
    r[2] = sum + middle;
    r[3] = wide + half;
    r[4] = wide - half;
    r[5] = c;
}

INLINE vec weight_row(int stride, vec a, vec b, vec c, int row) { /* one row of G */
    switch (stride == 2 ? row + SIDE : row) {
    case 0: return a * 0.25f;
    case 1: return (a + b + c) * (-1.0f / 6);
    case 2: return (a - b + c) * (-1.0f / 6);
    case 3: return a * (1.0f / 24) + b * (1.0f / 12) + c * (1.0f / 6);
    case 4: return a * (1.0f / 24) - b * (1.0f / 12) + c * (1.0f / 6);
    case SIDE: return a * 0.5f;
    case SIDE + 1: return (a + c) * -0.5f;
    case SIDE + 2: return (c - a) * (1.0f / 6);
    case SIDE + 3: return a * (1.0f / 6) + c * (1.0f / 3);
    case SIDE + 5: return b;
    default: return c;
    }
}

INLINE void weight_side_back(int stride, const vec *r, int from, vec *w, int to) { /* G^T */
    if (stride == 2) {
        vec near = r[from] * -0.5f, far = r[2 * from] * (1.0f / 6), half = r[3 * from] * (1.0f / 6);
        w[0] = r[0] * 0.5f + near - far + half;
        w[to] = r[5 * from];
        w[2 * to] = near + far + 2 * half + r[4 * from];
        return;
    }
    vec near = (r[from] + r[2 * from]) * (-1.0f / 6), far = r[3 * from] + r[4 * from];
    w[0] = r[0] * 0.25f + near + far * (1.0f / 24);
    w[to] = (r[2 * from] - r[from]) * (1.0f / 6) + (r[3 * from] - r[4 * from]) * (1.0f / 12);
    w[2 * to] = near + far * (1.0f / 6) + r[5 * from];
}

/* ---- Transforms of maps, one tile and one vector of channels at a time ---- */

/* What happens to a result before it is written: y * scale + shift + shortcut, and ReLU. NULL: not wanted. */
typedef struct {
    const float *scale, *shift; /* [C'] */
    const void *shortcut;       /* [N, H, W, C'] */
    int relu;
} After;

/* The places of all tiles in scratch memory: [places, tiles, row]. Those that share a weight follow each other, so that
   they are rows of one product. */
typedef struct {
    float *first;
    long row, tiles; /* numbers of a row, and of the rows of a place */
    long one, four;  /* from a place to the next, or from four that share a weight */
    long size;
} Places;

INLINE int reach(int stride) { return stride == 2 ? FAR : SIDE; } /* inputs of a tile along one side, and their places */

INLINE int sharing(int stride, int weight) { return stride == 2 && weight == SIDE - 1 ? TILE : 1; }

static Places places_at(float *memory, Shape s, long row) {
    long rows = s.tiles * row, one = apart(rows), four = apart(TILE * rows);
    long size = s.stride == 2 ? 25 * one + 10 * four + apart(TILE * TILE * rows) : PLACES * one;
    return (Places){memory, row, rows, one, four, size};
}

/* Where place (i, j) begins. */
INLINE long offset(Places p, int stride, int i, int j) {
    enum { LAST = SIDE - 1 };
    if (stride == 1) return (i * SIDE + j) * p.one;
    if (i < LAST) return i * (LAST * p.one + p.four) + (j < LAST ? j * p.one : LAST * p.one + (j - LAST) * p.tiles);
    return LAST * (LAST * p.one + p.four) +
           (j < LAST ? j * p.four + (i - LAST) * p.tiles : LAST * p.four + ((i - LAST) * TILE + j - LAST) * p.tiles);
}

typedef struct {
    int half, stride;
    void *map;
    long place; /* of the map's and vector's first number */
    float *places;
    Places of;
    long height, width, channels;
    long top, left;      /* of the tile's outputs */
    long channel, count; /* the first channel of the vector, and how many it has */
} Tile;

INLINE long at(Tile t, long y, long x) { return t.place + (y * t.width + x) * t.channels; }

INLINE int inside(Tile t, long y, long x) { return y >= 0 && y < t.height && x >= 0 && x < t.width; }

/* Runs `transform` with the Tile `t`, for all tiles of map n and a vector of channels from `channel` on, of maps [N, H, W,
   channels], with their places in column `column` of `p`. */
#define FOR_TILES(s, maps_, height_, width_, channels_, p, n, channel_, column, before, transform, after) \
    long rows = s.height / s.stride / TILE, columns = s.width / s.stride / TILE; \
    Tile t = {s.half, s.stride, (void *)(maps_), n * (height_) * (width_) * channels_ + channel_, 0, p, height_, \
              width_, channels_, 0, 0, channel_, at_most(LANES, channels_ - channel_)}; \
    before; \
    for (long y = 0; y < rows; y++) \
        for (long x = 0; x < columns; x++) { \
            t.places = p.first + ((n * rows + y) * columns + x) * p.row + column; \
            t.top = y * TILE; \
            t.left = x * TILE; \
            transform; \
        } \
    after;

/* Runs `access` for every place p of a tile, which lies at `place`. */
#define FOR_PLACES(t, access) \
    if (t.stride == 1) { \
        float *place = t.places; \
        for (int p = 0; p < PLACES; p++, place += t.of.one) { access; } \
    } else { \
        for (int i = 0; i < FAR; i++) \
            for (int j = 0, p = i * FAR; j < FAR; j++, p++) { \
                float *place = t.places + offset(t.of, 2, i, j); \
                access; \
            } \
    }

INLINE void input_tile(Tile t) {
    int side = reach(t.stride);
    vec d[MOST], half[MOST];
    for (int i = 0; i < side; i++)
        for (int j = 0; j < side; j++) {
            long y = t.top * t.stride + i - 1, x = t.left * t.stride + j - 1;
            d[i * side + j] = inside(t, y, x) ? load_any(t.half, t.map, at(t, y, x), t.count) : (vec){0};
        }
    for (int j = 0; j < side; j++) input_side(t.stride, d + j, side, half + j, side);
    for (int i = 0; i < side; i++) input_side(t.stride, half + i * side, 1, d + i * side, 1);
    FOR_PLACES(t, *(loose *)place = d[p])
}

/* The transposed of it: overlapping tiles are added up in `sum` [H, W]. */
INLINE void input_tile_back(Tile t, vec *sum) {
    int side = reach(t.stride);
    vec d[MOST], half[MOST];
    FOR_PLACES(t, d[p] = *(const loose *)place)
    for (int i = 0; i < side; i++) input_side_back(t.stride, d + i * side, 1, half + i * side, 1);
    for (int j = 0; j < side; j++) input_side_back(t.stride, half + j, side, d + j, side);
    for (int i = 0; i < side; i++)
        for (int j = 0; j < side; j++) {
            long y = t.top * t.stride + i - 1, x = t.left * t.stride + j - 1;
            if (inside(t, y, x)) sum[y * t.width + x] += d[i * side + j];
        }
}

INLINE void output_tile(Tile t, After after) {
    int side = reach(t.stride);
    vec m[MOST], half[TILE * FAR], y[TILE * TILE];
    FOR_PLACES(t, m[p] = *(const loose *)place)
    for (int j = 0; j < side; j++) output_side(t.stride, m + j, side, half + j, side);
    for (int i = 0; i < TILE; i++) output_side(t.stride, half + i * side, 1, y + i * TILE, 1);
    if (after.scale) {
        vec scale = load(after.scale + t.channel, t.count), shift = load(after.shift + t.channel, t.count);
        for (int p = 0; p < TILE * TILE; p++) y[p] = y[p] * scale + shift;
    }
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) {
            vec value = y[i * TILE + j];
            long place = at(t, t.top + i, t.left + j);
            if (after.shortcut) value += load_any(t.half, after.shortcut, place, t.count);
            if (after.relu) value = positive(value);
            store_any(t.half, t.map, place, value, t.count);
        }
}

/* The transposed of it. */
INLINE void output_tile_back(Tile t) {
    int side = reach(t.stride);
    vec y[TILE * TILE], half[TILE * FAR], m[MOST];
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) y[i * TILE + j] = load_any(t.half, t.map, at(t, t.top + i, t.left + j), t.count);
    for (int i = 0; i < TILE; i++) output_side_back(t.stride, y + i * TILE, 1, half + i * side, 1);
    for (int j = 0; j < side; j++) output_side_back(t.stride, half + j, side, m + j, side);
    FOR_PLACES(t, *(loose *)place = m[p])
}

INLINE void input_to_places_for(Shape s, const void *maps, Places p, long n, long channel, long column) {
    FOR_TILES(s, maps, s.height, s.width, s.inputs, p, n, channel, column, , input_tile(t), )
}

INLINE void places_to_input_for(Shape s, Places p, void *maps, long n, long channel, long column) {
    vec sum[LARGEST];
    long positions = s.height * s.width;
    FOR_TILES(
        s, maps, s.height, s.width, s.inputs, p, n, channel, column, memset(sum, 0, positions * sizeof(vec)),
        input_tile_back(t, sum),
        for (long i = 0; i < positions; i++) store_any(s.half, maps, t.place + i * t.channels, sum[i], t.count))
}

INLINE void places_to_output_for(Shape s, Places p, void *maps, After after, long n, long channel, long column) {
    FOR_TILES(s, maps, s.height / s.stride, s.width / s.stride, s.outputs, p, n, channel, column, , output_tile(t, after), )
}

INLINE void output_to_places_for(Shape s, const void *maps, Places p, long n, long channel, long column) {
    FOR_TILES(s, maps, s.height / s.stride, s.width / s.stride, s.outputs, p, n, channel, column, , output_tile_back(t), )
}

/* Calls `transform(s, ...)` for the maps n from `from` to `until`, with constants in `s` for the kind of maps and the
   stride, so that its loops are unrolled. Each transform is one function with four such bodies, and not part of its
   callers, which would take ten seconds to compile. */
#define WITH_CONSTANTS(transform, ...) \
    CASE(0, 1, transform, __VA_ARGS__) \
    CASE(0, 2, transform, __VA_ARGS__) \
    CASE(1, 1, transform, __VA_ARGS__) \
    CASE(1, 2, transform, __VA_ARGS__)

#define CASE(half_, stride_, transform, ...) \
    if (s.half == half_ && s.stride == stride_) { \
        s.half = half_, s.stride = stride_; \
        for (long n = from; n < until; n++) transform(s, __VA_ARGS__); \
    }

#define APART static __attribute__((noinline)) void

APART input_to_places(Shape s, const void *maps, Places p, long from, long until, long channel, long column) {
    WITH_CONSTANTS(input_to_places_for, maps, p, n, channel, column)
}

APART places_to_input(Shape s, Places p, void *maps, long from, long until, long channel, long column) {
    WITH_CONSTANTS(places_to_input_for, p, maps, n, channel, column)
}

APART places_to_output(Shape s, Places p, void *maps, After after, long from, long until, long channel, long column) {
    WITH_CONSTANTS(places_to_output_for, p, maps, after, n, channel, column)
}

APART output_to_places(Shape s, const void *maps, Places p, long from, long until, long channel, long column) {
    WITH_CONSTANTS(output_to_places_for, maps, p, n, channel, column)
}

/* ---- Matrix products ---- */

/* result[i, j] = sum over l of a[i, l] b[l, j], for a few i and one or two vectors of j, kept in registers. */
INLINE void corner(int rows, int vectors, long depth, const float *a, long a_row, long a_step, const float *b,
                   long b_step, float *result, long result_row) {
    vec sum[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = (vec){0};
    for (long l = 0; l < depth; l++) {
        vec first = load(b + l * b_step, LANES);
        vec second = vectors > 1 ? load(b + l * b_step + LANES, LANES) : first;
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            float factor = a[i * a_row + l * a_step];
            sum[i][0] += factor * first;
            if (vectors > 1) sum[i][1] += factor * second;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) *(loose *)(result + i * result_row + j * LANES) = sum[i][j];
}

/* The same for any number of rows. */
INLINE void product(long rows, int vectors, long depth, const float *a, long a_row, long a_step, const float *b,
                    long b_step, float *result, long result_row) {
#define CORNER(count) \
    case count: \
        if (count <= ROWS) corner(count <= ROWS ? count : 1, vectors, depth, a, a_row, a_step, b, b_step, result, result_row); \
        break;
    long corners = (rows + ROWS - 1) / ROWS;
    for (long left = corners; left > 0; left--) { /* of about equal size */
        long count = (rows + left - 1) / left;
        switch (count) {
            CORNER(1) CORNER(2) CORNER(3) CORNER(4) CORNER(5) CORNER(6)
            CORNER(7) CORNER(8) CORNER(9) CORNER(10) CORNER(11) CORNER(12)
        }
        rows -= count;
        a += count * a_row;
        result += count * result_row;
    }
#undef CORNER
}

static void product_1(long rows, long depth, const float *a, long a_row, long a_step, const float *b, long b_step,
                      float *result, long result_row) {
    product(rows, 1, depth, a, a_row, a_step, b, b_step, result, result_row);
}

static void product_2(long rows, long depth, const float *a, long a_row, long a_step, const float *b, long b_step,
                      float *result, long result_row) {
    product(rows, 2, depth, a, a_row, a_step, b, b_step, result, result_row);
}

INLINE void weights_to_places_for(int stride, int row, int whole, int vectors, long depth, const float *weights, long tap,
                                  long step, long count, float *places) {
    long next = apart(depth * vectors * LANES);
    for (long l = 0; l < depth; l++)
        for (int j = 0; j < vectors; j++) {
            const float *from = weights + l * step + j * LANES;
            long left = whole ? LANES : count - j * LANES;
            vec side[3], r[SIDE];
            for (int x = 0; x < 3; x++)
                side[x] = weight_row(stride, load(from + x * tap, left), load(from + (3 + x) * tap, left),
                                     load(from + (6 + x) * tap, left), row);
            weight_side(stride, side[0], side[1], side[2], r);
            for (int p = 0; p < SIDE; p++) *(loose *)(places + p * next + (l * vectors + j) * LANES) = r[p];
        }
}

/* The weights' places of one row, [6, depth, vectors], of weights [9, depth, columns] of which a few columns are wanted.
   `tap` and `step` are the distances of taps and of neighbors in depth. Each row is one body with constants: to choose it
   for every vector takes longer than to compute it. */
static void weights_to_places(int stride, int row, int vectors, long depth, const float *weights, long tap, long step,
                              long count, float *places) {
#define ROW(number) \
    case number: weights_to_places_for(number / SIDE + 1, number % SIDE, 1, vectors, depth, weights, tap, step, count, places); break;
    switch (count >= vectors * LANES ? (stride - 1) * SIDE + row : -1) {
        ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5) ROW(6) ROW(7) ROW(8) ROW(9) ROW(10) ROW(11)
    default: weights_to_places_for(stride, row, 0, vectors, depth, weights, tap, step, count, places);
    }
#undef ROW
}

/* results[p] = factors[p] x weights[p] for all places p: [tiles, depth] x [depth, columns], of a few columns. A row of
   places at a time has its weights in `block`. */
static void products_with_weights(Shape s, Places factors, long depth, const float *weights, long tap, long step,
                                  long count, int vectors, Places results, float *block) {
    for (int row = 0; row < SIDE; row++) {
        weights_to_places(s.stride, row, vectors, depth, weights, tap, step, count, block);
        for (int p = 0; p < SIDE; p++) {
            (vectors == 2 ? product_2 : product_1)(
                s.tiles * sharing(s.stride, row) * sharing(s.stride, p), depth,
                factors.first + offset(factors, s.stride, row, p), factors.row, 1,
                block + p * apart(depth * vectors * LANES), vectors * LANES,
                results.first + offset(results, s.stride, row, p), results.row);
        }
    }
}

/* A part of the gradient of the weights [C', 9, C], added to what is there where `more`: `outputs` and `inputs` have the
   places of so many channels from `top` and `left` on. A few products at a time are in `block`. */
static void weight_gradient(Shape s, Places outputs, long top, long high, Places inputs, long left, long wide,
                            float *gradient, int more, float *block) {
    for (long first = 0; first < high; first += TALL)
        for (long start = 0; start < wide; start += BLOCK) {
            long rows = at_most(TALL, high - first);
            int vectors = wide - start > LANES ? 2 : 1;
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j++)
                    (vectors == 2 ? product_2 : product_1)(
                        rows, s.tiles * sharing(s.stride, i) * sharing(s.stride, j),
                        outputs.first + offset(outputs, s.stride, i, j) + first, 1, outputs.row,
                        inputs.first + offset(inputs, s.stride, i, j) + start, inputs.row, block + (i * SIDE + j) * WITHIN,
                        BLOCK);
            for (long i = 0; i < rows; i++)
                for (int j = 0; j < vectors; j++) {
                    vec u[PLACES], half[3 * SIDE], w[TAPS];
                    for (int p = 0; p < PLACES; p++) u[p] = *(const loose *)(block + p * WITHIN + i * BLOCK + j * LANES);
                    for (int y = 0; y < SIDE; y++) weight_side_back(s.stride, u + y, SIDE, half + y, SIDE);
                    for (int y = 0; y < 3; y++) weight_side_back(s.stride, half + y * SIDE, 1, w + y * 3, 1);
                    long channel = left + start + j * LANES;
                    for (int y = 0; y < TAPS; y++) {
                        float *place = gradient + ((top + first + i) * TAPS + y) * s.inputs + channel;
                        store(place, more ? load(place, s.inputs - channel) + w[y] : w[y], s.inputs - channel);
                    }
                }
        }
}

/* A few outputs of the weights [C', 9, C], from `start` on -> [9, C, vectors], a square of numbers at a time. */
static void turn(Shape s, const float *weights, long start, int vectors, float *turned) {
    long next = apart(s.inputs * vectors * LANES);
    for (int j = 0; j < vectors; j++)
        for (long tap = 0; tap < TAPS; tap++)
            for (long first = 0; first < s.inputs; first += LANES) {
                long count = at_most(LANES, s.inputs - first), k = start + j * LANES;
                vec square[LANES];
                for (long i = 0; i < LANES; i++)
                    square[i] = k + i < s.outputs ? load(weights + ((k + i) * TAPS + tap) * s.inputs + first, count) : (vec){0};
                transpose(square);
                for (long c = 0; c < count; c++)
                    *(loose *)(turned + tap * next + ((first + c) * vectors + j) * LANES) = square[c];
            }
}

/* ---- What Python calls; `sizes` are N, H, W, C and C', 1 where the maps are in bf16, and the stride ---- */

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

/* Where map `first` begins, of maps of so many numbers each. */
INLINE const void *from_map(const void *maps, int half, long first, long numbers) {
    return (const char *)maps + first * numbers * (half ? 2 : 4);
}

/* Numbers of an input or output map. */
INLINE long input_size(Shape s) { return s.height * s.width * s.inputs; }

INLINE long output_size(Shape s) { return s.height / s.stride * (s.width / s.stride) * s.outputs; }

/* How threads share a pass, which computes a group of maps at a time. Where there are enough maps, a thread computes
   entire groups (`aside`); else threads share the tasks of a group. Two threads then transform the group's maps each for
   itself, which takes less time than reading what the other core has written; more threads share that as well. */
typedef struct {
    Shape group; /* the first one */
    long maps;
    int aside, alone; /* alone: each thread has the places of a group for itself */
    long whole;       /* numbers of these places */
    long own, shared; /* numbers of scratch memory: of each thread, and of all together */
} Plan;

enum { FORWARD, OF_WEIGHTS, OF_MAPS }; /* a forward pass, or a backward pass without or with the maps' gradient */

/* A task's scratch memory has its places; transformed weights, and in a forward pass turned ones, or products. */
INLINE Plan plan_of(const long *sizes, int pass, long threads) {
    int half = (int)sizes[5], stride = (int)sizes[6];
    long tiles = sizes[1] / stride / TILE * (sizes[2] / stride / TILE), together = GROUP / tiles > 1 ? GROUP / tiles : 1;
    int aside = pass == FORWARD && sizes[0] * tiles >= GROUP / 2 * threads;
    if (aside) together = at_most(together, (sizes[0] + threads - 1) / threads);
    long maps = at_most(together, sizes[0]);
    Shape s = {maps, sizes[1], sizes[2], sizes[3], sizes[4], maps * tiles, padded(sizes[3]), padded(sizes[4]), half, stride};
    long depth = pass == OF_MAPS ? s.outputs : pass == FORWARD ? s.inputs : 0;
    long weights = (SIDE + (pass == FORWARD ? TAPS : 0)) * apart(depth * BLOCK);
    long products = pass == FORWARD ? 0 : PLACES * WITHIN;
    long whole = places_at(0, s, pass == OF_MAPS ? s.padded_outputs : s.padded_inputs).size;
    long task = places_at(0, s, BLOCK).size + (weights > products ? weights : products);
    int alone = aside || threads <= 2;
    return (Plan){s, sizes[0], aside, alone, whole, alone ? whole + task : task, alone ? 0 : whole};
}

/* The shape of the group that begins with map `first`. */
INLINE Shape group_of(Plan plan, long first) {
    Shape s = plan.group;
    long maps = at_most(s.maps, plan.maps - first);
    s.tiles = s.tiles / s.maps * maps;
    s.maps = maps;
    return s;
}

/* Numbers of scratch memory for a pass: of each thread, or what all `shared` beside that. */
long winograd_scratch(const long *sizes, int pass, int threads, int shared) {
    Plan plan = plan_of(sizes, pass, threads);
    return shared ? plan.shared : plan.own;
}

/* Where a thread has the places of a group, and where the rest of its own memory begins. Behind the memory of all
   `threads`, of `slot` numbers each, is what they share. */
typedef struct {
    float *places, *rest;
} Memory;

INLINE Memory memory_of(Plan plan, float *scratch, long slot, int threads) {
    float *own = scratch + THREAD * slot;
    return plan.alone ? (Memory){own, own + plan.whole} : (Memory){scratch + threads * slot, own};
}

/* Runs `transform` for the maps from `from` to `until` and the vector of channels from v on, until all threads that share
   these places have done all maps and vectors. */
#define FOR_VECTORS(plan, maps, channels, transform) \
    if (plan.alone) { \
        long from = 0, until = maps; \
        for (long v = 0; v < channels; v += LANES) transform; \
    } else { \
        for (long i = THREAD; i < maps * (channels / LANES); i += THREADS) { \
            long from = i / (channels / LANES), until = from + 1, v = i % (channels / LANES) * LANES; \
            transform; \
        } \
        _Pragma("omp barrier") \
    }

/* Tasks of one or two vectors of channels: pairs as long as every thread gets as many of them, then single ones. */
typedef struct {
    long pairs, count;
} Tasks;

INLINE Tasks tasks_of(long channels, long threads) {
    long vectors = channels / LANES, pairs = vectors / 2 / threads * threads;
    return (Tasks){pairs, vectors - pairs};
}

typedef struct {
    long start;
    int vectors;
} Task;

INLINE Task task_of(Tasks tasks, long number) {
    return (Task){(number + at_most(number, tasks.pairs)) * LANES, number < tasks.pairs ? 2 : 1};
}

INLINE void forward_task(Shape s, Task task, Places inputs, const float *weights, After after, void *result, float *own) {
    Places outputs = places_at(own, s, BLOCK);
    float *block = own + outputs.size, *turned = block + SIDE * apart(s.inputs * BLOCK);
    turn(s, weights, task.start, task.vectors, turned);
    products_with_weights(s, inputs, s.inputs, turned, apart(s.inputs * task.vectors * LANES), task.vectors * LANES,
                          task.vectors * LANES, task.vectors, outputs, block);
    for (long v = 0; v < task.vectors * LANES; v += LANES)
        places_to_output(s, outputs, result, after, 0, s.maps, task.start + v, v);
}

/* By one of the threads that share the work, which may be fewer than the `threads` that were asked for and have scratch
   memory. */
static void forward(const long *sizes, int threads, const void *maps, const float *weights, After after,
                    void *result, float *scratch, long slot) {
    Plan plan = plan_of(sizes, FORWARD, threads);
    Memory memory = memory_of(plan, scratch, slot, threads);
    float *own = memory.rest;
    Tasks tasks = tasks_of(plan.group.padded_outputs, plan.aside ? 1 : THREADS);
    long step = plan.group.maps * (plan.aside ? THREADS : 1);
    for (long first = plan.aside ? THREAD * plan.group.maps : 0; first < plan.maps; first += step) {
        Shape s = group_of(plan, first);
        Places inputs = places_at(memory.places, s, s.padded_inputs);
        const void *here = from_map(maps, s.half, first, input_size(s));
        void *there = (void *)from_map(result, s.half, first, output_size(s));
        After with = after;
        if (after.shortcut) with.shortcut = from_map(after.shortcut, s.half, first, output_size(s));
        FOR_VECTORS(plan, s.maps, s.padded_inputs, input_to_places(s, here, inputs, from, until, v, v))
        if (plan.aside) {
            for (long i = 0; i < tasks.count; i++) forward_task(s, task_of(tasks, i), inputs, weights, with, there, own);
        } else {
#pragma omp for schedule(dynamic)
            for (long i = 0; i < tasks.count; i++) forward_task(s, task_of(tasks, i), inputs, weights, with, there, own);
        }
    }
}

INLINE void weights_task(Shape s, Task task, Places outputs, const void *maps, float *of_weights, int more, float *own) {
    Places inputs = places_at(own, s, BLOCK);
    for (long v = 0; v < task.vectors * LANES; v += LANES)
        input_to_places(s, maps, inputs, 0, s.maps, task.start + v, v);
    weight_gradient(s, outputs, 0, s.outputs, inputs, task.start, task.vectors * LANES, of_weights, more,
                    own + inputs.size);
}

INLINE void maps_task(Shape s, Task task, Places outputs, const float *weights, void *of_maps, float *own) {
    Places inputs = places_at(own, s, BLOCK);
    products_with_weights(s, outputs, s.outputs, weights + task.start, s.inputs, TAPS * s.inputs, s.inputs - task.start,
                          task.vectors, inputs, own + inputs.size);
    for (long v = 0; v < task.vectors * LANES; v += LANES)
        places_to_input(s, inputs, of_maps, 0, s.maps, task.start + v, v);
}

/* The same for a few outputs, where the places of all inputs are there. */
INLINE void outputs_task(Shape s, Task task, Places inputs, const void *gradient, float *of_weights, int more, float *own) {
    Places outputs = places_at(own, s, BLOCK);
    long count = at_most(task.vectors * LANES, s.outputs - task.start);
    for (long v = 0; v < task.vectors * LANES; v += LANES)
        output_to_places(s, gradient, outputs, 0, s.maps, task.start + v, v);
    weight_gradient(s, outputs, task.start, count, inputs, 0, s.padded_inputs, of_weights, more, own + outputs.size);
}

static void backward(const long *sizes, int threads, const void *maps, const float *weights, const void *gradient,
                     void *of_maps, float *of_weights, float *scratch, long slot) {
    Plan plan = plan_of(sizes, of_maps ? OF_MAPS : OF_WEIGHTS, threads);
    Memory memory = memory_of(plan, scratch, slot, threads);
    float *own = memory.rest;
    Tasks tasks = tasks_of(of_maps ? plan.group.padded_inputs : plan.group.padded_outputs, THREADS);
    for (long first = 0; first < plan.maps; first += plan.group.maps) {
        Shape s = group_of(plan, first);
        const void *gradients = from_map(gradient, s.half, first, output_size(s));
        const void *here = from_map(maps, s.half, first, input_size(s));
        void *there = (void *)from_map(of_maps, s.half, first, input_size(s));
        if (of_maps) {
            Places outputs = places_at(memory.places, s, s.padded_outputs);
            FOR_VECTORS(plan, s.maps, s.padded_outputs, output_to_places(s, gradients, outputs, from, until, v, v))
#pragma omp for schedule(dynamic)
            for (long i = 0; i < 2 * tasks.count; i++) {
                Task task = task_of(tasks, i % tasks.count);
                if (i >= tasks.count) maps_task(s, task, outputs, weights, there, own);
                else if (of_weights) weights_task(s, task, outputs, here, of_weights, first > 0, own);
            }
        } else {
            Places inputs = places_at(memory.places, s, s.padded_inputs);
            FOR_VECTORS(plan, s.maps, s.padded_inputs, input_to_places(s, here, inputs, from, until, v, v))
#pragma omp for schedule(dynamic)
            for (long i = 0; i < tasks.count; i++)
                outputs_task(s, task_of(tasks, i), inputs, gradients, of_weights, first > 0, own);
        }
    }
}

/* `scale` and `shift`, or `shortcut`, may be NULL: not wanted. Of the scratch memory, see `memory_of`. */
void winograd_forward(const long *sizes, int threads, int relu, const void *maps, const float *weights, const float *scale,
                      const float *shift, const void *shortcut, void *result, float *scratch, long slot) {
    After after = {scale, shift, shortcut, relu};
#pragma omp parallel num_threads(threads)
    forward(sizes, threads, maps, weights, after, result, scratch, slot);
}

/* `of_maps` or `of_weights` may be NULL: not wanted. */
void winograd_backward(const long *sizes, int threads, const void *maps, const float *weights, const void *gradient,
                       void *of_maps, float *of_weights, float *scratch, long slot) {
#pragma omp parallel num_threads(threads)
    backward(sizes, threads, maps, weights, gradient, of_maps, of_weights, scratch, slot);
}
