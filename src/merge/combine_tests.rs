use proptest::prelude::*;

use super::*;

/// SLERP of two vectors as the paper writes it (WARP §3.2), on the vectors themselves; `None` near its poles, where every
/// formula loses its digits.
fn by_definition(a: &[f64], b: &[f64], t: f64) -> Option<Vec<f64>> {
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let cosine = a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / (norm(a) * norm(b));
    let angle = cosine.clamp(-1.0, 1.0).acos();
    let (keep, add) = (((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin());
    (angle.sin() > 1e-2).then(|| a.iter().zip(b).map(|(a, b)| keep * a + add * b).collect())
}

fn gram(vectors: &[Vec<f64>]) -> Gram {
    let mut gram = Gram::zero(vectors.len());
    let products: Vec<f64> =
        Gram::pairs(vectors.len()).map(|(i, j)| vectors[i].iter().zip(&vectors[j]).map(|(a, b)| a * b).sum()).collect();
    gram.add(&products);
    gram
}

fn mixed(vectors: &[Vec<f64>], coefficients: &[f64]) -> Vec<f64> {
    (0..vectors[0].len()).map(|i| vectors.iter().zip(coefficients).map(|(vector, c)| c * vector[i]).sum()).collect()
}

fn length(vector: &[f64]) -> f64 {
    vector.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn a_gram_matrix_is_read_the_way_it_is_filled() {
    let mut gram = Gram::zero(3);
    gram.add(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    gram.add(&[10.0; 6]);
    let rows: Vec<Vec<f64>> = (0..3).map(|i| (0..3).map(|j| gram.get(i, j)).collect()).collect();
    assert_eq!(rows, [[11.0, 12.0, 14.0], [12.0, 13.0, 15.0], [14.0, 15.0, 16.0]]);
    assert_eq!(gram.norm(2), 4.0);
    assert_eq!(gram.cosine(0, 0), Some(1.0));
    assert_eq!(Gram::zero(2).cosine(0, 1), None);
}

#[test]
fn a_quarter_turn_has_known_coefficients() {
    let right_angle = gram(&[vec![2.0, 0.0], vec![0.0, 2.0]]);
    let (half, steps) = slerp(&right_angle, 0.5);
    // sin(45°)/sin(90°) for both.
    assert!(half.iter().all(|c| (c - 0.5_f64.sqrt()).abs() < 1e-15), "{half:?}");
    assert!(matches!(steps[..], [Step::Arc(angle)] if (angle - std::f64::consts::FRAC_PI_2).abs() < 1e-15));
    assert_eq!(slerp(&right_angle, 0.0).0, [1.0, 0.0]);
    assert_eq!(slerp(&right_angle, 1.0).0[1], 1.0);
    let third = slerp(&right_angle, 1.0 / 3.0).0;
    assert!((third[0] - 3_f64.sqrt() / 2.0).abs() < 1e-15 && (third[1] - 0.5).abs() < 1e-15, "{third:?}");
}

#[test]
fn where_there_is_no_arc_the_way_is_straight() {
    let no_direction = gram(&[vec![1.0, 0.0], vec![0.0, 9e-13]]);
    assert_eq!(slerp(&no_direction, 0.25), (vec![0.75, 0.25], vec![Step::NoDirection]));
    let just_long_enough = gram(&[vec![1.0, 0.0], vec![0.0, 1.1e-12]]);
    assert!(matches!(slerp(&just_long_enough, 0.25).1[..], [Step::Arc(_)]));
    for other in [vec![3.0, 0.0], vec![-3.0, 0.0], vec![3.0, 2.9e-6]] {
        assert_eq!(slerp(&gram(&[vec![1.0, 0.0], other]), 0.25), (vec![0.75, 0.25], vec![Step::OneLine]));
    }
    assert!(matches!(slerp(&gram(&[vec![1.0, 0.0], vec![3.0, 3.1e-6]]), 0.25).1[..], [Step::Arc(_)]));
    // Two that cancel leave nothing to turn the third from.
    let cancelled = gram(&[vec![1.0, 0.0], vec![-1.0, 0.0], vec![0.0, 1.0]]);
    let (coefficients, steps) = slerp(&cancelled, 0.5);
    assert_eq!(steps, [Step::OneLine, Step::NoDirection]);
    assert_eq!(coefficients[2], 1.0 / 3.0);
}

#[test]
fn one_member_is_itself_and_init_falls_out() {
    assert_eq!(slerp(&gram(&[vec![1.0]]), 0.5), (vec![1.0], Vec::new()));
    assert_eq!(Combination::of_task_vectors(&[1.0]), Combination { members: vec![1.0], init: 0.0 });
    assert_eq!(Combination::of_task_vectors(&[1.0]).parts(), [(0, 1.0)]);
    assert_eq!(Combination::one(3, 1).parts(), [(1, 1.0)]);
    assert_eq!(Combination::init(3).parts(), [(3, 1.0)]);
}

#[test]
fn liti_goes_from_init_to_the_merge_and_beyond() {
    let merged = Combination::of_members(&[0.75, 0.25]);
    assert_eq!(merged.clone().towards(0.5), Combination { members: vec![0.375, 0.125], init: 0.5 });
    assert_eq!(merged.clone().towards(1.0), merged);
    assert_eq!(merged.clone().towards(0.0).parts(), [(2, 1.0)]);
    assert_eq!(merged.towards(2.0), Combination { members: vec![1.5, 0.5], init: -1.0 });
    let turned = Combination::of_task_vectors(&[0.5, 0.75]);
    assert_eq!(turned.towards(2.0), Combination { members: vec![1.0, 1.5], init: -1.5 });
}

#[test]
fn a_moving_average_forgets_at_the_rate_mu() {
    assert_eq!(ema(1, 0.25), [1.0]);
    assert_eq!(ema(4, 0.25), [0.75 * 0.75 * 0.75, 0.25 * 0.75 * 0.75, 0.25 * 0.75, 0.25]);
    assert_eq!(ema(3, 1.0), [0.0, 0.0, 1.0]);
}

/// What the length of a partial result may lose to large coefficients that cancel: it is a sum over the Gram matrix, whose
/// terms grow with their square.
fn lost(coefficients: &[f64]) -> f64 {
    1e-12 * coefficients.iter().map(|a| a.abs()).sum::<f64>().powi(2)
}

fn vectors() -> impl Strategy<Value = Vec<Vec<f64>>> {
    (2_usize..7, 2_usize..6).prop_flat_map(|(count, size)| prop::collection::vec(prop::collection::vec(-1.0..1.0_f64, size), count))
}

proptest! {
    #[test]
    fn the_gram_matrix_holds_every_angle_of_the_iteration(vectors in vectors(), t in 0.0..1.0_f64) {
        let count = vectors.len();
        let mut expected = Some(vectors[0].clone());
        for (m, next) in vectors.iter().enumerate().skip(1) {
            let t = if count == 2 { t } else { 1.0 / (m + 1) as f64 };
            expected = expected.and_then(|so_far| by_definition(&so_far, next, t));
        }
        prop_assume!(expected.is_some());
        let (coefficients, steps) = slerp(&gram(&vectors), t);
        prop_assert!(steps.iter().all(|step| matches!(step, Step::Arc(_))));
        // Near the line every way of computing an arc loses digits, and the result grows without bound.
        prop_assume!(steps.iter().all(|step| matches!(step, Step::Arc(angle) if angle.sin() > 1e-1)));
        for (found, expected) in mixed(&vectors, &coefficients).iter().zip(expected.unwrap()) {
            prop_assert!((found - expected).abs() < 1e-9 * (1.0 + expected.abs()) + lost(&coefficients), "{} {}", found, expected);
        }
    }

    // WARP, Lemma 1.
    #[test]
    fn turning_keeps_the_length_of_equally_long_task_vectors(vectors in vectors(), scale in 1e-3..1e3_f64, t in 0.0..1.0_f64) {
        prop_assume!(vectors.iter().all(|vector| length(vector) > 1e-2));
        let vectors: Vec<Vec<f64>> =
            vectors.iter().map(|vector| vector.iter().map(|x| x * scale / length(vector)).collect()).collect();
        let (coefficients, steps) = slerp(&gram(&vectors), t);
        prop_assume!(steps.iter().all(|step| matches!(step, Step::Arc(angle) if angle.sin() > 1e-2)));
        let found = length(&mixed(&vectors, &coefficients));
        prop_assert!((found / scale - 1.0).abs() < 1e-9 + lost(&coefficients), "{} {}", found, scale);
    }

    #[test]
    fn a_moving_average_is_that_of_its_recursion_and_can_be_resumed(values in prop::collection::vec(-1.0..1.0_f64, 1..12), mu in 0.001..1.0_f64) {
        let recursion = |start: f64, values: &[f64]| values.iter().fold(start, |average, value| (1.0 - mu) * average + mu * value);
        let mixed = |values: &[f64]| values.iter().zip(ema(values.len(), mu)).map(|(value, c)| value * c).sum::<f64>();
        prop_assert!((mixed(&values) - recursion(values[0], &values[1..])).abs() < 1e-14);
        prop_assert!((ema(values.len(), mu).iter().sum::<f64>() - 1.0).abs() < 1e-14);
        let half = values.len().div_ceil(2);
        let resumed: Vec<f64> = std::iter::once(mixed(&values[..half])).chain(values[half..].iter().copied()).collect();
        prop_assert!((mixed(&resumed) - mixed(&values)).abs() < 1e-14);
    }

    #[test]
    fn any_products_give_an_answer(products in prop::collection::vec(prop_oneof![any::<f64>(), -1.0..1.0_f64], 6)) {
        let mut gram = Gram::zero(3);
        gram.add(&products);
        prop_assert_eq!(slerp(&gram, 0.5).0.len(), 3);
    }
}
