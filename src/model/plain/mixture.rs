//! A mixture of experts in a fixed number of operations, whatever the experts are: rows are gathered once, and brought back
//! into their own order once.

use candle_core::{Result, Tensor, bail};

use crate::model::kernels::route::Routed;
use crate::model::ops::Expert;
use crate::model::weights::narrowed;

/// See [`crate::model::ops::Ops::mix`]. Every row has chosen as many experts as any other.
pub fn mix(x: &Tensor, routed: &[Routed], run: Expert) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let gathered: Vec<u32> = routed.iter().flat_map(|expert| expert.rows.iter().copied()).collect();
    let chosen = gathered.len() / rows.max(1);
    if chosen == 0 || chosen * rows != gathered.len() {
        bail!("{rows} rows have chosen {} experts", gathered.len());
    }
    // For every row: where it stands among those that the experts are given, and by what weight, in the order of the experts.
    let (mut places, mut weights, mut met) = (vec![0u32; gathered.len()], vec![0f32; gathered.len()], vec![0usize; rows]);
    let weighed = routed.iter().flat_map(|expert| expert.rows.iter().zip(&expert.weights));
    for (place, (row, weight)) in weighed.enumerate() {
        let row = *row as usize;
        if met[row] == chosen {
            bail!("row {row} has chosen more than {chosen} experts");
        }
        (places[row * chosen + met[row]], weights[row * chosen + met[row]]) = (place as u32, *weight);
        met[row] += 1;
    }
    let device = x.device();
    let outputs = {
        let own = x.index_select(&Tensor::new(gathered, device)?, 0)?;
        let (mut outputs, mut first) = (Vec::with_capacity(routed.len()), 0);
        for (expert, count) in routed.iter().map(|expert| expert.rows.len()).enumerate().filter(|(_, count)| *count > 0) {
            outputs.push(narrowed(&run(expert, &own.narrow(0, first, count)?)?, width)?);
            first += count;
        }
        Tensor::cat(&outputs, 0)?
    };
    let outputs = outputs.index_select(&Tensor::new(places, device)?, 0)?.to_dtype(x.dtype())?;
    let weights = Tensor::from_vec(weights, (rows, chosen, 1), device)?.to_dtype(x.dtype())?;
    let weighed = outputs.reshape((rows, chosen, width))?.broadcast_mul(&weights)?;
    // One after another, and not by a sum, whose order is the library's.
    let mut sum = weighed.narrow(1, 0, 1)?.squeeze(1)?;
    for next in 1..chosen {
        sum = (sum + weighed.narrow(1, next, 1)?.squeeze(1)?)?;
    }
    sum.contiguous()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use proptest::prelude::*;

    use super::*;
    use crate::model::kernels::route::route;
    use crate::model::ops::Ops;

    /// `index_add`, expert by expert: each goes over all rows.
    fn one_by_one(x: &Tensor, routed: &[Routed], run: Expert) -> Result<Tensor> {
        let mut output = x.zeros_like()?;
        for (expert, Routed { rows, weights }) in routed.iter().enumerate().filter(|(_, routed)| !routed.rows.is_empty()) {
            let rows = Tensor::new(&rows[..], x.device())?;
            let weights = Tensor::new(&weights[..], x.device())?.unsqueeze(1)?;
            output = output.index_add(&rows, &run(expert, &x.index_select(&rows, 0)?)?.broadcast_mul(&weights)?, 0)?;
        }
        Ok(output)
    }

    fn bits(x: &Tensor) -> Vec<u32> {
        x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("values").into_iter().map(f32::to_bits).collect()
    }

    proptest! {
        #[test]
        fn a_mixture_has_the_bits_of_its_experts_added_one_by_one(logits in prop::collection::vec(-4f32..4.0, 6..120), chosen in 1usize..5, normalised in any::<bool>()) {
            let (experts, width) = (6, 5);
            let rows = logits.len() / experts;
            let routed = route(&logits[..rows * experts], experts, chosen, normalised);
            let x = Tensor::from_vec((0..rows * width).map(|i| (i as f32).sin()).collect(), (rows, width), &Device::Cpu).expect("rows");
            let mut run = |expert: usize, own: &Tensor| own.affine(1.5 - expert as f64, 0.25 * expert as f64);
            let expected = bits(&one_by_one(&x, &routed, &mut run).expect("a sum"));
            prop_assert_eq!(bits(&mix(&x, &routed, &mut run).expect("a mixture")), expected.clone());
            // The kernels multiply and add in one step.
            let kernels = bits(&Ops::Kernels.mix(&x, &routed, &mut run).expect("a mixture"));
            for (kernels, plain) in kernels.into_iter().zip(expected) {
                let (kernels, plain) = (f32::from_bits(kernels), f32::from_bits(plain));
                prop_assert!((kernels - plain).abs() <= 1e-5 * (1.0 + plain.abs()), "{} and {}", kernels, plain);
            }
        }
    }

    #[test]
    fn rows_that_chose_unequally_are_refused() {
        let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).expect("rows");
        let routed = |rows: &[u32]| Routed { rows: rows.to_vec(), weights: vec![1.0; rows.len()] };
        let mut run = |_: usize, own: &Tensor| Ok(own.clone());
        assert!(mix(&x, &[routed(&[0, 1]), routed(&[0])], &mut run).is_err());
        assert!(mix(&x, &[routed(&[0]), routed(&[0])], &mut run).is_err());
        assert!(mix(&x, &[], &mut run).is_err());
    }
}
