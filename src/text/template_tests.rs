use std::path::Path;

use jiff::civil::date;
use serde_json::{Map, Value as Json, json};

use super::*;

fn noon() -> DateTime {
    date(2026, 1, 2).at(3, 4, 5, 0)
}

/// A folder with the smallest tokenizer there is, and this template.
fn templates(text: &str) -> Result<Templates, TextError> {
    let dir = tempfile::tempdir().expect("temporary folder");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("writable");
    write("tokenizer.json", r#"{"model":{"type":"WordLevel","vocab":{"<s>":0,"</s>":1},"unk_token":"<s>"}}"#);
    write("tokenizer_config.json", r#"{"bos_token":"<s>","eos_token":{"__type":"AddedToken","content":"</s>"}}"#);
    write("chat_template.jinja", text);
    Templates::new(&TextFacts::open(dir.path()).expect("text facts"), &TemplateChoice::Default, noon())
}

fn conversation(messages: &Json, args: Json) -> Conversation {
    let turns = messages.as_array().expect("messages").iter().map(|message| {
        let mut extra = message.as_object().expect("message").clone();
        let mut take = |name: &str| extra.shift_remove(name).and_then(|text| Some(text.as_str()?.to_owned())).unwrap_or_default();
        let (role, content) = (take("role"), take("content"));
        Turn::new(role, content, extra).expect("valid turn")
    });
    Conversation::new(turns.collect(), None, args.as_object().cloned().unwrap_or_default()).expect("valid conversation")
}

fn render(text: &str) -> Result<String, String> {
    let messages = json!([{"role": "user", "content": " Hi there \u{1f}"}, {"role": "assistant", "content": "b<&>'\"", "n": 1.0, "tool_calls": [{"z": 1, "a": [true, null]}]}]);
    let templates = templates(text).map_err(|error| error.0)?;
    templates.render(&conversation(&messages, json!({}))).map_err(|failure| failure.message)
}

#[test]
fn real_templates_render_as_in_transformers() {
    let Some(root) = std::env::var_os("WARM_CONFORMANCE") else {
        eprintln!("skipped: 27 real chat templates (WARM_CONFORMANCE names no folder)");
        return;
    };
    let folder = Path::new(&root).join("templates");
    let golden: Json = serde_json::from_slice(&std::fs::read(folder.join("golden.json")).expect("golden.json")).expect("JSON");
    let (mut cases, mut wrong) = (0, Vec::new());
    for entry in golden.as_array().expect("list") {
        let name = entry["template"].as_str().expect("name");
        let text = std::fs::read_to_string(folder.join(name)).expect("template");
        let templates = templates(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        for case in entry["cases"].as_array().expect("cases") {
            cases += 1;
            let found = templates.render(&conversation(&case["messages"], json!({})));
            let as_golden = match (&found, case["rendered"].as_str(), case["error"].as_str()) {
                (Ok(text), Some(expected), _) => text == expected,
                // What `raise_exception` says is said here too; jinja's own errors have words of their own.
                (Err(failure), None, Some(expected)) => failure.message == expected || !text.contains(expected),
                _ => false,
            };
            if !as_golden {
                wrong.push(format!("{name} {}: {found:?}\nexpected {:?} {:?}", case["name"], case["rendered"], case["error"]));
            }
        }
    }
    println!("{cases} cases");
    assert!(wrong.is_empty(), "{} of {cases} differ\n{}", wrong.len(), wrong.join("\n"));
}

/// Our own templates, which together use every construct of those in the wild: `tests/fixtures/templates/make.py` writes
/// what transformers makes of them.
#[test]
fn own_templates_render_as_in_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates");
    let golden: Json = serde_json::from_slice(&std::fs::read(folder.join("golden.json")).expect("golden.json")).expect("JSON");
    let (mut cases, mut wrong) = (0, Vec::new());
    for entry in golden["templates"].as_array().expect("list") {
        let name = entry["template"].as_str().expect("name");
        let text = std::fs::read_to_string(folder.join(name)).expect("template");
        let templates = templates(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (index, case) in entry["cases"].as_array().expect("cases").iter().enumerate() {
            cases += 1;
            let args = case.get("template_args").cloned().unwrap_or(json!({}));
            let conversation = conversation(&case["messages"], args);
            let conversation = Conversation::new(
                conversation.turns().cloned().collect(),
                case.get("tools").cloned(),
                conversation.template_args().clone(),
            );
            let found = templates.render(&conversation.expect("valid conversation")).map_err(|failure| failure.message);
            let as_golden = match (&found, case["rendered"].as_str()) {
                (Ok(text), Some(expected)) => text == expected,
                (Err(message), None) => case["error"].as_str().is_none_or(|expected| message == expected),
                _ => false,
            };
            if !as_golden {
                wrong.push(format!("{name} {index}:\n  found {found:?}\n  expected {} {}", case["rendered"], case["error"]));
            }
        }
    }
    assert!(cases >= 81 && wrong.is_empty(), "{} of {cases} differ\n{}", wrong.len(), wrong.join("\n"));
}

/// Template and what jinja2 3.1.6 makes of it in transformers' environment, from `snippets.json` beside this file, which
/// `snippets.py` writes.
#[test]
fn every_construct_renders_as_in_jinja2() {
    let snippets: Json = serde_json::from_str(include_str!("template/snippets.json")).expect("JSON");
    let mut wrong = Vec::new();
    for snippet in snippets.as_array().expect("list") {
        let text = snippet["template"].as_str().expect("template");
        let found = render(text);
        let as_expected = match (&found, snippet["rendered"].as_str()) {
            (Ok(found), Some(expected)) => found == expected,
            (Err(_), None) => true,
            _ => false,
        };
        if !as_expected {
            wrong.push(format!("{text}\n  found {found:?}\n  jinja2 {}", snippet["rendered"]));
        }
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_refusal_is_a_failure_with_the_templates_own_words() {
    let templates = templates("{% macro m() %}{{ raise_exception('no ' ~ 'way') }}{% endmacro %}{{ m() }}").expect("compiles");
    let failure = templates.render(&Conversation::user("x")).expect_err("refused");
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::TemplateRefused, "no way"));
}

#[test]
fn a_template_that_does_not_parse_is_refused_at_load() {
    assert!(templates("{% if %}").is_err());
    assert!(templates("{{ 'open").is_err());
}

#[test]
fn endless_loops_and_bombs_end_with_a_failure() {
    let bombs = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = b %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}0123456789{% endfor %}{% endfor %}",
        "{{ 'x' * 900000000 }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x'.ljust(900000000000) }}",
        "{{ '%900000000d' % 1 }}",
        "{{ '%900000000d'|format(1) }}",
        "{{ '{:900000000}'.format(1) }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(300) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    ];
    for bomb in bombs {
        let failure = render(bomb).expect_err(bomb);
        assert!(failure.len() < 400, "{failure}");
    }
}

#[test]
fn arguments_are_taken_by_name_and_never_replace_the_templates_own_variables() {
    let templates = templates("{{ enable_thinking }} {{ bos_token }}").expect("compiles");
    let say = |args: Json| templates.render(&conversation(&json!([{"role": "user", "content": "x"}]), args));
    assert_eq!(say(json!({"enable_thinking": false})).expect("renders"), "False <s>");
    for name in ["chat_template", "bos_token", "messages", "add_generation_prompt"] {
        let failure = say(json!({name: "x"})).expect_err(name);
        assert!(failure.message.contains(name), "{failure}");
    }
}

#[test]
fn reasoning_is_found_under_each_of_its_names() {
    let templates = templates("{{ messages[0].thinking }} {{ messages[0].reasoning_content }} {{ 'x' in messages[0] }}").expect("compiles");
    for name in ["reasoning", "thinking", "reasoning_content"] {
        let messages = json!([{"role": "assistant", "content": "x", name: "why", "x": null}]);
        assert_eq!(templates.render(&conversation(&messages, json!({}))).expect("renders"), "why why False");
    }
}

#[test]
fn a_model_without_a_template_loads_and_refuses_conversations_only() {
    let dir = tempfile::tempdir().expect("temporary folder");
    std::fs::write(dir.path().join("tokenizer.json"), r#"{"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#)
        .expect("writable");
    let facts = TextFacts::open(dir.path()).expect("text facts");
    let templates = Templates::new(&facts, &TemplateChoice::Default, noon()).expect("loads");
    assert!(templates.render(&Conversation::user("x")).is_err());
    assert!(Templates::new(&facts, &TemplateChoice::Named("x".into()), noon()).is_err());
    let own = Templates::new(&facts, &TemplateChoice::Source("{{ messages[0].content }}".into()), noon()).expect("loads");
    assert_eq!(
        own.render(&Conversation::new(vec![Turn::new("user", "x", Map::new()).expect("turn")], None, Map::new()).expect("one"))
            .expect("renders"),
        "x"
    );
}
