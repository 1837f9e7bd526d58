/* One decode step on a CPU, a new position for each of a few rows, from weights of any of four kinds; and, at the end,
 * the attention of a prompt in bfloat16.
 *
 * At one row every weight is read once and used once, so the memory's speed is the limit: weights are widened in
 * registers, a vector at a time, and nothing else goes to memory. llama/native.py compiles this file, has the same
 * structs, and is its only caller.
 * Loops marked `omp for` are shared by the threads of the parallel region that calls them. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define GROUP 32       /* int4: columns that share a scale and a zero */
#define KEY_BLOCK 256  /* positions that one thread looks at in one go */
#define AHEAD 8192     /* bytes: what is asked of memory now will be needed when this much has been computed */
#define QUERIES 64     /* times heads, as many as fit: what one thread looks back from in one go */

/* LANES: what a vector of the machine has; ROWS: of x, that fit its registers together with four of a matrix.
 * KEEP: GCC 12 would load an operand again for each of its uses. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#define ROWS 4
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 2
#define KEEP(v) __asm__("" : "+x"(v))
#else
#define LANES 4
#define ROWS 4
#define KEEP(v)
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t words __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));
typedef int8_t bytes __attribute__((vector_size(2 * LANES)));

enum { F32, BF16, INT8, INT4 };

/* [n, k]. F32 and BF16: row by row. INT8 and INT4: panels of LANES rows (the last one filled up), of which each has
 * a lane: INT8 [k / 2, LANES, 2], INT4 [k / 8, LANES] of 32 bits, whose lower half has the columns 0 2 4 6, the upper
 * one 1 3 5 7, low bits first. scale: INT8 [n], INT4 [n / LANES, k / 32, LANES], as zero; a weight of INT4 is
 * (q - 8) * scale + zero. Scales and zeros are bfloat16. */
typedef struct {
    int64_t kind, n, k;
    const void *data;
    const uint16_t *scale, *zero;
} Matrix;

typedef struct {
    Matrix wqkv, wo, w13, w2;
    const void *attention_norm, *ffn_norm; /* of kind cache_kind, too */
    void *keys, *values; /* [rows, kv_heads, max_seq_len, head_dim] of kind cache_kind */
} Layer;

typedef struct {
    int64_t n_layers, dim, heads, kv_heads, head_dim, width, max_seq_len, cache_kind;
    float norm_eps;
    const Layer *layers;
    const void *norm;                                       /* of kind cache_kind */
    const float *freqs_cis;                                 /* cosine and sine: [max_seq_len, head_dim / 2, 2] */
    float *h, *qkv, *scores, *attended, *gate_up, *activations, *sums, *out; /* room for all rows */
    uint16_t *rounded;                                      /* NULL in float32 */
    int (*reduce)(void); /* adds `out` up over the ranks; NULL where there is one rank; not 0: it failed */
} Model;

/* What GCC 12 would do with several instructions where there is one. */
#if LANES == 16
INLINE ints wide_halves(halves v) { return (ints)_mm512_cvtepu16_epi32((__m256i)v); }
INLINE ints wide_bytes(bytes v) { return (ints)_mm512_cvtepi8_epi16((__m256i)v); }
INLINE float sum(floats v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE quad sums_of(floats a, floats b, floats c, floats d) {
    const __m512 v = (__m512)a, w = (__m512)b, x = (__m512)c, y = (__m512)d;
    const __m512 first = _mm512_unpacklo_ps(v, w) + _mm512_unpackhi_ps(v, w); /* a b a b, four times */
    const __m512 second = _mm512_unpacklo_ps(x, y) + _mm512_unpackhi_ps(x, y);
    const __m512 all = _mm512_shuffle_ps(first, second, 0x44) + _mm512_shuffle_ps(first, second, 0xee); /* a b c d */
    const __m256 half = _mm512_castps512_ps256(all) + _mm512_castps512_ps256(_mm512_shuffle_f32x4(all, all, 0x4e));
    return (quad)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
#else
INLINE float sum(floats v) {
    for (int n = LANES / 2; n; n /= 2)
        for (int j = 0; j < n; j++) v[j] += v[j + n];
    return v[0];
}
#endif
#if LANES == 8
INLINE ints wide_halves(halves v) { return (ints)_mm256_cvtepu16_epi32((__m128i)v); }
INLINE ints wide_bytes(bytes v) { return (ints)_mm256_cvtepi8_epi16((__m128i)v); }
INLINE quad sums_of(floats a, floats b, floats c, floats d) {
    const __m256 first = _mm256_hadd_ps((__m256)a, (__m256)b), second = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 all = _mm256_hadd_ps(first, second); /* a b c d, twice */
    return (quad)(_mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
}
#elif LANES == 4
INLINE ints wide_halves(halves v) { return __builtin_convertvector(v, ints); }
INLINE ints wide_bytes(bytes v) { return (ints)__builtin_convertvector(v, shorts); }
INLINE quad sums_of(floats a, floats b, floats c, floats d) { return (quad){sum(a), sum(b), sum(c), sum(d)}; }
#endif

INLINE floats widen(halves h) { return (floats)(wide_halves(h) << 16); }

INLINE float widen1(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Copy `count` numbers, usually as many as a vector has: then it is one instruction, not a call. */
#define COPY(to, from, count, usual, size) \
    ((count) == (usual) ? memcpy(to, from, (usual) * (size)) : memcpy(to, from, (count) * (size)))

/* Elements j to j + count of F32 or BF16 data; those beyond count are zero. */
INLINE floats load(const int kind, const void *data, int64_t j, int64_t count) {
    if (kind == F32) {
        floats v = {0};
        COPY(&v, (const float *)data + j, count, LANES, 4);
        return v;
    }
    halves v = {0};
    COPY(&v, (const uint16_t *)data + j, count, LANES, 2);
    return widen(v);
}

INLINE float one(const int kind, const void *data, int64_t j) {
    return kind == F32 ? ((const float *)data)[j] : widen1(((const uint16_t *)data)[j]);
}

INLINE void store(const int kind, void *data, int64_t j, float value) {
    if (kind == F32) {
        ((float *)data)[j] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    /* To the nearest, ties to even; a NaN stays one. */
    ((uint16_t *)data)[j] = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE halves narrow(floats v) { /* to the nearest, as `store` */
#if LANES == 16 && defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const ints bits = (ints)v;
    return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, halves);
#endif
}

INLINE void store_all(const int kind, void *data, int64_t j, floats v) {
    if (kind == F32) {
        memcpy((float *)data + j, &v, sizeof v);
        return;
    }
    const halves h = narrow(v);
    memcpy((uint16_t *)data + j, &h, sizeof h);
}

/* A lane of a and b holds two bfloat16 each: both products are added to it. */
INLINE floats dot(floats total, ints a, ints b) {
#if LANES == 16 && defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
    const int32_t high = 0xffff0000;
    return total + (floats)(a << 16) * (floats)(b << 16) + (floats)(a & high) * (floats)(b & high);
#endif
}

/* 32 numbers of 16 bits, two a lane; those beyond count are zero. */
INLINE ints load_ints(const void *data, int64_t count) {
    ints v = {0};
    COPY(&v, data, count, 2 * LANES, 2);
    return v;
}

INLINE int64_t lanes(int64_t left) { return left < LANES ? left : LANES; }

INLINE floats larger(floats a, floats b) {
    const ints above = a > b;
    return (floats)(((ints)a & above) | ((ints)b & ~above));
}

/* Replace the values below or above a limit; a NaN is neither. */
INLINE floats clamp(floats v, float low, float high) {
    const ints below = v < low, above = v > high;
    const floats lows = low - (floats){0}, highs = high - (floats){0};
    return (floats)(((ints)v & ~below & ~above) | ((ints)lows & below) | ((ints)highs & above));
}

/* e^x within 2 units of the last place: x = n log 2 + r, a polynomial for e^r (that of Cephes' expf), 2^n as bits. */
INLINE floats exponential(floats x) {
    const float to_whole = 12582912; /* 1.5 * 2^23: added, it leaves the nearest whole number in the low bits */
    x = clamp(x, -87, 88);
    const floats shifted = x * 1.44269504f + to_whole, n = shifted - to_whole;
    const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return (floats)((ints)p + ((ints)shifted << 23));
}

/* Ask memory for what lies AHEAD of so many bytes: where that is beyond the matrix, it does no harm. */
INLINE void ahead(const void *data, int64_t count) {
    for (int64_t j = 0; j < count; j += 64) __builtin_prefetch((const char *)data + AHEAD + j, 0, 2);
}

/* y[r, i..i+rows) = W[i..i+rows, :] x[r, :] for r in 0..m, in registers. One row is read as one stream, which the
 * processor fetches ahead, and summed in four chains; four rows and four x share what they load. */
INLINE void block(const int kind, const int rows, const int m, const Matrix *w, int64_t i, const float *x,
                  int64_t x_stride, float *y, int64_t y_stride) {
    const int chains = rows < 4 && m < 4 ? 4 : 1;
    const int64_t k = w->k, parts = k / LANES;
    floats acc[4][4][4];
    float rest[4][4] = {{0}};
    for (int c = 0; c < chains; c++)
        for (int a = 0; a < rows; a++)
            for (int r = 0; r < m; r++) acc[c][a][r] = (floats){0};
    for (int64_t p = 0; p < parts; p += chains)
        for (int c = 0; c < chains; c++) {
            if (p + c >= parts) break;
            floats left[4];
#pragma GCC unroll 4
            for (int a = 0; a < rows; a++) {
                const int64_t j = (i + a) * k + (p + c) * LANES;
                if (rows == 1 && m == 1) ahead((const char *)w->data + j * (kind == F32 ? 4 : 2), 1);
                floats v = load(kind, w->data, j, LANES);
                KEEP(v);
                left[a] = v;
            }
#pragma GCC unroll 4
            for (int r = 0; r < m; r++) {
                floats right = load(F32, x, r * x_stride + (p + c) * LANES, LANES);
                KEEP(right);
#pragma GCC unroll 4
                for (int a = 0; a < rows; a++) acc[c][a][r] += left[a] * right;
            }
        }
    for (int64_t j = parts * LANES; j < k; j++)
        for (int a = 0; a < rows; a++)
            for (int r = 0; r < m; r++) rest[a][r] += one(kind, w->data, (i + a) * k + j) * x[r * x_stride + j];
    for (int r = 0; r < m; r++) {
        if (rows == 4) { /* and one chain */
            const quad totals = sums_of(acc[0][0][r], acc[0][1][r], acc[0][2][r], acc[0][3][r]);
            for (int a = 0; a < 4; a++) rest[a][r] += totals[a];
        } else {
            for (int a = 0; a < rows; a++)
                for (int c = 0; c < chains; c++) rest[a][r] += sum(acc[c][a][r]);
        }
        for (int a = 0; a < rows; a++) y[r * y_stride + i + a] = rest[a][r];
    }
}

/* Rows [from, to) of an F32 or BF16 matrix, for m rows of x. */
INLINE void part(const int kind, const Matrix *w, int64_t from, int64_t to, const float *x, int64_t x_stride, float *y,
                 int64_t y_stride, int64_t m) {
    const int64_t shared = m / ROWS * ROWS, k = w->k, item = kind == F32 ? 4 : 2;
    int64_t i = from;
    for (; shared && i + 4 <= to; i += 4) {
        ahead((const char *)w->data + i * k * item, 4 * k * item);
        for (int64_t r = 0; r < shared; r += ROWS)
            block(kind, 4, ROWS, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride);
    }
    for (; shared && i < to; i++)
        for (int64_t r = 0; r < shared; r += ROWS)
            block(kind, 1, ROWS, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride);
    for (i = from; shared < m && i < to; i++)
        for (int64_t r = shared; r < m; r++)
            block(kind, 1, 1, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride);
}

/* `part` for the keys of a head: four of them at a time for any number of x, the queries. */
INLINE void keys_part(const int kind, const Matrix *w, int64_t from, int64_t to, const float *x, int64_t x_stride,
                      float *y, int64_t y_stride, int64_t m) {
    int64_t i = from;
    for (; i + 4 <= to; i += 4) {
        const int64_t item = kind == F32 ? 4 : 2;
        ahead((const char *)w->data + i * w->k * item, 4 * w->k * item);
        for (int64_t r = 0; r < m; r += 4)
            switch (m - r) {
                case 1: block(kind, 4, 1, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride); break;
                case 2: block(kind, 4, 2, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride); break;
                case 3: block(kind, 4, 3, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride); break;
                default: block(kind, 4, 4, w, i, x + r * x_stride, x_stride, y + r * y_stride, y_stride);
            }
    }
    part(kind, w, i, to, x, x_stride, y, y_stride, m);
}

/* acc[a][r] += W[a, 0..count) x[r, 0..count). */
INLINE void pairs(const int rows, const int m, const uint16_t *w, const uint16_t *x, int64_t k, int64_t count,
                  floats acc[4][4]) {
    ints left[4];
#pragma GCC unroll 4
    for (int a = 0; a < rows; a++) {
        ints v = load_ints(w + a * k, count);
        KEEP(v);
        left[a] = v;
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
        ints right = load_ints(x + r * k, count);
        KEEP(right);
#pragma GCC unroll 4
        for (int a = 0; a < rows; a++) acc[a][r] = dot(acc[a][r], left[a], right);
    }
}

/* y[r, 0..rows) = W[0..rows, :] x[r, :] for r in 0..m, all of them bfloat16, in registers. */
INLINE void dots(const int rows, const int m, const uint16_t *w, const uint16_t *x, int64_t k, float *y,
                 int64_t y_stride) {
    const int64_t whole = k / (2 * LANES) * 2 * LANES;
    floats acc[4][4];
#pragma GCC unroll 4
    for (int a = 0; a < rows; a++)
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) acc[a][r] = (floats){0};
    for (int64_t j = 0; j < whole; j += 2 * LANES) pairs(rows, m, w + j, x + j, k, 2 * LANES, acc);
    if (whole < k) pairs(rows, m, w + whole, x + whole, k, k - whole, acc);
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
        const quad totals = sums_of(acc[0][r], acc[rows > 1][r], acc[rows > 2 ? 2 : 0][r], acc[rows > 3 ? 3 : 0][r]);
        memcpy(y + r * y_stride, &totals, rows * sizeof(float));
    }
}

/* Rows [from, to) of a BF16 matrix, for m rows of bfloat16, of which all are near. Four rows of the matrix at a time,
 * while later ones are on their way from memory. */
static void half_part(const Matrix *w, int64_t from, int64_t to, const uint16_t *x, float *y, int64_t m) {
    const int64_t k = w->k, n = w->n;
    const uint16_t *data = w->data;
    for (int64_t i = from; i < to; i += 4) {
        const int64_t rows = to - i < 4 ? to - i : 4;
        int64_t r = 0;
        ahead(data + i * k, 8 * k);
        for (; rows == 4 && r + ROWS <= m; r += ROWS) dots(4, ROWS, data + i * k, x + r * k, k, y + r * n + i, n);
        for (; rows == 4 && r < m; r++) dots(4, 1, data + i * k, x + r * k, k, y + r * n + i, n);
        for (; r < m; r++)
            for (int64_t a = 0; a < rows; a++) dots(1, 1, data + (i + a) * k, x + r * k, k, y + r * n + i + a, n);
    }
}

/* INT8 and INT4 -------------------------------------------------------------------------------------- */

/* A lane of a and b has two whole numbers of 16 bits: both products are added to it. */
INLINE ints whole_dot(ints total, ints a, ints b) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif LANES == 8
    return total + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return total + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* Columns 2 j and 2 j + 1 of a panel, two numbers a lane: INT8 -127 to 127, INT4 0 to 15. */
INLINE ints columns(const int kind, const char *panel, int64_t j) {
    if (kind == INT8) {
        bytes v;
        memcpy(&v, panel + j * sizeof v, sizeof v);
        return wide_bytes(v);
    }
    words v;
    memcpy(&v, panel + j / 4 * sizeof v, sizeof v);
    return (ints)(v >> (uint16_t)(j % 4 * 4) & 15);
}

INLINE floats low_of(ints v) { return __builtin_convertvector(v << 16 >> 16, floats); }
INLINE floats high_of(ints v) { return __builtin_convertvector(v >> 16, floats); }

/* The scales or zeros of a panel's rows, in INT4 for a group of columns. */
INLINE floats of_rows(const int kind, const Matrix *w, const uint16_t *values, int64_t i, int64_t g) {
    return load(BF16, values, kind == INT8 ? i : i * (w->k / GROUP) + g * LANES, LANES);
}

/* y[r, i..i+LANES) = W[i..i+LANES, :] x[r, :] for r in 0..m, a row of the matrix in each lane. x: float32 if `exact`,
 * or else whole numbers of 16 bits, whose products add up without rounding. sums [m, k / 32 + 1]: of x over each group,
 * then what x is to be multiplied by. */
INLINE void panel(const int kind, const int m, const int exact, const Matrix *w, int64_t i, const void *x,
                  const float *sums, float *y) {
    const int unit = kind == INT8 ? 8 : GROUP / 2, chains = m < 4 ? 4 : 1;
    const int64_t k = w->k, groups = k / GROUP, units = k / 2 / unit, left = w->n - i;
    const char *data = (const char *)w->data + i * (kind == INT8 ? k : k / 2);
    floats total[2 * ROWS], partial[4][2 * ROWS];
    ints whole[4][2 * ROWS];
    for (int r = 0; r < m; r++) {
        total[r] = (floats){0};
        for (int c = 0; c < chains; c++) partial[c][r] = (floats){0}, whole[c][r] = (ints){0};
    }
    for (int64_t u = 0; u < units; u++, data += unit * (kind == INT8 ? 2 * LANES : LANES)) {
        for (int j = 0; j < unit; j++) {
            if (kind == INT4 && j % 4 == 0) ahead(data + j * LANES, 1); /* INT8 is as fast without */
            ints v = columns(kind, data, j);
            KEEP(v);
            for (int r = 0; r < m; r++) {
                const int64_t at = r * k + 2 * (u * unit + j);
                if (exact) {
                    const float *two = (const float *)x + at;
                    partial[j % chains][r] += low_of(v) * two[0] + high_of(v) * two[1];
                } else {
                    int32_t two;
                    memcpy(&two, (const int16_t *)x + at, sizeof two);
                    whole[j % chains][r] = whole_dot(whole[j % chains][r], v, two - (ints){0});
                }
            }
        }
        if (kind == INT8 && u % 32 < 31 && u + 1 < units) continue; /* 32 bits hold the sum of 32 units */
        const floats scale = of_rows(kind, w, w->scale, i, u);
        for (int r = 0; r < m; r++) {
            floats sum = {0};
            for (int c = 0; c < chains; c++) {
                sum += exact ? partial[c][r] : __builtin_convertvector(whole[c][r], floats);
                partial[c][r] = (floats){0}, whole[c][r] = (ints){0};
            }
            total[r] += sum * scale;
            /* The -8 and the zero of a group meet the sum of its x. */
            if (kind == INT4) total[r] += (of_rows(kind, w, w->zero, i, u) - 8 * scale) * sums[r * (groups + 1) + u];
        }
    }
    for (int r = 0; r < m; r++) {
        total[r] *= sums[r * (groups + 1) + groups];
        COPY(y + r * w->n + i, &total[r], lanes(left), LANES, 4);
    }
}

/* The panel of row i, for m rows of x. */
INLINE void panel_for(const int kind, const int exact, const Matrix *w, int64_t i, const void *x, const float *sums,
                      float *y, int64_t m) {
    const int64_t k = w->k, each = k / GROUP + 1, size = exact ? 4 : 2;
    int64_t r = 0;
    const char *row = x;
    for (; r + 2 * ROWS <= m; r += 2 * ROWS)
        panel(kind, 2 * ROWS, exact, w, i, row + r * k * size, sums + r * each, y + r * w->n);
    for (; r + ROWS <= m; r += ROWS) panel(kind, ROWS, exact, w, i, row + r * k * size, sums + r * each, y + r * w->n);
    for (; r < m; r++) panel(kind, 1, exact, w, i, row + r * k * size, sums + r * each, y + r * w->n);
}

/* A row x [k] as whole numbers of 16 bits (none where they are NULL), and `sums` as `panel` wants them. The rounding
 * errs by less than bfloat16's: at most 2^-16 of the largest, which is at most sqrt(k) of the root of the mean square. */
static void whole_row(const float *x, int64_t k, int16_t *out, float *sums) {
    const float to_whole = 12582912; /* as in `exponential` */
    floats most = {0}, taint = {0};
    for (int64_t j = 0; out && j < k; j += LANES) {
        const floats v = load(F32, x, j, LANES), size = (floats)((ints)v & 0x7fffffff);
        most = larger(size, most);
        taint += v - v; /* not a number where x is not finite */
    }
    float largest = sum(taint);
    for (int j = 0; j < LANES; j++) largest = most[j] > largest ? most[j] : largest;
    const float scale = out ? largest / 32767 + sum(taint) : 1;
    const float inverse = scale > 1.2e-38f ? 1 / scale : 0; /* of less than that, 1 / scale is infinite: as good as 0 */
    for (int64_t j = 0; j < k; j += GROUP) {
        floats total = {0};
        for (int64_t l = j; l < j + GROUP && l < k; l += LANES) {
            floats v = load(F32, x, l, LANES);
            if (out) {
                v = v * inverse + to_whole;
                const halves rounded = __builtin_convertvector((ints)v, halves);
                memcpy(out + l, &rounded, sizeof rounded);
                v -= to_whole;
            }
            total += v;
        }
        sums[j / GROUP] = sum(total);
    }
    sums[k / GROUP] = scale;
}

/* The panel of row i of an INT8 or INT4 matrix in full, k numbers of kind F32 or BF16 each. */
INLINE void expand(const int from, const int to, const Matrix *w, int64_t i, void *out) {
    const int64_t k = w->k, rows = lanes(w->n - i);
    const char *data = (const char *)w->data + i * (from == INT8 ? k : k / 2);
    for (int64_t j = 0; j < k / 2; j++) {
        const ints v = columns(from, data + j / 16 * LANES * (from == INT8 ? 32 : 16), j % 16);
        const floats scale = of_rows(from, w, w->scale, i, j / 16);
        floats low = low_of(v), high = high_of(v);
        if (from == INT4) {
            const floats zero = of_rows(from, w, w->zero, i, j / 16);
            low = (low - 8) * scale + zero;
            high = (high - 8) * scale + zero;
        } else {
            low *= scale;
            high *= scale;
        }
        if (to == F32) {
            for (int64_t l = 0; l < rows; l++) {
                ((float *)out)[l * k + 2 * j] = low[l];
                ((float *)out)[l * k + 2 * j + 1] = high[l];
            }
        } else {
            const ints both = wide_halves(narrow(low)) | wide_halves(narrow(high)) << 16;
            for (int64_t l = 0; l < rows; l++) memcpy((uint16_t *)out + l * k + 2 * j, (int32_t *)&both + l, 4);
        }
    }
}

/* Any kind ------------------------------------------------------------------------------------------ */

/* y [m, n] = x [m, k] W^T. sums: room for m * (k / 32 + 1) floats. halves: for as many numbers of 16 bits as x, in
 * models of bfloat16: several rows are then rounded to it, as torch's are, which lets an instruction do two products a
 * lane; for INT8 and INT4 any are rounded to whole numbers. */
static void matrix(const Matrix *w, const float *x, float *sums, uint16_t *halves, float *y, int64_t m) {
    const int64_t k = w->k;
    const int in_panels = w->kind == INT8 || w->kind == INT4, halved = halves && m > 1 && w->kind == BF16;
    if (in_panels || halved) {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < m; r++) {
            int64_t j = 0;
            if (in_panels) whole_row(x + r * k, k, halves ? (int16_t *)halves + r * k : 0, sums + r * (k / GROUP + 1));
            for (; halved && j + LANES <= k; j += LANES)
                store_all(BF16, halves, r * k + j, load(F32, x, r * k + j, LANES));
            for (; halved && j < k; j++) store(BF16, halves, r * k + j, x[r * k + j]);
        }
    }
    const int64_t step = in_panels ? LANES : 16;
#pragma omp for schedule(guided)
    for (int64_t i = 0; i < w->n; i += step) {
        const int64_t to = i + step < w->n ? i + step : w->n;
        if (w->kind == INT8 && halves)
            panel_for(INT8, 0, w, i, halves, sums, y, m);
        else if (w->kind == INT8)
            panel_for(INT8, 1, w, i, x, sums, y, m);
        else if (w->kind == INT4 && halves)
            panel_for(INT4, 0, w, i, halves, sums, y, m);
        else if (w->kind == INT4)
            panel_for(INT4, 1, w, i, x, sums, y, m);
        else if (halved)
            half_part(w, i, to, halves, y, m);
        else if (w->kind == BF16)
            part(BF16, w, i, to, x, k, y, w->n, m);
        else
            part(F32, w, i, to, x, k, y, w->n, m);
    }
}

static void normalise(const Model *model, const void *weight, const float *x, float *out, int64_t m) {
    const int64_t dim = model->dim;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; r++) {
        floats squares = {0};
        for (int64_t j = 0; j < dim; j += LANES) {
            const floats v = load(F32, x, r * dim + j, lanes(dim - j));
            squares += v * v;
        }
        const float scale = 1 / sqrtf(sum(squares) / dim + model->norm_eps);
        for (int64_t j = 0; j < dim; j += LANES) {
            const int64_t count = lanes(dim - j);
            const floats w = model->cache_kind == F32 ? load(F32, weight, j, count) : load(BF16, weight, j, count);
            const floats v = load(F32, x, r * dim + j, count) * scale * w;
            COPY(out + r * dim + j, &v, count, LANES, 4);
        }
    }
}

/* In place: e to the power of each, over their sum. What is subtracted first keeps the powers within range. */
static void softmax(float *p, int64_t n) {
    const int64_t whole = n / LANES * LANES;
    floats most = p[0] - (floats){0}, total = {0};
    for (int64_t t = 0; t < whole; t += LANES) most = larger(load(F32, p, t, LANES), most);
    float highest = p[0];
    for (int j = 0; j < LANES; j++) highest = most[j] > highest ? most[j] : highest;
    for (int64_t t = whole; t < n; t++) highest = p[t] > highest ? p[t] : highest;
    for (int64_t t = 0; t < n; t += LANES) {
        const int64_t count = lanes(n - t);
        const floats power = exponential(load(F32, p, t, count) - highest);
        COPY(p + t, &power, count, LANES, 4);
        total += load(F32, p, t, count);
    }
    const float share = 1 / sum(total);
    for (int64_t t = 0; t < n; t++) p[t] *= share;
}

/* attended[d..d+count) = sum over t of p[t] * values[t, d..d+count), for m heads that share the values. */
INLINE void mix(const int kind, const int m, const void *values, int64_t head_dim, int64_t d, const float *p,
                int64_t p_stride, int64_t ctx_len, float *out) {
    floats acc[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) acc[r][0] = acc[r][1] = (floats){0};
    const int64_t first = lanes(head_dim - d), second = lanes(head_dim - d - first);
    for (int64_t t = 0; t < ctx_len; t++) {
        ahead((const char *)values + (t * head_dim + d) * (kind == F32 ? 4 : 2), 1);
        const floats a = load(kind, values, t * head_dim + d, first);
        const floats b = load(kind, values, t * head_dim + d + first, second);
#pragma GCC unroll 4
        for (int r = 0; r < m; r++) {
            acc[r][0] += a * p[r * p_stride + t];
            acc[r][1] += b * p[r * p_stride + t];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
        COPY(out + r * head_dim + d, &acc[r][0], first, LANES, 4);
        COPY(out + r * head_dim + d + first, &acc[r][1], second, LANES, 4);
    }
}

/* Turn and store the new position of each row, look back from it: qkv -> attended [m, heads, head_dim]. */
INLINE void attend(const int kind, const Model *model, const Layer *layer, const int64_t *positions, int64_t m) {
    const int64_t heads = model->heads, kv_heads = model->kv_heads, head_dim = model->head_dim;
    const int64_t group = heads / kv_heads, stride = (heads + 2 * kv_heads) * head_dim, max_len = model->max_seq_len;
    const float scale = 1 / sqrtf(head_dim);
    int64_t longest = 0;
    for (int64_t r = 0; r < m; r++) longest = positions[r] + 1 > longest ? positions[r] + 1 : longest;
    const int64_t blocks = (longest + KEY_BLOCK - 1) / KEY_BLOCK, item = kind == F32 ? 4 : 2;

#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * (heads + 2 * kv_heads); i++) {
        const int64_t r = i / (heads + 2 * kv_heads), head = i % (heads + 2 * kv_heads), at = positions[r];
        float *x = model->qkv + r * stride + head * head_dim;
        const int64_t kv_head = head < heads + kv_heads ? head - heads : head - heads - kv_heads;
        const int64_t slot = ((r * kv_heads + kv_head) * max_len + at) * head_dim;
        for (int64_t j = 0; j < head_dim; j += 2) {
            const float even = x[j], odd = x[j + 1];
            if (head < heads + kv_heads) {
                const float c = model->freqs_cis[at * head_dim + j], s = model->freqs_cis[at * head_dim + j + 1];
                x[j] = even * c - odd * s;
                x[j + 1] = even * s + odd * c;
            }
            if (head < heads) {
                x[j] *= scale;
                x[j + 1] *= scale;
            }
        }
        void *to = head < heads + kv_heads ? layer->keys : layer->values;
        int64_t j = 0;
        for (; head >= heads && j + LANES <= head_dim; j += LANES)
            store_all(kind, to, slot + j, load(F32, x, j, LANES));
        for (; head >= heads && j < head_dim; j++) store(kind, to, slot + j, x[j]);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * kv_heads * blocks; i++) {
        const int64_t r = i / (kv_heads * blocks), kv_head = i / blocks % kv_heads, from = i % blocks * KEY_BLOCK;
        const int64_t ctx_len = positions[r] + 1, to = from + KEY_BLOCK < ctx_len ? from + KEY_BLOCK : ctx_len;
        const char *keys = (const char *)layer->keys + (r * kv_heads + kv_head) * max_len * head_dim * item;
        const Matrix w = {kind, ctx_len, head_dim, keys, 0, 0};
        keys_part(kind, &w, from, to, model->qkv + r * stride + kv_head * group * head_dim, head_dim,
                  model->scores + (r * heads + kv_head * group) * max_len, max_len, group);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * heads; i++) softmax(model->scores + i * max_len, positions[i / heads] + 1);
    const int64_t parts = (head_dim + 2 * LANES - 1) / (2 * LANES);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * kv_heads * parts; i++) {
        const int64_t r = i / (kv_heads * parts), kv_head = i / parts % kv_heads, d = i % parts * 2 * LANES;
        const char *values = (const char *)layer->values + (r * kv_heads + kv_head) * max_len * head_dim * item;
        const int64_t first = r * heads + kv_head * group, ctx_len = positions[r] + 1;
        for (int64_t g = 0; g < group; g += 4) {
            const float *p = model->scores + (first + g) * max_len;
            float *out = model->attended + (first + g) * head_dim;
            switch (group - g) {
                case 1: mix(kind, 1, values, head_dim, d, p, max_len, ctx_len, out); break;
                case 2: mix(kind, 2, values, head_dim, d, p, max_len, ctx_len, out); break;
                case 3: mix(kind, 3, values, head_dim, d, p, max_len, ctx_len, out); break;
                default: mix(kind, 4, values, head_dim, d, p, max_len, ctx_len, out);
            }
        }
    }
}

static void attention(const Model *model, const Layer *layer, const float *x, const int64_t *positions, int64_t m) {
    normalise(model, layer->attention_norm, x, model->h, m);
    matrix(&layer->wqkv, model->h, model->sums, model->rounded, model->qkv, m);
    if (model->cache_kind == F32)
        attend(F32, model, layer, positions, m);
    else
        attend(BF16, model, layer, positions, m);
    matrix(&layer->wo, model->attended, model->sums, model->rounded, model->out, m);
}

static void feed_forward(const Model *model, const Layer *layer, const float *x, int64_t m) {
    const int64_t width = model->width;
    normalise(model, layer->ffn_norm, x, model->h, m);
    matrix(&layer->w13, model->h, model->sums, model->rounded, model->gate_up, m);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m * width; i += LANES) {
        /* A vector may begin in one row and end in the next. */
        floats gate = {0}, up = {0};
        const int64_t count = lanes(m * width - i), left = width - i % width;
        const float *row = model->gate_up + i / width * 2 * width + i % width;
        COPY(&gate, row, count < left ? count : left, LANES, 4);
        COPY(&up, row + width, count < left ? count : left, LANES, 4);
        for (int64_t j = left; j < count; j++) {
            gate[j] = row[width + j];
            up[j] = row[2 * width + j];
        }
        const floats product = gate / (1 + exponential(-gate)) * up;
        COPY(model->activations + i, &product, count, LANES, 4);
    }
    matrix(&layer->w2, model->activations, model->sums, model->rounded, model->out, m);
}

static int add(const Model *model, float *x, int64_t m) {
    if (model->reduce && model->reduce()) return 1;
    for (int64_t j = 0; j < m * model->dim; j++) x[j] += model->out[j];
    return 0;
}

/* x [m, dim]: embeddings of the new ids, replaced by the normed hidden states. Returns not 0 if a reduction failed. */
int decode(const Model *model, float *x, const int64_t *positions, int64_t m, int threads) {
    for (int64_t i = 0; i < model->n_layers; i++) {
        const Layer *layer = model->layers + i;
#pragma omp parallel num_threads(threads)
        attention(model, layer, x, positions, m);
        if (add(model, x, m)) return 1;
#pragma omp parallel num_threads(threads)
        feed_forward(model, layer, x, m);
        if (add(model, x, m)) return 1;
    }
#pragma omp parallel num_threads(threads)
    normalise(model, model->norm, x, model->h, m);
    memcpy(x, model->h, m * model->dim * sizeof(float));
    return 0;
}

/* y [m, n] = x [m, k] W^T on its own, for the output layer. */
void multiply(const Matrix *w, const float *x, float *sums, uint16_t *halves, float *y, int64_t m, int threads) {
#pragma omp parallel num_threads(threads)
    matrix(w, x, sums, halves, y, m);
}

/* How many rows a panel of an INT8 or INT4 matrix has. */
int panel_rows(void) { return LANES; }

/* An INT8 or INT4 matrix in full, [n, k] of kind F32 or BF16, for products with many rows. */
void dequantize(const Matrix *w, void *out, int to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < w->n; i += LANES) {
        char *rows = (char *)out + i * w->k * (to == F32 ? 4 : 2);
        if (w->kind == INT8 && to == F32) expand(INT8, F32, w, i, rows);
        if (w->kind == INT8 && to == BF16) expand(INT8, BF16, w, i, rows);
        if (w->kind == INT4 && to == F32) expand(INT4, F32, w, i, rows);
        if (w->kind == INT4 && to == BF16) expand(INT4, BF16, w, i, rows);
    }
}

/* Many positions at once, in bfloat16 -------------------------------------------------------------- */

/* c [4, ..] += a [4, k] b [k, ..], columns [from, from + vectors * 16), where a and b have pairs: a two neighbours of a
 * row, b two neighbours of a column. */
INLINE void product(const int vectors, const int32_t *a, int64_t a_stride, const int32_t *b, float *c, int64_t stride,
                    int64_t k, int64_t from) {
    floats acc[4][4];
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < vectors; v++) acc[r][v] = load(F32, c, r * stride + from + v * LANES, LANES);
    for (int64_t j = 0; j < k; j++)
        for (int v = 0; v < vectors; v++) {
            const ints pairs = load_ints(b + j * stride + from + v * LANES, 2 * LANES);
            for (int r = 0; r < 4; r++) acc[r][v] = dot(acc[r][v], a[r * a_stride + j] - (ints){0}, pairs);
        }
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < vectors; v++) store_all(F32, c, r * stride + from + v * LANES, acc[r][v]);
}

/* c [rows, columns] += a [rows, k] b [k, columns]: fours of rows, LANES of columns. stride: of both b and c. */
static void products(const int32_t *a, int64_t a_stride, const int32_t *b, float *c, int64_t stride, int64_t rows,
                     int64_t k, int64_t columns) {
    for (int64_t r = 0; r < rows; r += 4) {
        int64_t j = 0;
        for (; j + 4 * LANES <= columns; j += 4 * LANES)
            product(4, a + r * a_stride, a_stride, b, c + r * stride, stride, k, j);
        for (; j < columns; j += LANES) product(1, a + r * a_stride, a_stride, b, c + r * stride, stride, k, j);
    }
}

/* Where the queries and the cache of a layer are. q, out: [bsz, seqlen, heads, head_dim]; keys, values: as in Layer;
 * starts [bsz]: the positions of the first queries. */
typedef struct {
    int64_t bsz, seqlen, heads, kv_heads, head_dim, max_seq_len;
    const uint16_t *q, *keys, *values;
    uint16_t *out;
    const int64_t *starts;
} AttentionArgs;

/* The queries [first, first + count) of the heads of one KV head, over KEY_BLOCK positions at a time: the exponentials
 * are of differences to the highest score so far, and what was summed before is scaled down when a higher one comes
 * (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). */
static void look_back(const AttentionArgs *at, int64_t row, int64_t kv_head, int64_t first, int64_t count) {
    const int64_t head_dim = at->head_dim, group = at->heads / at->kv_heads, start = at->starts[row];
    const int64_t half = head_dim / 2, width = (head_dim + LANES - 1) / LANES * LANES;
    const int64_t used = group * count, rows = (used + 3) / 4 * 4;
    const int64_t offset = (row * at->kv_heads + kv_head) * at->max_seq_len * head_dim;
    const float scale = 1 / sqrtf(head_dim);
    int32_t q[rows * half], keys[half * KEY_BLOCK], values[KEY_BLOCK / 2 * width], shares[rows * KEY_BLOCK / 2];
    float scores[rows * KEY_BLOCK], out[rows * width], highest[rows], total[rows];
    memset(q, 0, sizeof q);
    memset(keys, 0, sizeof keys);
    memset(values, 0, sizeof values);
    memset(shares, 0, sizeof shares);
    memset(out, 0, sizeof out);
    for (int64_t r = 0; r < used; r++) {
        const int64_t place = (row * at->seqlen + first + r / group) * at->heads + kv_head * group + r % group;
        memcpy(q + r * half, at->q + place * head_dim, head_dim * 2);
        highest[r] = -INFINITY;
        total[r] = 0;
    }
    const int64_t end = start + first + count; /* the last query sees the positions before this */
    for (int64_t from = 0; from < end; from += KEY_BLOCK) {
        const int64_t length = end - from < KEY_BLOCK ? end - from : KEY_BLOCK;
        const int64_t columns = (length + 4 * LANES - 1) / (4 * LANES) * 4 * LANES;
        const uint16_t *key = at->keys + offset + from * head_dim;
        for (int64_t j = 0; j < half; j++)
            for (int64_t t = 0; t < length; t++) memcpy(keys + j * KEY_BLOCK + t, key + t * head_dim + 2 * j, 4);
        for (int64_t t = 0; t < length; t += 2) {
            const uint16_t *even = at->values + offset + (from + t) * head_dim, *odd = even + head_dim;
            if (t + 1 == length) odd = even; /* beyond the last one, with no share */
            for (int64_t j = 0; j < head_dim; j++) values[t / 2 * width + j] = even[j] | (uint32_t)odd[j] << 16;
        }
        memset(scores, 0, sizeof scores);
        products(q, half, keys, scores, KEY_BLOCK, rows, half, columns);
        for (int64_t r = 0; r < used; r++) {
            const int64_t own = start + first + r / group + 1 - from, seen = own < length ? own : length;
            float *score = scores + r * KEY_BLOCK;
            floats most = {0}, sums = {0};
            most -= INFINITY;
            for (int64_t t = 0; t < seen; t += LANES)
                for (int j = 0; t + LANES > seen && j < LANES; j++)
                    if (t + j >= seen) score[t + j] = -INFINITY;
            for (int64_t t = 0; t < seen; t += LANES) most = larger(load(F32, score, t, LANES) * scale, most);
            const float before = highest[r];
            for (int j = 0; j < LANES; j++) highest[r] = most[j] > highest[r] ? most[j] : highest[r];
            for (int64_t t = 0; t < columns; t += LANES) {
                floats share = {0};
                if (t < seen) share = exponential(load(F32, score, t, LANES) * scale - highest[r]);
                store_all(BF16, shares + r * KEY_BLOCK / 2, t, share);
                sums += share;
            }
            const float shrink = before == highest[r] ? 1 : expf(before - highest[r]);
            total[r] = total[r] * shrink + sum(sums);
            for (int64_t j = 0; j < width; j++) out[r * width + j] *= shrink;
        }
        products(shares, KEY_BLOCK / 2, values, out, width, rows, (length + 1) / 2, width);
    }
    for (int64_t r = 0; r < used; r++) {
        const int64_t place = (row * at->seqlen + first + r / group) * at->heads + kv_head * group + r % group;
        for (int64_t j = 0; j < head_dim; j++)
            store(BF16, at->out, place * head_dim + j, out[r * width + j] / total[r]);
    }
}

/* Attention of all queries, each to its own position and those before it. */
void attend_all(const AttentionArgs *at, int threads) {
    const int64_t group = at->heads / at->kv_heads, size = group < QUERIES ? QUERIES / group : 1;
    const int64_t blocks = (at->seqlen + size - 1) / size;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < at->bsz * at->kv_heads * blocks; i++) {
        /* The longest first: the last ones then keep no thread waiting. */
        const int64_t first = (blocks - 1 - i / (at->bsz * at->kv_heads)) * size;
        const int64_t count = at->seqlen - first < size ? at->seqlen - first : size;
        look_back(at, i / at->kv_heads % at->bsz, i % at->kv_heads, first, count);
    }
}
