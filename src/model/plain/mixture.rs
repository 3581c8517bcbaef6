//! A mixture of experts: rows are gathered once, and brought back into their own order once. In between every expert has its
//! product, whose rows the host has to count; or all have one, where the device groups rows by itself.

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::ops::softmax_last_dim;

use crate::checkpoint::{Architecture, Experts};
use crate::model::device::{Grouped, Stack, Tiles, Tiling};
use crate::model::kernels::route::Choice;
use crate::model::ops::Expert;
use crate::model::weights::narrowed;

/// See [`crate::model::ops::Ops::mix`].
pub fn mix(x: &Tensor, logits: &Tensor, choice: Choice, run: Expert) -> Result<Tensor> {
    let (width, device) = (x.dim(1)?, x.device());
    let Chosen { experts, weights } = choose(logits, choice)?;
    // The one place in a forward where the host waits for the device: an expert's product needs to know how many rows it has.
    let InOrder { gathered, counts, places } = group(&experts.flatten_all()?.to_vec1()?, choice)?;
    let outputs = {
        let own = x.index_select(&Tensor::new(gathered, device)?, 0)?;
        let (mut outputs, mut first) = (Vec::with_capacity(counts.len()), 0);
        for (expert, count) in counts.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            outputs.push(narrowed(&run(expert, &own.narrow(0, first, count)?)?, width)?);
            first += count;
        }
        Tensor::cat(&outputs, 0)?
    };
    sums(&outputs, &Tensor::new(places, device)?, &weights, x.dtype())
}

/// The same with rows grouped on their device, for which nobody waits. `run` gives what every expert makes of the rows in its
/// tiles, `[places, width]`; its columns may be more.
pub fn mix_in_tiles(
    x: &Tensor,
    logits: &Tensor,
    choice: Choice,
    (grouped, tiling): (&dyn Grouped, Tiling),
    run: impl FnOnce(&Tensor, &Tiles) -> Result<Tensor>,
) -> Result<Tensor> {
    let Chosen { experts, weights } = choose(logits, choice)?;
    // Indices on a card are of 32 bits.
    if tiling.places() * x.dim(1)? > u32::MAX as usize {
        bail!("a mixture of {} rows in {tiling:?} is too large", x.dim(0)?);
    }
    let tiles = grouped.group(&experts, choice.experts, tiling)?;
    let outputs = narrowed(&run(&x.index_select(&tiles.rows, 0)?, &tiles)?, x.dim(1)?)?;
    sums(&outputs, &tiles.places.flatten_all()?, &weights, x.dtype())
}

/// For every row the sum of its outputs, `[all, width]` of which its own stand at `places`, by its `weights`, `[rows, chosen]`.
fn sums(outputs: &Tensor, places: &Tensor, weights: &Tensor, dtype: DType) -> Result<Tensor> {
    let ((rows, chosen), width) = (weights.dims2()?, outputs.dim(1)?);
    let outputs = outputs.index_select(places, 0)?.to_dtype(dtype)?.reshape((rows, chosen, width))?;
    let weighed = outputs.broadcast_mul(&weights.unsqueeze(2)?.to_dtype(dtype)?)?;
    // One after another, and not by a sum, whose order is the library's.
    let mut sum = weighed.narrow(1, 0, 1)?.squeeze(1)?;
    for next in 1..chosen {
        sum = (sum + weighed.narrow(1, next, 1)?.squeeze(1)?)?;
    }
    sum.contiguous()
}

/// Rows and experts of an example: enough that tiles are whole, filled up and nobody's.
const EXAMPLE: (usize, usize) = (300, 5);
/// Different rows of its weights, and rows between the beginnings of two experts.
const SOME: usize = 251;
const APART: usize = 16;

/// The largest difference, relative to numbers above one, between a mixture in tiles and one whose experts have products of
/// their own, over random rows and a few random experts as wide as the model's.
pub fn grouped_difference(
    grouped: &'static dyn Grouped,
    architecture: &Architecture,
    fixed_rows: Option<usize>,
    device: &Device,
    dtype: DType,
) -> Result<f32> {
    let Some(Experts { count, per_token, intermediate_size: inner, normalised }) = architecture.experts.clone() else { return Ok(0.0) };
    let (rows, experts) = (EXAMPLE.0, EXAMPLE.1.min(count));
    let choice = Choice { experts, per_token: per_token.min(experts), normalised };
    // What comes of rows of magnitude one is of that magnitude, too. All experts are views of one matrix, which is a few random
    // rows over and over: so there is little to make, and little room needed.
    let stack = |rows: usize, columns: usize| {
        let bound = (3.0 / columns as f32).sqrt();
        let (some, whole) = (Tensor::rand(-bound, bound, (SOME, columns), device)?.to_dtype(dtype)?, rows + APART * experts);
        let all = Tensor::cat(&vec![some; whole.div_ceil(SOME)], 0)?;
        Stack::new((0..experts).map(|expert| all.narrow(0, APART * expert, rows)?.t()).collect::<Result<_>>()?, grouped)
    };
    let width = architecture.hidden_size;
    let (up, down) = (stack(if architecture.gated { 2 * inner } else { inner }, width)?, stack(width, inner)?);
    let part = |up: Tensor| up.narrow(1, 0, inner)?.contiguous();
    let x = Tensor::rand(-1f32, 1f32, (rows, width), device)?;
    // The second expert has no row, if a row has a choice.
    let favour = Tensor::new((0..experts).map(|expert| if expert == 1 { -9f32 } else { 0.0 }).collect::<Vec<_>>(), device)?;
    let logits = Tensor::rand(-1f32, 1f32, (rows, experts), device)?.broadcast_add(&favour)?;
    let expected = mix(&x, &logits, choice, &mut |expert, own| {
        part(own.to_dtype(dtype)?.matmul(&up.matrices[expert])?)?.matmul(&down.matrices[expert])
    })?;
    let pairs = rows * choice.chosen();
    let own = Tiling::of(pairs, experts, fixed_rows);
    let tilings = [own, Tiling::with(pairs, experts, 16, None), Tiling::with(pairs, experts, 128, None)];
    let mut largest = 0f32;
    for tiling in tilings {
        let found =
            mix_in_tiles(&x, &logits, choice, (grouped, tiling), |own, tiles| down.multiply(&part(up.multiply(own, tiles)?)?, tiles))?;
        let apart = ((&found - &expected)?.abs()? / (expected.abs()? + 1.0)?)?.flatten_all()?;
        // A maximum passes over a NaN, a sum does not.
        if !apart.sum(0)?.to_scalar::<f32>()?.is_finite() {
            return Ok(f32::NAN);
        }
        largest = largest.max(apart.max(0)?.to_scalar::<f32>()?);
    }
    Ok(largest)
}

/// The experts that every row takes, in the order of their numbers, and their weights: `[rows, chosen]`.
struct Chosen {
    experts: Tensor,
    weights: Tensor,
}

/// Chooses on the device: of what the host waits for there is then no more than it needs. Among equals any may be taken, but
/// always the same by the same row.
fn choose(logits: &Tensor, choice: Choice) -> Result<Chosen> {
    let (_, experts) = logits.dims2()?;
    if choice.chosen() == 0 || experts != choice.experts {
        bail!("a row chooses {} of {} experts by {experts} numbers", choice.per_token, choice.experts);
    }
    let logits = logits.contiguous()?;
    let largest = logits.arg_sort_last_dim(false)?.narrow(1, 0, choice.chosen())?.contiguous()?;
    let experts = largest.gather(&largest.arg_sort_last_dim(true)?, 1)?;
    let weights = softmax_last_dim(&logits)?.gather(&experts, 1)?;
    let weights = if choice.normalised { weights.broadcast_div(&weights.sum_keepdim(1)?)? } else { weights };
    Ok(Chosen { experts, weights })
}

/// Rows in the order of their experts.
struct InOrder {
    gathered: Vec<u32>,
    /// How many are there for every expert.
    counts: Vec<usize>,
    /// Where a row stands there for each of its experts: `[rows, chosen]`.
    places: Vec<u32>,
}

/// Groups by the experts that every row takes, `[rows, chosen]`.
fn group(experts: &[u32], choice: Choice) -> Result<InOrder> {
    let mut counts = vec![0usize; choice.experts];
    for &expert in experts {
        match counts.get_mut(expert as usize) {
            Some(count) => *count += 1,
            None => bail!("a row chose expert {expert} of {}", choice.experts),
        }
    }
    let mut next: Vec<usize> = counts.iter().scan(0, |sum, count| Some(std::mem::replace(sum, *sum + count))).collect();
    let (mut gathered, mut places) = (vec![0; experts.len()], Vec::with_capacity(experts.len()));
    for (row, experts) in (0u32..).zip(experts.chunks_exact(choice.chosen())) {
        for &expert in experts {
            let place = &mut next[expert as usize];
            gathered[*place] = row;
            places.push(*place as u32);
            *place += 1;
        }
    }
    Ok(InOrder { gathered, counts, places })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use proptest::prelude::*;

    use super::*;
    use crate::model::kernels::route::route;
    use crate::model::ops::Ops;

    /// `index_add`, expert by expert: each goes over all rows.
    fn one_by_one(x: &Tensor, chosen: &Chosen, run: Expert) -> Result<Tensor> {
        let (experts, weights) = (chosen.experts.to_vec2::<u32>()?, chosen.weights.to_vec2::<f32>()?);
        let mut output = x.zeros_like()?;
        for expert in 0..6u32 {
            let taken = experts.iter().zip(&weights).enumerate().filter_map(|(row, (experts, weights))| {
                experts.iter().position(|other| *other == expert).map(|place| (row as u32, weights[place]))
            });
            let (rows, weights): (Vec<u32>, Vec<f32>) = taken.unzip();
            if rows.is_empty() {
                continue;
            }
            let (rows, weights) = (Tensor::new(rows, x.device())?, Tensor::new(weights, x.device())?.unsqueeze(1)?);
            output = output.index_add(&rows, &run(expert as usize, &x.index_select(&rows, 0)?)?.broadcast_mul(&weights)?, 0)?;
        }
        Ok(output)
    }

    fn bits(x: &Tensor) -> Vec<u32> {
        x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("values").into_iter().map(f32::to_bits).collect()
    }

    proptest! {
        #[test]
        fn a_mixture_has_the_bits_of_its_experts_added_one_by_one(logits in prop::collection::vec(-4f32..4.0, 6..120), per_token in 1usize..8, normalised in any::<bool>()) {
            let choice = Choice { experts: 6, per_token, normalised };
            let (rows, width) = (logits.len() / 6, 5);
            let logits = Tensor::from_slice(&logits[..rows * 6], (rows, 6), &Device::Cpu).expect("logits");
            let chosen = choose(&logits, choice).expect("chosen");
            let x = Tensor::from_vec((0..rows * width).map(|i| (i as f32).sin()).collect(), (rows, width), &Device::Cpu).expect("rows");
            let mut run = |expert: usize, own: &Tensor| own.affine(1.5 - expert as f64, 0.25 * expert as f64);
            let expected = bits(&one_by_one(&x, &chosen, &mut run).expect("a sum"));
            prop_assert_eq!(bits(&mix(&x, &logits, choice, &mut run).expect("a mixture")), expected.clone());
            // The kernels multiply and add in one step.
            let kernels = bits(&Ops::Kernels.mix(&x, &logits, choice, &mut run).expect("a mixture"));
            for (kernels, plain) in kernels.into_iter().zip(expected) {
                let (kernels, plain) = (f32::from_bits(kernels), f32::from_bits(plain));
                prop_assert!((kernels - plain).abs() <= 1e-5 * (1.0 + plain.abs()), "{} and {}", kernels, plain);
            }
        }

        #[test]
        fn the_device_chooses_as_the_host_does(logits in prop::collection::hash_set(-4000i32..4000, 7..200), per_token in 1usize..9, normalised in any::<bool>()) {
            let (choice, logits) = (Choice { experts: 7, per_token, normalised }, Vec::from_iter(logits.iter().map(|x| *x as f32 / 1000.0)));
            let rows = logits.len() / 7;
            let routed = route(&logits[..rows * 7], choice);
            let chosen = choose(&Tensor::from_slice(&logits[..rows * 7], (rows, 7), &Device::Cpu).expect("logits"), choice).expect("chosen");
            let experts: Vec<u32> = chosen.experts.flatten_all().and_then(|all| all.to_vec1()).expect("numbers");
            let weights: Vec<f32> = chosen.weights.flatten_all().and_then(|all| all.to_vec1()).expect("numbers");
            let InOrder { gathered, counts, places } = group(&experts, choice).expect("experts");
            prop_assert_eq!(&gathered, &routed.iter().flat_map(|expert| expert.rows.clone()).collect::<Vec<_>>());
            prop_assert_eq!(counts, routed.iter().map(|expert| expert.rows.len()).collect::<Vec<_>>());
            let by_place: Vec<f32> = routed.iter().flat_map(|expert| expert.weights.clone()).collect();
            for (index, (place, weight)) in places.iter().zip(&weights).enumerate() {
                prop_assert_eq!(gathered[*place as usize] as usize, index / choice.chosen());
                prop_assert!((by_place[*place as usize] - weight).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_row_of_no_numbers_takes_as_many_experts_as_any_other_and_changes_none() {
        let choice = Choice { experts: 6, per_token: 2, normalised: true };
        let logits = |broken: f32| {
            let row = |shift: f32| (0..6).map(move |i| (i as f32 * 1.7 + shift).sin());
            let values = row(0.0).chain((0..6).map(|i| if i == 3 { broken } else { 0.1 * i as f32 })).chain(row(2.0)).collect();
            Tensor::from_vec(values, (3, 6), &Device::Cpu).expect("logits")
        };
        let x = Tensor::from_vec((0..15).map(|i| (i as f32).sin()).collect(), (3, 5), &Device::Cpu).expect("rows");
        let mut run = |expert: usize, own: &Tensor| own.affine(1.5 - expert as f64, 0.25);
        let mut mixed = |broken: f32| bits(&mix(&x, &logits(broken), choice, &mut run).expect("a mixture"));
        let (whole, broken) = (mixed(0.3), mixed(f32::NAN));
        assert_eq!((&whole[..5], &whole[10..]), (&broken[..5], &broken[10..]));
        assert!(broken[5..10].iter().all(|bits| f32::from_bits(*bits).is_nan()));
    }

    #[test]
    fn experts_that_there_are_not_are_refused() {
        let choice = Choice { experts: 3, per_token: 2, normalised: false };
        assert!(group(&[0, 3], choice).is_err());
        let logits = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).expect("logits");
        assert!(choose(&logits, choice).is_ok());
        assert!(choose(&logits, Choice { experts: 4, ..choice }).is_err());
        assert!(choose(&logits, Choice { per_token: 0, ..choice }).is_err());
    }
}
