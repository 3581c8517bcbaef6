//! Whether there is room for a candidate, and how it gets in. Pure: decided before anything is loaded, from the plan and
//! the free memory, so that no swap is a matter of luck.
//!
//! Only the live generation keeps prefixes. So a candidate that is loaded beside it must leave room for what the live one's
//! caches may still take meanwhile, and for its own caches once it is live, when the other ones are given back; never for
//! both at once. Of free memory, what is held now is gone already.

use std::fmt;

use crate::model::PrefixBytes;

/// How the operator wants a new generation to take over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Swap {
    /// Loaded beside the live one, which answers all the while.
    #[default]
    Beside,
    /// The live one is drained and freed first; until the new one is there, the server answers UNAVAILABLE.
    InPlace,
}

/// Bytes that are neither weights nor kept: buffers of the load, the tokenizer, a forward of the probes.
pub const HEADROOM: u64 = 64 << 20;

/// What there is and what is needed, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The candidate's weights: merged model and resident members.
    pub needed: u64,
    /// The most that its prefix caches hold once it is live.
    pub prefixes: u64,
    /// Free memory; `None` where the system does not tell, and then nothing is refused.
    pub free: Option<u64>,
    /// Weights of the live generation.
    pub live: u64,
    /// Its prefix caches.
    pub live_prefixes: PrefixBytes,
    /// Weights of what is staged or held, which keeps no prefixes.
    pub idle: u64,
}

impl Room {
    /// What prefix caches may take beyond what they hold now, on a way in.
    fn prefixes_on(&self, swap: Swap) -> u64 {
        match swap {
            Swap::Beside => self.prefixes.max(self.live_prefixes.bound).saturating_sub(self.live_prefixes.held),
            Swap::InPlace => self.prefixes,
        }
    }

    /// What must be free.
    fn demand(&self, swap: Swap) -> u64 {
        self.needed.saturating_add(HEADROOM).saturating_add(self.prefixes_on(swap))
    }

    /// What is free once the candidate may be loaded in place.
    fn all(&self) -> u64 {
        self.idle.saturating_add(self.live).saturating_add(self.live_prefixes.held)
    }
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
    "no room: {} are needed ({} of weights, {} to load them{}), {} are free, and freeing {what} gives {} more{hint}",
    Mib(.room.demand(*.swap)), Mib(.room.needed), Mib(HEADROOM), Caches(.room.prefixes_on(*.swap)), Mib(.room.free.unwrap_or(u64::MAX)), Mib(*.freed)
)]
pub struct NoRoom {
    room: Room,
    swap: Swap,
    freed: u64,
    what: &'static str,
    hint: &'static str,
}

/// Decides how a candidate gets in.
pub fn decide(swap: Swap, room: Room) -> Result<Way, NoRoom> {
    let covers = |demand: u64, freed: u64| room.free.is_none_or(|free| free.saturating_add(freed) >= demand);
    let fits = |swap, freed| covers(room.demand(swap), freed);
    let (all, bare) = (room.all(), room.needed.saturating_add(HEADROOM));
    let refused = |freed, what, hint| Err(NoRoom { room, swap, freed, what, hint });
    let without_caches = "; it would fit with a smaller `prefix_cache_bytes`, which needs a restart";
    match swap {
        Swap::Beside if fits(swap, 0) => Ok(Way::Beside),
        Swap::Beside if room.idle > 0 && fits(swap, room.idle) => Ok(Way::BesideAfterRelease),
        Swap::Beside => {
            let hint = match () {
                () if fits(Swap::InPlace, all) => "; it would fit with `swap: in_place`",
                () if covers(bare, room.idle) => without_caches,
                () => "",
            };
            refused(room.idle, "what is staged or held", hint)
        }
        Swap::InPlace if fits(swap, all) => Ok(Way::InPlace),
        Swap::InPlace => refused(all, "everything that is loaded", if covers(bare, all) { without_caches } else { "" }),
    }
}

/// What caches may take, where they may take anything.
struct Caches(u64);

impl fmt::Display for Caches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            bytes => write!(f, ", {} that prefix caches may take", Mib(bytes)),
        }
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

    /// Nothing keeps prefixes.
    fn room(needed: u64, free: u64, live: u64, idle: u64) -> Room {
        Room { needed, prefixes: 0, free: Some(free), live, live_prefixes: PrefixBytes::default(), idle }
    }

    fn refusal(swap: Swap, room: Room) -> String {
        decide(swap, room).expect_err("no room").to_string()
    }

    #[test]
    fn beside_where_it_fits_then_after_a_release_then_not_at_all() {
        assert_eq!(decide(Swap::Beside, room(GIB, 2 * GIB, GIB, GIB)), Ok(Way::Beside));
        assert_eq!(decide(Swap::Beside, room(GIB, GIB / 2, GIB, GIB)), Ok(Way::BesideAfterRelease));
        assert_eq!(
            refusal(Swap::Beside, room(GIB, GIB / 2, GIB, 0)),
            "no room: 1088.0 MiB are needed (1024.0 MiB of weights, 64.0 MiB to load them), 512.0 MiB are free, and freeing what is \
             staged or held gives 0.0 MiB more; it would fit with `swap: in_place`"
        );
        assert!(!refusal(Swap::Beside, room(4 * GIB, 0, GIB, 0)).contains("would fit"));
    }

    #[test]
    fn in_place_counts_what_it_frees_and_is_never_another_way_by_luck() {
        assert_eq!(decide(Swap::InPlace, room(GIB, 100 * GIB, GIB, 0)), Ok(Way::InPlace));
        assert_eq!(decide(Swap::InPlace, room(GIB, GIB / 2, GIB, 0)), Ok(Way::InPlace));
        assert!(decide(Swap::InPlace, room(2 * GIB, GIB / 2, GIB, 0)).is_err());
        assert_eq!(decide(Swap::Beside, Room { free: None, ..room(GIB, 0, 0, 0) }), Ok(Way::Beside));
    }

    #[test]
    fn caches_that_may_still_grow_count_and_those_that_are_full_are_gone_from_free_memory() {
        let caches = |held| Room { prefixes: GIB, live_prefixes: PrefixBytes { held, bound: GIB }, ..room(GIB, 2 * GIB, GIB, 0) };
        assert_eq!(
            refusal(Swap::Beside, caches(0)),
            "no room: 2112.0 MiB are needed (1024.0 MiB of weights, 64.0 MiB to load them, 1024.0 MiB that prefix caches may take), \
             2048.0 MiB are free, and freeing what is staged or held gives 0.0 MiB more; it would fit with `swap: in_place`"
        );
        // What the live one holds it gives back when the candidate's caches begin to fill.
        assert_eq!(decide(Swap::Beside, caches(GIB)), Ok(Way::Beside));
        // In place, caches that are full are freed with the weights.
        let tight = Room { free: Some(HEADROOM), ..caches(GIB) };
        assert_eq!(decide(Swap::InPlace, tight), Ok(Way::InPlace));
        let larger = Room { prefixes: 4 * GIB, ..tight };
        assert!(
            refusal(Swap::InPlace, larger)
                .ends_with("gives 2048.0 MiB more; it would fit with a smaller `prefix_cache_bytes`, which needs a restart")
        );
    }

    proptest! {
        /// Step by step: what is used beside what is used now never exceeds what is free, and nothing is refused that would not.
        #[test]
        fn what_is_let_in_fits_at_every_moment_and_nothing_else_is_refused(
            sizes in prop::array::uniform6(0u64..1 << 40), free in 0u64..1 << 42, in_place in any::<bool>(),
        ) {
            let [needed, prefixes, live, held, more, idle] = sizes;
            let live_prefixes = PrefixBytes { held, bound: held + more };
            let room = Room { needed, prefixes, free: Some(free), live, live_prefixes, idle };
            let [free, needed, prefixes, live, held, more, idle, headroom] =
                [free, needed, prefixes, live, held, more, idle, HEADROOM].map(i128::from);
            // While it is loaded beside a live one whose caches fill; and live, its own caches full, the others given back.
            let beside = |freed: i128| [needed + headroom + more - freed, needed + headroom + prefixes - held - freed];
            let in_place_uses = needed + headroom + prefixes - live - held - idle;
            let fits = |uses: &[i128]| uses.iter().all(|uses| *uses <= free);
            let swap = if in_place { Swap::InPlace } else { Swap::Beside };
            match decide(swap, room) {
                Ok(Way::Beside) => prop_assert!(fits(&beside(0))),
                Ok(Way::BesideAfterRelease) => prop_assert!(!fits(&beside(0)) && fits(&beside(idle))),
                Ok(Way::InPlace) => prop_assert!(fits(&[in_place_uses])),
                Err(_) if in_place => prop_assert!(!fits(&[in_place_uses])),
                Err(refused) => {
                    prop_assert!(!fits(&beside(0)) && !fits(&beside(idle)));
                    prop_assert_eq!(refused.to_string().contains("in_place"), fits(&[in_place_uses]));
                }
            }
        }

        #[test]
        fn sums_that_leave_the_range_are_more_memory_than_there_is(sizes in prop::array::uniform6(any::<u64>()), free in any::<u64>(), in_place in any::<bool>()) {
            let [needed, prefixes, live, held, bound, idle] = sizes;
            let room = Room { needed, prefixes, free: Some(free), live, live_prefixes: PrefixBytes { held, bound }, idle };
            let swap = if in_place { Swap::InPlace } else { Swap::Beside };
            if let Err(refused) = decide(swap, room) {
                prop_assert!(refused.to_string().starts_with("no room: "));
            }
        }
    }
}
