//! The arithmetic of a forward pass on the CPU, row by row, in safe code that the compiler vectorises.
//!
//! Every kernel computes a row by the same operations in the same order wherever the row stands and whatever stands
//! beside it: that is what makes a score independent of its company. Sums run over sixteen lanes in a fixed order; a
//! vector's tail uses the same operations as its body.

pub mod activation;
pub mod attention;
pub mod linear;
pub mod math;
pub mod norm;
pub mod rope;

use rayon::prelude::*;

/// Elements below which a hand-over to another thread costs more than the work.
const ALONE: usize = 1 << 15;

/// Runs `work` over runs of whole rows of `data`, in parallel inside the current rayon pool, with the best instructions
/// of this machine. `work` gets the index of its first row.
pub fn for_rows(data: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if width == 0 {
        return;
    }
    let arch = pulp::Arch::new();
    if data.len() <= ALONE {
        return arch.dispatch(|| work(0, data));
    }
    let rows = data.len() / width;
    // Several tasks a thread, so that a thread that was interrupted does not hold up the rest.
    let step = (4096 / width).max(1).max(rows.div_ceil(8 * rayon::current_num_threads().max(1)));
    data.par_chunks_mut(step * width).enumerate().for_each(|(chunk, rows)| arch.dispatch(|| work(chunk * step, rows)));
}
