//! How the queue fills a pack: whose turn it is, what rides along, and where it ends. Pure.
//!
//! What has more in common with the pack than apart rides along, whoever sent it: later it would cost as much as what it
//! begins with, too. Within the tenant whose turn it is that overtakes what stands before it. Of another tenant only the
//! first job is taken, so nothing of its own is overtaken, and only until it owes a pack; it pays with turns, as always. As
//! every turn begins with the first job of its tenant, nothing starves.
//!
//! The first sample that does not fit ends the turns, and begins the next pack of its lane. The room that it leaves is filled
//! with samples that do fit: of its own tenant any, of every other those that come first, up to a pack of debt.
//!
//! What is likely to come too late with the pack does not fit into it, nor does what would make others come too late. Of a
//! sample that would be late by itself nobody's pack is the smaller.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use super::load::Rest;
use super::pace::Paces;
use super::queue::{TURNS_PER_PACK, Tenant, Waiting};
use super::{Draw, JobId, PackLimits, Pick, Queue};

/// A pack may cost so many times its budget where what is above it rides along. Its tokens, which take the device's memory,
/// stay within the budget.
const MOST_COST: usize = 2;
/// Jobs that one pack looks at outside their turns, at most.
const LOOKS: usize = 1024;

/// A pack is given so many times as long as it is likely to take, where somebody waits for it until a certain time.
const SLACK: f64 = 1.25;
/// Of a lane of which nothing has run yet, packs with deadlines cost so much at most: what it takes tells of the next one.
const FIRST: usize = 512;

/// A pack is full enough to be made before its time when at most this part of it is left.
const UNFILLED: usize = 8;

/// A pack that is being filled.
struct Filling {
    limits: PackLimits,
    /// When the device is likely to begin with it.
    begins: Instant,
    /// That of its samples, once it has some.
    lane: Option<u64>,
    /// The earliest deadline of those samples that are likely to be done in time.
    until: Option<Instant>,
    /// The marks of its samples.
    there: HashSet<u64>,
    /// Marks that were not there when what rides along was looked for last.
    new: Vec<u64>,
    looks: usize,
    draw: Draw,
}

/// How a turn ended.
enum Turn {
    /// The next sample of this job does not fit; the turn goes on with the next pack.
    Full(JobId),
    /// The tenant has nothing of this lane.
    Nothing,
    Over,
}

impl Filling {
    fn new(limits: PackLimits, now: Instant) -> Self {
        let (there, begins) = (HashSet::new(), now + limits.wait);
        Self { limits, begins, lane: None, until: None, there, new: Vec::new(), looks: LOOKS, draw: Draw::default() }
    }

    fn fits(&self, rest: Rest, job: &Waiting, paces: &Paces) -> bool {
        self.draw.picks.is_empty() || self.has_room_for(rest) && self.is_in_time(rest, job, paces)
    }

    fn has_room_for(&self, rest: Rest) -> bool {
        let (draw, limits) = (&self.draw, self.limits);
        let most = if rest.akin { limits.max_tokens.saturating_mul(MOST_COST) } else { limits.max_tokens };
        let room = draw.computed + rest.tokens <= limits.max_tokens && draw.cost + rest.cost <= most;
        draw.picks.len() < limits.max_samples && room
    }

    /// Whether the pack is likely to be done before the first of its deadlines with this sample, too.
    fn is_in_time(&self, rest: Rest, job: &Waiting, paces: &Paces) -> bool {
        let (until, cost) = (self.until.into_iter().chain(self.deadline(rest, job, paces)).min(), self.draw.cost + rest.cost);
        until.is_none_or(|until| self.done(job.lane, cost, paces).map_or(cost <= FIRST, |done| done <= until))
    }

    /// When a pack of this cost is likely to be done.
    fn done(&self, lane: u64, cost: usize, paces: &Paces) -> Option<Instant> {
        Some(self.begins + paces.duration(lane, cost)?.mul_f64(SLACK))
    }

    /// The deadline of a sample, unless it would not keep that by itself.
    fn deadline(&self, rest: Rest, job: &Waiting, paces: &Paces) -> Option<Instant> {
        let alone = self.done(job.lane, rest.cost, paces);
        job.deadline.filter(|deadline| alone.is_none_or(|alone| alone <= *deadline))
    }

    fn has_room(&self) -> bool {
        self.draw.picks.len() < self.limits.max_samples && self.draw.computed < self.limits.max_tokens
    }

    fn add(&mut self, pick: Pick, job: &Waiting, rest: Rest, paces: &Paces) {
        self.until = self.until.into_iter().chain(self.deadline(rest, job, paces)).min();
        self.draw.computed += rest.tokens;
        self.draw.cost += rest.cost;
        self.draw.picks.push(pick);
        let marks = job.samples.get(pick.sample).map(|load| load.marks.clone()).unwrap_or_default();
        self.new.extend(marks.iter().map(|mark| mark.hash).filter(|hash| self.there.insert(*hash)));
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
        let mut pack = Filling::new(limits, now);
        let mut from = 0;
        while let Some((&turn, name)) = self.line.range(from..).next() {
            let name = name.clone();
            match self.turn(&mut pack, &name, now) {
                Turn::Full(id) => {
                    self.fill_up(&mut pack, turn, id);
                    break;
                }
                Turn::Nothing => from = turn + 1,
                Turn::Over => self.move_to_the_end(&name, limits),
            }
        }
        pack.draw.picks.sort_unstable();
        Draw { expired, ..pack.draw }
    }

    /// Whether what waits in the lane of the next pack all but fills it. Nothing is given out.
    pub fn fills(&self, now: Instant, limits: PackLimits) -> bool {
        let tenants = || self.line.values().filter_map(|name| self.tenants.get(name)).filter(|tenant| !tenant.lanes.is_empty());
        let next = tenants().find(|tenant| tenant.credit.is_none_or(|credit| credit > 0)).or_else(|| tenants().next());
        let Some((lane, _)) = next.and_then(Tenant::first) else { return false };
        let jobs = tenants().filter_map(|tenant| tenant.lanes.get(&lane)).flat_map(BTreeMap::values);
        let samples = jobs
            .filter_map(|id| Some((*id, self.jobs.get(id)?)))
            .flat_map(|(id, job)| (job.next..job.samples.len()).map(move |sample| (id, job, sample, &job.samples[sample])));
        let mut pack = Filling::new(limits, now);
        for (id, job, sample, load) in samples.take(limits.max_samples.saturating_add(LOOKS)) {
            let rest = load.rest(&pack.there);
            if pack.fits(rest, job, &self.paces) {
                pack.add(Pick { job: id, sample, tokens: load.tokens }, job, rest, &self.paces);
            } else if pack.has_room_for(rest) {
                // There is no time for more.
                return true;
            }
            if !pack.has_room() || limits.max_tokens.saturating_sub(pack.draw.cost) <= limits.max_tokens / UNFILLED {
                return true;
            }
        }
        false
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
            // Its place in the line is for the first of its jobs: other lanes have its turns for one pack and no longer.
            if tenant.strayed.is_some_and(|pack| pack < self.packs) && tenant.first().is_some_and(|(lane, _)| lane != here) {
                return Turn::Nothing;
            }
            let over = *tenant.credit.get_or_insert(share(pack.limits)) <= 0;
            if self.has_filled_a_pack(id, pack.limits) {
                self.move_back(id, now);
                continue;
            }
            if over {
                return Turn::Over;
            }
            // What had no room in the last pack of this lane.
            let id = if pack.draw.picks.is_empty() { self.front.remove(&here).unwrap_or(id) } else { id };
            if self.give(pack, id, false).is_none() {
                return Turn::Full(id);
            }
            given = true;
            self.take_along(pack, name, id);
        }
    }

    /// Gives out the next sample of a job, if it fits, and, if that is asked for, only if it is akin to the pack.
    fn give(&mut self, pack: &mut Filling, id: JobId, akin: bool) -> Option<()> {
        let job = self.jobs.get(&id)?;
        let (lane, sample) = (job.lane, job.next);
        let load = job.samples.get(sample)?;
        let rest = load.rest(&pack.there);
        if (akin && !rest.akin) || !pack.fits(rest, job, &self.paces) {
            return None;
        }
        pack.lane = Some(lane);
        pack.add(Pick { job: id, sample, tokens: load.tokens }, job, rest, &self.paces);
        self.hand_over(id, rest.cost, pack.limits);
        Some(())
    }

    /// Fills the room that was too small for the next sample of a job, whose tenant has this turn.
    fn fill_up(&mut self, pack: &mut Filling, turn: u64, first: JobId) {
        if let Some(job) = self.jobs.get_mut(&first) {
            // What is too small for a job that has most of the pack belongs to what it has taken; not what there is no time for.
            let room = pack.limits.max_tokens.saturating_sub(pack.draw.cost).min(job.samples.get(job.next).map_or(0, |load| load.cost));
            if job.pack == self.packs && 2 * job.given >= pack.limits.max_tokens {
                job.given += room;
            }
            if job.given < pack.limits.max_tokens {
                self.front.insert(job.lane, first);
            }
        }
        let names: Vec<Arc<str>> = self.line.range(turn..).take(pack.looks).map(|(_, name)| name.clone()).collect();
        for (place, name) in names.iter().enumerate() {
            let passed = if place == 0 { Some(first) } else { None };
            while pack.has_room()
                && pack.looks > 0
                && let Some(id) = self.first_that_fits(pack, name, passed)
                && self.give(pack, id, false).is_some()
            {
                self.take_along(pack, name, id);
            }
        }
    }

    /// The first job of a tenant that may fill a pack up, if its next sample fits. Behind the job `passed`, which begins the
    /// next pack, or has filled this one, any.
    fn first_that_fits(&self, pack: &mut Filling, name: &Arc<str>, passed: Option<JobId>) -> Option<JobId> {
        let tenant = self.tenants.get(name).filter(|tenant| tenant.may_owe(pack.limits))?;
        let (lane, first) = tenant.first().filter(|(lane, _)| pack.lane == Some(*lane))?;
        let fits = |id: &&JobId| {
            let next = self.jobs.get(id).and_then(|job| Some((job, job.samples.get(job.next)?)));
            let in_pack = next.is_some_and(|(job, load)| pack.fits(load.rest(&pack.there), job, &self.paces));
            in_pack && !self.has_filled_a_pack(**id, pack.limits)
        };
        let most = if passed == Some(first) { pack.looks } else { 1 };
        let mut looks = 0;
        let found = tenant.lanes.get(&lane)?.values().take(most).inspect(|_| looks += 1).find(fits).copied();
        pack.looks -= looks;
        found
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
