//! LoRA members that stand on the device as their base, once, and what each has of its own.

use std::path::{Path, PathBuf};

use serde_json::Value;
use warm::client::Client;
use warm::wire::{self, generation::State};

use super::parity::{near, sample};
use super::running::Running;

fn family() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance/transformers-5/qwen3-lora")
}

fn cases() -> Vec<Value> {
    let text = std::fs::read_to_string(family().join("golden.json")).expect("golden scores");
    let golden: Value = serde_json::from_str(&text).expect("JSON");
    golden["cases"].as_array().expect("cases").clone()
}

fn want(file: &Path, ensemble: &str, members: &[usize]) {
    let members: Vec<String> = members.iter().map(|index| family().join(format!("member-{index}")).display().to_string()).collect();
    // Random weights agree on nothing, so a canary has nothing to compare.
    let text = format!(
        "ensemble: {ensemble}\ncanary_min_rank_correlation: -1\ncanary_max_mean_shift: 1000000\nshadow: {{share: 0}}\nmodel:\n  members: [{}]\n",
        members.join(", ")
    );
    std::fs::write(file.with_extension("new"), text).expect("written");
    std::fs::rename(file.with_extension("new"), file).expect("renamed");
}

/// What members say of the cases, checked against transformers: every member's reward bits, case by case.
async fn compared(client: &Client, fingerprint: &str) -> Vec<Vec<u32>> {
    let cases = cases();
    let options = wire::ScoreOptions { fingerprint: fingerprint.to_owned(), ..Default::default() };
    let request = wire::CompareRequest { samples: cases.iter().map(sample).collect(), options: Some(options), ..Default::default() };
    let response = client.compare(request).await.expect("compared");
    assert_eq!(response.samples.len(), cases.len());
    let mut bits = Vec::new();
    for (case, found) in cases.iter().zip(&response.samples) {
        for (name, &reward) in response.members.iter().zip(&found.member_rewards) {
            assert!(near(reward, &case["scores"][name]), "{name}: {reward} for {case}");
        }
        bits.push(found.member_rewards.iter().map(|reward| reward.to_bits()).collect());
    }
    bits
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_on_one_base_are_compared_asked_alone_reloaded_and_held_as_whole_members_are() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("warm.yaml");
    want(&file, "adapters", &[0, 1]);
    let server = Running::start_from(&file).await;
    let client = &server.client;
    let two = compared(client, "").await;
    assert!(two.iter().all(|rewards| rewards.len() == 2));
    let generations = client.list_generations().await.expect("a list");
    let [live] = generations.as_slice() else { panic!("{generations:?}") };
    assert_eq!((live.ensemble.as_str(), live.members_loaded), ("adapters", true));
    let (fingerprint, bytes) = (live.stamp.clone().expect("a stamp").fingerprint, live.device_bytes);
    // One alone has the same bits as beside the others, in packs of its own.
    let options = wire::ScoreOptions { scorer: "member-1".to_owned(), ..Default::default() };
    for (case, rewards) in cases().iter().zip(&two) {
        let request = wire::ScoreRequest { samples: vec![sample(case)], options: Some(options.clone()), ..Default::default() };
        let alone = client.score(request).await.expect("scored");
        assert_eq!(alone.scores[0].reward.map(f32::to_bits), Some(rewards[1]));
    }

    want(&file, "adapters", &[0, 1, 2]);
    let last = client.reload(wire::ReloadRequest::default(), |_| {}).await.expect("loaded");
    assert_eq!(last.outcome, "loaded");
    let three = compared(client, "").await;
    assert!(three.iter().zip(&two).all(|(three, two)| three[..2] == two[..]), "a member is who it is, whoever stands beside it");
    assert_eq!(compared(client, &fingerprint).await, two, "held");
    let generations = client.list_generations().await.expect("a list");
    assert_eq!(generations.iter().map(wire::Generation::state).collect::<Vec<_>>(), [State::Live, State::Held]);
    let more = generations[0].device_bytes - bytes;

    // The same members as whole models are another equipment, of the same fingerprint, and take a model more each.
    want(&file, "resident", &[0, 1, 2]);
    let last = client.reload(wire::ReloadRequest::default(), |_| {}).await.expect("loaded");
    let whole = last.result.expect("a generation");
    assert_eq!(
        (whole.ensemble.as_str(), &whole.stamp.expect("a stamp").fingerprint),
        ("resident", &generations[0].stamp.clone().expect("a stamp").fingerprint)
    );
    let model = whole.device_bytes / 4;
    assert!(more < model / 3, "one adapter more takes {more} of the {model} bytes of a model");
    assert!(generations[0].device_bytes < whole.device_bytes * 3 / 4, "{} of {}", generations[0].device_bytes, whole.device_bytes);
    server.stopped().await;
}
