//! The commands around a merge, from their arguments to their exit codes: plan, report, merge, and serving from a cache.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::{Value, json};

fn family(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance/transformers-5").join(name)
}

fn warm<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Output {
    let mut command = crate::program::warm();
    command.args(arguments).stdin(Stdio::null()).output().expect("ran")
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The code and the JSON that was printed.
fn json_of(output: &Output) -> (Option<i32>, Value) {
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}")))
}

/// A recipe of the members of a family.
fn recipe(dir: &Path, more: &str) -> String {
    let members: Vec<_> = (0..3).map(|i| family("qwen3").join(format!("member-{i}"))).collect();
    let path = dir.join("recipe.yaml");
    std::fs::write(&path, format!("members: {members:?}\ninit: {:?}\n{more}", family("qwen3").join("init"))).expect("written");
    path.display().to_string()
}

#[test]
fn a_plan_says_what_would_happen() {
    let dir = tempfile::tempdir().expect("a folder");
    let recipe = recipe(dir.path(), "method: slerp\nrules: [{match: 'score.*', from: member-1}]\ndtype: bfloat16");
    let output = warm(["plan", "--recipe", &recipe]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for part in ["slerp", "member-2", "twice: once for the angles", "model.layers.{0..1}.", "rule score.*: from member-1", "on the device"]
    {
        assert!(out(&output).contains(part), "{part}: {}", out(&output));
    }
    let (code, plan) = json_of(&warm(["plan", "--recipe", &recipe, "--json"]));
    assert_eq!(
        (code, &plan["ok"], &plan["passes"], &plan["dtype"], &plan["kind"]),
        (Some(0), &json!(true), &json!(2), &json!("BF16"), &json!("reward"))
    );
    assert_eq!((&plan["members"][1]["name"], &plan["init"]["name"]), (&json!("member-1"), &json!("init")));
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{plan}"));
    assert_eq!(number(&plan["merged_bytes"]), 2 * number(&plan["parameters"]));
    assert_eq!(number(&plan["peaks"]["device_bytes"]), 4 * number(&plan["parameters"]));
    assert!(number(&plan["peaks"]["merge_host_bytes"]) > 0 && number(&plan["bytes_to_read"]) > number(&plan["merged_bytes"]));
    // A server has the merged model, and beside it one member at a time or all three; and what it keeps of prompts.
    let model = number(&plan["peaks"]["device_bytes"]);
    assert_eq!(number(&plan["peaks"]["device_bytes_streamed"]), 2 * model);
    assert_eq!(number(&plan["peaks"]["device_bytes_with_members"]), 4 * model);
    assert_eq!(number(&plan["peaks"]["prefix_cache_bytes"]), 1 << 30, "the setting's own default");
    let tensors: u64 = plan["groups"].as_array().expect("groups").iter().map(|group| number(&group["tensors"])).sum();
    assert_eq!(tensors, number(&plan["tensors"]));
}

#[test]
fn a_plan_tells_what_adapters_on_one_base_take() {
    let member = |name: &str, index: usize| family(name).join(format!("member-{index}")).display().to_string();
    let adapters: Vec<String> = (0..3).map(|index| member("qwen3-lora", index)).collect();
    let arguments = |members: &[String], more: &[&str]| -> Vec<String> {
        ["plan"].iter().chain(more).map(|word| (*word).to_owned()).chain(members.iter().cloned()).collect()
    };
    let run = |members: &[String], more: &[&str]| warm(arguments(members, more).iter().map(String::as_str));
    let (_, plan) = json_of(&run(&adapters, &["--json"]));
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{plan}"));
    let (peaks, apart) = (&plan["peaks"], &plan["adapters"]);
    assert_eq!(apart["base"], json!(std::fs::canonicalize(family("qwen3-lora").join("base")).expect("there").display().to_string()));
    let own: u64 = apart["member_bytes"].as_array().expect("three").iter().map(number).sum();
    let all = number(&peaks["device_bytes_adapters"]);
    assert_eq!(all, number(&peaks["device_bytes"]) + number(&apart["base_bytes"]) + own);
    assert!(all < number(&peaks["device_bytes_with_members"]), "{plan}");
    let words = out(&run(&adapters, &[]));
    assert!(words.contains("with `ensemble: adapters`: ") && words.contains("for the base "), "{words}");
}

#[test]
fn a_plan_tells_what_a_server_needs_to_compare_and_keeps_of_prompts() {
    let dir = tempfile::tempdir().expect("a folder");
    let recipe = recipe(dir.path(), "");
    let lines = |more: &[&str]| -> Vec<String> {
        let output = warm([&["plan", "--recipe", &recipe], more].concat());
        out(&output)
            .lines()
            .filter(|line| line.starts_with("  to compare") || line.starts_with("  for prompts"))
            .map(str::to_owned)
            .collect()
    };
    let told = lines(&["--prefix-cache-bytes", "64MB"]);
    assert!(told[0].starts_with("  to compare with `ensemble: streamed`: ") && told[0].ends_with(" while a member is asked"), "{told:?}");
    assert_eq!(told[1], "  for prompts that come again: up to 64.0 MB (`prefix_cache_bytes`) while it is live");
    assert_eq!(lines(&["--prefix-cache-bytes", "off"]), told[..1]);
    // The tokens of an encoder see what comes after them, so none of them can be kept.
    let encoder = family("bert").join("member-0").display().to_string();
    let (_, plan) = json_of(&warm(["plan", &encoder, "--json"]));
    assert_eq!(plan["peaks"]["prefix_cache_bytes"], 0, "{plan}");
}

#[test]
fn a_plan_counts_the_memory_of_a_device_that_need_not_be_here() {
    let member = family("qwen3").join("member-0").display().to_string();
    let (code, plan) = json_of(&warm(["plan", &member, "--device", "cuda:0", "--device-memory", "80GiB", "--json"]));
    let device = &plan["device"];
    assert_eq!((code, &plan["ok"], &device["device"], &device["way"]), (Some(0), &json!(true), &json!("cuda:0"), &json!("plain")));
    assert_eq!((&device["memory_bytes"], &device["max_pack_tokens"]), (&json!(80u64 << 30), &json!(16_384)));
    let parts = ["weights", "members", "activations", "prefix_cache", "driver"].map(|part| device[part].as_u64().expect("bytes"));
    assert_eq!(device["needed"].as_u64(), Some(parts.iter().sum()));
    // What does not fit ends with 2, and says what would help.
    let refused = warm(["plan", &member, "--device", "cpu", "--device-memory", "1MiB", "--max-pack-tokens", "4096"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(err(&refused).contains("tensor parallelism is not done") && out(&refused).contains("packs of 4096 tokens"), "{refused:?}");
    let absent = warm(["plan", &member, "--device", "cuda:999"]);
    assert_eq!(absent.status.code(), Some(2));
    assert!(err(&absent).contains("device cuda:999: ") && err(&absent).contains("--device-memory"), "{absent:?}");
}

#[test]
fn a_plan_counts_the_cards_of_a_step_by_a_rate_that_was_told_or_measured() {
    let dir = tempfile::tempdir().expect("a folder");
    let member = family("qwen3").join("member-0").display().to_string();
    let workload = ["--workload", "prompts=512,group=16,prompt=100,completion=20", "--step-seconds", "10"];
    let plan = |more: &[&str]| {
        let arguments = ["plan", &member].into_iter().chain(workload).chain(more.iter().copied());
        warm(arguments.collect::<Vec<_>>())
    };
    // 512 x (100 + 16 x 20) = 215,040 distinct tokens.
    let output = plan(&["--tokens-per-second", "1000"]);
    assert!(out(&output).contains("215040 of them distinct") && out(&output).contains("within 10 s: 22 cards"), "{output:?}");
    let report = dir.path().join("bench.json").display().to_string();
    let measured = json!({"per_second": {"requests": 5.12}, "workload": {"group": 16, "prompt_tokens": 100, "completion_tokens": 20}});
    std::fs::write(&report, measured.to_string()).expect("written");
    let (code, found) = json_of(&plan(&["--rate-from", &report, "--json"]));
    assert_eq!((code, &found["step"]["cards"], &found["step"]["seconds"]), (Some(0), &json!(10), &json!(100.0)));
    let here = plan(&["--measure", "--device", "cpu"]);
    assert!(out(&here).contains("measured (here, on cpu)") && out(&here).contains("within 10 s: "), "{here:?}");
    let wrong = warm(["plan", &member, "--workload", "prompts=512,group=0,prompt=1,completion=1"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(err(&wrong).contains("group: expected a whole number from 1"), "{wrong:?}");
}

#[test]
fn quantised_checkpoints_are_refused_by_the_plan_in_a_sentence() {
    let dir = tempfile::tempdir().expect("a folder");
    let member = family("qwen3").join("member-0");
    for file in std::fs::read_dir(&member).expect("a folder") {
        let file = file.expect("a file").path();
        std::fs::copy(&file, dir.path().join(file.file_name().expect("a name"))).expect("copied");
    }
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("a config")).expect("JSON");
    config["quantization_config"] = json!({"quant_method": "compressed-tensors", "format": "float-quantized"});
    std::fs::write(&path, config.to_string()).expect("written");
    let refused = warm(["plan", &dir.path().display().to_string()]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(err(&refused).contains("the checkpoint is quantised (compressed-tensors)"), "{refused:?}");
    assert!(err(&refused).contains("FP8 and other quantised weights are not done"), "{refused:?}");
}

#[test]
fn a_plan_that_cannot_be_made_lists_every_reason_and_exits_with_two() {
    let dir = tempfile::tempdir().expect("a folder");
    let (one, other) = (family("qwen3").join("member-0"), family("llama").join("member-0"));
    let (one, other) = (one.display().to_string(), other.display().to_string());
    let (code, plan) = json_of(&warm(["plan", &one, &other, "/nowhere", "--json"]));
    let problems = plan["problems"].as_array().expect("problems");
    assert_eq!((code, &plan["ok"]), (Some(2), &json!(false)));
    let told = |part: &str| problems.iter().any(|problem| problem.as_str().is_some_and(|problem| problem.contains(part)));
    assert!(problems.len() > 3 && told("/nowhere") && told("model_type") && told("is missing"), "{plan:#}");
    let output = warm(["plan", &one, &other, "/nowhere"]);
    assert_eq!((output.status.code(), out(&output)), (Some(2), String::new()));
    assert!(err(&output).contains(&format!("cannot merge, for {} reasons", problems.len())), "{}", err(&output));

    let bad = dir.path().join("bad.yaml");
    std::fs::write(&bad, "members: []\nmethod: magic\n").expect("written");
    let (code, plan) = json_of(&warm(["plan", "--recipe", &bad.display().to_string(), "--json"]));
    assert_eq!((code, plan["problems"].as_array().map(Vec::len)), (Some(2), Some(2)), "{plan:#}");
    assert!(plan["problems"][0].as_str().is_some_and(|problem| problem.contains("bad.yaml")), "{plan:#}");
    assert_eq!(warm(["plan"]).status.code(), Some(2), "no recipe at all");
}

#[test]
fn a_report_tells_norms_angles_and_a_verdict() {
    let dir = tempfile::tempdir().expect("a folder");
    let recipe = recipe(dir.path(), "");
    let output = warm(["report", "--recipe", &recipe]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for part in ["task vectors from init", "model.layers.1.", "shared initialisation", "score.weight", "published (WARP)"] {
        assert!(out(&output).contains(part), "{part}: {}", out(&output));
    }
    let (code, report) = json_of(&warm(["report", "--recipe", &recipe, "--json"]));
    assert_eq!((code, &report["around"], &report["members"][2]["name"]), (Some(0), &json!("init"), &json!("member-2")));
    // The members of this family are independent moves from init.
    let cosine = report["overall"]["cosines"][0][1].as_f64().expect("a cosine");
    assert!(cosine.abs() < 0.2, "{cosine}");
    let missing = warm(["report", "/nowhere"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(err(&missing).contains("/nowhere"), "{}", err(&missing));
}

/// The rewards of a few texts.
fn scores(arguments: &[&str]) -> (Vec<Value>, String) {
    let mut command = crate::program::warm();
    command.arg("score").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("started");
    child.stdin.take().expect("piped").write_all(b"{\"text\": \"hello\"}\n{\"text\": \"a longer answer, please\"}\n").expect("written");
    let output = child.wait_with_output().expect("ran");
    assert!(output.status.success(), "{output:?}");
    let lines = out(&output);
    let rewards = lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")["reward"].clone());
    (rewards.collect(), err(&output))
}

#[test]
fn a_written_merge_scores_as_the_merge_itself() {
    let dir = tempfile::tempdir().expect("a folder");
    let recipe = recipe(dir.path(), "method: slerp");
    let place = dir.path().join("merged").display().to_string();
    let output = warm(["merge", "--recipe", &recipe, "--out", &place]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(out(&output).contains("weights_id "), "{}", out(&output));
    let (written, _) = scores(&[&place]);
    assert_eq!(written.len(), 2);
    assert_eq!(written, scores(&["--recipe", &recipe]).0);

    let again = warm(["merge", "--recipe", &recipe, "--out", &place]);
    assert_eq!(again.status.code(), Some(1));
    assert!(err(&again).contains("stands there already") && err(&again).contains("--overwrite"), "{}", err(&again));
    let arguments =
        ["merge", "--recipe", &recipe, "--out", &place, "--overwrite", "--max-shard-size", "60kB", "--dtype", "bfloat16", "--json"];
    let (code, told) = json_of(&warm(arguments));
    assert_eq!(code, Some(0));
    assert!(told["files"].as_array().is_some_and(|files| files.len() > 1), "{told}");
    assert_eq!(told["weights_id"].as_str().map(str::len), Some(64));
    assert!(dir.path().join("merged/model.safetensors.index.json").exists());
    let mut names: Vec<_> = std::fs::read_dir(dir.path()).expect("a folder").flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    assert_eq!(names, ["merged", "recipe.yaml"], "nothing is left beside it");
}

#[test]
fn a_cache_gives_the_same_scores_and_says_so() {
    let dir = tempfile::tempdir().expect("a folder");
    let recipe = recipe(dir.path(), "");
    let cache = dir.path().join("cache").display().to_string();
    let (plain, _) = scores(&["--recipe", &recipe]);
    let (first, log) = scores(&["--recipe", &recipe, "--cache-dir", &cache]);
    assert!(log.contains("merged weights are kept in the cache"), "{log}");
    let (second, log) = scores(&["--recipe", &recipe, "--cache-dir", &cache]);
    assert!(log.contains("merged weights come from the cache"), "{log}");
    assert_eq!((&first, &second), (&plain, &plain));
    let small = scores(&["--recipe", &recipe, "--cache-dir", &cache, "--cache-max-bytes", "1kB"]);
    assert_eq!(small.0, plain);
}
