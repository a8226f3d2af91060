/* 3x3 convolutions by Winograd's algorithm F(4x4, 3x3), forward and backward, for maps [N, H, W, C] in fp32 or bf16.

   The algorithm and its transforms stand in ../winograd.py. Here nothing is copied to suit a library's matrix product,
   and little has to leave the processor's second-level cache. Of the maps that are multiplied, all channels are
   transformed at first; then a task takes one or two vectors of the other side's channels through everything that is
   left: it transforms their weights, a few places at a time, multiplies, and transforms back. Large maps are computed a
   few at a time. Maps in bf16 are widened where they are read and rounded where they are written; all arithmetic is in
   fp32.

   Every number is computed in the same order for any number of threads. */

#include "vectors.h"

#if defined(__AVX512F__)
enum { ROWS = 12 }; /* 12 x 2 sums, in 24 of 32 registers */
#elif defined(__AVX__)
enum { ROWS = 5 }; /* 5 x 2 sums, in 10 of 16 registers */
#else
enum { ROWS = 8 }; /* 8 x 2 sums, in 16 of the 32 registers of an ARM processor */
#endif

enum { TILE = 4, REACH = 6, TAPS = 9, PLACES = REACH * REACH, BLOCK = 2 * LANES, TALL = 2 * ROWS, WITHIN = TALL * BLOCK + 16 };
enum { GROUP = 128, LARGEST = 1024 }; /* tiles that are computed together; positions of a map, at most */

typedef struct {
    long maps, height, width, inputs, outputs; /* as in [N, H, W, C] and [N, H, W, C'] */
    long tiles;                                /* of all maps */
    long padded_inputs, padded_outputs;        /* channels in scratch memory, where vectors are full */
    int half;                                  /* maps are in bf16, else in fp32 */
} Shape;

static long padded(long channels) { return (channels + LANES - 1) / LANES * LANES; }

/* Not less than `numbers`, and an odd number of cache lines: the 36 places of a tile are used together, and in a distance
   of a power of two they would fight for the same few lines of the first-level cache. */
static long apart(long numbers) { return ((numbers + 15) / 16 | 1) * 16; }

/* ---- Transforms along one side; `step` is the distance of an array's elements ---- */

INLINE void input_side(const vec *d, int from, vec *t, int to) { /* B^T */
    vec even = d[4 * from] - 4 * d[2 * from], odd = d[3 * from] - 4 * d[from];
    vec wide = d[4 * from] - d[2 * from], bent = 2 * (d[3 * from] - d[from]);
    t[0] = 4 * d[0] - 5 * d[2 * from] + d[4 * from];
    t[to] = even + odd;
    t[2 * to] = even - odd;
    t[3 * to] = wide + bent;
    t[4 * to] = wide - bent;
    t[5 * to] = 4 * d[from] - 5 * d[3 * from] + d[5 * from];
}

INLINE void input_side_back(const vec *t, int from, vec *d, int to) { /* B */
    vec near = t[from] + t[2 * from], far = t[3 * from] + t[4 * from];
    vec tilt = t[from] - t[2 * from], bend = t[3 * from] - t[4 * from];
    d[0] = 4 * t[0];
    d[to] = 4 * (t[5 * from] - tilt) - 2 * bend;
    d[2 * to] = -5 * t[0] - 4 * near - far;
    d[3 * to] = tilt + 2 * bend - 5 * t[5 * from];
    d[4 * to] = t[0] + near + far;
    d[5 * to] = t[5 * from];
}

INLINE void output_side(const vec *m, int from, vec *y, int to) { /* A^T */
    vec near = m[from] + m[2 * from], far = m[3 * from] + m[4 * from];
    vec tilt = m[from] - m[2 * from], bend = m[3 * from] - m[4 * from];
    y[0] = m[0] + near + far;
    y[to] = tilt + 2 * bend;
    y[2 * to] = near + 4 * far;
    y[3 * to] = tilt + 8 * bend + m[5 * from];
}

INLINE void output_side_back(const vec *y, int from, vec *m, int to) { /* A */
    vec even = y[0] + y[2 * from], odd = y[from] + y[3 * from];
    vec wide = y[0] + 4 * y[2 * from], bent = 2 * y[from] + 8 * y[3 * from];
    m[0] = y[0];
    m[to] = even + odd;
    m[2 * to] = even - odd;
    m[3 * to] = wide + bent;
    m[4 * to] = wide - bent;
    m[5 * to] = y[3 * from];
}

INLINE void weight_side(vec a, vec b, vec c, vec *r, long to) { /* G */
    vec sum = (a + c) * (-1.0f / 6), middle = b * (1.0f / 6);
    vec wide = a * (1.0f / 24) + c * (1.0f / 6), half = b * (1.0f / 12);
    r[0] = a * 0.25f;
    r[to] = sum - middle;
    r[2 * to] = sum + middle;
    r[3 * to] = wide + half;
    r[4 * to] = wide - half;
    r[5 * to] = c;
}

INLINE vec weight_row(vec a, vec b, vec c, int row) { /* one row of G */
    switch (row) {
    case 0: return a * 0.25f;
    case 1: return (a + b + c) * (-1.0f / 6);
    case 2: return (a - b + c) * (-1.0f / 6);
    case 3: return a * (1.0f / 24) + b * (1.0f / 12) + c * (1.0f / 6);
    case 4: return a * (1.0f / 24) - b * (1.0f / 12) + c * (1.0f / 6);
    default: return c;
    }
}

INLINE void weight_side_back(const vec *r, int from, vec *w, int to) { /* G^T */
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

/* The 36 places of tiles in scratch memory: [36, tiles, row], the places `next` apart. */
typedef struct {
    float *first;
    long row, next;
} Places;

static Places places_at(float *memory, Shape s, long row) { return (Places){memory, row, apart(s.tiles * row)}; }

static long size_of(Places p) { return PLACES * p.next; }

typedef struct {
    int half; /* bf16, else fp32 */
    void *map;
    long place; /* of the map's and vector's first number */
    float *places;
    long height, width, channels, next; /* `next`: the distance of two places */
    long top, left;                     /* of the tile's outputs */
    long channel, count;                /* the first channel of the vector, and how many it has */
} Tile;

INLINE long at(Tile t, long y, long x) { return t.place + (y * t.width + x) * t.channels; }

INLINE int inside(Tile t, long y, long x) { return y >= 0 && y < t.height && x >= 0 && x < t.width; }

/* Runs `transform` with the Tile `t`, for all tiles of map n and a vector of channels from `channel` on, of maps [N, H, W,
   channels], with their places in column `column` of `p`. */
#define FOR_TILES(s, maps_, channels_, p, n, channel_, column, before, transform, after) \
    long rows = s.height / TILE, columns = s.width / TILE; \
    Tile t = {s.half, (void *)(maps_), n * s.height * s.width * channels_ + channel_, 0, s.height, s.width, channels_, \
              p.next, 0, 0, channel_, at_most(LANES, channels_ - channel_)}; \
    before; \
    for (long y = 0; y < rows; y++) \
        for (long x = 0; x < columns; x++) { \
            t.places = p.first + ((n * rows + y) * columns + x) * p.row + column; \
            t.top = y * TILE; \
            t.left = x * TILE; \
            transform; \
        } \
    after;

INLINE void input_tile(Tile t) {
    vec d[PLACES], half[PLACES];
    for (int i = 0; i < REACH; i++)
        for (int j = 0; j < REACH; j++) {
            long y = t.top + i - 1, x = t.left + j - 1;
            d[i * REACH + j] = inside(t, y, x) ? load_any(t.half, t.map, at(t, y, x), t.count) : (vec){0};
        }
    for (int j = 0; j < REACH; j++) input_side(d + j, REACH, half + j, REACH);
    for (int i = 0; i < REACH; i++) input_side(half + i * REACH, 1, d + i * REACH, 1);
    for (int p = 0; p < PLACES; p++) *(loose *)(t.places + p * t.next) = d[p];
}

/* The transposed of it: overlapping tiles are added up in `sum` [H, W]. */
INLINE void input_tile_back(Tile t, vec *sum) {
    vec d[PLACES], half[PLACES];
    for (int p = 0; p < PLACES; p++) d[p] = *(const loose *)(t.places + p * t.next);
    for (int i = 0; i < REACH; i++) input_side_back(d + i * REACH, 1, half + i * REACH, 1);
    for (int j = 0; j < REACH; j++) input_side_back(half + j, REACH, d + j, REACH);
    for (int i = 0; i < REACH; i++)
        for (int j = 0; j < REACH; j++) {
            long y = t.top + i - 1, x = t.left + j - 1;
            if (inside(t, y, x)) sum[y * t.width + x] += d[i * REACH + j];
        }
}

INLINE void output_tile(Tile t, After after) {
    vec m[PLACES], half[TILE * REACH], y[TILE * TILE];
    for (int p = 0; p < PLACES; p++) m[p] = *(const loose *)(t.places + p * t.next);
    for (int j = 0; j < REACH; j++) output_side(m + j, REACH, half + j, REACH);
    for (int i = 0; i < TILE; i++) output_side(half + i * REACH, 1, y + i * TILE, 1);
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
    vec y[TILE * TILE], half[TILE * REACH], m[PLACES];
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) y[i * TILE + j] = load_any(t.half, t.map, at(t, t.top + i, t.left + j), t.count);
    for (int i = 0; i < TILE; i++) output_side_back(y + i * TILE, 1, half + i * REACH, 1);
    for (int j = 0; j < REACH; j++) output_side_back(half + j, REACH, m + j, REACH);
    for (int p = 0; p < PLACES; p++) *(loose *)(t.places + p * t.next) = m[p];
}

INLINE void input_to_places(Shape s, const void *maps, Places p, long n, long channel, long column) {
    FOR_TILES(s, maps, s.inputs, p, n, channel, column, , input_tile(t), )
}

INLINE void places_to_input(Shape s, Places p, void *maps, long n, long channel, long column) {
    vec sum[LARGEST];
    long positions = s.height * s.width;
    FOR_TILES(
        s, maps, s.inputs, p, n, channel, column, memset(sum, 0, positions * sizeof(vec)), input_tile_back(t, sum),
        for (long i = 0; i < positions; i++) store_any(s.half, maps, t.place + i * t.channels, sum[i], t.count))
}

INLINE void places_to_output(Shape s, Places p, void *maps, After after, long n, long channel, long column) {
    FOR_TILES(s, maps, s.outputs, p, n, channel, column, , output_tile(t, after), )
}

INLINE void output_to_places(Shape s, const void *maps, Places p, long n, long channel, long column) {
    FOR_TILES(s, maps, s.outputs, p, n, channel, column, , output_tile_back(t), )
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

/* The weights' places of one row, [6, depth, vectors], of weights [9, depth, columns] of which a block of columns is
   wanted. `tap` and `step` are the distances of taps and of neighbors in depth. */
static void weights_to_places(int row, int vectors, long depth, const float *weights, long tap, long step, long count,
                              float *places) {
    long next = apart(depth * vectors * LANES);
    for (long l = 0; l < depth; l++)
        for (int j = 0; j < vectors; j++) {
            const float *from = weights + l * step + j * LANES;
            vec side[3], r[REACH];
            for (int x = 0; x < 3; x++)
                side[x] = weight_row(load(from + x * tap, count - j * LANES), load(from + (3 + x) * tap, count - j * LANES),
                                     load(from + (6 + x) * tap, count - j * LANES), row);
            weight_side(side[0], side[1], side[2], r, 1);
            for (int p = 0; p < REACH; p++) *(loose *)(places + p * next + (l * vectors + j) * LANES) = r[p];
        }
}

/* results[p] = factors[p] x weights[p] for the 36 places p: [tiles, depth] x [depth, columns], of a few columns. A row of
   places at a time has its weights in `block`. */
static void products_with_weights(Shape s, Places factors, long depth, const float *weights, long tap, long step, long count,
                                  int vectors, Places results, float *block) {
    for (int row = 0; row < REACH; row++) {
        weights_to_places(row, vectors, depth, weights, tap, step, count, block);
        for (int p = 0; p < REACH; p++)
            (vectors == 2 ? product_2 : product_1)(
                s.tiles, depth, factors.first + (row * REACH + p) * factors.next, factors.row, 1,
                block + p * apart(depth * vectors * LANES), vectors * LANES, results.first + (row * REACH + p) * results.next,
                results.row);
    }
}

/* The gradient of the weights [C', 9, C] of a few inputs from `start` on, added to what is there where `more`. The
   products of some outputs at a time are in `block`. */
static void weight_gradient(Shape s, Places outputs, Places inputs, long start, int vectors, float *gradient, int more,
                            float *block) {
    for (long first = 0; first < s.outputs; first += TALL) {
        long rows = at_most(TALL, s.outputs - first);
        for (int p = 0; p < PLACES; p++)
            (vectors == 2 ? product_2 : product_1)(
                rows, s.tiles, outputs.first + p * outputs.next + first, 1, outputs.row, inputs.first + p * inputs.next,
                inputs.row, block + p * WITHIN, BLOCK);
        for (long i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++) {
                vec u[PLACES], half[3 * REACH], w[TAPS];
                for (int p = 0; p < PLACES; p++) u[p] = *(const loose *)(block + p * WITHIN + i * BLOCK + j * LANES);
                for (int y = 0; y < REACH; y++) weight_side_back(u + y, REACH, half + y, REACH);
                for (int y = 0; y < 3; y++) weight_side_back(half + y * REACH, 1, w + y * 3, 1);
                long channel = start + j * LANES;
                for (int y = 0; y < TAPS; y++) {
                    float *place = gradient + ((first + i) * TAPS + y) * s.inputs + channel;
                    store(place, more ? load(place, s.inputs - channel) + w[y] : w[y], s.inputs - channel);
                }
            }
    }
}

/* A few outputs of the weights [C', 9, C], from `start` on -> [9, C, vectors], a square of numbers at a time. */
static void turn(Shape s, const float *weights, long start, int vectors, float *turned) {
    for (int j = 0; j < vectors; j++)
        for (long tap = 0; tap < TAPS; tap++)
            for (long first = 0; first < s.inputs; first += LANES) {
                long count = at_most(LANES, s.inputs - first), k = start + j * LANES;
                vec square[LANES];
                for (long i = 0; i < LANES; i++)
                    square[i] = k + i < s.outputs ? load(weights + ((k + i) * TAPS + tap) * s.inputs + first, count) : (vec){0};
                transpose(square);
                for (long c = 0; c < count; c++)
                    *(loose *)(turned + tap * apart(s.inputs * vectors * LANES) + ((first + c) * vectors + j) * LANES) = square[c];
            }
}

/* ---- What Python calls; `sizes` are N, H, W, C and C', and 1 where the maps are in bf16 ---- */

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

/* Where map `first` begins. */
INLINE const void *from_map(const void *maps, const long *sizes, long first, long channels) {
    return (const char *)maps + first * sizes[1] * sizes[2] * channels * (sizes[5] ? 2 : 4);
}

/* How threads share a pass, which computes a group of maps at a time. Where there are enough maps, a thread computes
   entire groups (`aside`); else threads share the tasks of a group. Two threads then transform the group's maps each for
   itself, which takes less time than reading what the other core has written; more threads share that as well. */
typedef struct {
    Shape group; /* the first one */
    long maps;
    int aside;
    long copies;       /* of the places of a group, one for each thread or one for all */
    long whole, alone; /* scratch memory of a copy, and of a thread for its task */
} Plan;

/* `half` is a constant where it is called. A task's scratch memory has its places; transformed weights, and in a forward
   pass turned ones, or products. */
INLINE Plan plan_of(const long *sizes, int half, int backward, long threads) {
    long tiles = sizes[1] / TILE * (sizes[2] / TILE), together = GROUP / tiles > 1 ? GROUP / tiles : 1;
    int aside = !backward && sizes[0] * tiles >= GROUP / 2 * threads;
    if (aside) together = at_most(together, (sizes[0] + threads - 1) / threads);
    Shape s = {at_most(together, sizes[0]), sizes[1], sizes[2], sizes[3], sizes[4], 0, padded(sizes[3]), padded(sizes[4]), half};
    s.tiles = s.maps * tiles;
    long depth = backward ? s.outputs : s.inputs;
    long weights = (REACH + (backward ? 0 : TAPS)) * apart(depth * BLOCK), products = backward ? PLACES * WITHIN : 0;
    return (Plan){s, sizes[0], aside, aside || threads <= 2 ? threads : 1,
                  size_of(places_at(0, s, backward ? s.padded_outputs : s.padded_inputs)),
                  size_of(places_at(0, s, BLOCK)) + (weights > products ? weights : products)};
}

/* The shape of the group that begins with map `first`. */
INLINE Shape group_of(Plan plan, long first) {
    Shape s = plan.group;
    long maps = at_most(s.maps, plan.maps - first);
    s.tiles = s.tiles / s.maps * maps;
    s.maps = maps;
    return s;
}

/* Numbers of scratch memory for a forward or a backward pass. */
long winograd_scratch(const long *sizes, int backward, int threads) {
    Plan plan = plan_of(sizes, 0, backward, threads);
    return plan.copies * plan.whole + threads * plan.alone;
}

/* Runs `transform` for all maps n and vectors from channel v on, by all threads that share a copy. */
#define FOR_VECTORS(plan, maps, channels, transform) \
    { \
        int shared = plan.copies == 1; \
        for (long i = shared ? THREAD : 0; i < maps * (channels / LANES); i += shared ? THREADS : 1) { \
            long n = i / (channels / LANES), v = i % (channels / LANES) * LANES; \
            transform; \
        } \
        if (shared) { _Pragma("omp barrier") } \
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
    float *block = own + size_of(outputs), *turned = block + REACH * apart(s.inputs * BLOCK);
    turn(s, weights, task.start, task.vectors, turned);
    products_with_weights(s, inputs, s.inputs, turned, apart(s.inputs * task.vectors * LANES), task.vectors * LANES,
                          task.vectors * LANES, task.vectors, outputs, block);
    for (long n = 0; n < s.maps; n++)
        for (long v = 0; v < task.vectors * LANES; v += LANES)
            places_to_output(s, outputs, result, after, n, task.start + v, v);
}

/* By one of the threads that share the work; `half` is a constant where it is called. */
INLINE void forward(const long *sizes, int half, const void *maps, const float *weights, After after, void *result,
                    float *scratch) {
    Plan plan = plan_of(sizes, half, 0, THREADS);
    float *own = scratch + plan.copies * plan.whole + THREAD * plan.alone;
    Tasks tasks = tasks_of(plan.group.padded_outputs, plan.aside ? 1 : THREADS);
    long step = plan.group.maps * (plan.aside ? THREADS : 1);
    for (long first = plan.aside ? THREAD * plan.group.maps : 0; first < plan.maps; first += step) {
        Shape s = group_of(plan, first);
        Places inputs = places_at(scratch + THREAD % plan.copies * plan.whole, s, s.padded_inputs);
        const void *here = from_map(maps, sizes, first, s.inputs);
        void *there = (void *)from_map(result, sizes, first, s.outputs);
        After with = after;
        if (after.shortcut) with.shortcut = from_map(after.shortcut, sizes, first, s.outputs);
        FOR_VECTORS(plan, s.maps, s.padded_inputs, input_to_places(s, here, inputs, n, v, v))
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
    for (long n = 0; n < s.maps; n++)
        for (long v = 0; v < task.vectors * LANES; v += LANES) input_to_places(s, maps, inputs, n, task.start + v, v);
    weight_gradient(s, outputs, inputs, task.start, task.vectors, of_weights, more, own + size_of(inputs));
}

INLINE void maps_task(Shape s, Task task, Places outputs, const float *weights, void *of_maps, float *own) {
    Places inputs = places_at(own, s, BLOCK);
    products_with_weights(s, outputs, s.outputs, weights + task.start, s.inputs, TAPS * s.inputs, s.inputs - task.start,
                          task.vectors, inputs, own + size_of(inputs));
    for (long n = 0; n < s.maps; n++)
        for (long v = 0; v < task.vectors * LANES; v += LANES) places_to_input(s, inputs, of_maps, n, task.start + v, v);
}

INLINE void backward(const long *sizes, int half, const void *maps, const float *weights, const void *gradient,
                     void *of_maps, float *of_weights, float *scratch) {
    Plan plan = plan_of(sizes, half, 1, THREADS);
    float *own = scratch + plan.copies * plan.whole + THREAD * plan.alone;
    Tasks tasks = tasks_of(plan.group.padded_inputs, THREADS);
    for (long first = 0; first < plan.maps; first += plan.group.maps) {
        Shape s = group_of(plan, first);
        Places outputs = places_at(scratch + THREAD % plan.copies * plan.whole, s, s.padded_outputs);
        const void *here = from_map(gradient, sizes, first, s.outputs), *inputs = from_map(maps, sizes, first, s.inputs);
        void *there = (void *)from_map(of_maps, sizes, first, s.inputs);
        FOR_VECTORS(plan, s.maps, s.padded_outputs, output_to_places(s, here, outputs, n, v, v))
#pragma omp for schedule(dynamic)
        for (long i = 0; i < 2 * tasks.count; i++) {
            Task task = task_of(tasks, i % tasks.count);
            if (i < tasks.count && of_weights) weights_task(s, task, outputs, inputs, of_weights, first > 0, own);
            if (i >= tasks.count && of_maps) maps_task(s, task, outputs, weights, there, own);
        }
    }
}

/* `scale` and `shift`, or `shortcut`, may be NULL: not wanted. */
void winograd_forward(const long *sizes, int threads, int relu, const void *maps, const float *weights, const float *scale,
                      const float *shift, const void *shortcut, void *result, float *scratch) {
    After after = {scale, shift, shortcut, relu};
#pragma omp parallel num_threads(threads)
    if (sizes[5]) forward(sizes, 1, maps, weights, after, result, scratch);
    else forward(sizes, 0, maps, weights, after, result, scratch);
}

/* `of_maps` or `of_weights` may be NULL: not wanted. */
void winograd_backward(const long *sizes, int threads, const void *maps, const float *weights, const void *gradient,
                       void *of_maps, float *of_weights, float *scratch) {
#pragma omp parallel num_threads(threads)
    if (sizes[5]) backward(sizes, 1, maps, weights, gradient, of_maps, of_weights, scratch);
    else backward(sizes, 0, maps, weights, gradient, of_maps, of_weights, scratch);
}
