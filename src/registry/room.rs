//! Whether there is room for a candidate, and how it gets in. Pure: decided before anything is loaded, from the plan and
//! the free memory, so that no swap is a matter of luck.

use std::fmt;

/// How the operator wants a new generation to take over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Swap {
    /// Loaded beside the live one, which answers all the while.
    #[default]
    Beside,
    /// The live one is drained and freed first; until the new one is there, the server answers UNAVAILABLE.
    InPlace,
}

/// Bytes that are not weights: buffers of the load, the tokenizer, a forward of the probes.
pub const HEADROOM: u64 = 64 << 20;

/// What there is and what is needed, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The candidate's weights: merged model and resident members.
    pub needed: u64,
    /// Free memory; `None` where the system does not tell, and then nothing is refused.
    pub free: Option<u64>,
    /// Weights of the live generation.
    pub live: u64,
    /// Weights of what is staged or held.
    pub idle: u64,
}

/// The way a candidate gets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Beside,
    /// What is staged or held is freed first.
    BesideAfterRelease,
    InPlace,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Beside => "loaded beside the live generation",
            Self::BesideAfterRelease => "loaded beside the live generation, once what is staged or held is freed",
            Self::InPlace => {
                "loaded in the place of the live generation, which is drained and freed first: UNAVAILABLE meanwhile, and nothing is held"
            }
        })
    }
}

/// There is no room either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no room: {} are needed, {} are free, and freeing {what} gives {} more{hint}",
    Mib(.room.needed.saturating_add(HEADROOM)), Mib(.room.free.unwrap_or(u64::MAX)), Mib(*.freed)
)]
pub struct NoRoom {
    room: Room,
    freed: u64,
    what: &'static str,
    hint: &'static str,
}

/// Decides how a candidate gets in.
pub fn decide(swap: Swap, room: Room) -> Result<Way, NoRoom> {
    let fits = |freed: u64| room.free.is_none_or(|free| free.saturating_add(freed) >= room.needed.saturating_add(HEADROOM));
    match swap {
        Swap::Beside if fits(0) => Ok(Way::Beside),
        Swap::Beside if room.idle > 0 && fits(room.idle) => Ok(Way::BesideAfterRelease),
        Swap::Beside => {
            let in_place = fits(room.idle.saturating_add(room.live));
            let hint = if in_place { "; it would fit with `swap: in_place`" } else { "" };
            Err(NoRoom { room, freed: room.idle, what: "what is staged or held", hint })
        }
        Swap::InPlace if fits(room.idle.saturating_add(room.live)) => Ok(Way::InPlace),
        Swap::InPlace => Err(NoRoom { room, freed: room.idle.saturating_add(room.live), what: "everything that is loaded", hint: "" }),
    }
}

/// Bytes for people.
pub(super) struct Mib(pub u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MiB", self.0 as f64 / f64::from(1 << 20))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn room(needed: u64, free: u64, live: u64, idle: u64) -> Room {
        Room { needed, free: Some(free), live, idle }
    }

    #[test]
    fn beside_where_it_fits_then_after_a_release_then_not_at_all() {
        assert_eq!(decide(Swap::Beside, room(GIB, 2 * GIB, GIB, GIB)), Ok(Way::Beside));
        assert_eq!(decide(Swap::Beside, room(GIB, GIB / 2, GIB, GIB)), Ok(Way::BesideAfterRelease));
        let refused = decide(Swap::Beside, room(GIB, GIB / 2, GIB, 0)).expect_err("no room").to_string();
        assert_eq!(
            refused,
            "no room: 1088.0 MiB are needed, 512.0 MiB are free, and freeing what is staged or held gives 0.0 MiB more; it would fit with `swap: in_place`"
        );
        assert!(!decide(Swap::Beside, room(4 * GIB, 0, GIB, 0)).expect_err("no room").to_string().contains("in_place"));
    }

    #[test]
    fn in_place_counts_what_it_frees_and_is_never_another_way_by_luck() {
        assert_eq!(decide(Swap::InPlace, room(GIB, 100 * GIB, GIB, 0)), Ok(Way::InPlace));
        assert_eq!(decide(Swap::InPlace, room(GIB, GIB / 2, GIB, 0)), Ok(Way::InPlace));
        assert!(decide(Swap::InPlace, room(2 * GIB, GIB / 2, GIB, 0)).is_err());
        assert_eq!(decide(Swap::Beside, Room { free: None, ..room(GIB, 0, 0, 0) }), Ok(Way::Beside));
    }

    proptest! {
        #[test]
        fn what_is_let_in_fits(needed in any::<u64>(), free in any::<u64>(), live in any::<u64>(), idle in any::<u64>(), in_place in any::<bool>()) {
            let wide = |value: u64| u128::from(value);
            let room = room(needed, free, live, idle);
            if let Ok(way) = decide(if in_place { Swap::InPlace } else { Swap::Beside }, room) {
                let freed = match way {
                    Way::Beside => 0,
                    Way::BesideAfterRelease => wide(idle),
                    Way::InPlace => wide(idle) + wide(live),
                };
                // Sums that leave the range of u64 are more memory than there is anywhere.
                prop_assert!(wide(free) + freed >= wide(needed.saturating_add(HEADROOM)));
            }
        }
    }
}
