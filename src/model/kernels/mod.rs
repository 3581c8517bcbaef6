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

/// Runs `work` over runs of whole rows of `data`, in parallel inside the current rayon pool, with the best instructions
/// of this machine. `work` gets the index of its first row.
pub fn for_rows(data: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if width == 0 {
        return;
    }
    let rows = data.len() / width;
    // At least 16 KiB a task, so that scheduling costs nothing beside the work.
    let step = (4096 / width).max(1).max(rows.div_ceil(8 * rayon::current_num_threads().max(1)));
    let arch = pulp::Arch::new();
    data.par_chunks_mut(step * width).enumerate().for_each(|(chunk, rows)| arch.dispatch(|| work(chunk * step, rows)));
}
