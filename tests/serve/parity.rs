//! What comes over the wire is what transformers computes, for samples and for groups.

use serde_json::Value;
use warm::wire::{self, sample::Input};

use super::running::Running;

pub fn near(found: f32, golden: &Value) -> bool {
    let golden = golden.as_f64().expect("a golden score");
    (f64::from(found) - golden).abs() <= 1e-4 * golden.abs().max(1.0)
}

/// A golden case as a caller would send it.
pub fn sample(case: &Value) -> wire::Sample {
    let text = |name: &str| case[name].as_str().expect("a text").to_owned();
    let input = match case["kind"].as_str() {
        Some("text") => Input::Text(text("text")),
        Some("pair") => Input::Pair(wire::TextPair { first: text("text"), second: text("text_pair") }),
        Some("chat") => {
            let messages = case["messages"].as_array().expect("messages").iter().map(|message| wire::Message {
                role: message["role"].as_str().expect("a role").to_owned(),
                content: message["content"].as_str().expect("a content").to_owned(),
                extra_json: String::new(),
            });
            Input::Conversation(wire::Conversation { messages: messages.collect(), ..Default::default() })
        }
        _ => {
            let ids = case["input_ids"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32);
            Input::Tokens(wire::TokenIds { ids: ids.collect() })
        }
    };
    wire::Sample { input: Some(input) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_merged_model_and_its_members_score_as_transformers_does() {
    let server = Running::start(super::members(), &[("ensemble", "resident")]).await;
    let client = &server.client;
    let cases = super::golden();
    let request = wire::CompareRequest { samples: cases.iter().map(sample).collect(), ..Default::default() };
    let response = client.compare(request).await.expect("compared");
    assert_eq!(response.members, ["member-0", "member-1", "member-2"]);
    assert_eq!(response.samples.len(), cases.len());
    for (case, found) in cases.iter().zip(&response.samples) {
        let merged = found.merged.as_ref().expect("merged");
        let reward = merged.reward.unwrap_or_else(|| panic!("{:?}", merged.failure));
        assert!(near(reward, &case["scores"]["warm"]), "{reward} for {case}");
        for (name, &reward) in response.members.iter().zip(&found.member_rewards) {
            assert!(near(reward, &case["scores"][name]), "{name}: {reward} for {case}");
        }
        assert!(near(found.mean.expect("mean"), &case["scores"]["ens_mean"]), "{found:?}");
    }
    // Alone and in a batch: the same bits.
    let alone = wire::ScoreRequest { samples: vec![sample(&cases[0])], ..Default::default() };
    let alone = client.score(alone).await.expect("scored").scores[0].reward;
    assert_eq!(alone, response.samples[0].merged.as_ref().and_then(|merged| merged.reward));
    server.stopped().await;
}
