//! `max_pack_tokens: auto`: how large packs may be, from the memory that is free once the model is there, and from what one
//! forward was seen to take of it. What is found too large all the same is split and lowered by the scorer.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use super::free_memory::{free_on, used_on};
use crate::config::Config;
use crate::domain::{Sample, Truncation};
use crate::model::{Pack, Place, fitting_pack, settle};
use crate::registry::{Generation, Swap};
use crate::text::Encoding;

/// What packs may hold at most: what the settings say, or as much as is of use on the device.
pub(super) fn most(config: &Config) -> usize {
    // A device that is not there is told by whoever opens it.
    let place = || config.device.resolve().ok().and_then(|places| places.first().copied()).unwrap_or(Place::Cpu);
    config.max_pack_tokens.unwrap_or_else(|| place().enough_pack_tokens())
}

/// What the measurement goes by.
#[derive(Clone, Debug)]
pub(super) struct Measure {
    pub places: Vec<Place>,
    pub most: usize,
    /// Bytes that prompts may fill later, on the CPU.
    pub prefix_cache: u64,
    pub swap: Swap,
}

/// What is known of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    free: u64,
    /// What another generation beside this one would take.
    another: u64,
    /// What is free now and will be filled.
    promised: u64,
}

/// Tokens of a forward, and what it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    tokens: usize,
    bytes: u64,
}

/// A tenth of what is free stays so.
const KEPT_FREE: u64 = 10;
/// Forwards differ; what was seen of one is taken for four fifths.
const MARGIN: f64 = 1.25;
/// Tokens of the forward that is looked at: a few samples of those that a trainer sends.
const WARM_UP: usize = 1024;
/// Tokens of one of its samples.
const SAMPLE: usize = 256;
/// How often memory is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(1);

impl Measure {
    /// Runs one forward of a generation that nobody uses yet, and that keeps no prompts yet, on each of its devices. So many
    /// bytes are taken by others that go.
    pub(super) fn measured(&self, generation: &Generation, others: u64) -> usize {
        let model = generation.model();
        let Some(pack) = warm_up_pack(generation, self.most) else { return self.most };
        let mut seen: Option<Seen> = None;
        for (device, place) in self.places.iter().enumerate() {
            // What freed blocks are kept would be taken again, and seen by nobody.
            if let Err(problem) = settle(&[*place]) {
                tracing::warn!(%problem, "what a forward takes may be seen too small");
            }
            let (outcome, bytes) = rise(|| used_on(*place), || model.forward_on(device, &pack));
            if let Err(problem) = outcome {
                tracing::warn!(%problem, device = %place, "the forward that measures memory failed");
            }
            let of = bytes.map(|bytes| Seen { tokens: pack.computed_tokens(), bytes });
            seen = [seen, of].into_iter().flatten().max_by_key(|seen| seen.bytes);
        }
        let promised = if self.places.contains(&Place::Cpu) { self.prefix_cache } else { 0 };
        let another = if self.swap == Swap::Beside { generation.device_bytes() } else { 0 };
        let Some(free) = free_on(&self.places) else { return self.most };
        let room = Room { free: free.saturating_add(others), another, promised };
        let tokens = choose(self.most, room, seen, |tokens| model.activation_bytes(tokens));
        tracing::info!(
            max_pack_tokens = tokens,
            free_bytes = free,
            measured_bytes = seen.map(|seen| seen.bytes),
            measured_tokens = seen.map(|seen| seen.tokens),
            "packs are as large as there is room for"
        );
        tokens
    }
}

/// The largest pack that the room holds by plan, and by what was seen where that is another thing.
fn choose(most: usize, room: Room, seen: Option<Seen>, planned: impl Fn(usize) -> Option<u64>) -> usize {
    let free = (room.free - room.free / KEPT_FREE).saturating_sub(room.promised);
    // Where there is room for a reload, the packs leave it free.
    let free = if free / 2 > room.another { free - room.another } else { free };
    let factor = seen.and_then(|seen| Some(MARGIN * seen.bytes as f64 / planned(seen.tokens)? as f64)).map_or(1.0, |part| part.max(0.25));
    let bytes = |tokens: usize| match (planned(tokens), seen) {
        (Some(planned), _) => (planned as f64 * factor) as u64,
        (None, Some(seen)) => (MARGIN * seen.bytes as f64 * tokens as f64 / seen.tokens.max(1) as f64) as u64,
        (None, None) => 0,
    };
    fitting_pack(free, most, bytes)
}

/// A few samples of any tokens; `None` for a model that reads none.
fn warm_up_pack(generation: &Generation, most: usize) -> Option<Pack> {
    let model = generation.model();
    let vocabulary = u32::try_from(generation.info.vocabulary).ok()?.max(1);
    let longest = SAMPLE.min(model.limits().max_tokens).max(1);
    let count = (WARM_UP.min(most) / longest).max(1);
    let ids = |sample: usize| (0..longest).map(move |place| ((place * 7919 + sample * 104_729 + 11) % vocabulary as usize) as u32);
    let encode = |sample: usize| generation.text.encode(&Sample::Tokens(ids(sample).collect()), Truncation::Left).ok().map(Arc::new);
    let samples: Vec<Arc<Encoding>> = (0..count).map(encode).collect::<Option<_>>()?;
    Some(Pack::forest(&samples, |tokens| model.prefix_key(tokens)))
}

/// How far `used` rose while something ran, looked at again and again from another thread.
fn rise<T>(used: impl Fn() -> Option<u64> + Sync, run: impl FnOnce() -> T) -> (T, Option<u64>) {
    let before = used();
    let (ran, watched) = mpsc::channel::<()>();
    let (outcome, most) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut most = used();
            let watched = watched;
            while watched.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                most = most.max(used());
            }
            most
        });
        let outcome = run();
        // Hanging up ends the watch.
        drop(ran);
        (outcome, watcher.join().ok().flatten())
    });
    (outcome, most.zip(before).map(|(most, before)| most.saturating_sub(before)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn room(free: u64) -> Room {
        Room { free, another: 0, promised: 0 }
    }

    #[test]
    fn packs_fill_what_is_free_by_what_was_seen() {
        // Planned is a mebibyte for each 16 tokens, seen was half of that.
        let planned = |tokens: usize| Some(tokens as u64 * MIB / 16);
        let seen = Some(Seen { tokens: 1024, bytes: 32 * MIB });
        assert_eq!(choose(16_384, room(10 << 30), None, planned), 16_384);
        // 576 MiB after the tenth that stays: 9,216 tokens by plan.
        assert_eq!(choose(16_384, room(640 * MIB), None, planned), 9216);
        // By what was seen and a quarter more, 16,384 tokens take 640 MiB.
        assert_eq!(choose(16_384, room(640 * MIB), seen, planned), 14_592);
        assert_eq!(choose(16_384, room(640 * MIB), seen, |_| None), 14_592);
        // Without either nothing is known, and the scorer learns it.
        assert_eq!(choose(16_384, room(MIB), None, |_| None), 16_384);
    }

    #[test]
    fn what_is_promised_is_not_free_and_room_for_a_reload_is_left_where_there_is_some() {
        let planned = |tokens: usize| Some(tokens as u64 * MIB);
        let tokens = |another, promised| choose(16_384, Room { free: 10_240 * MIB, another, promised }, None, planned);
        assert_eq!((tokens(0, 0), tokens(0, 4096 * MIB), tokens(4096 * MIB, 0)), (9216, 5120, 5120));
        // Where the reload would not fit anyway, nothing is left for it.
        assert_eq!(tokens(8000 * MIB, 0), 9216);
    }

    #[test]
    fn the_most_that_is_taken_meanwhile_is_seen() {
        let (memory, looks) = (AtomicU64::new(5), AtomicU64::new(0));
        let used = || {
            let now = memory.load(Ordering::SeqCst);
            looks.fetch_add(1, Ordering::SeqCst);
            Some(now)
        };
        // Until somebody has looked at what is in memory now.
        let seen = |value: u64| {
            memory.store(value, Ordering::SeqCst);
            let (before, enough) = (looks.load(Ordering::SeqCst), 2);
            while looks.load(Ordering::SeqCst) < before + enough {
                std::thread::yield_now();
            }
        };
        let (outcome, bytes) = rise(used, || {
            seen(105);
            seen(25);
            "done"
        });
        assert_eq!((outcome, bytes), ("done", Some(100)));
        assert_eq!(rise(|| None, || ()).1, None);
    }

    proptest! {
        #[test]
        fn more_room_never_makes_smaller_packs_and_none_makes_them_impossible(free in 0u64..1 << 40, more in 0u64..1 << 40, bytes in 0u64..1 << 40, each in 1u64..1 << 30, most in 1usize..100_000) {
            let seen = Some(Seen { tokens: 1024, bytes });
            let tokens = |free| choose(most, room(free), seen, |tokens| Some(tokens as u64 * each));
            prop_assert!((1..=most).contains(&tokens(free)));
            prop_assert!(tokens(free) <= tokens(free.saturating_add(more)));
        }
    }
}
