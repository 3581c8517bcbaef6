//! Small additions around the matrix products, and the head's own product.

use super::math::dot;
use super::{RowKernel, Vectorised, for_rows, vectorised};

/// `x += y`, rows of `x` contiguous and `width` wide, rows of `y` `stride` apart.
pub fn add_rows(x: &mut [f32], width: usize, y: &[f32], stride: usize) {
    for_rows(x, width, &AddRows { width, y, stride });
}

/// `x += bias` on every row; rows of `x` are `stride` apart and may be wider than the bias.
pub fn add_bias(x: &mut [f32], stride: usize, bias: &[f32]) {
    for_rows(x, stride, &AddBias { stride, bias });
}

/// `x[rows[i]] += weights[i] * y[i]`, rows of `x` contiguous and `width` wide, rows of `y` `stride` apart.
pub fn scatter_add(x: &mut [f32], width: usize, y: &[f32], stride: usize, rows: &[u32], weights: &[f32]) {
    vectorised(ScatterAdd { x, width, y, stride, rows, weights });
}

/// `y = x W^T + b` for one row, each output by one dot product in a fixed order: the head's product, whose single column
/// would take another path through a matrix product at every batch size. `weight` is `[outputs, x.len()]`.
pub fn project(x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    vectorised(Project { x, weight, bias })
}

struct AddRows<'a> {
    width: usize,
    y: &'a [f32],
    stride: usize,
}

impl RowKernel for AddRows<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, rows: &mut [f32]) {
        for (row, x) in rows.chunks_exact_mut(self.width).enumerate() {
            let start = (first + row) * self.stride;
            for (x, y) in x.iter_mut().zip(&self.y[start..start + self.width]) {
                *x += y;
            }
        }
    }
}

struct ScatterAdd<'a> {
    x: &'a mut [f32],
    width: usize,
    y: &'a [f32],
    stride: usize,
    rows: &'a [u32],
    weights: &'a [f32],
}

impl Vectorised for ScatterAdd<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for ((row, weight), y) in self.rows.iter().zip(self.weights).zip(self.y.chunks(self.stride)) {
            let x = &mut self.x[*row as usize * self.width..][..self.width];
            for (x, y) in x.iter_mut().zip(y) {
                *x = weight.mul_add(*y, *x);
            }
        }
    }
}

struct AddBias<'a> {
    stride: usize,
    bias: &'a [f32],
}

impl RowKernel for AddBias<'_> {
    #[inline(always)]
    fn rows(&self, _: usize, rows: &mut [f32]) {
        for x in rows.chunks_exact_mut(self.stride) {
            for (x, bias) in x.iter_mut().zip(self.bias) {
                *x += bias;
            }
        }
    }
}

struct Project<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
}

impl Vectorised for Project<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn call(self) -> Vec<f32> {
        let mut outputs = Vec::with_capacity(self.weight.len() / self.x.len());
        for (output, row) in self.weight.chunks_exact(self.x.len()).enumerate() {
            outputs.push(dot(self.x, row) + self.bias.map_or(0.0, |bias| bias[output]));
        }
        outputs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_projection_of_a_worked_example() {
        assert_eq!(project(&[1.0, 2.0, 3.0], &[1.0, 0.0, -1.0, 0.5, 0.5, 0.5], Some(&[10.0, -1.0])), [8.0, 2.0]);
    }

    #[test]
    fn additions_read_strided_rows() {
        let mut x = vec![1.0; 4];
        add_rows(&mut x, 2, &[1.0, 2.0, 99.0, 3.0, 4.0, 99.0], 3);
        assert_eq!(x, [2.0, 3.0, 4.0, 5.0]);
        add_bias(&mut x, 2, &[10.0]);
        assert_eq!(x, [12.0, 3.0, 14.0, 5.0]);
        scatter_add(&mut x, 2, &[1.0, 2.0, 99.0, 3.0, 4.0, 99.0], 3, &[1, 1], &[1.0, 0.5]);
        assert_eq!(x, [12.0, 3.0, 16.5, 9.0]);
    }
}
