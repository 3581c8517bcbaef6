//! The arithmetic of averaging: pure kernels over blocks of one tensor.
//!
//! A merged element is `round(Σ c_m · x_m)`: products and sums in float64, in member order, each rounded separately (Rust
//! never fuses them), and one rounding to the output dtype. So the bits are the same on every machine, whatever vectors
//! and threads it has. The loops are plain; `pulp` compiles them for the vectors of the machine at hand.

use half::{bf16, f16};

use crate::checkpoint::{Elements, widen_bf16, widen_f16};

/// Adds `coefficient` times `elements` to `sum`, or starts the sum with it. Starting is not adding to zero: `0 + -0` is
/// `+0`, and a merge of one must give back its member bit for bit.
///
/// The elements are finite, as [`crate::checkpoint::TensorSource::read`] gives them, and as many as `sum` has; integers
/// add nothing.
pub fn accumulate(sum: &mut [f64], elements: &Elements, coefficient: f64, start: bool) {
    match elements {
        Elements::F64(values) => mix(sum, values, coefficient, start, |x| x),
        Elements::F32(values) => mix(sum, values, coefficient, start, f64::from),
        Elements::Bf16(values) => mix(sum, values, coefficient, start, widen_bf16),
        Elements::F16(values) => mix(sum, values, coefficient, start, widen_f16),
        Elements::I64(_) | Elements::I32(_) | Elements::I16(_) | Elements::Bytes(_) => {}
    }
}

/// Widens the elements that begin at `begin`, as many as `into` has.
pub fn widen(into: &mut [f64], elements: &Elements, begin: usize) {
    match elements {
        Elements::F64(values) => each(into, from(values, begin), |into, x| *into = x),
        Elements::F32(values) => each(into, from(values, begin), |into, x| *into = f64::from(x)),
        Elements::Bf16(values) => each(into, from(values, begin), |into, x| *into = widen_bf16(x)),
        Elements::F16(values) => each(into, from(values, begin), |into, x| *into = widen_f16(x)),
        Elements::I64(_) | Elements::I32(_) | Elements::I16(_) | Elements::Bytes(_) => {}
    }
}

/// The elements that begin at `begin` minus `base`, as many as `into` has.
pub fn subtract(into: &mut [f64], elements: &Elements, begin: usize, base: &[f64]) {
    widen(into, elements, begin);
    each(into, base, |into, base| *into -= base);
}

#[inline(always)]
fn each<T: Copy>(into: &mut [f64], values: &[T], with: impl Fn(&mut f64, T)) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (into, &value) in into.iter_mut().zip(values) {
                with(into, value);
            }
        },
    );
}

fn from<T>(values: &[T], begin: usize) -> &[T] {
    values.get(begin..).unwrap_or_default()
}

/// Where rounded sums go.
#[derive(Debug)]
pub enum Rounded<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
}

/// Rounds every sum once, to nearest, ties to even. The error is the index of the first that became infinite.
pub fn round(sum: &[f64], into: Rounded<'_>) -> Result<(), usize> {
    match into {
        Rounded::F32(into) => narrow(sum, into, |x| x as f32, |x| !x.is_finite()),
        Rounded::F16(into) => narrow(sum, into, to_f16, |x| x.to_bits() & 0x7c00 == 0x7c00),
        Rounded::Bf16(into) => narrow(sum, into, to_bf16, |x| x.to_bits() & 0x7f80 == 0x7f80),
    }
}

#[inline(always)]
fn mix<T: Copy>(sum: &mut [f64], values: &[T], coefficient: f64, start: bool, widen: impl Fn(T) -> f64) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            if start {
                for (sum, &value) in sum.iter_mut().zip(values) {
                    *sum = coefficient * widen(value);
                }
            } else {
                for (sum, &value) in sum.iter_mut().zip(values) {
                    *sum += coefficient * widen(value);
                }
            }
        },
    );
}

#[inline(always)]
fn narrow<T: Copy>(sum: &[f64], into: &mut [T], to: impl Fn(f64) -> T, infinite: impl Fn(T) -> bool) -> Result<(), usize> {
    let overflow = pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (into, &sum) in into.iter_mut().zip(sum) {
                *into = to(sum);
            }
            into.iter().fold(false, |found, &value| found | infinite(value))
        },
    );
    if !overflow {
        return Ok(());
    }
    Err(into.iter().position(|&value| infinite(value)).unwrap_or_default())
}

/// The bits of `value` as a float32, rounded to odd: cut off, and the last bit set if anything was cut. Rounding that
/// again to a type at least two bits shorter is the same as rounding `value` once; rounding to nearest twice is not, and
/// `bf16::from_f64` of crate `half` 2.7 ignores the low 32 bits of a float64 when it decides a tie.
#[inline(always)]
fn to_odd_f32(value: f64) -> u32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    let cut = nearest.to_bits().wrapping_sub(u32::from(back.abs() > value.abs()));
    cut | u32::from(back != value)
}

#[inline(always)]
fn to_bf16(value: f64) -> bf16 {
    let bits = to_odd_f32(value);
    // A carry out of the mantissa moves into the exponent, which is just what rounding up to a power of two is.
    bf16::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16)
}

#[inline(always)]
fn to_f16(value: f64) -> f16 {
    let bits = to_odd_f32(value);
    let magnitude = bits & 0x7fff_ffff;
    // Normal: change the exponent's bias, then round away the 13 low bits of the mantissa.
    let rebiased = magnitude.wrapping_sub(112 << 23);
    let normal = rebiased.wrapping_add(0xfff + (rebiased >> 13 & 1)) >> 13;
    // Subnormal (below 2^-14): 0.5 has steps of 2^-24, those of a subnormal float16, so adding it rounds to them.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
    let rounded = if magnitude < (127 - 14) << 23 { subnormal } else { normal };
    let bounded = if magnitude >= (127 + 16) << 23 { 0x7c00 } else { rounded };
    f16::from_bits((bits >> 16 & 0x8000 | bounded) as u16)
}

#[cfg(test)]
#[path = "average_tests.rs"]
mod tests;
