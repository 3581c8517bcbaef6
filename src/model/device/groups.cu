// Rows of a mixture put in the order of their experts; see `grouped.rs` for what a tile is, and `groups.rs` for who calls.
//
// A row takes `chosen` experts; a pair is a row and one of them, row after row. What is made lies in one buffer of zeros:
// the row of every place, the place of every pair, the expert of every tile, the first tile of every expert, and how many
// rows chose it.

struct Buffer {
    unsigned *rows, *places, *owners, *firsts, *counts;

    __device__ Buffer(unsigned *all, unsigned pairs, unsigned experts, unsigned tiles, unsigned height)
        : rows(all), places(rows + tiles * height), owners(places + pairs), firsts(owners + tiles), counts(firsts + experts) {}
};

// How many rows chose every expert, and for every pair how many others came before it, in whichever order they come: no
// row's result depends on where it stands. One thread a pair.
extern "C" __global__ void rank(const unsigned *chosen_experts, unsigned *all, unsigned pairs, unsigned chosen, unsigned experts,
                                unsigned tiles, unsigned height) {
    Buffer buffer(all, pairs, experts, tiles, height);
    unsigned pair = blockIdx.x * blockDim.x + threadIdx.x;
    if (pair < pairs) {
        buffer.places[pair] = atomicAdd(buffer.counts + min(chosen_experts[pair], experts - 1), 1u);
    }
}

// The tiles of every expert. One block, with room for a number of every expert.
extern "C" __global__ void deal(const unsigned *chosen_experts, unsigned *all, unsigned pairs, unsigned chosen, unsigned experts,
                                unsigned tiles, unsigned height) {
    extern __shared__ unsigned firsts[];
    Buffer buffer(all, pairs, experts, tiles, height);
    for (unsigned expert = threadIdx.x; expert < experts; expert += blockDim.x) {
        firsts[expert] = (buffer.counts[expert] + height - 1) / height;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned next = 0;
        for (unsigned expert = 0; expert < experts; expert++) {
            unsigned own = firsts[expert];
            firsts[expert] = next;
            next += own;
        }
    }
    __syncthreads();
    for (unsigned expert = threadIdx.x; expert < experts; expert += blockDim.x) {
        buffer.firsts[expert] = firsts[expert];
    }
    for (unsigned tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
        // The last expert whose tiles begin here or before; those without a row begin where the next one does. Tiles that
        // nobody needs are the last one's.
        unsigned low = 0, high = experts;
        while (high - low > 1) {
            unsigned middle = (low + high) / 2;
            if (firsts[middle] <= tile) {
                low = middle;
            } else {
                high = middle;
            }
        }
        buffer.owners[tile] = low;
    }
}

// Puts every pair into its place. One thread a pair.
extern "C" __global__ void place(const unsigned *chosen_experts, unsigned *all, unsigned pairs, unsigned chosen, unsigned experts,
                                 unsigned tiles, unsigned height) {
    Buffer buffer(all, pairs, experts, tiles, height);
    unsigned pair = blockIdx.x * blockDim.x + threadIdx.x;
    if (pair < pairs) {
        unsigned own = buffer.firsts[min(chosen_experts[pair], experts - 1)] * height + buffer.places[pair];
        buffer.rows[own] = pair / chosen;
        buffer.places[pair] = own;
    }
}

// Where the weight, the input and the output of every tile begin: three arrays, one behind the other. One thread a tile.
extern "C" __global__ void point(const char *x, char *y, const unsigned long long *weights, const unsigned *owners,
                                 unsigned long long *pointers, unsigned long long x_bytes, unsigned long long y_bytes, unsigned tiles) {
    unsigned tile = blockIdx.x * blockDim.x + threadIdx.x;
    if (tile < tiles) {
        pointers[tile] = weights[owners[tile]];
        pointers[tiles + tile] = (unsigned long long)x + tile * x_bytes;
        pointers[2 * tiles + tile] = (unsigned long long)y + tile * y_bytes;
    }
}
