use std::path::{Path, PathBuf};

use jiff::civil::date;
use serde_json::{Map, Value};

use super::*;
use crate::domain::{Conversation, Turn};

/// Folders of conformance families: those committed with the tests, and those that `WARM_CONFORMANCE` names.
fn conformance_roots() -> Vec<PathBuf> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/conformance");
    let named = std::env::var_os("WARM_CONFORMANCE").map(PathBuf::from);
    if named.is_none() {
        eprintln!("skipped: the conformance families outside the repository (WARM_CONFORMANCE names no folder)");
    }
    [Some(committed), named].into_iter().flatten().filter(|root| root.is_dir()).collect()
}

/// Every family folder below a root: `transformers-*/NAME` with a `golden.json`.
fn families(root: &Path) -> Vec<PathBuf> {
    let children = |dir: &Path| -> Vec<PathBuf> {
        let mut paths: Vec<_> = std::fs::read_dir(dir).expect("readable").map(|entry| entry.expect("entry").path()).collect();
        paths.sort();
        paths
    };
    let versions =
        children(root).into_iter().filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("transformers-")));
    versions.flat_map(|version| children(&version)).filter(|family| family.join("golden.json").is_file()).collect()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("readable")).expect("JSON")
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().expect("list").iter().map(|id| id.as_u64().expect("id") as u32).collect()
}

fn conversation(messages: &Value) -> Conversation {
    let turns = messages.as_array().expect("messages").iter().map(|message| {
        let mut extra = message.as_object().expect("message").clone();
        let mut take = |name: &str| extra.shift_remove(name).and_then(|text| Some(text.as_str()?.to_owned())).unwrap_or_default();
        let (role, content) = (take("role"), take("content"));
        Turn::new(role, content, extra).expect("valid turn")
    });
    Conversation::new(turns.collect(), None, Map::new()).expect("valid conversation")
}

fn sample(case: &Value) -> Sample {
    let text = |name: &str| case[name].as_str().expect("text").to_owned();
    match case["kind"].as_str() {
        Some("text") => Sample::Text(text("text")),
        Some("pair") => Sample::Pair { first: text("text"), second: text("text_pair") },
        Some("chat") => Sample::Conversation(conversation(&case["messages"])),
        Some("ids") => Sample::Tokens(numbers(&case["input_ids"])),
        other => panic!("unknown kind {other:?}"),
    }
}

fn options() -> TextOptions {
    TextOptions::new(1 << 20, 1 << 20, date(2026, 1, 2).at(3, 4, 5, 0))
}

#[test]
fn token_ids_of_every_conformance_family_equal_those_of_transformers() {
    for root in conformance_roots() {
        let (mut cases, mut seen) = (0, 0);
        for family in families(&root) {
            let golden = read_json(&family.join("golden.json"));
            let facts = TextFacts::open(&family.join("member-0")).expect("text facts");
            let pipeline = TextPipeline::new(&facts, options()).unwrap_or_else(|error| panic!("{}: {error}", family.display()));
            seen += 1;
            for case in golden["cases"].as_array().expect("cases") {
                let encoding =
                    pipeline.encode(&sample(case), Truncation::Refuse).unwrap_or_else(|error| panic!("{}: {error}", family.display()));
                assert_eq!(encoding.ids(), numbers(&case["input_ids"]), "{} {case}", family.display());
                if let Some(types) = case.get("token_type_ids") {
                    let types = numbers(types);
                    assert_eq!(encoding.type_ids().map_or(vec![0; types.len()], <[u32]>::to_vec), types, "{} {case}", family.display());
                } else {
                    assert!(encoding.type_ids().is_none_or(|types| types.iter().all(|&id| id == 0)), "{} {case}", family.display());
                }
                cases += 1;
            }
        }
        println!("{}: {seen} families, {cases} cases", root.display());
        assert!(seen > 0, "{} holds no family", root.display());
    }
}
