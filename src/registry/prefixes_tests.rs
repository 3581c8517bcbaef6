//! Which generation keeps prefixes: the live one, and no other.

use super::testing::*;
use super::*;
use crate::model::RewardModel;

/// What its models may keep together while it is live.
const BYTES: usize = 120;

fn keeping(id: u64, models: &[Arc<FakeModel>]) -> Generation {
    let names = ["rm-0", "rm-1"];
    let members: Vec<_> = names.into_iter().zip(models[1..].iter().cloned()).collect();
    let mut generation = generation(id, models[0].clone(), &members);
    generation.prefix_bytes = BYTES;
    generation
}

fn models(factors: &[f32]) -> Vec<Arc<FakeModel>> {
    factors.iter().map(|factor| FakeModel::new(*factor)).collect()
}

fn bounds(models: &[Arc<FakeModel>]) -> Vec<u64> {
    models.iter().map(|model| model.prefix_bytes().bound).collect()
}

/// What was live gives back on a thread of its own.
fn become_bounds(models: &[Arc<FakeModel>], expected: &[u64]) {
    while bounds(models) != expected {
        std::thread::yield_now();
    }
}

#[test]
fn only_the_live_generation_keeps_prefixes_and_one_that_is_live_again_keeps_them_again() {
    let registry = Registry::new(RegistryMetrics::unregistered(), 1);
    let (first, second, third) = (models(&[1.0, 2.0, 3.0]), models(&[4.0]), models(&[5.0]));
    let first_generation = keeping(1, &first);
    let name = first_generation.fingerprint;
    assert_eq!(bounds(&first), [0; 3], "nothing before it goes live");
    registry.install(first_generation);
    assert_eq!(bounds(&first), [40; 3], "its models share evenly, from the first request on");
    assert_eq!(registry.prefix_bytes(), PrefixBytes { held: 3 * FakeModel::HELD, bound: 120 });

    registry.stage(keeping(2, &second));
    assert_eq!((bounds(&first), bounds(&second)), (vec![40; 3], vec![0]), "what is staged keeps none");
    registry.install(keeping(3, &third));
    assert_eq!(bounds(&third), [120]);
    become_bounds(&first, &[0; 3]);
    assert_eq!(registry.prefix_bytes().bound, 120, "held generations have given their share back");

    registry.activate(name).expect("held");
    become_bounds(&first, &[40; 3]);
    become_bounds(&third, &[0]);
}

#[test]
fn what_is_let_go_gives_back_and_comes_back_with_its_bound() {
    let registry = Registry::new(RegistryMetrics::unregistered(), 0);
    let models = models(&[1.0]);
    registry.install(keeping(1, &models));
    let live = registry.current().expect("live");
    registry.vacate();
    become_bounds(&models, &[0]);
    assert_eq!(registry.prefix_bytes(), PrefixBytes::default(), "nothing is live");
    registry.come_back(live);
    become_bounds(&models, &[120]);
}

#[test]
fn the_merge_of_one_is_its_only_member_and_counts_once() {
    let registry = Registry::new(RegistryMetrics::unregistered(), 0);
    let model = FakeModel::new(1.0);
    registry.install(keeping(1, &[model.clone(), model.clone()]));
    assert_eq!((model.prefix_bytes().bound, registry.prefix_bytes().bound), (120, 120));
}
