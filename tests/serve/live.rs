//! Reloads of real checkpoints, through the wire: what is asked while one runs, and after it failed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use warm::client::{Client, ClientError};
use warm::wire::{self, generation::State, sample::Input};

use super::running::Running;

/// A configuration file in a folder of its own, beside copies of all members that may be broken.
pub struct Files {
    pub dir: tempfile::TempDir,
}

/// Members with random weights agree on nothing, so the canary only asks for finite answers that differ.
const LOOSE: &str = "canary_min_rank_correlation: -1\ncanary_max_mean_shift: 1e9\n";

impl Files {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for member in super::members() {
            copy(&member, &dir.path().join(member.file_name().expect("a name")));
        }
        Self { dir }
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("warm.yaml")
    }

    pub fn member(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("member-{index}"))
    }

    /// Writes the configuration: these members, and further settings.
    pub fn want(&self, members: &[usize], settings: &str) {
        let members: Vec<String> = members.iter().map(|index| format!("./member-{index}")).collect();
        let text = format!("{LOOSE}{settings}model:\n  members: [{}]\n", members.join(", "));
        // Replaced as a whole, so that nobody reads half of it.
        std::fs::write(self.dir.path().join("new"), text).expect("written");
        std::fs::rename(self.dir.path().join("new"), self.config()).expect("renamed");
    }
}

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder").flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

fn request(fingerprint: &str) -> wire::ScoreRequest {
    let sample = |text: &str| wire::Sample { input: Some(Input::Text(text.to_owned())) };
    let options = wire::ScoreOptions { fingerprint: fingerprint.to_owned(), ..Default::default() };
    wire::ScoreRequest { samples: ["Hello there.", "a b c"].map(sample).to_vec(), options: Some(options), ..Default::default() }
}

/// The bits of all rewards, and who gave them.
async fn scores(client: &Client, fingerprint: &str) -> Result<(Vec<u32>, String), ClientError> {
    let response = client.score(request(fingerprint)).await?;
    let bits = response.scores.iter().map(|score| score.reward.expect("scored").to_bits()).collect();
    Ok((bits, response.model.expect("a stamp").fingerprint))
}

async fn reload(client: &Client) -> (Vec<wire::ReloadProgress>, Result<wire::ReloadProgress, ClientError>) {
    let mut steps = Vec::new();
    let end = client.reload(wire::ReloadRequest::default(), |step| steps.push(step.clone())).await;
    (steps, end)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_recipe_goes_live_and_the_old_model_scores_for_whoever_names_it() {
    let files = Files::new();
    files.want(&[0, 1], "");
    let server = Running::start_from(&files.config()).await;
    let before = scores(&server.client, "").await.expect("scored");
    let unchanged = reload(&server.client).await.1.expect("fine");
    assert_eq!((unchanged.outcome.as_str(), unchanged.stage.as_str()), ("unchanged", "done"));

    files.want(&[0, 1, 2], "listen: 127.0.0.1:9\n");
    let (steps, end) = reload(&server.client).await;
    let last = end.expect("loaded");
    assert_eq!(last.outcome, "loaded");
    let result = last.result.expect("a generation");
    assert_eq!((result.state(), result.members.len()), (State::Live, 3));
    assert!(steps.iter().any(|step| step.message.contains("3 members")), "the plan: {steps:#?}");
    assert!(steps.iter().any(|step| step.message.contains("needs a restart: listen stays `127.0.0.1:50051`")), "{steps:#?}");
    assert!(steps.iter().any(|step| step.stage == "canary" && step.message.contains("rank correlation")), "{steps:#?}");
    assert_eq!(server.metric("warm_registry_restart_needed"), 1.0);

    // All three members are what transformers scored.
    let golden = super::golden();
    let case = golden.iter().find(|case| case["kind"] == "text").expect("a text");
    let sample = wire::Sample { input: Some(Input::Text(case["text"].as_str().expect("a text").to_owned())) };
    let scored = server.client.score(wire::ScoreRequest { samples: vec![sample], ..Default::default() }).await.expect("scored");
    let (found, expected) = (f64::from(scored.scores[0].reward.expect("scored")), case["scores"]["warm"].as_f64().expect("a score"));
    assert!((found - expected).abs() < 1e-4, "{found} {expected}");

    let after = scores(&server.client, "").await.expect("scored");
    assert_ne!(after, before);
    assert_eq!(scores(&server.client, &before.1).await.expect("held"), before, "bit for bit");
    // The watch begins anew with the new model: three samples of it, and none of the one that is held.
    assert_eq!(server.metric("warm_watch_now{figure=\"samples\",tenant=\"none\"}"), 3.0);
    let states: Vec<_> = server.client.list_generations().await.expect("a list").iter().map(wire::Generation::state).collect();
    assert_eq!(states, [State::Live, State::Held]);
    server.client.activate(&before.1).await.expect("back");
    assert_eq!(scores(&server.client, "").await.expect("scored"), before);
    let unknown = server.client.activate(&"ab".repeat(32)).await.expect_err("unknown");
    assert_eq!(unknown.code(), Some("FAILED_PRECONDITION"));
    assert_eq!(server.client.activate("zz").await.expect_err("no fingerprint").code(), Some("INVALID_ARGUMENT"));
    server.stopped().await;
}

/// What a broken candidate says, while the live model answers as before.
async fn refused(damage: impl FnOnce(&Files)) -> (String, String) {
    let files = Files::new();
    files.want(&[0, 1], "");
    let server = Running::start_from(&files.config()).await;
    let before = scores(&server.client, "").await.expect("scored");
    files.want(&[0, 1, 2], "");
    damage(&files);
    let (steps, end) = reload(&server.client).await;
    assert_eq!(end.expect_err("refused").code(), Some("FAILED_PRECONDITION"));
    let last = steps.last().expect("steps").clone();
    assert_eq!(last.stage, "failed");
    assert_eq!(scores(&server.client, "").await.expect("scored"), before);
    assert_eq!(server.metric(&format!("warm_registry_reloads_total{{outcome=\"{}\"}}", last.outcome)), 1.0);
    assert_eq!(server.metric("warm_registry_reloading"), 0.0);
    server.stopped().await;
    (last.outcome, last.message)
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).expect("readable");
    change(&mut bytes);
    std::fs::write(path, bytes).expect("writable");
}

fn replace(path: &Path, from: &str, to: &str) {
    change(path, |bytes| {
        let text = String::from_utf8(bytes.clone()).expect("UTF-8");
        assert!(text.contains(from), "{text}");
        *bytes = text.replace(from, to).into_bytes();
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_candidate_is_refused_with_its_reason() {
    let shard = |files: &Files| files.member(2).join("model.safetensors");
    let (outcome, words) = refused(|files| change(&shard(files), |bytes| bytes.truncate(bytes.len() - 100))).await;
    assert!(outcome == "no_plan" && words.contains("member-2") && words.contains("model.safetensors"), "{words}");

    let (outcome, words) = refused(|files| {
        change(&shard(files), |bytes| {
            let begin = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
            bytes[begin..begin + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        });
    })
    .await;
    assert!(outcome == "failed" && words.contains("member-2") && words.contains("NaN"), "{outcome}: {words}");

    let (outcome, words) = refused(|files| replace(&files.member(2).join("config.json"), "\"qwen3\"", "\"llama\"")).await;
    assert!(outcome == "no_plan" && words.contains("member-2"), "{words}");

    let (outcome, words) =
        refused(|files| std::fs::write(files.member(2).join("chat_template.jinja"), "{{ messages[0]['content'] }}").expect("written"))
            .await;
    assert!(outcome == "no_plan" && words.contains("chat template"), "{words}");

    // Two words that change places in its vocabulary: every file is whole, and most texts would be read as other words.
    let (outcome, words) = refused(|files| {
        let path = files.member(2).join("tokenizer.json");
        let mut tokenizer: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("JSON");
        let vocabulary = tokenizer["model"]["vocab"].as_object_mut().expect("a vocabulary");
        let ids = ["a", "b"].map(|word| vocabulary[word].clone());
        vocabulary.insert("a".to_owned(), ids[1].clone());
        vocabulary.insert("b".to_owned(), ids[0].clone());
        std::fs::write(path, tokenizer.to_string()).expect("written");
    })
    .await;
    assert!(outcome == "no_plan" && words.contains("member-2") && words.contains("tokenizer"), "{outcome}: {words}");

    let (outcome, words) = refused(|files| std::fs::remove_dir_all(files.member(2)).expect("removed")).await;
    assert!(outcome == "no_plan" && words.contains("member-2"), "{words}");

    let (outcome, words) =
        refused(|files| std::fs::write(files.config(), "model: {members: [./member-0], metod: x}\nlisen: y\n").expect("written")).await;
    assert!(outcome == "no_plan" && words.contains("metod") && words.contains("lisen"), "every mistake at once: {words}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_that_loses_known_preferences_is_refused_with_the_figures() {
    let files = Files::new();
    // What member 0 prefers, so that another model need not.
    std::fs::write(files.dir.path().join("pairs.jsonl"), "{\"text\": \"x\"}\n{\"text\": \"y\"}\n").expect("written");
    files.want(&[0], "canary: pairs.jsonl\n");
    let server = Running::start_from(&files.config()).await;
    let answers = ["a", "yes", "no it is not", "maybe so"];
    let raw = |answer: &str| format!("{{\"prompt\": \"q \", \"completion\": \"{answer}\", \"raw\": true}}\n");
    let samples = answers.map(|answer| wire::Sample { input: Some(Input::Text(format!("q {answer}"))) }).to_vec();
    let scored = server.client.score(wire::ScoreRequest { samples, ..Default::default() }).await.expect("scored");
    let mut ranked: Vec<(f32, &str)> = scored.scores.iter().map(|score| score.reward.expect("scored")).zip(answers).collect();
    ranked.sort_by(|one, other| other.0.total_cmp(&one.0));
    let mut lines: String = ranked
        .windows(2)
        .map(|pair| format!("{{\"prompt\": \"q \", \"chosen\": \"{}\", \"rejected\": \"{}\", \"raw\": true}}\n", pair[0].1, pair[1].1))
        .collect();
    lines.push_str(&raw("b"));
    std::fs::write(files.dir.path().join("pairs.jsonl"), lines).expect("written");
    // The coefficient of minus one half is against whatever member 0 says, and all else is equal.
    let text = format!(
        "{LOOSE}canary: pairs.jsonl\nmodel:\n  members: [{{path: ./member-1, coefficient: 1.5}}, {{path: ./member-0, coefficient: -0.5}}]\n"
    );
    std::fs::write(files.config(), text).expect("written");
    let before = scores(&server.client, "").await.expect("scored");
    let (steps, end) = reload(&server.client).await;
    let last = steps.last().expect("steps");
    assert!(end.is_err() && last.outcome == "refused", "{last:?}");
    assert!(last.message.contains("accuracy on the preferences falls from 1.0000 to"), "{}", last.message);
    assert_eq!(scores(&server.client, "").await.expect("scored"), before);
    assert_eq!(server.metric("warm_registry_canary{figure=\"live_accuracy\"}"), 1.0);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_under_load_fail_no_request_and_every_answer_is_of_one_model() {
    let files = Files::new();
    let wanted: [&[usize]; 3] = [&[0, 1], &[1, 2], &[0, 1, 2]];
    // What each model says when it is alone.
    let mut own: HashMap<String, Vec<u32>> = HashMap::new();
    for members in wanted {
        let folders = members.iter().map(|index| files.member(*index)).collect();
        let alone = Running::start(folders, &[]).await;
        let (bits, name) = scores(&alone.client, "").await.expect("scored");
        own.insert(name, bits);
        alone.stopped().await;
    }
    assert_eq!(own.len(), wanted.len());
    files.want(wanted[2], "");
    let server = Running::start_from(&files.config()).await;
    let (own, stop) = (Arc::new(own), Arc::new(AtomicBool::new(false)));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (client, own, stop) = (server.client.clone(), own.clone(), stop.clone());
            tokio::spawn(async move {
                let mut seen = HashMap::<String, u64>::new();
                while !stop.load(Ordering::Relaxed) {
                    let (bits, name) = scores(&client, "").await.expect("no request fails");
                    assert_eq!(own.get(&name), Some(&bits), "{name}");
                    *seen.entry(name).or_default() += 1;
                }
                seen
            })
        })
        .collect();
    for i in 0..12 {
        files.want(wanted[i % 3], "");
        let last = reload(&server.client).await.1.expect("a good candidate");
        assert_eq!(last.outcome, "loaded", "{}", last.message);
    }
    stop.store(true, Ordering::Relaxed);
    let mut seen = HashMap::<String, u64>::new();
    for caller in callers {
        caller.await.expect("no panic").into_iter().for_each(|(name, count)| *seen.entry(name).or_default() += count);
    }
    assert_eq!(seen.len(), 3, "{seen:?}");
    // What retires ends with its last request, so nothing but what is live and held is left.
    while server.metric("warm_registry_generations{state=\"retiring\"}") > 0.0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.metric("warm_registry_generations{state=\"held\"}"), 1.0);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watched_file_that_settles_goes_live_and_a_swapped_config_map_too() {
    let files = Files::new();
    let settings = "watch: true\nwatch_interval: 10ms\nwatch_settle: 30ms\n";
    files.want(&[0, 1], settings);
    // As a ConfigMap is mounted: the file is a link through a folder that is swapped.
    let path = |name: &str| files.dir.path().join(name);
    std::fs::create_dir(path("..1")).expect("a folder");
    // Paths in the file are relative to it, so the versions name their members from where the link stands.
    std::fs::rename(files.config(), path("..1").join("warm.yaml")).expect("moved");
    std::os::unix::fs::symlink("..1", path("..data")).expect("linked");
    std::os::unix::fs::symlink("..data/warm.yaml", files.config()).expect("linked");
    let server = Running::start_from(&files.config()).await;
    let before = scores(&server.client, "").await.expect("scored");
    std::fs::create_dir(path("..2")).expect("a folder");
    let changed = std::fs::read_to_string(files.config()).expect("readable").replace("./member-0", "./member-2");
    std::fs::write(path("..2").join("warm.yaml"), changed).expect("written");
    std::os::unix::fs::symlink("..2", path("..new")).expect("linked");
    std::fs::rename(path("..new"), path("..data")).expect("swapped");
    let next = async |before: &(Vec<u32>, String)| {
        loop {
            let now = scores(&server.client, "").await.expect("scored");
            if now.1 != before.1 {
                return now;
            }
        }
    };
    let swapped = next(&before).await;
    // New bytes in a folder that the recipe names already, all at once: how long a slow copy may pause is for the test of
    // settling, which owns its clock.
    copy(&files.member(0), &path("fresh"));
    std::fs::rename(files.member(1), path("stale")).expect("moved");
    std::fs::rename(path("fresh"), files.member(1)).expect("moved");
    let rewritten = next(&swapped).await;
    assert_ne!(rewritten.0, swapped.0);
    // A swap is seen before its reload has ended, and only then it is counted.
    let loaded = || server.metric("warm_registry_reloads_total{outcome=\"loaded\"}");
    while loaded() < 3.0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(loaded(), 3.0, "the first one, and one for each change");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_call_a_reload_stages_and_a_restart_comes_up_with_what_was_live() {
    let files = Files::new();
    let settings = "activate: on_call\nstate: ./state\n";
    files.want(&[0, 1], settings);
    let server = Running::start_from(&files.config()).await;
    let first = scores(&server.client, "").await.expect("scored");
    files.want(&[0, 1, 2], settings);
    let staged = reload(&server.client).await.1.expect("staged");
    assert_eq!(staged.outcome, "staged");
    assert_eq!(scores(&server.client, "").await.expect("scored"), first);
    let name = staged.result.and_then(|generation| generation.stamp).expect("a stamp").fingerprint;
    assert_eq!(scores(&server.client, &name).await.expect_err("not served yet").code(), Some("FAILED_PRECONDITION"));
    server.stopped().await;

    // The fleet still serves the first; so does a replica that comes back, and it has the other one ready again.
    let server = Running::start_from(&files.config()).await;
    assert_eq!(scores(&server.client, "").await.expect("scored"), first);
    loop {
        let list = server.client.list_generations().await.expect("a list");
        if list.iter().any(|generation| generation.state() == State::Staged) {
            break;
        }
    }
    server.client.activate(&name).await.expect("staged");
    server.stopped().await;
    let server = Running::start_from(&files.config()).await;
    assert_eq!(scores(&server.client, "").await.expect("scored").1, name, "what was activated last");
    server.stopped().await;
}
