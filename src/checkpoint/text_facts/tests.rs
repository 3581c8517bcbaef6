use super::*;

const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,
    "post_processor":null,"decoder":null,"model":{"type":"BPE","dropout":null,"unk_token":null,"fuse_unk":false,"vocab":{"a":0,"b":1,"ab":2},"merges":[["a","b"]]}}"#;

fn facts(files: &[(&str, &str)]) -> Result<TextFacts, CheckpointError> {
    let dir = tempfile::tempdir().expect("temporary folder");
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("folder")).expect("writable");
        std::fs::write(path, text).expect("writable");
    }
    TextFacts::open(dir.path())
}

#[test]
fn the_same_tokenizer_as_two_versions_write_it_is_equal() {
    let bare = r#"{"type":"TemplateProcessing","single":[{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{}}"#;
    let older = TOKENIZER
        .replace("\"post_processor\":null", &format!("\"post_processor\":{bare}"))
        .replace(r#"[["a","b"]]"#, r#"["a b"]"#)
        .replace(r#""truncation":null"#, r#""truncation":{"max_length":9}"#)
        .replace(r#""dropout":null,"#, "");
    let (a, b) = (facts(&[("tokenizer.json", TOKENIZER)]).expect("facts"), facts(&[("tokenizer.json", &older)]).expect("facts"));
    assert_eq!(a.hash(), b.hash());
    assert!(a.differences(&b).is_empty());
}

#[test]
fn every_difference_is_named() {
    let a = facts(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", r#"{"eos_token":"a","chat_template":"x"}"#)]).expect("facts");
    let changed = TOKENIZER.replace(r#""ab":2"#, r#""ab":3"#).replace(r#""normalizer":null"#, r#""normalizer":{"type":"NFC"}"#);
    let b = facts(&[("tokenizer.json", &changed), ("tokenizer_config.json", r#"{"eos_token":"b","chat_template":"y"}"#)]).expect("facts");
    let expected = [
        "the tokenizers differ in vocabulary",
        "the tokenizers differ in normaliser",
        "the chat template `default` differs",
        "the special token `eos_token` differs: \"a\" and \"b\"",
    ];
    assert_eq!(a.differences(&b), expected);
    assert_ne!(a.hash(), b.hash());
}

#[test]
fn template_files_replace_the_configurations_templates() {
    let listed = r#"{"chat_template":[{"name":"default","template":"x"},{"name":"rag","template":"y"}]}"#;
    let only_config = facts(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", listed)]).expect("facts");
    assert_eq!(only_config.templates().keys().collect::<Vec<_>>(), ["default", "rag"]);
    let files = [
        ("tokenizer.json", TOKENIZER),
        ("tokenizer_config.json", listed),
        ("chat_template.jinja", "z\r\n"),
        ("additional_chat_templates/tool_use.jinja", "t"),
    ];
    let with_files = facts(&files).expect("facts");
    assert_eq!(
        with_files.templates().iter().map(|(a, b)| (a.as_str(), b.as_str())).collect::<Vec<_>>(),
        [("default", "z\n"), ("tool_use", "t")]
    );
}

#[test]
fn the_special_tokens_map_counts_only_without_an_added_tokens_decoder() {
    let map = ("special_tokens_map.json", r#"{"pad_token":{"content":"p"}}"#);
    let plain = facts(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", r#"{"pad_token":"q"}"#), map]).expect("facts");
    assert_eq!(plain.special_tokens()["pad_token"], "p");
    let newer = facts(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", r#"{"pad_token":"q","added_tokens_decoder":{}}"#), map])
        .expect("facts");
    assert_eq!(newer.special_tokens()["pad_token"], "q");
}

#[test]
fn errors_name_the_file() {
    let file = |files: &[(&str, &str)]| facts(files).expect_err("refused").to_string();
    assert!(file(&[]).contains("tokenizer.json: is missing"));
    assert!(file(&[("tokenizer.json", "{")]).contains("tokenizer.json: is not valid JSON"));
    assert!(file(&[("tokenizer.json", "{}")]).contains("`model`"));
    assert!(
        file(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", "[]")]).contains("tokenizer_config.json: expected a JSON object")
    );
    assert!(file(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", r#"{"chat_template":3}"#)]).contains("chat_template"));
}
