//! The bound against what a forward really takes, measured in a process of its own, and its order.

use std::process::Command;
use std::sync::Arc;

use candle_core::DType;
use proptest::prelude::*;
use serde_json::json;

use super::super::device::Backend;
use super::super::{Pack, RewardModel, What, load_with};
use super::*;
use crate::checkpoint::Readout;
use crate::checkpoint::fixture::{self, Size};
use crate::merge::{MergePlan, Merged, Recipe};
use crate::text::Encoding;

/// Asks a process of this test program to measure.
const ASKED: &str = "WARM_MEASURE_A_FORWARD";

const SIZE: Size = Size { hidden: 256, intermediate: 1024, layers: 2, vocab: 64 };

fn config() -> serde_json::Value {
    let mut config = fixture::config(SIZE);
    config["max_position_embeddings"] = json!(8192);
    config["num_attention_heads"] = json!(8);
    config["num_key_value_heads"] = json!(8);
    config["head_dim"] = json!(32);
    config
}

/// Groups of four samples that share half of their tokens.
fn samples(count: usize, tokens: usize) -> Vec<Arc<Encoding>> {
    let id = |sample: usize, place: usize| 4 + ((if place < tokens / 2 { sample / 4 } else { 100 + sample } * 31 + place * 7) % 50) as u32;
    (0..count).map(|sample| Arc::new(Encoding::for_test((0..tokens).map(|place| id(sample, place)).collect()))).collect()
}

fn kilobytes(of: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix(of)).expect("a line");
    line.trim().trim_end_matches("kB").trim().parse().expect("a number")
}

/// Of the process that was asked: the most bytes that one forward added. Does nothing where nobody asked.
#[test]
fn measure() {
    let Ok(asked) = std::env::var(ASKED) else { return };
    let mut words = asked.split(' ');
    let mut next = || words.next().expect("a word");
    let (way, count, tokens) = (next(), next().parse().expect("a number"), next().parse().expect("a number"));
    let backend = match way {
        "kernels" => Backend::cpu(),
        "plain" => Backend::plain_on_cpu(DType::F32),
        _ => Backend { fixed_rows: Some(crate::model::device::FIXED_ROWS), ..Backend::plain_on_cpu(DType::F32) },
    };
    let dir = tempfile::tempdir().expect("a folder");
    fixture::write(dir.path(), &config(), &fixture::llama(SIZE, "F32", 1), 1).expect("written");
    let plan = Arc::new(MergePlan::open(&Recipe::uniform(&[dir.path().to_owned()]).expect("a recipe")).expect("a plan"));
    let (merged, reward) = (Merged::new(Arc::clone(&plan)).expect("coefficients"), plan.reward().expect("a reward model"));
    let readout = Readout::unnamed(reward.architecture, reward.layout);
    let (architecture, layout) = (reward.architecture, reward.layout);
    let what = What { source: &merged, apart: None, architecture, layout, readout: &readout, max_tokens: usize::MAX };
    let model = load_with(&backend, &what, &mut |_, _| {}).expect("loads");
    let samples = samples(count, tokens);
    let pack = Pack::forest(&samples, |tokens| model.prefix_key(tokens));
    // The high-water mark begins anew.
    std::fs::write("/proc/self/clear_refs", "5").expect("Linux");
    let before = kilobytes("VmRSS:");
    model.forward(&pack).expect("a forward");
    println!("measured {} over {}", 1024 * (kilobytes("VmHWM:") - before), pack.computed_tokens());
}

/// Bytes of a forward, and the tokens that it computed.
fn measured(way: &str, count: usize, tokens: usize) -> (u64, usize) {
    let program = std::env::current_exe().expect("this program");
    let mut run = Command::new(program);
    run.args(["--exact", "model::memory::tests::measure", "--nocapture"]).env(ASKED, format!("{way} {count} {tokens}"));
    let output = run.env("RAYON_NUM_THREADS", "2").env("MALLOC_ARENA_MAX", "1").output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.split_once("measured ")).unwrap_or_else(|| panic!("{text}{:?}", output.stderr)).1;
    let (bytes, tokens) = line.split_once(" over ").expect("two numbers");
    (bytes.parse().expect("bytes"), tokens.parse().expect("tokens"))
}

#[test]
#[cfg(target_os = "linux")]
fn no_forward_takes_more_than_planned_and_the_plan_is_no_wild_guess() {
    let architecture = crate::checkpoint::Architecture::parse(&config()).expect("valid");
    let cases = [("plain", 64, 128), ("plain", 4, 1500), ("plain", 512, 16), ("fixed", 64, 128), ("fixed", 4, 1500), ("kernels", 64, 64)];
    for (name, count, length) in cases {
        let (bytes, tokens) = measured(name, count, length);
        let way = if name == "kernels" { Way::Kernels } else { Way::Plain };
        let load = Load { tokens, longest: length, samples: count };
        let planned = activation_bytes(&architecture, way, Dtype::F32, name == "fixed", load);
        println!(
            "{name} {count} x {length}: {tokens} tokens, {:.1} MB measured, {:.1} MB planned",
            bytes as f64 / 1e6,
            planned as f64 / 1e6
        );
        assert!(bytes <= planned, "{name}: {bytes} of {planned}");
        // What is planned for the libraries has little to do here.
        assert!(planned - WORKSPACE <= 6 * bytes, "{name}: {bytes} of {planned}");
    }
}

fn architecture(more: serde_json::Value) -> crate::checkpoint::Architecture {
    let mut config = config();
    config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    crate::checkpoint::Architecture::parse(&config).expect("valid")
}

proptest! {
    #[test]
    fn the_largest_pack_that_fits_is_found(room in 0u64..1 << 40, most in 1usize..100_000, each in 1u64..1 << 24) {
        let pack = fitting_pack(room, most, |tokens| tokens as u64 * each);
        prop_assert!(pack <= most);
        prop_assert!(pack as u64 * each <= room || pack <= STEP, "{pack}");
        let next = pack + STEP;
        prop_assert!(next > most || next as u64 * each > room, "{next} would fit, too");
    }

    #[test]
    fn more_tokens_never_take_less(tokens in 1usize..200_000, more in 1usize..100_000, longest in 1usize..40_000, way in 0usize..3, fixed in any::<bool>(), wide in any::<bool>()) {
        let (way, dtype) = ([Way::Kernels, Way::Plain, Way::Flash][way], if wide { Dtype::F32 } else { Dtype::Bf16 });
        let architecture = architecture(json!({}));
        let bytes = |tokens| activation_bytes(&architecture, way, dtype, fixed, Load::of(tokens, longest));
        prop_assert!(bytes(tokens) <= bytes(tokens + more));
        prop_assert!(activation_bytes(&architecture, way, Dtype::Bf16, fixed, Load::of(tokens, longest)) <= activation_bytes(&architecture, way, Dtype::F32, fixed, Load::of(tokens, longest)));
    }
}

#[test]
fn flash_attention_needs_no_scores() {
    let architecture = architecture(json!({"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "head_dim": 128}));
    let load = Load::of(16_384, 4096);
    let bytes = |way| activation_bytes(&architecture, way, Dtype::Bf16, false, load);
    assert!(bytes(Way::Flash) < bytes(Way::Plain));
}

#[test]
fn the_least_that_a_device_must_have_free_is_what_its_smallest_packs_take() {
    let (architecture, invariant) = (Architecture::parse(&config()).expect("valid"), true);
    let least = |places: &[Place], arithmetic| least_activation_bytes(places, arithmetic, &architecture, 8192);
    let planned = |way, dtype, fixed| activation_bytes(&architecture, way, dtype, fixed, Load { tokens: 256, longest: 256, samples: 256 });
    let cards = [Place::Metal(0), Place::Metal(1)];
    assert_eq!(least(&cards, Dtype::F32.into()), planned(Way::Plain, Dtype::F32, false));
    let fixed = Arithmetic { dtype: Dtype::Bf16, batch_invariant: invariant };
    assert_eq!(least(&cards, fixed), planned(Way::Plain, Dtype::Bf16, true));
    assert_eq!(least(&[Place::Cpu], fixed), planned(Way::Kernels, Dtype::Bf16, true));
}
