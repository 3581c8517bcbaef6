//! Products of the rows of a mixture with the weights of the experts that they chose, where the host does not know which.
//!
//! Rows stand in the order of their experts, in tiles of one height; the last tile of an expert is filled up. How many tiles
//! there are at most follows from the numbers of rows and experts alone, so all of them are multiplied by one call whose
//! shape is known, each by the weight of its expert, and the host waits for nobody to say who chose what.

use std::fmt;

use std::sync::Mutex;

use candle_core::{Result as CandleResult, Tensor, bail};

use super::fault::Fault;
use crate::lock::lock;

/// Rows of the smallest tiles, which is what matrix units multiply at a time, and of the largest, which keep them busy.
const HEIGHTS: [usize; 2] = [16, 128];
/// Tiles are so small that at most one place in so many is nobody's, but for the smallest.
const SPARE: usize = 8;

/// Experts whose tiles one block of a card's threads can count.
pub const MOST_EXPERTS: usize = 8192;

/// How many tiles there are, and of how many rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    pub tiles: usize,
    pub height: usize,
    /// Tiles of one call.
    pub at_once: usize,
}

impl Tiling {
    /// For so many `pairs` of a row and an expert. With `fixed_rows` all calls are of one shape, of so many rows.
    pub fn of(pairs: usize, experts: usize, fixed_rows: Option<usize>) -> Self {
        let [least, most] = HEIGHTS;
        match fixed_rows {
            Some(rows) => Self::with(pairs, experts, most.min(rows), Some(rows / most.min(rows))),
            None => Self::with(pairs, experts, (1 << (pairs / (SPARE * experts.max(1))).max(1).ilog2()).clamp(least, most), None),
        }
    }

    /// Tiles of this height: as many as can be needed, whoever chose what.
    pub fn with(pairs: usize, experts: usize, height: usize, at_once: Option<usize>) -> Self {
        let tiles = (pairs / height + experts.min(pairs)).next_multiple_of(at_once.unwrap_or(1));
        Self { tiles, height, at_once: at_once.unwrap_or(tiles) }
    }

    pub fn places(self) -> usize {
        self.tiles * self.height
    }

    /// At least the places of [`Tiling::of`], and never fewer for more pairs.
    pub fn most_places(pairs: u64, experts: u64, fixed_rows: Option<u64>) -> u64 {
        let [least, most] = HEIGHTS.map(|height| height as u64);
        pairs
            + match fixed_rows {
                Some(rows) => experts * most + rows,
                None => (pairs / SPARE as u64).max(experts * least),
            }
    }
}

/// What was found when something was checked; it stays like that for as long as the program runs.
#[derive(Default)]
pub struct Verdicts(Mutex<Vec<(String, Result<(), String>)>>);

impl Verdicts {
    pub const fn none() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// What `check` finds of this, or has found before. What had no memory has found nothing.
    pub fn of(&self, what: String, check: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        if let Some((_, verdict)) = lock(&self.0).iter().find(|(known, _)| *known == what) {
            return verdict.clone();
        }
        let verdict = check();
        if !verdict.as_ref().is_err_and(|problem| Fault::of(problem) == Fault::OutOfMemory) {
            lock(&self.0).push((what, verdict.clone()));
        }
        verdict
    }
}

/// Rows in their tiles.
#[derive(Debug)]
pub struct Tiles {
    /// The row in every place, `[places]`; any row where the place is nobody's.
    pub rows: Tensor,
    /// Where a row stands for each of its experts, `[rows, chosen]`.
    pub places: Tensor,
    /// The expert of every tile, `[tiles]`.
    pub owners: Tensor,
    pub tiling: Tiling,
}

/// What groups rows on their device, and multiplies them there.
pub trait Grouped: fmt::Debug + Sync {
    /// Puts rows into tiles by the experts that each of them chose, `[rows, chosen]`, all below `experts`.
    fn group(&self, chosen: &Tensor, experts: usize, tiling: Tiling) -> CandleResult<Tiles>;

    /// What [`Grouped::product`] needs to know of matrices, one number each.
    fn addresses(&self, matrices: &[Tensor]) -> CandleResult<Tensor>;

    /// `[places, inputs]` to `[places, outputs]`, every tile by the matrix of its expert, of matrices that are alike and stand at
    /// these addresses.
    fn product(&self, x: &Tensor, matrices: &[Tensor], addresses: &Tensor, tiles: &Tiles) -> CandleResult<Tensor>;
}

/// The weights of all experts for one product.
#[derive(Debug)]
pub struct Stack {
    /// `[inputs, outputs]` each, as views of the stored `[outputs, inputs]`, on one device.
    pub matrices: Vec<Tensor>,
    addresses: Tensor,
    grouped: &'static dyn Grouped,
}

impl Stack {
    pub fn new(matrices: Vec<Tensor>, grouped: &'static dyn Grouped) -> CandleResult<Self> {
        let Some(first) = matrices.first() else { bail!("expected an expert, found none") };
        for matrix in &matrices {
            let alike =
                (matrix.dims(), matrix.dtype(), matrix.device().location()) == (first.dims(), first.dtype(), first.device().location());
            if !alike || !matrix.t()?.is_contiguous() {
                bail!("expected experts like {first:?}, found {matrix:?}");
            }
        }
        let addresses = grouped.addresses(&matrices)?;
        Ok(Self { matrices, addresses, grouped })
    }

    /// `[places, inputs]` to `[places, outputs]`, in the type of the weights.
    pub fn multiply(&self, x: &Tensor, tiles: &Tiles) -> CandleResult<Tensor> {
        let x = x.to_dtype(self.matrices[0].dtype())?.contiguous()?;
        let (places, count) = (tiles.tiling.places(), tiles.tiling.tiles);
        if x.dims() != [places, self.matrices[0].dim(0)?] || tiles.owners.dims() != [count] {
            bail!("expected rows in {places} places of {count} tiles, found {x:?} and owners of {:?}", tiles.owners.dims());
        }
        self.grouped.product(&x, &self.matrices, &self.addresses, tiles)
    }
}

/// The same on the host, tile by tile, in place of what a card does.
#[cfg(test)]
pub mod on_host {
    use super::*;

    #[derive(Debug)]
    pub struct OnHost;

    impl Grouped for OnHost {
        fn group(&self, chosen: &Tensor, experts: usize, tiling: Tiling) -> CandleResult<Tiles> {
            let (rows, each) = chosen.dims2()?;
            let chosen = chosen.flatten_all()?.to_vec1::<u32>()?;
            let (mut places, mut taken, mut owners) = (vec![0u32; chosen.len()], vec![0u32; tiling.places()], Vec::new());
            for expert in 0..experts as u32 {
                // From the last row on: the order within an expert is nobody's business.
                let own: Vec<usize> = (0..chosen.len()).rev().filter(|pair| chosen[*pair] == expert).collect();
                for tile in own.chunks(tiling.height) {
                    for (pair, place) in tile.iter().zip(owners.len() * tiling.height..) {
                        (places[*pair], taken[place]) = (place as u32, (*pair / each) as u32);
                    }
                    owners.push(expert);
                }
            }
            assert!(owners.len() <= tiling.tiles, "{} of {tiling:?}", owners.len());
            owners.resize(tiling.tiles, 0);
            let device = &candle_core::Device::Cpu;
            let places = Tensor::from_vec(places, (rows, each), device)?;
            Ok(Tiles { rows: Tensor::new(taken, device)?, places, owners: Tensor::new(owners, device)?, tiling })
        }

        fn addresses(&self, matrices: &[Tensor]) -> CandleResult<Tensor> {
            Tensor::arange(0u32, matrices.len() as u32, &candle_core::Device::Cpu)
        }

        fn product(&self, x: &Tensor, matrices: &[Tensor], _: &Tensor, tiles: &Tiles) -> CandleResult<Tensor> {
            let (owners, height) = (tiles.owners.to_vec1::<u32>()?, tiles.tiling.height);
            let tile = |(tile, owner): (usize, &u32)| x.narrow(0, tile * height, height)?.matmul(&matrices[*owner as usize]);
            Tensor::cat(&owners.iter().enumerate().map(tile).collect::<CandleResult<Vec<_>>>()?, 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn there_are_tiles_for_whatever_rows_choose_and_few_that_nobody_needs(
            counts in prop::collection::vec(prop_oneof![Just(0usize), 1usize..40, 500usize..3000], 1..70), rows in prop::option::of(prop_oneof![Just(64usize), Just(1024)])
        ) {
            let (pairs, experts) = (counts.iter().sum::<usize>(), counts.len());
            let tiling = Tiling::of(pairs, experts, rows);
            let needed: usize = counts.iter().map(|count| count.div_ceil(tiling.height)).sum();
            prop_assert!(needed <= tiling.tiles, "{needed} of {tiling:?}");
            let most = Tiling::most_places(pairs as u64, experts as u64, rows.map(|rows| rows as u64));
            prop_assert!(tiling.places() as u64 <= most, "{tiling:?} over {most}");
            match rows {
                Some(rows) => {
                    prop_assert_eq!(tiling.height * tiling.at_once, rows);
                    prop_assert_eq!(tiling.tiles % tiling.at_once, 0);
                }
                None => prop_assert!(tiling.tiles == tiling.at_once && (tiling.height == 16 || tiling.places() * 8 <= pairs * 9)),
            }
        }

        #[test]
        fn more_pairs_never_need_fewer_places(pairs in 0u64..1 << 30, more in 0u64..1 << 20, experts in 1u64..1000, fixed in any::<bool>()) {
            let places = |pairs| Tiling::most_places(pairs, experts, fixed.then_some(1024));
            prop_assert!(places(pairs) <= places(pairs + more));
        }
    }

    #[test]
    fn a_verdict_is_found_once_but_by_whoever_has_no_memory() {
        let (verdicts, checks) = (Verdicts::default(), std::cell::Cell::new(0));
        let ask = |what: &str, found: &str| {
            let check = || {
                checks.set(checks.get() + 1);
                if found.is_empty() { Ok(()) } else { Err(found.to_owned()) }
            };
            (verdicts.of(what.to_owned(), check).err().unwrap_or_default(), checks.get())
        };
        assert_eq!(
            [ask("a", ""), ask("a", "wrong"), ask("b", "wrong"), ask("b", "")].map(|(found, checks)| (found == "wrong", checks)),
            [(false, 1), (false, 1), (true, 2), (true, 2)]
        );
        let full = "CUDA_ERROR_OUT_OF_MEMORY";
        assert_eq!([ask("c", full), ask("c", ""), ask("c", full)], [(full.to_owned(), 3), (String::new(), 4), (String::new(), 4)]);
    }

    #[test]
    fn experts_that_are_not_alike_do_not_stand_in_one_stack() {
        let matrix =
            |shape: (usize, usize)| Tensor::zeros(shape, candle_core::DType::F32, &candle_core::Device::Cpu).and_then(|stored| stored.t());
        let stack = |shapes: &[(usize, usize)]| {
            Stack::new(shapes.iter().map(|shape| matrix(*shape)).collect::<CandleResult<_>>()?, &on_host::OnHost)
        };
        assert!(stack(&[(3, 4), (3, 4)]).is_ok_and(|stack| stack.matrices[1].dims() == [4, 3]));
        assert!(stack(&[(3, 4), (4, 3)]).is_err() && stack(&[]).is_err());
    }
}
