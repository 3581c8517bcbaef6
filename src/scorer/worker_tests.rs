//! Steps the worker by hand: no thread, no sleep.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use std::time::Duration;

use super::super::line::Answer;
use super::*;
use crate::model::{Limits, ModelError, Output, Pack, RewardModel};
use crate::scorer::{Admission, AdmissionOptions, Permit, SampleError, Submission};
use crate::text::Encoding;

/// Gives every sample's sum of ids; panics, fails or forgets a sample where an id asks for it.
#[derive(Default)]
struct Sum {
    seen: Mutex<Vec<Vec<u32>>>,
    forwards: AtomicU64,
    clock: Clock,
    /// Tokens that the device has room for; 0 for any number.
    room: AtomicU64,
    /// The device is broken.
    broken: AtomicBool,
    /// The device of every forward, in order.
    devices: Mutex<Vec<usize>>,
    /// Samples of the packs that were made ready, and how many forwards there were then.
    prepared: Mutex<Vec<(usize, u64)>>,
    /// What happens in the next forward.
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

const PANIC: u32 = 1001;
const FAIL: u32 = 1002;
const FORGET: u32 = 1003;

impl RewardModel for Sum {
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        self.forwards.fetch_add(1, Ordering::Relaxed);
        self.clock.advance(Duration::from_millis(10));
        if let Some(meanwhile) = lock(&self.meanwhile).take() {
            meanwhile();
        }
        if self.broken.load(Ordering::Relaxed) {
            return Err(ModelError::DeviceLost("CUDA_ERROR_ILLEGAL_ADDRESS".to_owned()));
        }
        let room = self.room.load(Ordering::Relaxed);
        if room > 0 && pack.computed_tokens() as u64 > room {
            return Err(ModelError::OutOfMemory(format!("{} tokens", pack.computed_tokens())));
        }
        let samples: Vec<Vec<u32>> = (0..pack.len()).map(|i| pack.encoding(i).ids().to_vec()).collect();
        lock(&self.seen).extend(samples.clone());
        let asked = |id: u32| samples.iter().flatten().any(|&found| found == id);
        assert!(!asked(PANIC), "asked to panic");
        if asked(FAIL) {
            return Err(ModelError::Failed("asked to fail".to_owned()));
        }
        let outputs = samples.iter().map(|ids| Output {
            reward: ids.iter().sum::<u32>() as f32,
            values: vec![ids.iter().sum::<u32>() as f32],
            steps: Vec::new(),
            pooled_position: ids.len() - 1,
            shared_tokens: 0,
            cached_tokens: 0,
        });
        Ok(outputs.skip(usize::from(asked(FORGET))).collect())
    }

    fn forward_on(&self, device: usize, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        lock(&self.devices).push(device);
        self.forward(pack)
    }

    fn prepare(&self, _: usize, pack: &Pack) {
        lock(&self.prepared).push((pack.len(), self.forwards.load(Ordering::Relaxed)));
    }

    fn limits(&self) -> Limits {
        Limits { max_tokens: 8, outputs: 1, parameters: 0, device_bytes: 0 }
    }

    fn prefix_key(&self, _: usize) -> Option<crate::model::PrefixKey> {
        Some(Vec::new())
    }
}

struct Bench {
    clock: Clock,
    handle: ScorerHandle,
    worker: Worker,
    model: Arc<Sum>,
}

impl Bench {
    fn new(options: ScorerOptions) -> Self {
        let clock = Clock::manual();
        let (handle, worker) = pair(options, clock.clone(), ScorerMetrics::unregistered());
        Self { model: Arc::new(Sum { clock: clock.clone(), ..Sum::default() }), clock, handle, worker }
    }

    fn submission(&self, samples: &[&[u32]]) -> Submission {
        Submission {
            models: Arc::new([self.model.clone()]),
            lane: 0,
            encodings: samples.iter().map(|ids| Arc::new(Encoding::for_test(ids.to_vec()))).collect(),
            deadline: None,
            tenant: Arc::default(),
            priority: 0,
            permit: Permit::unlimited(),
            span: tracing::Span::none(),
        }
    }

    fn submit(&self, samples: &[&[u32]]) -> impl Future<Output = Answer> + use<> {
        self.handle.submit(self.submission(samples)).expect("room")
    }
}

fn small() -> ScorerOptions {
    ScorerOptions { max_pack_tokens: 8, ..ScorerOptions::default() }
}

/// What a future has come to, if anything.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn values(answer: Option<Answer>) -> Vec<f32> {
    let reply = answer.expect("answered").expect("scored");
    reply.outcomes.into_iter().map(|outcome| outcome.expect("not expired")[0].values[0]).collect()
}

#[test]
fn a_request_over_several_packs_is_answered_once_and_in_order() {
    let mut bench = Bench::new(small());
    let answer = bench.submit(&[&[1, 1, 1, 1], &[2, 2, 2], &[3, 3], &[4]]);
    bench.clock.advance(Duration::from_millis(5));
    assert!(bench.worker.step());
    let mut answer = pin!(answer);
    assert!(now(answer.as_mut()).is_none(), "7 of 10 tokens");
    assert!(bench.worker.step() && !bench.worker.step());
    let reply = now(answer).expect("answered").expect("scored");
    assert_eq!((reply.queue, reply.forward), (Duration::from_millis(5), Duration::from_millis(20)));
    assert_eq!(values(Some(Ok(reply))), [4.0, 6.0, 6.0, 4.0]);
    let metrics = &bench.worker.shared.metrics;
    assert_eq!((metrics.samples.get(), metrics.tokens_computed.get(), metrics.queue_samples.get()), (4, 10, 0));
}

#[test]
fn what_samples_of_different_requests_share_is_counted_as_computed_once() {
    let mut bench = Bench::new(ScorerOptions::default());
    let prompt = [7; crate::model::MIN_SHARED];
    let [first, second] = [1, 2].map(|completion| bench.submit(&[&[&prompt[..], &[completion]].concat()]));
    bench.worker.step();
    assert_eq!((values(now(first)).len(), values(now(second)).len()), (1, 1));
    let metrics = &bench.worker.shared.metrics;
    assert_eq!((metrics.tokens_computed.get(), metrics.tokens_shared.get()), (prompt.len() as u64 + 2, prompt.len() as u64));
}

#[test]
fn all_models_of_a_lane_run_over_the_same_pack_in_order() {
    let mut bench = Bench::new(small());
    let other = Arc::new(Sum::default());
    let submission = Submission { models: Arc::new([bench.model.clone(), other.clone()]), ..bench.submission(&[&[1, 2], &[5]]) };
    let answer = bench.handle.submit(submission).expect("room");
    bench.worker.step();
    let reply = now(answer).expect("answered").expect("scored");
    assert!(reply.outcomes.iter().all(|outcome| outcome.as_ref().is_ok_and(|outputs| outputs.len() == 2)));
    assert_eq!(*lock(&bench.model.seen), *lock(&other.seen));
}

#[test]
fn a_panic_or_a_failure_costs_its_request_and_the_worker_lives_on() {
    for (bad, words) in [(PANIC, "the forward pass panicked: asked to panic"), (FAIL, "asked to fail"), (FORGET, "expected 1 outputs")] {
        let mut bench = Bench::new(small());
        let fine = bench.submit(&[&[1; 8]]);
        let broken = bench.submit(&[&[bad; 8], &[2; 8]]);
        let after = bench.submit(&[&[3; 8]]);
        while bench.worker.step() {}
        assert_eq!(values(now(fine)), [8.0]);
        let error = now(broken).expect("answered").expect_err("its sample failed");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(values(now(after)), [24.0]);
        assert_eq!(bench.model.forwards.load(Ordering::Relaxed), 3, "the rest of the broken request is not run");
        assert!(bench.handle.is_alive());
    }
}

#[test]
fn a_pack_is_made_before_its_time_only_if_its_own_lane_fills_it() {
    let mut bench = Bench::new(small());
    let submit =
        |bench: &Bench, lane, sample: &[u32]| bench.handle.submit(Submission { lane, ..bench.submission(&[sample]) }).expect("room");
    let first = submit(&bench, 0, &[1; 8]);
    let second = submit(&bench, 1, &[2; 3]);
    let third = submit(&bench, 0, &[3; 8]);
    assert!(bench.worker.step());
    // There is room beside the second one, which comes next.
    let late = submit(&bench, 1, &[4; 5]);
    assert!(bench.worker.step());
    assert_eq!([now(first), now(second), now(late)].map(values), [[8.0], [6.0], [20.0]]);
    assert!(now(third).is_none());
    assert_eq!(bench.model.forwards.load(Ordering::Relaxed), 2);
}

#[test]
fn a_sample_that_fails_takes_down_no_stranger_in_its_pack() {
    for (bad, outcome) in [(PANIC, "panic"), (FAIL, "error"), (FORGET, "error")] {
        let mut bench = Bench::new(ScorerOptions::default());
        let samples: Vec<_> = (0..40).map(|id| bench.submit(&[&[id; 8], &[if id == 23 { bad } else { 100 }; 8]])).collect();
        assert!(bench.worker.step());
        for (id, answer) in (0..).zip(samples) {
            match id {
                23 => drop(now(answer).expect("answered").expect_err("its sample failed")),
                _ => assert_eq!(values(now(answer)), [8.0 * id as f32, 800.0]),
            }
        }
        // The whole, and both halves of what holds it, down to its own request.
        let forwards = bench.model.forwards.load(Ordering::Relaxed);
        assert!(forwards <= 13, "{forwards}");
        let metrics = &bench.worker.shared.metrics;
        assert_eq!(metrics.packs.with_label_values(&[outcome]).get(), 1);
        assert!(metrics.samples.get() >= 78, "{}", metrics.samples.get());
        assert_eq!(bench.worker.budget.tokens(), 8192, "nothing is learned of the room");
        assert!(bench.handle.is_alive());
    }
}

#[test]
fn a_model_that_always_fails_is_not_asked_for_every_sample() {
    let mut bench = Bench::new(ScorerOptions::default());
    let answers: Vec<_> = (0..500).map(|_| bench.submit(&[&[FAIL; 8]])).collect();
    assert!(bench.worker.step());
    assert!(answers.into_iter().all(|answer| now(answer).expect("answered").is_err()));
    let forwards = bench.model.forwards.load(Ordering::Relaxed);
    assert!(forwards < 50, "{forwards}");
}

#[test]
fn cancelled_work_is_never_run_and_gives_its_permit_back() {
    let mut bench = Bench::new(small());
    let admission = crate::scorer::Admission::new(Default::default(), ScorerMetrics::unregistered());
    let permit = admission.admit(0).expect("room");
    let gone = bench.handle.submit(Submission { permit, ..bench.submission(&[&[1], &[2]]) }).expect("room");
    let kept = bench.submit(&[&[3]]);
    drop(gone);
    while bench.worker.step() {}
    assert_eq!(values(now(kept)), [3.0]);
    assert_eq!(*lock(&bench.model.seen), [vec![3]]);
    assert_eq!(*admission.in_flight().borrow(), 0);
}

#[test]
fn expired_samples_are_never_run_and_are_told() {
    let mut bench = Bench::new(small());
    let deadline = Some(bench.clock.now() + Duration::from_millis(10));
    let answer = bench.handle.submit(Submission { deadline, ..bench.submission(&[&[1; 8], &[2; 8]]) }).expect("room");
    // The first pack takes 10 ms, so the second sample is too late.
    while bench.worker.step() {}
    let outcomes = now(answer).expect("answered").expect("a reply").outcomes;
    assert!(outcomes[0].is_ok());
    assert_eq!(outcomes[1], Err(SampleError::Expired));
    assert_eq!(lock(&bench.model.seen).len(), 1);
}

#[test]
fn a_full_queue_sheds_but_first_makes_room_of_what_nobody_waits_for() {
    let bench = Bench::new(ScorerOptions { max_queue_samples: 2, ..small() });
    let gone = bench.submit(&[&[1], &[2]]);
    let refused = bench.handle.submit(bench.submission(&[&[3]])).err().expect("full");
    assert!(matches!(refused, ScorerError::Full { .. }), "{refused}");
    drop(gone);
    let _kept = bench.submit(&[&[3]]);
    assert_eq!(bench.handle.queued_samples(), 1);
}

#[test]
fn an_empty_request_is_answered_at_once() {
    let bench = Bench::new(small());
    assert!(values(now(bench.submit(&[]))).is_empty());
}

#[test]
fn a_worker_that_is_gone_is_an_error_for_those_who_wait_and_those_who_come() {
    let Bench { handle, worker, model, clock } = Bench::new(small());
    let bench = |worker| Bench { handle: handle.clone(), worker, model: model.clone(), clock: clock.clone() };
    let bench = bench(worker);
    let waiting = bench.submit(&[&[1]]);
    let submission = bench.submission(&[&[2]]);
    drop(bench);
    assert_eq!(now(waiting), Some(Err(ScorerError::WorkerGone)));
    assert_eq!(handle.submit(submission).err(), Some(ScorerError::WorkerGone));
    assert!(!handle.is_alive());
}

#[test]
fn the_threads_of_several_devices_finish_what_is_queued_and_end_with_the_last_handle() {
    let options = ScorerOptions { threads: 1, devices: 3, ..small() };
    let (handle, threads) = spawn(options, Clock::system(), ScorerMetrics::unregistered()).expect("threads");
    let bench = Bench::new(options);
    let answers: Vec<_> = (0..20).map(|i| handle.clone().submit(bench.submission(&[&[i; 8], &[i; 3]])).expect("room")).collect();
    drop(handle);
    for thread in threads {
        thread.join().expect("no panic");
    }
    for (i, answer) in answers.into_iter().enumerate() {
        assert_eq!(values(now(answer)), [8.0 * i as f32, 3.0 * i as f32]);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_thread_that_computes_stands_behind_and_takes_no_other_with_it() {
    use super::super::niceness;
    let before = niceness();
    let options = ScorerOptions { threads: 1, nice: 3, ..small() };
    let (handle, threads) = spawn(options, Clock::system(), ScorerMetrics::unregistered()).expect("threads");
    let bench = Bench::new(options);
    let found = Arc::new(Mutex::new(None));
    let in_forward = found.clone();
    let here = move || *lock(&in_forward) = Some((std::thread::current().name().map(str::to_owned), niceness()));
    *lock(&bench.model.meanwhile) = Some(Box::new(here));
    let answer = handle.submit(bench.submission(&[&[1]])).expect("room");
    drop(handle);
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert_eq!(values(now(answer)), [1.0]);
    assert_eq!(lock(&found).take(), Some((Some("warm-device-0".to_owned()), (before + 3).min(19))));
    assert_eq!(niceness(), before);
}

#[test]
fn a_pack_that_was_made_ready_goes_to_the_first_device_that_has_time() {
    let clock = Clock::manual();
    let (handle, mut workers) = crew(ScorerOptions { devices: 2, ..small() }, clock.clone(), ScorerMetrics::unregistered());
    let bench = Bench { model: Arc::default(), handle, worker: workers.remove(0), clock };
    let (first, second) = (bench.submit(&[&[1; 8]]), bench.submit(&[&[2; 8]]));
    let (mut one, mut other) = (bench.worker, workers.remove(0));
    assert!(one.step() && other.step());
    assert_eq!((values(now(first)), values(now(second))), (vec![8.0], vec![16.0]));
    assert_eq!(*lock(&bench.model.devices), [0, 1]);
}

#[test]
fn who_cancels_during_a_forward_gives_the_permit_back_when_the_device_has_let_go() {
    for (samples, skipped) in [(vec![&[1u32; 8][..]], 0), (vec![&[1; 8], &[2; 8]], 1)] {
        let mut bench = Bench::new(small());
        let admission = crate::scorer::Admission::new(Default::default(), ScorerMetrics::unregistered());
        let permit = admission.admit(0).expect("room");
        let gone = bench.handle.submit(Submission { permit, ..bench.submission(&samples) }).expect("room");
        let in_flight = admission.in_flight();
        let (handle, seen) = (bench.handle.clone(), Arc::new(Mutex::new(None)));
        let in_forward = seen.clone();
        *lock(&bench.model.meanwhile) = Some(Box::new(move || {
            drop(gone);
            *lock(&in_forward) = Some((*in_flight.borrow(), handle.is_idle()));
        }));
        while bench.worker.step() {}
        assert_eq!(*lock(&seen), Some((1, false)));
        assert_eq!((*admission.in_flight().borrow(), bench.handle.is_idle()), (0, true));
        assert_eq!(bench.model.forwards.load(Ordering::Relaxed), 1, "the rest is not run");
        assert_eq!(bench.worker.shared.metrics.skipped.with_label_values(&["cancelled"]).get(), skipped);
    }
}

#[test]
fn several_devices_take_packs_from_one_queue() {
    let clock = Clock::manual();
    let metrics = ScorerMetrics::unregistered();
    let (handle, mut workers) = crew(ScorerOptions { devices: 2, ..small() }, clock.clone(), metrics.clone());
    assert_eq!(metrics.devices.get(), 2);
    let model = Arc::new(Sum { clock: clock.clone(), ..Sum::default() });
    let (other, worker) = pair(small(), clock.clone(), ScorerMetrics::unregistered());
    let bench = Bench { clock, handle: other, worker, model };
    let answer = handle.submit(bench.submission(&[&[1; 8], &[2; 8], &[3; 8], &[4; 8]])).expect("room");
    for turn in 0..4 {
        assert!(workers[turn % 2].step());
    }
    assert_eq!(values(now(answer)), [8.0, 16.0, 24.0, 32.0]);
    assert_eq!(*lock(&bench.model.devices), [0, 1, 0, 1]);
    // A worker that ends when nobody is there any more leaves the rest to the others.
    let kept = handle.submit(bench.submission(&[&[5]])).expect("room");
    drop(handle);
    drop(workers.pop());
    assert!(workers[0].step());
    assert_eq!(values(now(kept)), [5.0]);
}

#[test]
fn a_pack_that_does_not_fit_is_run_in_parts_and_the_next_ones_are_smaller() {
    let mut bench = Bench::new(ScorerOptions { max_pack_tokens: 64, ..ScorerOptions::default() });
    bench.model.room.store(20, Ordering::Relaxed);
    let samples: Vec<Vec<u32>> = (1..=8).map(|id| vec![id; 8]).collect();
    let samples: Vec<&[u32]> = samples.iter().map(Vec::as_slice).collect();
    let answer = bench.submit(&samples);
    assert!(bench.worker.step());
    assert_eq!(values(now(answer)), [8.0, 16.0, 24.0, 32.0, 40.0, 48.0, 56.0, 64.0]);
    // 64 and twice 32 do not fit, four times 16 does.
    assert_eq!(bench.model.forwards.load(Ordering::Relaxed), 7);
    assert_eq!(bench.worker.budget.tokens(), 16);
    let metrics = &bench.worker.shared.metrics;
    assert_eq!((metrics.packs.with_label_values(&["split"]).get(), metrics.max_pack_tokens.get()), (1, 16));
    assert_eq!((metrics.tokens_computed.get(), metrics.tokens_shared.get()), (64, 0));
    let answer = bench.submit(&samples);
    while bench.worker.step() {}
    assert_eq!(values(now(answer)).len(), 8);
    assert_eq!(bench.model.forwards.load(Ordering::Relaxed), 7 + 4);
    assert!(bench.handle.is_alive());
}

#[test]
fn a_sample_that_does_not_fit_even_alone_costs_its_request_only() {
    let mut bench = Bench::new(ScorerOptions { max_pack_tokens: 64, ..ScorerOptions::default() });
    bench.model.room.store(20, Ordering::Relaxed);
    let fine = bench.submit(&[&[1; 8]]);
    let large = bench.submit(&[&[2; 30]]);
    let after = bench.submit(&[&[3; 8]]);
    while bench.worker.step() {}
    assert_eq!((values(now(fine)), values(now(after))), (vec![8.0], vec![24.0]));
    let error = now(large).expect("answered").expect_err("no room");
    assert!(error.to_string().contains("out of memory"), "{error}");
    // Nothing was done with its tokens.
    let metrics = &bench.worker.shared.metrics;
    assert_eq!((metrics.tokens_computed.get(), metrics.tokens_shared.get(), metrics.tokens_cached.get()), (16, 0, 0));
    assert!(bench.handle.is_alive());
}

#[test]
fn a_lost_device_is_asked_no_more_and_everybody_is_told() {
    let clock = Clock::manual();
    let (handle, mut workers) = crew(ScorerOptions { devices: 2, ..small() }, clock.clone(), ScorerMetrics::unregistered());
    let (other, worker) = pair(small(), clock.clone(), ScorerMetrics::unregistered());
    let bench = Bench { model: Arc::new(Sum { clock: clock.clone(), ..Sum::default() }), clock, handle: other, worker };
    bench.model.broken.store(true, Ordering::Relaxed);
    let running = handle.submit(bench.submission(&[&[1; 8]])).expect("room");
    let queued = handle.submit(bench.submission(&[&[2; 8]])).expect("room");
    assert!(workers[1].step());
    let error = now(running).expect("answered").expect_err("lost");
    assert!(error.to_string().contains("the device is lost: CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    let worker = workers.pop().expect("two");
    let mut ended = pin!(handle.ended());
    assert!(ended.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    // Its thread ends by itself, although there is work.
    worker.run();
    assert!(!handle.is_alive());
    assert!(ended.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
    assert_eq!(now(queued), Some(Err(ScorerError::WorkerGone)));
}

#[test]
fn what_is_allowed_later_holds_from_the_next_pack_on() {
    let mut bench = Bench::new(small());
    let (first, second) = (bench.submit(&[&[1; 8]]), bench.submit(&[&[2; 8]]));
    bench.handle.set_max_pack_tokens(16);
    assert_eq!((bench.handle.max_pack_tokens(), bench.worker.shared.metrics.max_pack_tokens.get()), (16, 16));
    assert!(bench.worker.step());
    assert_eq!((values(now(first)), values(now(second))), (vec![8.0], vec![16.0]));
    assert_eq!(bench.model.forwards.load(Ordering::Relaxed), 1, "both in one pack");
}

#[test]
fn a_pack_is_made_ready_before_its_turn_if_it_waits_for_one() {
    let mut bench = Bench::new(small());
    let answers = [[1, 2, 3, 4], [1, 2, 3, 5], [5, 6, 7, 8], [5, 6, 7, 9]].map(|ids| bench.submit(&[&ids[..]]));
    assert!(bench.worker.step());
    // The second pack, before the first was run: nothing waits behind it.
    let prepared = lock(&bench.model.prepared).clone();
    assert_eq!(prepared.iter().map(|(_, forwards)| *forwards).collect::<Vec<_>>(), [0]);
    while bench.worker.step() {}
    assert_eq!(lock(&bench.model.prepared).len(), 1);
    drop(answers);
}

/// Takes a millisecond a token, in which others may act.
struct Slow {
    clock: Clock,
    meanwhile: Mutex<Box<dyn FnMut() + Send>>,
}

impl RewardModel for Slow {
    fn forward(&self, pack: &Pack) -> Result<Vec<Output>, ModelError> {
        for _ in 0..pack.computed_tokens() {
            self.clock.advance(Duration::from_millis(1));
            lock(&self.meanwhile)();
        }
        let output = Output { reward: 0.0, values: vec![0.0], steps: Vec::new(), pooled_position: 0, shared_tokens: 0, cached_tokens: 0 };
        Ok(vec![output; pack.len()])
    }

    fn limits(&self) -> Limits {
        Limits { max_tokens: 8192, outputs: 1, parameters: 0, device_bytes: 0 }
    }

    fn prefix_key(&self, _: usize) -> Option<crate::model::PrefixKey> {
        None
    }
}

/// A deadline, and the answer.
type Asked = (Instant, std::pin::Pin<Box<dyn Future<Output = Answer> + Send>>);

#[test]
fn a_device_that_is_asked_for_ten_times_what_it_can_do_does_most_of_that_in_time() {
    const PATIENCE: Duration = Duration::from_secs(2);
    let (clock, metrics) = (Clock::manual(), ScorerMetrics::unregistered());
    let admission = Admission::new(AdmissionOptions::default(), metrics.clone());
    let (handle, mut worker) = pair(ScorerOptions::default(), clock.clone(), metrics);
    let model = Arc::new(Slow { clock: clock.clone(), meanwhile: Mutex::new(Box::new(|| ())) });
    let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
    let begun = clock.now();
    // A request of a hundred tokens every ten milliseconds, whatever becomes of those before it.
    let mut next = begun;
    let (waiting, models, time) = (asked.clone(), Arc::downgrade(&model), clock.clone());
    let come = move || {
        let now = time.now();
        while next <= now {
            next += Duration::from_millis(10);
            let Ok(permit) = admission.admit_of(&crate::scorer::Caller::default(), 0, Some(PATIENCE)) else { continue };
            permit.charge(100).expect("room");
            let submission = Submission {
                models: Arc::new([models.upgrade().expect("there") as Arc<dyn RewardModel>]),
                lane: 0,
                encodings: vec![Arc::new(Encoding::for_test(vec![1; 100]))],
                deadline: Some(now + PATIENCE),
                tenant: Arc::default(),
                priority: 0,
                permit,
                span: tracing::Span::none(),
            };
            lock(&waiting).push((now + PATIENCE, Box::pin(handle.submit(submission).expect("room"))));
        }
    };
    *lock(&model.meanwhile) = Box::new(come);
    let (mut in_time, mut late) = (0, 0);
    while clock.now() < begun + Duration::from_secs(60) {
        if !worker.step() {
            clock.advance(Duration::from_millis(1));
            lock(&model.meanwhile)();
        }
        lock(&asked).retain_mut(|(deadline, answer)| {
            let Poll::Ready(answer) = answer.as_mut().poll(&mut Context::from_waker(Waker::noop())) else { return true };
            let scored = answer.expect("no failure").outcomes.iter().all(Result::is_ok);
            if scored && clock.now() <= *deadline {
                in_time += 1;
            } else {
                late += 1;
            }
            false
        });
    }
    *lock(&model.meanwhile) = Box::new(|| ());
    // Ten a second are its capacity.
    assert!(in_time >= 540, "{in_time} in time, {late} late");
    assert!(late <= 200, "{late} late, those of the first seconds, and {in_time} in time");
}
