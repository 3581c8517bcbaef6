//! What the driver says of cards, one card at a time: a card that does not answer says so, and is in nobody's way.

use serde::Serialize;

use super::{DeviceError, Place, cuda, flash, guarded};

/// What this build can compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Support {
    pub cuda: bool,
    pub flash_attention: bool,
    pub metal: bool,
}

/// A card as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Card {
    pub device: String,
    pub name: String,
    /// Such as `9.0`.
    pub compute_capability: String,
    pub free_bytes: u64,
    pub total_bytes: u64,
}

/// The devices of this machine that this build can use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inventory {
    pub support: Support,
    pub cards: Vec<Card>,
    /// Cards that are there and do not answer.
    pub silent: Vec<DeviceError>,
    /// Why there are no cards.
    pub problem: Option<String>,
}

impl Support {
    pub fn of_this_build() -> Self {
        Self {
            cuda: candle_core::utils::cuda_is_available(),
            flash_attention: flash::BUILT,
            metal: candle_core::utils::metal_is_available(),
        }
    }
}

/// What `warm devices` tells. Touches every card.
pub fn inventory() -> Inventory {
    listed(Support::of_this_build(), guarded(cuda::count), |ordinal| guarded(|| cuda::card(ordinal)))
}

fn listed(support: Support, count: Result<usize, String>, card: impl Fn(usize) -> Result<Card, String>) -> Inventory {
    let mut inventory = Inventory { support, cards: Vec::new(), silent: Vec::new(), problem: count.as_ref().err().cloned() };
    for ordinal in 0..count.unwrap_or(0) {
        match card(ordinal) {
            Ok(card) => inventory.cards.push(card),
            Err(problem) => inventory.silent.push(Place::Cuda(ordinal).error(problem)),
        }
    }
    inventory
}

/// What the driver says of one device; `None` of one that is no card, or that does not answer. Touches that card alone.
pub fn card(place: Place) -> Option<Card> {
    match place {
        Place::Cuda(ordinal) => guarded(|| cuda::card(ordinal)).ok(),
        Place::Cpu | Place::Metal(_) => None,
    }
}

/// Waits until all is done that any thread of this process has asked of these devices, and gives what nobody holds of their
/// memory back to their drivers: freed blocks are kept for later ones otherwise, and count as taken.
pub fn settle(places: &[Place]) -> Result<(), DeviceError> {
    places.iter().try_for_each(|place| match place {
        Place::Cuda(ordinal) => guarded(|| cuda::settle(*ordinal)).map_err(|problem| place.error(problem)),
        // Metal orders by itself what is in one queue.
        Place::Cpu | Place::Metal(_) => Ok(()),
    })
}

/// Whether each of these devices has room for so many bytes, as far as its driver tells; asked before anything is loaded.
/// Of the CPU nothing is asked: its system gives memory as it is used, and how much that may be is the operator's business.
pub fn has_room(places: &[Place], needed: u64) -> Result<(), DeviceError> {
    settle(places)?;
    has_room_among(card, places, needed)
}

fn has_room_among(card: impl Fn(Place) -> Option<Card>, places: &[Place], needed: u64) -> Result<(), DeviceError> {
    let full = |place: &Place| card(*place).filter(|card| card.free_bytes < needed);
    match places.iter().find_map(|place| Some((place, full(place)?))) {
        None => Ok(()),
        Some((place, card)) => {
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            let (needed, free, total) = (gib(needed), gib(card.free_bytes), gib(card.total_bytes));
            Err(place.error(format!(
                "{needed:.1} GiB are needed, and {free:.1} of its {total:.1} GiB are free; a device holds the whole model, because tensor \
                 parallelism is not done: `warm plan --device {place}` says what takes how much"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn with(ordinal: usize, free: u64) -> Card {
        Card {
            device: Place::Cuda(ordinal).to_string(),
            name: String::new(),
            compute_capability: String::new(),
            free_bytes: free << 30,
            total_bytes: 80 << 30,
        }
    }

    #[test]
    fn a_card_without_room_is_named_before_anything_is_loaded_and_no_other_card_is_asked() {
        let asked = RefCell::new(Vec::new());
        let card = |place: Place| {
            asked.borrow_mut().push(place);
            match place {
                Place::Cuda(0) => Some(with(0, 70)),
                Place::Cuda(1) => Some(with(1, 10)),
                _ => None,
            }
        };
        let room = |places: &[Place], gib: u64| has_room_among(card, places, gib << 30).map_err(|error| error.to_string());
        assert_eq!(room(&[Place::Cuda(0)], 60), Ok(()));
        assert_eq!(asked.take(), [Place::Cuda(0)]);
        assert_eq!(room(&[Place::Cuda(0), Place::Cuda(1)], 10), Ok(()));
        let full = room(&[Place::Cuda(0), Place::Cuda(1)], 60).expect_err("no room");
        assert!(full.starts_with("device cuda:1: 60.0 GiB are needed, and 10.0 of its 80.0 GiB are free"), "{full}");
        assert!(full.contains("tensor parallelism is not done"), "{full}");
        // The CPU, and a card that says nothing, are not refused.
        assert_eq!((has_room(&[Place::Cpu], u64::MAX), room(&[Place::Cuda(7)], 60)), (Ok(()), Ok(())));
    }

    #[test]
    fn a_card_that_does_not_answer_hides_no_other() {
        let support = Support::of_this_build();
        let card = |ordinal| if ordinal == 1 { Err("CUDA_ERROR_ECC_UNCORRECTABLE".to_owned()) } else { Ok(with(ordinal, 1)) };
        let found = listed(support, Ok(3), card);
        assert_eq!(found.cards, [with(0, 1), with(2, 1)]);
        assert_eq!(found.silent, [Place::Cuda(1).error("CUDA_ERROR_ECC_UNCORRECTABLE")]);
        assert_eq!(found.problem, None);
        let none = listed(support, Err("no driver".to_owned()), card);
        assert_eq!((none.cards.len(), none.silent.len(), none.problem.as_deref()), (0, 0, Some("no driver")));
    }
}
