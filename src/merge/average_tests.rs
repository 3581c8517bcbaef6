use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;

/// The finite values of a 16-bit type from zero upwards, with what lies beyond the largest: rounding treats infinity as
/// the next value of the sequence.
struct Ladder(Vec<f64>);

static BF16: LazyLock<Ladder> = LazyLock::new(Ladder::bf16);
static F16: LazyLock<Ladder> = LazyLock::new(Ladder::f16);

impl Ladder {
    fn bf16() -> Self {
        let finite = (0..0x7f80).map(|bits| f64::from(f32::from_bits(bits << 16)));
        Self(finite.chain([2_f64.powi(128)]).collect())
    }

    /// From the definition of the format: five bits of exponent, ten of mantissa.
    fn f16() -> Self {
        let value = |bits: i32| match (bits >> 10, f64::from(bits & 0x3ff)) {
            (0, mantissa) => mantissa * 2_f64.powi(-24),
            (exponent, mantissa) => (1024.0 + mantissa) * 2_f64.powi(exponent - 25),
        };
        Self((0..0x7c00).map(value).chain([65536.0]).collect())
    }

    /// The bits of the nearest value, ties to the even one: bits that count the steps of the ladder. The middle of two
    /// neighbours is exact in float64.
    fn nearest(&self, x: f64) -> u16 {
        let magnitude = x.abs();
        let above = self.0.partition_point(|&value| value < magnitude).min(self.0.len() - 1);
        let below = above.saturating_sub(1);
        let middle = (self.0[below] + self.0[above]) / 2.0;
        let step = match magnitude.partial_cmp(&middle).unwrap() {
            std::cmp::Ordering::Less => below,
            std::cmp::Ordering::Greater => above,
            std::cmp::Ordering::Equal if below % 2 == 0 => below,
            std::cmp::Ordering::Equal => above,
        };
        step as u16 | if x.is_sign_negative() { 0x8000 } else { 0 }
    }

    fn check(&self, to_bits: impl Fn(f64) -> u16) {
        for pair in self.0.windows(2) {
            let middle = (pair[0] + pair[1]) / 2.0;
            for value in [pair[0], middle] {
                // Also one float64 step aside, where rounding twice goes wrong.
                for x in [value, f64::from_bits(value.to_bits().saturating_sub(1)), f64::from_bits(value.to_bits() + 1)] {
                    for x in [x, -x] {
                        assert_eq!(to_bits(x), self.nearest(x), "{x:e}");
                    }
                }
            }
        }
        for beyond in [self.0[self.0.len() - 1], 1e300, f64::MAX] {
            assert_eq!(to_bits(beyond), self.0.len() as u16 - 1);
        }
    }
}

#[test]
fn rounding_to_bfloat16_is_right_at_every_value_and_every_tie() {
    BF16.check(|x| to_bf16(x).to_bits());
}

#[test]
fn rounding_to_float16_is_right_at_every_value_and_every_tie() {
    F16.check(|x| to_f16(x).to_bits());
}

#[test]
fn sixteen_bits_widen_exactly() {
    for bits in 0..0x7f80_u16 {
        assert_eq!(widen_bf16(bf16::from_bits(bits)), BF16.0[bits as usize]);
        assert_eq!(widen_bf16(bf16::from_bits(bits | 0x8000)), -BF16.0[bits as usize]);
    }
    for bits in 0..0x7c00_u16 {
        assert_eq!(widen_f16(f16::from_bits(bits)), F16.0[bits as usize]);
        assert_eq!(widen_f16(f16::from_bits(bits | 0x8000)), -F16.0[bits as usize]);
    }
}

#[test]
fn a_sum_that_becomes_infinite_is_told_by_its_index() {
    let sum = [1.0, 65519.0, 65520.0, -1e6];
    assert_eq!(round(&sum, Rounded::F16(&mut [f16::ZERO; 4])), Err(2));
    assert_eq!(round(&sum[..2], Rounded::F16(&mut [f16::ZERO; 2])), Ok(()));
    assert_eq!(round(&sum, Rounded::Bf16(&mut [bf16::ZERO; 4])), Ok(()));
    assert_eq!(round(&[0.0, -3.5e38], Rounded::Bf16(&mut [bf16::ZERO; 2])), Err(1));
    assert_eq!(round(&[0.0, 3.5e38], Rounded::F32(&mut [0.0; 2])), Err(1));
    assert_eq!(round(&[f64::NAN], Rounded::Bf16(&mut [bf16::ZERO; 1])), Err(0));
    assert_eq!(round(&[f64::NAN], Rounded::F16(&mut [f16::ZERO; 1])), Err(0));
}

fn sum_of(members: &[(Elements, f64)]) -> Vec<f64> {
    let mut sum = vec![7.0; members[0].0.len()];
    for (place, (elements, coefficient)) in members.iter().enumerate() {
        accumulate(&mut sum, elements, *coefficient, place == 0);
    }
    sum
}

/// Finite numbers of one stored type and of any size.
fn elements(count: usize) -> impl Strategy<Value = Elements> {
    let halves = move || prop::collection::vec(any::<u16>(), count);
    prop_oneof![
        prop::collection::vec(any::<f32>().prop_filter("finite", |x| x.is_finite()), count).prop_map(Elements::F32),
        halves().prop_map(|bits| Elements::F16(
            bits.into_iter().map(|b| f16::from_bits(if b & 0x7c00 == 0x7c00 { b & 0xbfff } else { b })).collect()
        )),
        halves().prop_map(|bits| Elements::Bf16(
            bits.into_iter().map(|b| bf16::from_bits(if b & 0x7f80 == 0x7f80 { b & 0xbfff } else { b })).collect()
        )),
    ]
}

fn wide(elements: &Elements) -> Vec<f64> {
    match elements {
        Elements::F32(values) => values.iter().map(|&x| x.into()).collect(),
        Elements::F16(values) => values.iter().map(|x| F16.0[(x.to_bits() & 0x7fff) as usize].copysign(x.to_f32().into())).collect(),
        Elements::Bf16(values) => values.iter().map(|x| f64::from(f32::from_bits(u32::from(x.to_bits()) << 16))).collect(),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn sums_are_those_of_the_formula_element_by_element(
        members in (1_usize..40).prop_flat_map(|count| prop::collection::vec((elements(count), -2.0..2.0_f64), 1..5)),
    ) {
        let sum = sum_of(&members);
        for (index, found) in sum.iter().enumerate() {
            let terms: Vec<f64> = members.iter().map(|(elements, coefficient)| coefficient * wide(elements)[index]).collect();
            let expected = terms[1..].iter().fold(terms[0], |sum, term| sum + term);
            prop_assert_eq!(found.to_bits(), expected.to_bits());
        }
    }

    #[test]
    fn a_difference_is_that_of_the_wide_numbers(a in elements(40), b in elements(40), begin in 0_usize..40) {
        let count = 40 - begin;
        let (mut base, mut found) = (vec![7.0; count], vec![7.0; count]);
        super::widen(&mut base, &b, begin);
        prop_assert_eq!(&base, &wide(&b)[begin..]);
        subtract(&mut found, &a, begin, &base);
        let expected = wide(&a).iter().zip(wide(&b)).map(|(a, b)| (a - b).to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(found.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), &expected[begin..]);
    }

    #[test]
    fn the_order_of_members_matters_only_by_rounding(a in elements(9), b in elements(9), c in elements(9)) {
        let forward = sum_of(&[(a.clone(), 0.5), (b.clone(), 0.25), (c.clone(), 0.25)]);
        let backward = sum_of(&[(c.clone(), 0.25), (b.clone(), 0.25), (a.clone(), 0.5)]);
        for index in 0..9 {
            let size = [&a, &b, &c].map(|elements| wide(elements)[index].abs()).into_iter().fold(0.0, f64::max);
            prop_assert!((forward[index] - backward[index]).abs() <= 4.0 * f64::EPSILON * size);
        }
    }

    #[test]
    fn a_member_alone_comes_back_bit_for_bit(member in elements(50)) {
        let sum = sum_of(&[(member.clone(), 1.0)]);
        let (mut f32s, mut f16s, mut bf16s) = (vec![0.0; 50], vec![f16::ONE; 50], vec![bf16::ONE; 50]);
        round(&sum, Rounded::F32(&mut f32s)).unwrap();
        for (found, expected) in f32s.iter().zip(wide(&member)) {
            prop_assert_eq!(f64::from(*found).to_bits(), expected.to_bits());
        }
        match &member {
            Elements::F16(values) => {
                round(&sum, Rounded::F16(&mut f16s)).unwrap();
                prop_assert!(f16s.iter().zip(values).all(|(found, expected)| found.to_bits() == expected.to_bits()));
            }
            Elements::Bf16(values) => {
                round(&sum, Rounded::Bf16(&mut bf16s)).unwrap();
                prop_assert!(bf16s.iter().zip(values).all(|(found, expected)| found.to_bits() == expected.to_bits()));
            }
            _ => {}
        }
    }

    #[test]
    fn equal_members_give_that_member(member in elements(20), count in 1_usize..12) {
        let coefficient = 1.0 / count as f64;
        let sum = sum_of(&vec![(member.clone(), coefficient); count]);
        let mut merged = vec![0.0; 20];
        round(&sum, Rounded::F32(&mut merged)).unwrap();
        let expected: Vec<f64> = wide(&member);
        prop_assert_eq!(merged.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn rounding_is_to_the_nearest_for_any_number(bits: u64, exponent in 900_u64..1150) {
        for x in [f64::from_bits(bits), f64::from_bits(bits & !(0x7ff << 52) | exponent << 52)] {
            if x.is_finite() {
                prop_assert_eq!(to_bf16(x).to_bits(), BF16.nearest(x));
                prop_assert_eq!(to_f16(x).to_bits(), F16.nearest(x));
            }
        }
    }
}
