use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

const AGEING: Duration = Duration::from_secs(1);
const ROOMY: QueueBounds = QueueBounds { max_samples: 1 << 20, max_tokens: 1 << 30 };

fn limits(max_tokens: usize) -> PackLimits {
    PackLimits { max_tokens, max_samples: 1 << 20 }
}

fn job(arrived: Instant, lane: u64, priority: i32, tokens: &[usize]) -> NewJob {
    NewJob { lane, priority, arrived, deadline: None, tokens: tokens.to_vec() }
}

fn push(queue: &mut Queue, job: NewJob) -> JobId {
    queue.push(job).expect("room")
}

fn names(draw: &Draw) -> Vec<(JobId, usize)> {
    draw.picks.iter().map(|pick| (pick.job, pick.sample)).collect()
}

#[test]
fn priority_goes_first_then_arrival_and_a_large_request_is_spread_over_packs() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let large = push(&mut queue, job(now, 0, 0, &[4, 4, 4]));
    let second = push(&mut queue, job(now, 0, 0, &[2]));
    let urgent = push(&mut queue, job(now, 0, 1, &[3]));
    let draw = queue.next_pack(now, limits(8), |_| false);
    assert_eq!(names(&draw), [(urgent, 0), (large, 0)], "7 tokens: the next 4 do not fit");
    let draw = queue.next_pack(now, limits(8), |_| false);
    assert_eq!(names(&draw), [(large, 1), (large, 2)]);
    assert_eq!((queue.samples(), queue.tokens()), (1, 2));
    assert_eq!(names(&queue.next_pack(now, limits(8), |_| false)), [(second, 0)]);
    assert!(queue.is_empty() && queue.next_pack(now, limits(8), |_| false).is_empty());
}

#[test]
fn a_level_of_priority_is_worth_the_ageing_time_and_no_more() {
    let (mut queue, start) = (Queue::new(ROOMY, AGEING), Instant::now());
    let patient = push(&mut queue, job(start, 0, 0, &[1]));
    let soon = push(&mut queue, job(start + AGEING / 2, 0, 1, &[1]));
    let later = push(&mut queue, job(start + AGEING * 3 / 2, 0, 1, &[1]));
    let order = names(&queue.next_pack(start + AGEING * 2, limits(8), |_| false));
    assert_eq!(order, [(soon, 0), (patient, 0), (later, 0)]);
}

#[test]
fn a_pack_takes_the_lane_of_the_first_in_order_and_no_other() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let a = push(&mut queue, job(now, 1, 0, &[1]));
    let b = push(&mut queue, job(now, 2, 0, &[1]));
    let c = push(&mut queue, job(now, 1, 0, &[1]));
    assert_eq!(names(&queue.next_pack(now, limits(8), |_| false)), [(a, 0), (c, 0)]);
    assert_eq!(names(&queue.next_pack(now, limits(8), |_| false)), [(b, 0)]);
}

#[test]
fn expired_and_cancelled_work_leaves_the_queue_and_is_not_given_out() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let late = push(&mut queue, NewJob { deadline: Some(now + AGEING), ..job(now, 0, 0, &[1, 2]) });
    let gone = push(&mut queue, job(now, 0, 0, &[3]));
    let kept = push(&mut queue, NewJob { deadline: Some(now + AGEING * 2), ..job(now, 0, 0, &[4]) });
    let draw = queue.next_pack(now + AGEING, limits(8), |id| id == gone);
    assert_eq!(names(&draw), [(kept, 0)]);
    assert_eq!(draw.cancelled, [gone]);
    assert_eq!(draw.expired.iter().map(|pick| (pick.job, pick.sample)).collect::<Vec<_>>(), [(late, 0), (late, 1)]);
    assert_eq!((queue.samples(), queue.tokens()), (0, 0));
}

#[test]
fn a_full_queue_refuses_but_an_empty_one_takes_any_job() {
    let (mut queue, now) = (Queue::new(QueueBounds { max_samples: 3, max_tokens: 10 }, AGEING), Instant::now());
    push(&mut queue, job(now, 0, 0, &[20]));
    assert_eq!(queue.push(job(now, 0, 0, &[1])), Err(QueueFull { samples: 1, tokens: 20 }));
    queue.next_pack(now, limits(8), |_| false);
    push(&mut queue, job(now, 0, 0, &[1, 1]));
    assert!(queue.push(job(now, 0, 0, &[1, 1])).is_err(), "four samples");
    assert!(queue.push(job(now, 0, 0, &[9])).is_err(), "eleven tokens");
    assert!(queue.push(job(now, 0, 0, &[8])).is_ok());
}

#[test]
fn a_sample_above_the_budget_gets_a_pack_of_its_own() {
    let (mut queue, now) = (Queue::new(ROOMY, AGEING), Instant::now());
    let id = push(&mut queue, job(now, 0, 0, &[9, 1]));
    assert_eq!(names(&queue.next_pack(now, limits(8), |_| false)), [(id, 0)]);
    assert_eq!(names(&queue.next_pack(now, limits(8), |_| false)), [(id, 1)]);
}

#[derive(Clone, Debug)]
struct Arrival {
    /// Packs drawn before this job arrives.
    packs: usize,
    after_ms: u64,
    lane: u64,
    priority: i32,
    tokens: Vec<usize>,
    lives_ms: Option<u64>,
    cancelled: bool,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let tokens = prop::collection::vec(1usize..=16, 1..6);
    let lives = prop::option::weighted(0.3, 0u64..800);
    (0usize..2, 0u64..400, 0u64..3, -2i32..=2, tokens, lives, prop::bool::weighted(0.1)).prop_map(
        |(packs, after_ms, lane, priority, tokens, lives_ms, cancelled)| Arrival {
            packs,
            after_ms,
            lane,
            priority,
            tokens,
            lives_ms,
            cancelled,
        },
    )
}

proptest! {
    #[test]
    fn each_sample_leaves_once_and_packs_keep_budget_lane_and_order(
        arrivals in prop::collection::vec(arrival(), 1..40), budget in 16usize..40, max_samples in 1usize..8,
    ) {
        let (mut queue, mut now) = (Queue::new(ROOMY, AGEING), Instant::now());
        let limits = PackLimits { max_tokens: budget, max_samples };
        let (mut jobs, mut left) = (std::collections::BTreeMap::new(), HashSet::new());
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
                let new = NewJob { deadline, ..job(now, arrival.lane, arrival.priority, &arrival.tokens) };
                waiting += arrival.tokens.len();
                jobs.insert(push(&mut queue, new.clone()), (new, arrival.cancelled));
                continue;
            }
            let draw = queue.next_pack(now, limits, |id| jobs[&id].1);
            prop_assert!(draw.tokens() <= budget && draw.picks.len() <= max_samples);
            let lanes: HashSet<u64> = draw.picks.iter().map(|pick| jobs[&pick.job].0.lane).collect();
            prop_assert!(lanes.len() <= 1);
            for pick in draw.picks.iter().chain(&draw.expired) {
                prop_assert!(left.insert((pick.job, pick.sample)), "{pick:?} left twice");
                prop_assert_eq!(pick.tokens, jobs[&pick.job].0.tokens[pick.sample]);
            }
            for pick in &draw.expired {
                prop_assert!(jobs[&pick.job].0.deadline.is_some_and(|deadline| deadline <= now));
            }
            for pick in &draw.picks {
                prop_assert!(jobs[&pick.job].0.deadline.is_none_or(|deadline| deadline > now) && !jobs[&pick.job].1);
            }
            for id in &draw.cancelled {
                for sample in 0..jobs[id].0.tokens.len() {
                    left.insert((*id, sample));
                }
            }
            // Of two samples side by side, the first one's job does not come after the second one's.
            let rank = |id: JobId| {
                let new = &jobs[&id].0;
                let level = AGEING.as_secs_f64() * f64::from(new.priority);
                (new.arrived.duration_since(jobs.values().next().expect("a job").0.arrived).as_secs_f64() - level, id)
            };
            for pair in draw.picks.windows(2) {
                let ((first, a), (second, b)) = (rank(pair[0].job), rank(pair[1].job));
                prop_assert!(first < second + 1e-9 && (a != b || pair[0].sample + 1 == pair[1].sample));
            }
            // Nothing of this lane that is left comes before what was given out.
            if let Some(last) = draw.picks.last() {
                let (bound, _) = rank(last.job);
                let passed = jobs.iter().filter(|(id, (new, _))| lanes.contains(&new.lane) && rank(**id).0 < bound - 1e-9);
                for (id, (new, _)) in passed {
                    for sample in 0..new.tokens.len() {
                        prop_assert!(left.contains(&(*id, sample)), "{id:?} was passed over");
                    }
                }
            }
            prop_assert_eq!(queue.samples(), waiting - left.len());
        }
        prop_assert!(queue.is_empty());
        prop_assert_eq!((queue.tokens(), left.len()), (0, waiting));
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
            let draw = queue.next_pack(now, PackLimits { max_tokens: 1, max_samples: 1 }, |_| false);
            names(&draw).contains(&(patient, 0))
        });
        prop_assert!(served.is_some(), "still queued after {bound} packs");
    }
}
