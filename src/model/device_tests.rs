//! What is asked of a device beside computing: by loads, and by forwards that fail.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ThreadId;

use candle_core::{DType, Device};
use serde_json::json;

use super::device::Driver;
use super::replicas::{Lodger, Replicas, copies};
use super::sharing_tests::loaded;
use super::*;
use crate::lock::lock;
use crate::text::Encoding;

/// Remembers what was asked of it, and by whom.
#[derive(Debug, Default)]
struct Recorder {
    settled: Mutex<Vec<(Place, ThreadId)>>,
    broken: AtomicBool,
}

impl Recorder {
    fn settled(&self) -> Vec<(Place, ThreadId)> {
        lock(&self.settled).drain(..).collect()
    }
}

impl Driver for Recorder {
    fn settle(&self, place: Place) -> Result<(), DeviceError> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(DeviceError { place: place.to_string(), problem: "CUDA_ERROR_UNKNOWN".to_owned() });
        }
        lock(&self.settled).push((place, std::thread::current().id()));
        Ok(())
    }

    fn answers(&self, _: &Device) -> bool {
        !self.broken.load(Ordering::Relaxed)
    }
}

/// Cards that are the CPU, with a driver of their own.
fn card(ordinal: usize, driver: &'static Recorder) -> Backend {
    Backend { place: Place::Cuda(ordinal), driver, ..Backend::plain_on_cpu(DType::F32) }
}

fn driver() -> &'static Recorder {
    Box::leak(Box::default())
}

#[test]
fn every_device_has_settled_when_a_load_returns_and_replicas_are_copied_at_the_same_time() {
    let driver = driver();
    let load = |what: &What| load_with(&card(0, driver), what, &mut |_, _| {});
    let model = loaded("llama", json!({}), load).expect("loads");
    let here = std::thread::current().id();
    assert_eq!(driver.settled(), [(Place::Cuda(0), here)]);
    let others = [card(1, driver), card(2, driver)];
    assert_eq!(copies(&model, &others, None).expect("copies").len(), 2);
    let mut settled = driver.settled();
    settled.sort_by_key(|(place, _)| place.to_string());
    let [(Place::Cuda(1), first), (Place::Cuda(2), second)] = settled[..] else { panic!("{settled:?}") };
    assert!(first != second && first != here && second != here);
    driver.broken.store(true, Ordering::Relaxed);
    let refused = loaded("llama", json!({}), load).err().expect("refused").to_string();
    assert_eq!(refused, "device cuda:0: CUDA_ERROR_UNKNOWN");
    assert!(copies(&model, &others, None).is_err());
}

#[test]
fn a_device_that_answers_no_more_is_lost_and_one_that_does_is_not() {
    let driver = driver();
    let failing = |kernel: device::FlashKernel| {
        let backend = Backend { flash: Some(kernel), ..card(0, driver) };
        loaded("llama", json!({}), |what| load_with(&backend, what, &mut |_, _| {})).expect("loads")
    };
    let odd = failing(|_, _, _, _| candle_core::bail!("unlikely"));
    let full = failing(|_, _, _, _| candle_core::bail!("CUDA_ERROR_OUT_OF_MEMORY"));
    let pack = Pack::new(&[Arc::new(Encoding::for_test(vec![1, 2, 3]))]);
    let outcome = |model: &Model| model.forward(&pack).expect_err("fails");
    assert!(matches!(outcome(&odd), ModelError::Failed(_)));
    assert!(matches!(outcome(&full), ModelError::OutOfMemory(_)));
    driver.broken.store(true, Ordering::Relaxed);
    assert!(matches!(outcome(&odd), ModelError::DeviceLost(words) if words.contains("unlikely")));
    assert!(matches!(outcome(&full), ModelError::OutOfMemory(_)));
}

#[test]
fn a_pack_that_was_made_ready_has_the_same_scores_on_whichever_device_it_runs() {
    let driver = driver();
    let several = loaded("mistral", json!({"sliding_window": 5}), |what| {
        let model = load_with(&card(0, driver), what, &mut |_, _| {}).expect("loads");
        let copies = copies(&model, &[card(1, driver)], None).expect("copies");
        Replicas::new(model, copies, device::Turns::new(2))
    });
    let samples = [vec![1, 2, 3], vec![1, 2, 3, 4, 5, 6, 7, 8], vec![9]].map(|ids| Arc::new(Encoding::for_test(ids)));
    let pack = || Pack::forest(&samples, |tokens| several.prefix_key(tokens));
    let bits = |pack: &Pack, device: usize| -> Vec<u32> {
        several.forward_on(device, pack).expect("scored").iter().map(|output| output.reward.to_bits()).collect()
    };
    let expected = bits(&pack(), 0);
    let ready = pack();
    let kinds = || several.each().map(|model| ready.ready().has(model.kind)).collect::<Vec<_>>();
    several.prepare(1, &ready);
    assert_eq!(kinds(), [false, true]);
    assert_eq!(bits(&ready, 0), expected, "what is ready elsewhere is no use here");
    assert_eq!(bits(&ready, 1), expected);
    assert_eq!((kinds(), bits(&ready, 1)), (vec![false, true], expected), "and stays for as long as the pack");
    let kernels = loaded("llama", json!({}), |what| load_with(&Backend::cpu(), what, &mut |_, _| {})).expect("loads");
    kernels.prepare(0, &ready);
    assert!(!ready.ready().has(kernels.kind), "the host needs nothing");
}

#[test]
fn members_of_one_device_share_what_was_made_ready_for_one_of_them() {
    let driver = driver();
    let load = |ordinal: usize| loaded("llama", json!({}), |what| load_with(&card(ordinal, driver), what, &mut |_, _| {})).expect("loads");
    let (first, second, elsewhere) = (load(0), load(0), Lodger::new(load(1), 1, false, device::Turns::new(2)));
    let other = loaded("llama", json!({"rope_theta": 5000.0}), |what| load_with(&card(0, driver), what, &mut |_, _| {})).expect("loads");
    let pack = || Pack::new(&[Arc::new(Encoding::for_test(vec![1, 2, 3]))]);
    let ready = pack();
    first.prepare(0, &ready);
    let made = ready.ready().get::<transformer::Ready>(first.kind).expect("made");
    second.prepare(0, &ready);
    assert!(Arc::ptr_eq(&made, &ready.ready().get(second.kind).expect("there")), "it is not made again");
    assert!(!ready.ready().has(other.kind), "another architecture needs something else");
    elsewhere.prepare(0, &ready);
    assert!(!ready.ready().has(elsewhere.model.kind), "that is for the worker of its own device");
    elsewhere.prepare(1, &ready);
    assert!(ready.ready().has(elsewhere.model.kind));
    let rewards = |model: &dyn RewardModel, pack: &Pack| model.forward(pack).expect("scored")[0].reward.to_bits();
    for model in [&first as &dyn RewardModel, &second, &elsewhere, &other] {
        assert_eq!(rewards(model, &ready), rewards(model, &pack()));
    }
}

#[test]
fn a_model_on_one_device_waits_for_what_runs_there_and_for_nothing_else() {
    let driver = driver();
    let turns = device::Turns::new(2);
    let load = |ordinal: usize| loaded("llama", json!({}), |what| load_with(&card(ordinal, driver), what, &mut |_, _| {})).expect("loads");
    let pack = Pack::new(&[Arc::new(Encoding::for_test(vec![1, 2, 3]))]);
    let everywhere = Replicas::new(load(0), vec![load(1)], turns.clone());
    let second = Lodger::new(load(1), 1, false, turns.clone());
    assert_eq!((second.limits().device_bytes, everywhere.limits().device_bytes > 0), (0, true));
    let busy = turns.take(1).expect("a device");
    let ((begin, begun), (done, finished)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    std::thread::scope(|scope| {
        for device in [0, 1] {
            let (second, pack, begin, done) = (&second, &pack, begin.clone(), done.clone());
            scope.spawn(move || {
                begin.send(()).expect("heard");
                done.send(second.forward_on(device, pack).expect("scored")[0].reward)
            });
        }
        (0..2).for_each(|_| begun.recv().expect("begun"));
        // Device 0 is nobody's turn, and neither of the others has come to an end meanwhile.
        let there = everywhere.forward_on(0, &pack).expect("scored")[0].reward;
        assert!(finished.try_recv().is_err());
        drop(busy);
        assert_eq!([finished.recv().expect("done"), finished.recv().expect("done")], [there; 2]);
    });
    assert!(everywhere.forward_on(2, &pack).is_err());
}

#[test]
fn models_go_round_the_devices_and_the_first_has_most() {
    let cards = |count: usize| (0..count).map(Place::Cuda).collect::<Vec<_>>();
    for (devices, models, most) in [(1, 5, 5), (2, 5, 3), (2, 4, 2), (8, 5, 1), (3, 0, 0)] {
        assert_eq!(most_on_one(&cards(devices), models), most, "{models} on {devices}");
    }
    assert_eq!(most_on_one(&[Place::Cpu; 3], 7), 7, "workers on one processor share it");
}
