//! How the queue fills a pack: whose turn it is, what rides along, and where it ends. Pure.
//!
//! What has more in common with the pack than apart rides along, whoever sent it: later it would cost as much as what it
//! begins with, too. Within the tenant whose turn it is that overtakes what stands before it. Of another tenant only the
//! first job is taken, so nothing of its own is overtaken, and only until it owes a pack; it pays with turns, as always. As
//! every turn begins with the first job of its tenant, nothing starves.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use super::load::Rest;
use super::queue::TURNS_PER_PACK;
use super::{Draw, JobId, Load, PackLimits, Pick, Queue};

/// A pack may cost so many times its budget where what is above it rides along. Its tokens, which take the device's memory,
/// stay within the budget.
const MOST_COST: usize = 2;
/// Jobs that one pack looks at outside their turns, at most.
const LOOKS: usize = 1024;

/// A pack that is being filled.
struct Filling {
    limits: PackLimits,
    /// That of its samples, once it has some.
    lane: Option<u64>,
    /// The marks of its samples.
    there: HashSet<u64>,
    /// Marks that were not there when what rides along was looked for last.
    new: Vec<u64>,
    looks: usize,
    draw: Draw,
}

/// How a turn ended.
enum Turn {
    /// The pack is full; the turn goes on with the next one.
    Full,
    /// The tenant has nothing of this lane.
    Nothing,
    Over,
}

impl Filling {
    fn new(limits: PackLimits) -> Self {
        Self { limits, lane: None, there: HashSet::new(), new: Vec::new(), looks: LOOKS, draw: Draw::default() }
    }

    fn fits(&self, rest: Rest) -> bool {
        let (draw, limits) = (&self.draw, self.limits);
        let most = if rest.akin { limits.max_tokens.saturating_mul(MOST_COST) } else { limits.max_tokens };
        let room = draw.computed + rest.tokens <= limits.max_tokens && draw.cost + rest.cost <= most;
        draw.picks.is_empty() || draw.picks.len() < limits.max_samples && room
    }

    fn add(&mut self, pick: Pick, load: &Load, rest: Rest) {
        self.draw.computed += rest.tokens;
        self.draw.cost += rest.cost;
        self.draw.picks.push(pick);
        self.new.extend(load.marks.iter().map(|mark| mark.hash).filter(|hash| self.there.insert(*hash)));
    }
}

impl Queue {
    /// Removes what came too late, then gives out the next pack: in the lane of the first job of the tenant whose turn it
    /// is, turn by turn, until the next sample does not fit.
    pub fn next_pack(&mut self, now: Instant, limits: PackLimits) -> Draw {
        let expired = self.expire(now);
        self.packs += 1;
        if self.is_empty() {
            // Nobody waits for what is owed.
            self.tenants.clear();
            self.line.clear();
        }
        let mut pack = Filling::new(limits);
        let mut from = 0;
        while let Some((&turn, name)) = self.line.range(from..).next() {
            let name = name.clone();
            match self.turn(&mut pack, &name, now) {
                Turn::Full => break,
                Turn::Nothing => from = turn + 1,
                Turn::Over => self.move_to_the_end(&name, limits),
            }
        }
        pack.draw.picks.sort_unstable();
        Draw { expired, ..pack.draw }
    }

    /// What one tenant gives to the pack.
    fn turn(&mut self, pack: &mut Filling, name: &Arc<str>, now: Instant) -> Turn {
        let mut given = false;
        loop {
            let Some(tenant) = self.tenants.get_mut(name).filter(|tenant| !tenant.lanes.is_empty()) else { return Turn::Over };
            let Some(here) = pack.lane.or_else(|| tenant.first().map(|(lane, _)| lane)) else { return Turn::Nothing };
            let Some(&id) = tenant.lanes.get(&here).and_then(BTreeMap::first_key_value).map(|(_, id)| id) else {
                return if given { Turn::Over } else { Turn::Nothing };
            };
            let over = *tenant.credit.get_or_insert(share(pack.limits)) <= 0;
            if self.has_filled_a_pack(id, pack.limits) {
                self.move_back(id, now);
                continue;
            }
            if over {
                return Turn::Over;
            }
            if self.give(pack, id, false).is_none() {
                self.leaves_unused(pack, id);
                return Turn::Full;
            }
            given = true;
            self.take_along(pack, name, id);
        }
    }

    /// Gives out the next sample of a job, if it fits, and, if that is asked for, only if it is akin to the pack.
    fn give(&mut self, pack: &mut Filling, id: JobId, akin: bool) -> Option<()> {
        let job = self.jobs.get(&id)?;
        let (lane, sample) = (job.lane, job.next);
        let load = job.samples.get(sample)?.clone();
        let rest = load.rest(&pack.there);
        if (akin && !rest.akin) || !pack.fits(rest) {
            return None;
        }
        pack.lane = Some(lane);
        pack.add(Pick { job: id, sample, tokens: load.tokens }, &load, rest);
        self.hand_over(id, rest.cost, pack.limits);
        Some(())
    }

    /// Room that is too small for the next sample of a job belongs to what the job has taken of the pack.
    fn leaves_unused(&mut self, pack: &Filling, id: JobId) {
        if let Some(job) = self.jobs.get_mut(&id).filter(|job| job.pack == self.packs) {
            job.given += pack.limits.max_tokens.saturating_sub(pack.draw.cost);
        }
    }

    /// Gives out what rides along with what `id`, whose turn it is or who rides along itself, has just given.
    fn take_along(&mut self, pack: &mut Filling, name: &Arc<str>, id: JobId) {
        while self.give(pack, id, true).is_some() {}
        while let Some(mark) = pack.new.pop() {
            let Some(kin) = self.kin.get(&mark) else { continue };
            let kin: Vec<JobId> = kin.values().copied().take(pack.looks).collect();
            pack.looks -= kin.len();
            for id in kin {
                while self.may_ride(pack, name, id) && self.give(pack, id, true).is_some() {}
            }
        }
    }

    /// Whether a job may ride along in a turn of the tenant `name`.
    fn may_ride(&self, pack: &Filling, name: &Arc<str>, id: JobId) -> bool {
        let Some(job) = self.jobs.get(&id).filter(|job| pack.lane == Some(job.lane)) else { return false };
        let Some(tenant) = self.tenants.get(&job.tenant).filter(|_| !self.has_filled_a_pack(id, pack.limits)) else { return false };
        job.tenant == *name || tenant.may_owe(pack.limits) && tenant.first().is_some_and(|(_, first)| first == id)
    }

    /// Whether a job is to stand behind others before it gives out any more.
    fn has_filled_a_pack(&self, id: JobId, limits: PackLimits) -> bool {
        self.jobs.get(&id).is_some_and(|job| job.given >= limits.max_tokens && job.pack < self.packs)
    }
}

/// What a tenant gives out in one turn.
pub(super) fn share(limits: PackLimits) -> i64 {
    i64::try_from(limits.max_tokens.div_ceil(TURNS_PER_PACK)).unwrap_or(i64::MAX).max(1)
}
