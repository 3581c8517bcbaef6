use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::text::Encoding;

/// Textbook attention in float64.
fn reference(shape: &Shape, lengths: &[usize], data: &[f32], stride: usize) -> Vec<Vec<f64>> {
    let group = shape.heads / shape.kv_heads;
    let dim = shape.head_dim;
    let mut output = Vec::new();
    let mut offset = 0;
    for &length in lengths {
        for i in 0..length {
            let mut row = vec![0.0; shape.heads * dim];
            for head in 0..shape.heads {
                let at = |row: usize, column: usize| f64::from(data[(offset + row) * stride + column]);
                let kv = head / group;
                let sees = |j: usize| (!shape.causal || j <= i) && shape.window.is_none_or(|window| i.abs_diff(j) < window);
                let bent = |product: f64| shape.softcap.map_or(product, |cap| f64::from(cap) * (product / f64::from(cap)).tanh());
                let scores: Vec<f64> = (0..length)
                    .map(|j| {
                        let products = (0..dim).map(|d| at(i, head * dim + d) * at(j, (shape.heads + kv) * dim + d));
                        bent(products.sum::<f64>() * f64::from(shape.scale))
                    })
                    .collect();
                let top = (0..length).filter(|&j| sees(j)).map(|j| scores[j]).fold(f64::MIN, f64::max);
                let weights: Vec<f64> = (0..length).map(|j| if sees(j) { (scores[j] - top).exp() } else { 0.0 }).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    row[head * dim + d] =
                        (0..length).map(|j| weights[j] / total * at(j, (shape.heads + shape.kv_heads + kv) * dim + d)).sum();
                }
            }
            output.push(row);
        }
        offset += length;
    }
    output
}

fn pack(lengths: &[usize]) -> Pack {
    let encodings: Vec<_> = lengths.iter().map(|&length| Arc::new(Encoding::for_test(vec![1; length]))).collect();
    Pack::new(&encodings)
}

fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

fn shapes() -> impl Strategy<Value = Shape> {
    (1usize..3, 1usize..3, 1usize..42, any::<bool>(), prop::option::of(1usize..90), prop::option::of(0.5f32..30.0)).prop_map(
        |(kv_heads, group, half, causal, window, softcap)| Shape {
            heads: kv_heads * group,
            kv_heads,
            head_dim: half * 2,
            scale: 1.5,
            softcap,
            causal,
            window,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn attention_agrees_with_its_textbook_form(shape in shapes(), lengths in prop::collection::vec(1usize..150, 1..4), seed in any::<u32>()) {
        let stride = (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 3;
        let pack = pack(&lengths);
        let rows = pack.ids().len();
        let data = noise(rows * stride, seed);
        let width = shape.heads * shape.head_dim;
        let found = attend(&shape, None, &pack, None, &data, stride, rows).0;
        for (row, exact) in reference(&shape, &lengths, &data, stride).iter().enumerate() {
            for (found, exact) in found[row * width..].iter().zip(exact) {
                prop_assert!((f64::from(*found) - exact).abs() < 2e-5, "row {row}: {found} against {exact}");
            }
        }
    }

    #[test]
    fn a_sample_gets_the_same_bits_alone_and_in_company(shape in shapes(), lengths in prop::collection::vec(1usize..150, 2..5), seed in any::<u32>(), threads in 1usize..4) {
        let stride = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let together = pack(&lengths);
        let rows = together.ids().len();
        let data = noise(rows * stride, seed);
        let width = shape.heads * shape.head_dim;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
        let found = pool.install(|| attend(&shape, None, &together, None, &data, stride, rows).0);
        let mut offset = 0;
        for &length in &lengths {
            let alone = pack(&[length]);
            let mut own = data[offset * stride..(offset + length) * stride].to_vec();
            own.resize(alone.ids().len() * stride, 0.0);
            let single = attend(&shape, None, &alone, None, &own, stride, alone.ids().len()).0;
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&single[..length * width]), bits(&found[offset * width..(offset + length) * width]));
            offset += length;
        }
    }
}

#[test]
fn a_nan_of_one_sample_stays_with_it() {
    let shape = Shape { heads: 1, kv_heads: 1, head_dim: 4, scale: 1.0, softcap: None, causal: true, window: None };
    let pack = pack(&[3, 70]);
    let mut data = noise(73 * 12, 5);
    data[..36].fill(f32::NAN);
    let output = attend(&shape, None, &pack, None, &data, 12, 73).0;
    assert!(output[..12].iter().all(|value| value.is_nan()));
    assert!(output[12..].iter().all(|value| value.is_finite()));
}
