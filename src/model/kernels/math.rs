//! Elementary functions without branches, so that they vectorise: every lane does the same operations.

/// Lanes of the fixed-order sums.
pub const LANES: usize = 16;

/// `e^x` in float32, within two units in the last place on [-87, 88]; below, it stays at the smallest normal magnitude,
/// and above at the largest. `exp(0)` is exactly 1.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds a small number to an integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first with few enough bits that its product with n is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    // The Taylor series to the seventh power: |r| <= ln(2)/2, so the next term is below 6e-9.
    let mut p = 1.0 / 5040.0;
    p = r.mul_add(p, 1.0 / 720.0);
    p = r.mul_add(p, 1.0 / 120.0);
    p = r.mul_add(p, 1.0 / 24.0);
    p = r.mul_add(p, 1.0 / 6.0);
    p = r.mul_add(p, 0.5);
    p = r.mul_add(p, 1.0);
    p = r.mul_add(p, 1.0);
    // The low bits of `shifted` are n, so shifting them into the exponent gives 2^n.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    p * scale
}

/// The hyperbolic tangent, within three units in the last place.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Near zero the odd series, whose next term is below 2e-9 of the sum; elsewhere nothing cancels in 1 - 2 / (e^2|x| + 1).
    let square = x * x;
    let mut p = -1382.0 / 155_925.0;
    p = square.mul_add(p, 62.0 / 2835.0);
    p = square.mul_add(p, -17.0 / 315.0);
    p = square.mul_add(p, 2.0 / 15.0);
    p = square.mul_add(p, -1.0 / 3.0);
    let near = (square * p).mul_add(x, x);
    let far = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.3 { near } else { far }
}

/// The error function, within 2e-7.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    // Interpolations at Chebyshev points: below 1 of `erf(x) / x` in x^2, above of `erfc(x) e^(x^2) / t` in `t = 1 / (1 + x/2)`.
    const NEAR: [f32; 7] =
        [std::f32::consts::FRAC_2_SQRT_PI, -0.376_126_26, 0.112_835_94, -0.026_854_21, 0.005_189_087, -0.000_801_686_4, 7.875_875e-5];
    const FAR: [f32; 7] = [0.282_592_03, 0.274_488_18, 0.295_938_9, 0.004_239_372, 0.430_149_14, -0.380_875_6, 0.093_350_74];
    // At 4.2 the function is 1 to the last bit. A NaN stays one.
    let magnitude = x.abs();
    let magnitude = if magnitude > 4.2 { 4.2 } else { magnitude };
    let square = magnitude * magnitude;
    let horner = |coefficients: &[f32; 7], x: f32| coefficients.iter().rev().fold(0.0, |sum: f32, c| sum.mul_add(x, *c));
    let near = magnitude * horner(&NEAR, square);
    let t = 1.0 / magnitude.mul_add(0.5, 1.0);
    let far = 1.0 - exp(-square) * t * horner(&FAR, t);
    (if magnitude < 1.0 { near } else { far }).copysign(x)
}

/// The sum of sixteen lanes, always in the same order.
#[inline(always)]
pub fn fold(lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    let mut lanes = lanes;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `sum f(x_i, y_i)` over two equal slices, in the fixed order of [`fold`].
#[inline(always)]
pub fn sum(x: &[f32], y: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (x_body, x_tail) = x.as_chunks::<LANES>();
    let (y_body, y_tail) = y.as_chunks::<LANES>();
    for (x, y) in x_body.iter().zip(y_body) {
        for i in 0..LANES {
            lanes[i] = f(x[i], y[i], lanes[i]);
        }
    }
    for (i, (x, y)) in x_tail.iter().zip(y_tail).enumerate() {
        lanes[i] = f(*x, *y, lanes[i]);
    }
    fold(lanes)
}

/// The dot product, in the fixed order of [`fold`].
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    sum(x, y, |x, y, sum| x.mul_add(y, sum))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exp_of_zero_is_exactly_one() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
    }

    proptest! {
        #[test]
        fn exp_is_within_two_units_in_the_last_place(x in -87.0f32..88.0) {
            let exact = f64::from(x).exp();
            let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            prop_assert!((f64::from(exp(x)) - exact).abs() <= 2.0 * unit, "{x}: {} against {exact}", exp(x));
        }

        #[test]
        fn tanh_is_within_three_units_in_the_last_place(x in prop_oneof![-0.4f32..0.4, -20.0f32..20.0]) {
            let exact = f64::from(x).tanh();
            let unit = f64::from((exact as f32).abs().next_up()) - f64::from((exact as f32).abs());
            prop_assert!((f64::from(tanh(x)) - exact).abs() <= 3.0 * unit, "{x}: {} against {exact}", tanh(x));
        }

        #[test]
        fn erf_is_within_two_ten_millionths(x in prop_oneof![-1.1f32..1.1, -6.0f32..6.0]) {
            prop_assert!((f64::from(erf(x)) - libm::erf(f64::from(x))).abs() < 2e-7, "{x}: {}", erf(x));
        }

        #[test]
        fn a_dot_product_is_near_its_float64_value(pairs in prop::collection::vec((-2.0f32..2.0, -2.0f32..2.0), 0..200)) {
            let (x, y): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let exact: f64 = x.iter().zip(&y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            prop_assert!((f64::from(dot(&x, &y)) - exact).abs() < 1e-3);
        }
    }
}
