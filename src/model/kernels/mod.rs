//! The arithmetic of a forward pass on the CPU, row by row, in safe code that the compiler vectorises.
//!
//! Every kernel computes a row by the same operations in the same order wherever the row stands and whatever stands
//! beside it: that is what makes a score independent of its company. Sums run over sixteen lanes in a fixed order; a
//! vector's tail uses the same operations as its body.

pub mod activation;
pub mod attention;
pub mod distances;
pub mod keys;
pub mod linear;
pub mod low_rank;
pub mod math;
pub mod norm;
pub mod rope;
pub mod route;
pub mod tile;
pub mod turn;

use rayon::prelude::*;

/// Elements below which a hand-over to another thread costs more than the work.
const ALONE: usize = 1 << 15;

/// Work on runs of whole rows. Implementations are `#[inline(always)]`, down to the arithmetic: only code that is inlined
/// into [`vectorised`] is compiled for the instructions of this machine. (A closure is not: measured, its fused
/// multiply-adds become calls.)
pub trait RowKernel: Sync {
    /// `first` is the index of the first of these rows.
    fn rows(&self, first: usize, rows: &mut [f32]);
}

/// Code to be compiled once for each set of vector instructions.
pub trait Vectorised {
    type Output;

    fn call(self) -> Self::Output;
}

/// Runs `work` with the best instructions of this machine.
pub fn vectorised<W: Vectorised>(work: W) -> W::Output {
    struct Wrapped<W>(W);
    impl<W: Vectorised> pulp::WithSimd for Wrapped<W> {
        type Output = W::Output;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> W::Output {
            self.0.call()
        }
    }
    pulp::Arch::new().dispatch(Wrapped(work))
}

/// Runs a kernel over all rows of `data`, in parallel inside the current rayon pool.
pub fn for_rows<K: RowKernel>(data: &mut [f32], width: usize, kernel: &K) {
    struct Run<'a, K>(&'a K, usize, &'a mut [f32]);
    impl<K: RowKernel> Vectorised for Run<'_, K> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            self.0.rows(self.1, self.2);
        }
    }
    if width == 0 {
        return;
    }
    if data.len() <= ALONE {
        return vectorised(Run(kernel, 0, data));
    }
    let rows = data.len() / width;
    // Several tasks a thread, so that a thread that was interrupted does not hold up the rest.
    let step = (4096 / width).max(1).max(rows.div_ceil(8 * rayon::current_num_threads().max(1)));
    data.par_chunks_mut(step * width).enumerate().for_each(|(chunk, rows)| vectorised(Run(kernel, chunk * step, rows)));
}
