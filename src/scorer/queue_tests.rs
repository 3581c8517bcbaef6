use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::scorer::Mark;

const AGEING: Duration = Duration::from_secs(1);
const ROOMY: QueueBounds = QueueBounds { max_samples: 1 << 20, max_tokens: 1 << 30 };

fn limits(max_tokens: usize) -> PackLimits {
    PackLimits { max_tokens, max_samples: 1 << 20, wait: Duration::ZERO }
}

fn job(arrived: Instant, lane: u64, priority: i32, tokens: &[usize]) -> NewJob {
    let samples = tokens.iter().copied().map(Load::plain).collect();
    NewJob { lane, tenant: "t".into(), priority, arrived, deadline: None, samples }
}

fn of(tenant: &str, job: NewJob) -> NewJob {
    NewJob { tenant: tenant.into(), ..job }
}

/// A sample that begins with so many tokens of a prompt. Every token costs a fifth more for every token before it.
fn load(lane: u64, prompt: u64, shared: usize, tokens: usize) -> Load {
    let cost = |tokens: usize| tokens + tokens * tokens / 10;
    let mark = |hash: u64, tokens| Mark { hash: 10 * hash + lane, tokens, cost: cost(tokens) };
    // All prompts begin with the same token.
    let marks = if shared > 1 { vec![mark(0, 1), mark(100 * prompt + shared as u64, shared)] } else { Vec::new() };
    Load { tokens, cost: cost(tokens), marks: marks.into() }
}

/// What samples cost together, and how many tokens of them are computed.
fn together<'l>(loads: impl IntoIterator<Item = &'l Load>) -> (usize, usize) {
    let mut there = HashSet::new();
    loads.into_iter().fold((0, 0), |(cost, computed), load| {
        let rest = load.rest(&there);
        there.extend(load.marks.iter().map(|mark| mark.hash));
        (cost + rest.cost, computed + rest.tokens)
    })
}

fn push(queue: &mut Queue, job: NewJob) -> JobId {
    queue.push(job).expect("room")
}

fn names(draw: &Draw) -> Vec<(JobId, usize)> {
    draw.picks.iter().map(|pick| (pick.job, pick.sample)).collect()
}

/// The jobs of one-sample packs, in the order in which they are given out.
fn order(queue: &mut Queue, now: Instant) -> Vec<JobId> {
    let one = PackLimits { max_tokens: 100, max_samples: 1, wait: Duration::ZERO };
    std::iter::from_fn(|| queue.next_pack(now, one).picks.first().map(|pick| pick.job)).collect()
}

#[test]
fn priority_goes_first_then_arrival() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let [a, b, urgent, late] =
        [(0, 0), (0, 0), (1, 0), (0, 5)].map(|(priority, ms)| push(&mut queue, job(now + Duration::from_millis(ms), 0, priority, &[1])));
    assert_eq!(order(&mut queue, now), [urgent, a, b, late]);
}

#[test]
fn a_level_of_priority_is_worth_the_ageing_time_and_no_more() {
    let (mut queue, start) = (Queue::new(ROOMY, AGEING), Instant::now());
    let patient = push(&mut queue, job(start, 0, 0, &[1]));
    let soon = push(&mut queue, job(start + AGEING / 2, 0, 1, &[1]));
    let later = push(&mut queue, job(start + AGEING * 3 / 2, 0, 1, &[1]));
    assert_eq!(order(&mut queue, start + AGEING * 2), [soon, patient, later]);
}

#[test]
fn a_large_request_is_spread_over_packs_and_holds_up_nobody() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let large = push(&mut queue, job(now, 0, 0, &[2; 100]));
    assert_eq!(names(&queue.next_pack(now, limits(16))), (0..8).map(|sample| (large, sample)).collect::<Vec<_>>());
    let small = push(&mut queue, job(now, 0, 0, &[3]));
    let draw = queue.next_pack(now, limits(16));
    assert!(names(&draw).contains(&(small, 0)), "{draw:?}");
    assert_eq!(draw.picks.len(), 7, "and the large one fills the rest");
}

#[test]
fn a_pack_takes_the_lane_of_the_first_in_order_and_no_other() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let a = push(&mut queue, job(now, 1, 0, &[1]));
    let b = push(&mut queue, job(now, 2, 0, &[1]));
    let c = push(&mut queue, job(now, 1, 0, &[1]));
    let d = push(&mut queue, of("other", job(now, 2, 0, &[1])));
    assert_eq!(names(&queue.next_pack(now, limits(8))), [(a, 0), (c, 0)]);
    assert_eq!(names(&queue.next_pack(now, limits(8))), [(b, 0), (d, 0)]);
}

#[test]
fn expired_and_removed_work_leaves_the_queue_and_is_not_given_out() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let late = push(&mut queue, NewJob { deadline: Some(now + AGEING), ..job(now, 0, 0, &[1, 2]) });
    let gone = push(&mut queue, job(now, 0, 0, &[3]));
    let kept = push(&mut queue, NewJob { deadline: Some(now + AGEING * 2), ..job(now, 0, 0, &[4]) });
    queue.remove(gone);
    let draw = queue.next_pack(now + AGEING, limits(8));
    assert_eq!(names(&draw), [(kept, 0)]);
    assert_eq!(draw.expired.iter().map(|pick| (pick.job, pick.sample)).collect::<Vec<_>>(), [(late, 0), (late, 1)]);
    assert_eq!((queue.samples(), queue.tokens()), (0, 0));
    assert!(queue.is_empty() && queue.tenants.is_empty() && queue.line.is_empty() && queue.deadlines.is_empty());
}

#[test]
fn a_full_queue_refuses_but_an_empty_one_takes_any_job() {
    let (mut queue, now) = (Queue::new(QueueBounds { max_samples: 3, max_tokens: 10 }, AGEING), Instant::now());
    push(&mut queue, job(now, 0, 0, &[20]));
    assert_eq!(queue.push(job(now, 0, 0, &[1])), Err(QueueFull { samples: 1, tokens: 20 }));
    queue.next_pack(now, limits(8));
    push(&mut queue, job(now, 0, 0, &[1, 1]));
    assert!(queue.push(job(now, 0, 0, &[1, 1])).is_err(), "four samples");
    assert!(queue.push(job(now, 0, 0, &[9])).is_err(), "eleven tokens");
    assert!(queue.push(job(now, 0, 0, &[8])).is_ok());
}

#[test]
fn a_sample_above_the_budget_gets_a_pack_of_its_own() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let id = push(&mut queue, job(now, 0, 0, &[9, 1]));
    assert_eq!(names(&queue.next_pack(now, limits(8))), [(id, 0)]);
    assert_eq!(names(&queue.next_pack(now, limits(8))), [(id, 1)]);
}

#[test]
fn samples_that_share_with_the_one_before_cost_what_is_new_and_stay_together() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    // Groups of six: a prompt of 10 tokens and completions of 2.
    let sample = |hash| Load { tokens: 12, cost: 12, marks: [Mark { hash, tokens: 10, cost: 10 }].into() };
    let samples = (0..3).flat_map(|group| vec![sample(group); 6]).collect();
    let large = push(&mut queue, NewJob { samples, ..job(now, 0, 0, &[]) });
    let other = push(&mut queue, of("other", job(now, 0, 0, &[1; 3])));
    let draw = queue.next_pack(now, limits(32));
    // A turn is 8 tokens, but the first group is not torn apart; then it is the other's turn, and 7 tokens are left.
    let expected: Vec<_> = (0..6).map(|sample| (large, sample)).chain((0..3).map(|sample| (other, sample))).collect();
    assert_eq!((names(&draw), draw.cost), (expected, 25));
    // In another pack, nothing is there yet to share with.
    assert_eq!(queue.next_pack(now, PackLimits { max_tokens: 32, max_samples: 3, wait: Duration::ZERO }).cost, 16);
    assert_eq!(queue.next_pack(now, PackLimits { max_tokens: 32, max_samples: 2, wait: Duration::ZERO }).cost, 14);
}

#[test]
fn what_begins_alike_rides_in_one_pack_whoever_sent_it_and_each_pays_its_own() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let sample = |hash| vec![Load { tokens: 12, cost: 12, marks: [Mark { hash, tokens: 10, cost: 10 }].into() }];
    let single = |tenant, hash| of(tenant, NewJob { samples: sample(hash), ..job(now, 0, 0, &[]) });
    let first = push(&mut queue, single("a", 1));
    let between = push(&mut queue, single("a", 2));
    let own = push(&mut queue, single("a", 1));
    let plain = push(&mut queue, of("b", job(now, 0, 0, &[9])));
    let waits = push(&mut queue, single("b", 1));
    let rides = push(&mut queue, single("c", 1));
    let draw = queue.next_pack(now, limits(17));
    assert_eq!((names(&draw), draw.cost), (vec![(first, 0), (own, 0), (rides, 0)], 16), "of b, something else comes first");
    assert_eq!((queue.tenants["a"].credit, queue.tenants["b"].credit), (Some(5 - 14 + 5), Some(5)));
    assert_eq!(names(&queue.next_pack(now, limits(17))), [(plain, 0)]);
    assert_eq!(names(&queue.next_pack(now, limits(24))), [(between, 0), (waits, 0)]);
}

#[test]
fn a_large_request_that_has_filled_a_pack_does_not_ride_before_others() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let sample = |hash| Load { tokens: 12, cost: 12, marks: [Mark { hash, tokens: 10, cost: 10 }].into() };
    let large = push(&mut queue, NewJob { samples: vec![sample(1); 100], ..job(now, 0, 0, &[]) });
    assert_eq!(queue.next_pack(now, limits(20)).picks.len(), 5);
    let small = push(&mut queue, NewJob { samples: vec![sample(1)], ..job(now, 0, 1, &[]) });
    let other = push(&mut queue, job(now, 0, 0, &[3]));
    let draw = queue.next_pack(now, limits(20));
    assert_eq!(names(&draw), [(large, 5), (large, 6), (small, 0), (other, 0)]);
}

#[test]
fn a_sample_without_room_begins_the_next_pack_and_what_fits_takes_its_place() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let small = push(&mut queue, of("a", job(now, 0, 0, &[4])));
    let large = push(&mut queue, of("b", job(now, 0, 0, &[15])));
    let behind = push(&mut queue, of("b", job(now, 0, 0, &[3, 2])));
    let other = push(&mut queue, of("c", job(now, 0, 0, &[9, 1])));
    let last = push(&mut queue, of("c", job(now, 0, 0, &[1])));
    let draw = queue.next_pack(now, limits(16));
    assert_eq!((names(&draw), draw.cost), (vec![(small, 0), (behind, 0), (behind, 1)], 9), "of others only what is first");
    // It comes first although its tenant owes something by now.
    assert_eq!(queue.tenants["b"].credit, Some(4 - 5));
    let urgent = push(&mut queue, of("a", job(now, 0, 100, &[2])));
    assert_eq!(names(&queue.next_pack(now, limits(16))), [(large, 0), (last, 0)]);
    assert_eq!(names(&queue.next_pack(now, limits(16))), [(other, 0), (other, 1), (urgent, 0)]);
}

#[test]
fn a_pack_that_is_filled_up_leaves_other_lanes_their_turn() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    push(&mut queue, of("a", job(now, 1, 0, &[4, 15, 15, 15])));
    push(&mut queue, of("a", job(now, 1, 0, &[1; 30])));
    let other = push(&mut queue, of("b", job(now, 2, 0, &[1])));
    let packs: Vec<Draw> = (0..4).map(|_| queue.next_pack(now, limits(16))).collect();
    assert!(packs.iter().any(|draw| names(draw) == [(other, 0)]), "{packs:?}");
}

#[test]
fn debts_of_those_that_left_are_remembered_in_bounds_and_only_while_somebody_waits() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    push(&mut queue, of("patient", job(now, 0, 0, &[1; 40_000])));
    for tenant in 0..MAX_DEBTORS + 10 {
        push(&mut queue, of(&tenant.to_string(), job(now, 0, 0, &[8])));
    }
    let one = PackLimits { max_samples: 1, ..limits(8) };
    while queue.jobs.len() > 1 {
        assert!(!queue.next_pack(now, one).is_empty());
        assert!(queue.tenants.len() <= queue.jobs.len() + MAX_DEBTORS);
    }
    assert!(queue.tenants.len() > 1, "debtors are remembered");
    let last = *queue.jobs.keys().next().expect("one");
    queue.remove(last);
    queue.next_pack(now, one);
    assert!(queue.tenants.is_empty() && queue.line.is_empty());
}

#[test]
fn a_pack_holds_what_is_likely_to_be_done_before_the_first_of_its_deadlines() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let soon = |seconds| Some(now + Duration::from_secs(seconds));
    let drawn = |queue: &mut Queue, wait| queue.next_pack(now, PackLimits { wait, ..limits(8192) }).cost;
    // A hundred tokens a second, of which four fifths count.
    queue.paces.observe(0, 100, 100, Duration::from_secs(1));
    push(&mut queue, NewJob { deadline: soon(5), ..job(now, 0, 0, &[20; 30]) });
    push(&mut queue, NewJob { deadline: soon(9), ..job(now, 0, 0, &[20; 100]) });
    assert_eq!(drawn(&mut queue, Duration::ZERO), 400);
    assert_eq!(drawn(&mut queue, Duration::from_secs(1)), 320, "the device begins with it a second later");
    assert_eq!(drawn(&mut queue, Duration::ZERO), 720, "what is left has more time");
    // Nobody waits for a certain time, in a lane of which as much is known.
    queue.paces.observe(1, 100, 100, Duration::from_secs(1));
    push(&mut queue, job(now, 1, 0, &[20; 100]));
    while drawn(&mut queue, Duration::ZERO) != 2000 {
        assert!(!queue.is_empty());
    }
}

#[test]
fn a_lane_of_which_nothing_has_run_begins_with_little_where_somebody_waits_until_a_certain_time() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    push(&mut queue, NewJob { deadline: Some(now + AGEING), ..job(now, 0, 0, &[100; 100]) });
    assert_eq!(queue.next_pack(now, limits(8192)).cost, 500);
    queue.paces.observe(0, 500, 500, Duration::from_millis(10));
    assert_eq!(queue.next_pack(now, limits(8192)).cost, 8100);
}

#[test]
fn of_what_comes_too_late_by_itself_nobodys_pack_is_the_smaller() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    queue.paces.observe(0, 100, 100, Duration::from_secs(1));
    let late = push(&mut queue, NewJob { deadline: Some(now + Duration::from_millis(200)), ..job(now, 0, 0, &[20]) });
    let other = push(&mut queue, NewJob { deadline: Some(now + Duration::from_secs(2)), ..job(now, 0, 0, &[20; 100]) });
    let draw = queue.next_pack(now, limits(8192));
    assert_eq!((draw.cost, draw.picks[0].job, draw.picks[1].job), (160, late, other));
}

#[derive(Clone, Debug)]
struct Arrival {
    /// Packs drawn before this job arrives.
    packs: usize,
    after_ms: u64,
    tenant: usize,
    lane: u64,
    priority: i32,
    /// Prompts, and tokens.
    samples: Vec<(u64, usize)>,
    lives_ms: Option<u64>,
    cancelled: bool,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let samples = prop::collection::vec((0u64..4, 1usize..=16), 1..6);
    let lives = prop::option::weighted(0.3, 0u64..800);
    (0usize..2, 0u64..400, 0usize..3, 0u64..3, -2i32..=2, samples, lives, prop::bool::weighted(0.1)).prop_map(
        |(packs, after_ms, tenant, lane, priority, samples, lives_ms, cancelled)| Arrival {
            packs,
            after_ms,
            tenant,
            lane,
            priority,
            samples,
            lives_ms,
            cancelled,
        },
    )
}

const TENANTS: [&str; 3] = ["a", "b", "c"];

proptest! {
    #[test]
    fn each_sample_leaves_once_and_packs_keep_budget_lane_and_order(
        arrivals in prop::collection::vec(arrival(), 1..40), budget in 16usize..40, max_samples in 1usize..8,
    ) {
        let (mut queue, mut now) = (Queue::new(ROOMY, AGEING), Instant::now());
        let limits = PackLimits { max_tokens: budget, max_samples, wait: Duration::ZERO };
        let (mut jobs, mut left) = (BTreeMap::new(), HashSet::new());
        let mut waiting = 0usize;
        let mut steps: Vec<Option<Arrival>> = Vec::new();
        for arrival in arrivals {
            steps.extend(std::iter::repeat_n(None, arrival.packs));
            steps.push(Some(arrival));
        }
        steps.extend(std::iter::repeat_n(None, 300));
        for step in steps {
            if let Some(arrival) = step {
                now += Duration::from_millis(arrival.after_ms);
                let deadline = arrival.lives_ms.map(|ms| now + Duration::from_millis(ms));
                // Prompts of 0, 4, 8 and 12 tokens.
                let sample = |(prompt, tokens): &(u64, usize)| load(arrival.lane, *prompt, (4 * *prompt as usize).min(tokens - 1), *tokens);
                let samples = arrival.samples.iter().map(sample).collect();
                let new = NewJob { deadline, samples, ..of(TENANTS[arrival.tenant], job(now, arrival.lane, arrival.priority, &[])) };
                waiting += arrival.samples.len();
                jobs.insert(push(&mut queue, new.clone()), (new, arrival.cancelled));
                continue;
            }
            // Whoever cancels does so before the next pack.
            for (id, (new, _)) in jobs.iter().filter(|(_, (_, cancelled))| *cancelled) {
                queue.remove(*id);
                left.extend((0..new.samples.len()).map(|sample| (*id, sample)));
            }
            let front = queue.front.clone();
            let draw = queue.next_pack(now, limits);
            let of_pick = |pick: &Pick| &jobs[&pick.job].0.samples[pick.sample];
            prop_assert!(draw.computed <= budget && draw.picks.len() <= max_samples);
            // One sample costs 41 at most.
            prop_assert!(draw.cost <= 2 * budget || draw.picks.len() == 1, "{draw:?}");
            prop_assert_eq!((draw.cost, draw.computed), together(draw.picks.iter().map(of_pick)));
            let lanes: HashSet<u64> = draw.picks.iter().map(|pick| jobs[&pick.job].0.lane).collect();
            prop_assert!(lanes.len() <= 1);
            for pick in draw.picks.iter().chain(&draw.expired) {
                prop_assert!(left.insert((pick.job, pick.sample)), "{pick:?} left twice");
                prop_assert_eq!(pick.tokens, jobs[&pick.job].0.samples[pick.sample].tokens);
            }
            for pick in &draw.expired {
                prop_assert!(jobs[&pick.job].0.deadline.is_some_and(|deadline| deadline <= now));
            }
            for pick in &draw.picks {
                prop_assert!(jobs[&pick.job].0.deadline.is_none_or(|deadline| deadline > now) && !jobs[&pick.job].1);
                // Samples of a job leave in order, and those of a pack stand side by side.
                prop_assert!((0..pick.sample).all(|before| left.contains(&(pick.job, before))));
            }
            prop_assert!(draw.picks.windows(2).all(|pair| pair[0].job != pair[1].job || pair[0].sample + 1 == pair[1].sample));
            let mut seen = HashSet::new();
            let runs = draw.picks.chunk_by(|a, b| a.job == b.job);
            prop_assert!(runs.clone().all(|run| seen.insert(run[0].job)));
            // What had no room in the last pack of its lane is in this one.
            let begins = |id: &JobId| draw.picks.iter().any(|pick| pick.job == *id);
            let waits = |lane: &u64, id: &JobId| !lanes.contains(lane) || draw.expired.iter().any(|pick| pick.job == *id);
            prop_assert!(front.iter().all(|(lane, id)| waits(lane, id) || begins(id)), "{front:?} {draw:?}");
            // A job that is untouched came before none of its tenant, lane and urgency that was begun, but for those that ride,
            // and those that fill a pack up in which it has no room.
            let rides = |run: &&[Pick]| {
                let kin = of_pick(&run[0]).kin();
                let akin = |pick: &&Pick| pick.job != run[0].job && of_pick(pick).marks.iter().any(|mark| Some(mark.hash) == kin);
                draw.picks.iter().any(|pick| akin(&pick))
            };
            let begun = runs.filter(|run| run[0].sample == 0 && !rides(run)).map(|run| &jobs[&run[0].job].0);
            let begun: Vec<&NewJob> = begun.collect();
            for (id, (new, cancelled)) in &jobs {
                let with = together(draw.picks.iter().map(of_pick).chain(new.samples.first()));
                let room = draw.picks.len() < max_samples && with.0.max(with.1) <= budget;
                let untouched = !cancelled && !left.contains(&(*id, 0)) && room;
                let before = |other: &&NewJob| {
                    new.tenant == other.tenant && new.lane == other.lane && new.priority >= other.priority && new.arrived < other.arrived
                };
                prop_assert!(!untouched || !begun.iter().any(before), "{id:?} was passed over");
            }
            prop_assert_eq!(queue.samples(), waiting - left.len());
        }
        prop_assert!(queue.is_empty() && queue.tenants.is_empty() && queue.line.is_empty() && queue.deadlines.is_empty());
        prop_assert!(queue.kin.is_empty());
        prop_assert_eq!((queue.tokens(), left.len()), (0, waiting));
    }

    #[test]
    fn a_request_of_any_sizes_goes_behind_others_after_each_pack_that_it_filled(
        budget in 16usize..64, sizes in prop::collection::vec(1usize..=8, 300), packs in 1usize..5,
    ) {
        let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
        let large = push(&mut queue, job(now, 0, 0, &sizes));
        for _ in 0..packs {
            prop_assert!(queue.next_pack(now, limits(budget)).picks.iter().all(|pick| pick.job == large));
            // It takes all that is left of a pack, and never all of it.
            let small = push(&mut queue, job(now, 0, 0, &[8]));
            let draw = queue.next_pack(now, limits(budget));
            prop_assert!(names(&draw).contains(&(small, 0)), "{draw:?}");
        }
    }

    #[test]
    fn nobody_starves_under_a_flood_of_higher_priority(difference in 1i32..5, flood in 1usize..4) {
        // One pack of one sample per tick, `flood` urgent arrivals per tick: more than the device can do.
        let (mut queue, start) = (Queue::new(ROOMY, AGEING), Instant::now());
        let tick = Duration::from_millis(100);
        let patient = push(&mut queue, job(start, 0, 0, &[1]));
        // Overtaken only by what arrives within `difference * ageing`, so served once all of that is done.
        let bound = 1 + flood * (difference as usize * 10 + 1);
        let served = (0..=bound).find(|&i| {
            let now = start + tick * i as u32;
            for _ in 0..flood {
                push(&mut queue, job(now, 1, difference, &[1]));
            }
            let draw = queue.next_pack(now, PackLimits { max_tokens: 1, max_samples: 1, wait: Duration::ZERO });
            names(&draw).contains(&(patient, 0))
        });
        prop_assert!(served.is_some(), "still queued after {bound} packs");
    }

    #[test]
    fn backlogged_tenants_get_the_same_share_whatever_they_send(
        sizes in prop::collection::vec(prop::collection::vec(1usize..40, 3..30), 2..5), priorities in prop::collection::vec(-9i32..9, 5),
        budget in 16usize..80, packs in 20usize..60,
    ) {
        let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
        let mut whose = HashMap::new();
        // Every tenant has more than all packs can take: one in large requests, one in small ones.
        for (tenant, sizes) in sizes.iter().enumerate() {
            let mut tokens = 0;
            while tokens < 2 * packs * budget {
                let id = push(&mut queue, of(&tenant.to_string(), job(now, 0, priorities[tenant], sizes)));
                whose.insert(id, tenant);
                tokens += sizes.iter().sum::<usize>();
            }
        }
        let mut served = vec![0usize; sizes.len()];
        for _ in 0..packs {
            for pick in queue.next_pack(now, limits(budget)).picks {
                served[whose[&pick.job]] += pick.tokens;
            }
            // A turn and the sample that ends it, a sample that was larger than a pack, and a pack of what was filled up.
            let apart = served.iter().max().expect("tenants") - served.iter().min().expect("tenants");
            prop_assert!(apart <= budget.div_ceil(TURNS_PER_PACK) + 2 * 40 + budget, "{served:?}");
        }
    }

    #[test]
    fn whoever_sends_one_sample_at_a_time_gets_no_more_than_those_that_wait(
        size in 1usize..80, patient in prop::collection::vec(1usize..40, 1..4), budget in 16usize..80, packs in 20usize..60,
    ) {
        let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
        let mut whose = HashMap::new();
        for (tenant, size) in patient.iter().enumerate() {
            let backlog = job(now, 0, 0, &vec![*size; 2 * packs * (budget + 80)]);
            whose.insert(push(&mut queue, of(&tenant.to_string(), backlog)), tenant);
        }
        let mut served = vec![0usize; patient.len() + 1];
        let mut waits = false;
        for _ in 0..packs {
            if !std::mem::replace(&mut waits, true) {
                whose.insert(push(&mut queue, of("one", job(now, 0, 0, &[size]))), patient.len());
            }
            for pick in queue.next_pack(now, limits(budget)).picks {
                served[whose[&pick.job]] += pick.tokens;
                waits &= whose[&pick.job] < patient.len();
            }
            let (one, others) = served.split_last().expect("tenants");
            // A turn, the samples that end it, and a pack of what was filled up before its time.
            let most = others.iter().min().expect("tenants") + budget.div_ceil(TURNS_PER_PACK) + size + 40 + budget;
            prop_assert!(*one <= most, "{served:?}");
        }
    }

    #[test]
    fn backlogged_tenants_get_the_same_share_of_packs_whatever_rides(
        prompts in prop::collection::vec((1usize..20, 1usize..20), 2..5), single in prop::collection::vec(any::<bool>(), 5),
        budget in 40usize..80, packs in 20usize..60,
    ) {
        let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
        let mut jobs = HashMap::new();
        for (tenant, (prompt, completion)) in prompts.iter().enumerate() {
            // Groups of five: each one request, or five of them.
            let (mut cost, mut group) = (0, 0);
            while cost < 4 * packs * budget {
                let sample = load(0, (tenant + 10 * group) as u64, *prompt, prompt + completion);
                cost += together(vec![&sample; 5]).0;
                group += 1;
                let (requests, samples) = if single[tenant] { (5, 1) } else { (1, 5) };
                for _ in 0..requests {
                    let new = NewJob { samples: vec![sample.clone(); samples], ..of(&tenant.to_string(), job(now, 0, 0, &[])) };
                    jobs.insert(push(&mut queue, new), (tenant, sample.clone()));
                }
            }
        }
        let mut served = vec![0usize; prompts.len()];
        for _ in 0..packs {
            let draw = queue.next_pack(now, limits(budget));
            for (tenant, served) in served.iter_mut().enumerate() {
                let own = draw.picks.iter().map(|pick| &jobs[&pick.job]).filter(|(of, _)| *of == tenant);
                *served += together(own.map(|(_, load)| load)).0;
            }
            // Turns, a pack of debt, and one that is filled, at its most, by what rides with the last sample.
            let apart = served.iter().max().expect("tenants") - served.iter().min().expect("tenants");
            let largest = prompts.iter().map(|(prompt, completion)| load(0, 0, 0, prompt + completion).cost).max().expect("tenants");
            prop_assert!(apart <= 2 * budget.div_ceil(TURNS_PER_PACK) + 3 * budget.max(largest), "{served:?}");
        }
    }

    #[test]
    fn nobody_waits_for_more_than_one_turn_of_each_tenant_however_much_rides(
        floods in prop::collection::vec(2usize..20, 1..5), same_prompt in any::<bool>(), budget in 32usize..80, packs in 1usize..20,
    ) {
        let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
        for (tenant, prompt) in floods.iter().enumerate() {
            let samples = vec![load(0, if same_prompt { 0 } else { tenant as u64 }, if same_prompt { 4 } else { *prompt }, 20); 40 * budget];
            push(&mut queue, NewJob { samples, ..of(&tenant.to_string(), job(now, 0, 100, &[])) });
        }
        for _ in 0..packs {
            queue.next_pack(now, limits(budget));
        }
        let small = push(&mut queue, of("small", job(now, 0, -100, &[1])));
        let bound = floods.len() + 1;
        let served = (0..bound).any(|_| names(&queue.next_pack(now, limits(budget))).contains(&(small, 0)));
        prop_assert!(served, "not within {bound} packs");
    }

    #[test]
    fn filling_up_overtakes_nobody_for_long_and_leaves_little_room(
        large in prop::collection::vec(17usize..=32, 1..3), small in 2usize..6, budget in 32usize..50, lanes in 1u64..3,
    ) {
        // Large samples do not fit beside each other; small ones of the same tenants arrive faster than they are scored.
        let (mut queue, start) = (Queue::new(ROOMY, AGEING), Instant::now());
        let mut patient: HashSet<JobId> = HashSet::new();
        for (tenant, size) in large.iter().enumerate() {
            push(&mut queue, of(TENANTS[tenant], job(start, 0, 0, &vec![small; 4 * budget])));
            let new = of(TENANTS[tenant], job(start, tenant as u64 % lanes, 0, &[*size]));
            patient.insert(push(&mut queue, new));
        }
        // Behind the first small ones, of which a tenant gives a quarter of a pack in a turn; and a turn is cut short by as much
        // as filled up a pack before.
        let bound = 20 * large.len();
        for i in 0..bound {
            let now = start + Duration::from_millis(10) * i as u32;
            for tenant in &TENANTS[..large.len()] {
                push(&mut queue, of(tenant, job(now, 0, 0, &vec![small; budget / small])));
            }
            let draw = queue.next_pack(now, limits(budget));
            if draw.picks.iter().any(|pick| pick.tokens == small) {
                // Whoever waits has small ones, but those that owe a pack take no more.
                let owes = queue.tenants.values().filter(|tenant| !tenant.may_owe(limits(budget))).count();
                prop_assert!(budget - draw.cost < small || owes > 0 || lanes > 1, "{draw:?}");
            }
            for pick in draw.picks {
                patient.remove(&pick.job);
            }
        }
        prop_assert!(patient.is_empty(), "{patient:?} still queued after {bound} packs");
    }

    #[test]
    fn what_rides_overtakes_nobody_for_long(difference in 1i32..3, flood in 1usize..3, tenants in 1usize..3, shared in 2usize..10) {
        // Urgent samples that are all akin come faster than they are scored; each tenant has one that nothing rides with.
        let (mut queue, start) = (Queue::new(ROOMY, AGEING), Instant::now());
        let tick = Duration::from_millis(100);
        let mut patient: HashSet<JobId> = (0..tenants).map(|tenant| push(&mut queue, of(TENANTS[tenant], job(start, 0, 0, &[9])))).collect();
        let bound = tenants * (1 + 2 * flood * (difference as usize * 10 + 1));
        for i in 0..=bound {
            let now = start + tick * i as u32;
            for tenant in 0..tenants * flood {
                let samples = vec![load(0, 1, shared, 10); 2];
                push(&mut queue, NewJob { samples, ..of(TENANTS[tenant % tenants], job(now, 0, difference, &[])) });
            }
            for pick in queue.next_pack(now, limits(20)).picks {
                patient.remove(&pick.job);
            }
        }
        prop_assert!(patient.is_empty(), "{patient:?} still queued after {bound} packs");
    }

    #[test]
    fn a_newcomer_waits_for_one_turn_of_each_tenant_and_no_longer(
        floods in prop::collection::vec(1usize..8, 1..4), budget in 32usize..80, packs in 1usize..20,
    ) {
        let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
        for (tenant, size) in floods.iter().enumerate() {
            push(&mut queue, of(&tenant.to_string(), job(now, 0, 100, &vec![*size; 40 * budget])));
        }
        for _ in 0..packs {
            queue.next_pack(now, limits(budget));
        }
        let small = push(&mut queue, of("small", job(now, 0, -100, &[1])));
        // Each turn is at most a quarter of a pack and a sample of up to 8 tokens.
        let turns = floods.len() * (budget.div_ceil(TURNS_PER_PACK) + 8) + 1;
        let bound = turns.div_ceil(budget - 8);
        let served = (0..bound).any(|_| names(&queue.next_pack(now, limits(budget))).contains(&(small, 0)));
        prop_assert!(served, "not within {bound} packs");
    }
}
