use std::path::{Path, PathBuf};

use jiff::civil::date;
use serde_json::{Map, Value};

use super::*;
use crate::domain::{Conversation, Turn};
use crate::text::TemplateChoice;

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

#[test]
fn a_prompt_that_is_tokenised_once_gives_every_completion_the_tokens_of_the_whole() {
    for root in conformance_roots() {
        // Families whose prompts were tokenised once, and others.
        let (mut once, mut whole) = (Vec::new(), Vec::new());
        for family in families(&root) {
            let golden = read_json(&family.join("golden.json"));
            let facts = TextFacts::open(&family.join("member-0")).expect("text facts");
            let pipeline = TextPipeline::new(&facts, options()).expect("loads");
            let (mut before, mut begun) = (Before::default(), 0);
            for case in golden["cases"].as_array().expect("cases").iter().filter(|case| case["kind"] == "chat") {
                for ending in ["", "", " ", " and more", "\n", "<", "é", ""] {
                    let mut case = case.clone();
                    let last = case["messages"].as_array_mut().and_then(|messages| messages.last_mut()).expect("a message");
                    last["content"] = format!("{}{ending}", last["content"].as_str().unwrap_or_default()).into();
                    let sample = sample(&case);
                    let alone = pipeline.encode(&sample, Truncation::Refuse).expect("encodes");
                    let beside = pipeline.encode_beside(&sample, Truncation::Refuse, &mut before).expect("encodes");
                    assert_eq!(beside, alone, "{} {case}", family.display());
                    begun += usize::from(before.begins());
                }
            }
            let name = family.file_name().expect("a name").to_string_lossy().into_owned();
            if begun > 0 { once.push(name) } else { whole.push(name) }
        }
        println!("{}: by what they begin with {once:?}, as a whole {whole:?}", root.display());
        assert!(once.iter().any(|name| name.starts_with("qwen3")) && once.iter().any(|name| name.starts_with("llama")), "{once:?}");
    }
}

/// A whitespace tokenizer: `<s>` 0, `</s>` 1, `<unk>` 2, `a` to `f` 3 to 8, and a post-processor of this JSON.
fn facts(post_processor: &str, config: &str) -> TextFacts {
    let dir = tempfile::tempdir().expect("temporary folder");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("writable");
    let added = |id: u32, content: &str| {
        format!(
            r#"{{"id":{id},"content":"{content}","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}"#
        )
    };
    let tokenizer = format!(
        r#"{{"truncation":{{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0}},
        "added_tokens":[{},{}],"normalizer":null,"pre_tokenizer":{{"type":"Whitespace"}},"post_processor":{post_processor},"decoder":null,
        "model":{{"type":"WordLevel","vocab":{{"<s>":0,"</s>":1,"<unk>":2,"a":3,"b":4,"c":5,"d":6,"e":7,"f":8}},"unk_token":"<unk>"}}}}"#,
        added(0, "<s>"),
        added(1, "</s>")
    );
    write("tokenizer.json", &tokenizer);
    write("tokenizer_config.json", config);
    write("chat_template.jinja", "{{ bos_token }} {% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}");
    TextFacts::open(dir.path()).expect("text facts")
}

const TOKENS: &str = r#"{"bos_token":"<s>","eos_token":"</s>"}"#;
const WITH_BOS: &str = r#"{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
    "pair":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}},{"SpecialToken":{"id":"</s>","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],
    "special_tokens":{"<s>":{"id":"<s>","ids":[0],"tokens":["<s>"]},"</s>":{"id":"</s>","ids":[1],"tokens":["</s>"]}}}"#;

fn pipeline(max_tokens: usize, change: impl FnOnce(&mut TextOptions)) -> TextPipeline {
    let mut options = TextOptions::new(max_tokens, 9, date(2026, 1, 2).at(0, 0, 0, 0));
    change(&mut options);
    TextPipeline::new(&facts(WITH_BOS, TOKENS), options).expect("loads")
}

fn ids(pipeline: &TextPipeline, sample: &Sample, truncation: Truncation) -> Result<Vec<u32>, FailureKind> {
    pipeline.encode(sample, truncation).map(|encoding| encoding.ids().to_vec()).map_err(|failure| failure.kind)
}

fn text(text: &str) -> Sample {
    Sample::Text(text.to_owned())
}

#[test]
fn bos_is_doubled_only_where_it_is_asked_for() {
    let encode =
        |bos: BosPolicy, input: &str| ids(&pipeline(9, |options| options.bos = bos), &text(input), Truncation::Refuse).expect("encodes");
    assert_eq!(encode(BosPolicy::Auto, "a"), [0, 3]);
    assert_eq!(encode(BosPolicy::Auto, "<s>a"), [0, 3]);
    assert_eq!(encode(BosPolicy::AsIs, "<s>a"), [0, 0, 3]);
    assert_eq!(encode(BosPolicy::Always, "<s>a"), [0, 3]);
    assert_eq!(encode(BosPolicy::Never, "<s>a"), [3]);
    let counted = pipeline(9, |_| {});
    let doubled = |input: &str| counted.encode(&text(input), Truncation::Refuse).expect("encodes").doubled_bos();
    assert_eq!(["<s>a", "a", "<s>b"].map(doubled), [true, false, true]);
}

#[test]
fn a_template_brings_its_own_bos_and_policies_still_hold() {
    let chat = Sample::Conversation(Conversation::user("a b"));
    let encode = |bos: BosPolicy| ids(&pipeline(9, |options| options.bos = bos), &chat, Truncation::Refuse).expect("encodes");
    assert_eq!(encode(BosPolicy::Auto), [0, 3, 4, 1]);
    assert_eq!(encode(BosPolicy::Always), [0, 3, 4, 1]);
    assert_eq!(encode(BosPolicy::Never), [3, 4, 1]);
}

#[test]
fn eos_is_ensured_once_and_survives_every_cut() {
    let ensured = pipeline(4, |options| options.eos = EosPolicy::Ensure);
    assert_eq!(ids(&ensured, &text("a b"), Truncation::Refuse), Ok(vec![0, 3, 4, 1]));
    assert_eq!(ids(&ensured, &text("a b </s>"), Truncation::Refuse), Ok(vec![0, 3, 4, 1]));
    assert_eq!(ids(&ensured, &text("a b c d"), Truncation::Right), Ok(vec![0, 3, 4, 1]));
    assert_eq!(ids(&ensured, &text("a b c d"), Truncation::Left), Ok(vec![0, 5, 6, 1]));
    let chat = Sample::Conversation(Conversation::user("a b c d"));
    assert_eq!(ids(&ensured, &chat, Truncation::Right), Ok(vec![0, 3, 4, 1]));
    assert_eq!(ids(&ensured, &Sample::Tokens(vec![3, 4, 5, 6, 1]), Truncation::Right), Ok(vec![3, 4, 5, 1]));
    assert_eq!(ids(&ensured, &Sample::Tokens(vec![3, 4]), Truncation::Refuse), Ok(vec![3, 4]));
}

#[test]
fn cutting_never_takes_what_the_head_reads() {
    let plain = pipeline(3, |_| {});
    assert_eq!(ids(&plain, &text("a b c"), Truncation::Refuse), Err(FailureKind::TooLong));
    assert_eq!(ids(&plain, &text("a b c"), Truncation::Right), Ok(vec![0, 3, 4]));
    assert_eq!(ids(&plain, &text("a b c"), Truncation::Left), Ok(vec![0, 4, 5]));
    assert_eq!(ids(&plain, &text("a b c </s>"), Truncation::Right), Err(FailureKind::TooLong));
    let chat = Sample::Conversation(Conversation::user("a b c"));
    assert_eq!(ids(&plain, &chat, Truncation::Right), Err(FailureKind::TooLong));
    assert_eq!(ids(&plain, &chat, Truncation::Left), Ok(vec![4, 5, 1]));
    let first = pipeline(3, |options| options.reads_last_token = false);
    assert_eq!(ids(&first, &chat, Truncation::Right), Ok(vec![0, 3, 4]));
    let pair = Sample::Pair { first: "a b c".to_owned(), second: "d".to_owned() };
    assert_eq!(ids(&pipeline(5, |_| {}), &pair, Truncation::Right), Ok(vec![0, 3, 4, 1, 6]));
    let failure = plain.encode(&text("a b c"), Truncation::Refuse).expect_err("too long");
    assert_eq!(failure.message, "4 tokens, and the model takes at most 3");
}

#[test]
fn ids_beyond_the_embedding_and_nothing_at_all_are_failures() {
    let plain = pipeline(9, |options| options.bos = BosPolicy::Never);
    assert_eq!(ids(&plain, &Sample::Tokens(vec![3, 9]), Truncation::Refuse), Err(FailureKind::UnknownToken));
    assert_eq!(ids(&plain, &Sample::Tokens(vec![]), Truncation::Refuse), Err(FailureKind::Empty));
    assert_eq!(ids(&plain, &text(""), Truncation::Refuse), Err(FailureKind::Empty));
    let mut options = options();
    options.vocab_rows = 8;
    let error = TextPipeline::new(&facts(WITH_BOS, TOKENS), options).expect_err("id 8 has no row");
    assert!(error.0.contains("\"f\" = 8"), "{error}");
}

#[test]
fn flags_rebuild_the_post_processor_only_in_the_classes_that_heed_them() {
    let with = |class: &str| {
        format!(r#"{{"bos_token":"<s>","eos_token":"</s>","tokenizer_class":"{class}","add_bos_token":false,"add_eos_token":true}}"#)
    };
    let encode = |class: &str| {
        let pipeline = TextPipeline::new(&facts(WITH_BOS, &with(class)), options()).expect("loads");
        ids(&pipeline, &text("a"), Truncation::Refuse).expect("encodes")
    };
    assert_eq!(encode("LlamaTokenizerFast"), [3, 1]);
    assert_eq!(encode("GemmaTokenizer"), [3, 1]);
    assert_eq!(encode("PreTrainedTokenizerFast"), [0, 3]);
}

#[test]
fn the_hash_names_every_choice() {
    let hash = |change: fn(&mut TextOptions)| pipeline(9, change).hash();
    let plain = hash(|_| {});
    assert_eq!(plain, hash(|options| options.template_time = date(2027, 1, 1).at(0, 0, 0, 0)), "the template asks for no time");
    assert_ne!(plain, hash(|options| options.bos = BosPolicy::Never));
    assert_ne!(plain, hash(|options| options.eos = EosPolicy::Ensure));
    assert_ne!(plain, hash(|options| options.max_tokens = 8));
    assert_ne!(plain, hash(|options| options.template = crate::text::TemplateChoice::Source("x".to_owned())));
}

/// A pipeline that strips reasoning, with this template.
fn stripping(template: &str) -> TextPipeline {
    let mut options = TextOptions::new(32, 9, date(2026, 1, 2).at(0, 0, 0, 0));
    options.reasoning = ReasoningPolicy::Strip;
    options.template = TemplateChoice::Source(template.to_owned());
    TextPipeline::new(&facts("null", TOKENS), options).expect("loads")
}

const BARE: &str = "{% for m in messages %}{{ m.content }} {{ m.reasoning_content }}{% endfor %}";
/// A template that opens a thinking block before the answer.
const OPENING: &str = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}";

#[test]
fn reasoning_is_taken_out_of_what_is_judged() {
    let plain = stripping(BARE);
    let chat = |answer: &str| Sample::Conversation(Conversation::user("a <think> b").answered(answer));
    // The user's own words stay as they are: `<think>` in them is text (two unknown words here).
    let rendered = |pipeline: &TextPipeline, sample: &Sample| {
        pipeline.encode(sample, Truncation::Refuse).map(|encoding| encoding.rendered().expect("a conversation").to_owned())
    };
    assert_eq!(rendered(&plain, &chat("<think>c d</think>\n\ne")).expect("closed"), "a <think> b e ");
    assert_eq!(rendered(&plain, &chat("c d</think>e")).expect("closed"), "a <think> b e ");
    assert_eq!(rendered(&plain, &chat("<think>c d")).expect_err("open").kind, FailureKind::UnfinishedReasoning);
    assert_eq!(rendered(&plain, &chat("e")).expect("none"), "a <think> b e ");
    // Where the template opens the block, an answer without an end is all reasoning.
    let opening = stripping(OPENING);
    assert_eq!(rendered(&opening, &chat("c d")).expect_err("open").kind, FailureKind::UnfinishedReasoning);
    assert_eq!(rendered(&opening, &chat("c</think>d")).expect("closed"), "a <think> b d ");
    // A field of its own goes too, and tells that the content has none.
    let extra = serde_json::json!({"reasoning_content": "c"}).as_object().expect("an object").clone();
    let beside = Conversation::user("a").extended([Turn::new("assistant", "d", extra).expect("a turn")]);
    assert_eq!(rendered(&opening, &Sample::Conversation(beside.clone())).expect("closed"), "a d ");
    assert_eq!(rendered(&plain, &Sample::Conversation(beside)).expect("closed"), "a d ");
}

#[test]
fn reasoning_goes_from_texts_and_pairs_and_never_from_ids() {
    let plain = stripping(BARE);
    assert_eq!(ids(&plain, &text("a <think> b </think> c"), Truncation::Refuse), Ok(vec![3, 5]));
    assert_eq!(ids(&plain, &text("a <think>\nb"), Truncation::Refuse), Err(FailureKind::UnfinishedReasoning));
    let pair = |first: &str, second: &str| Sample::Pair { first: first.to_owned(), second: second.to_owned() };
    assert_eq!(ids(&plain, &pair("a <think>", "b</think>c"), Truncation::Refuse), Ok(vec![3, 5]));
    assert_eq!(ids(&plain, &pair("a <think>", "b"), Truncation::Refuse), Err(FailureKind::UnfinishedReasoning));
    assert_eq!(ids(&plain, &Sample::Tokens(vec![3, 4]), Truncation::Refuse), Ok(vec![3, 4]));
    let kept = pipeline(9, |_| {});
    assert_eq!(ids(&kept, &text("<think>a"), Truncation::Refuse).map(|ids| ids.len() > 1), Ok(true), "kept by default");
    assert_ne!(kept.hash(), pipeline(9, |options| options.reasoning = ReasoningPolicy::Strip).hash());
}

#[test]
fn the_token_that_a_head_reads_ends_every_text_and_survives_every_cut() {
    let closing = pipeline(4, |options| options.closing = Some(8));
    assert_eq!(ids(&closing, &text("a b"), Truncation::Refuse), Ok(vec![0, 3, 4, 8]));
    assert_eq!(ids(&closing, &text("a b f"), Truncation::Refuse), Ok(vec![0, 3, 4, 8]), "not twice");
    assert_eq!(ids(&closing, &text("a b c d"), Truncation::Right), Ok(vec![0, 3, 4, 8]));
    assert_eq!(ids(&closing, &Sample::Tokens(vec![3, 4]), Truncation::Refuse), Ok(vec![3, 4]), "ids are taken as they are");
    assert_eq!(closing.policy().closing, Some(8));
}

#[test]
fn a_name_is_a_token_only_if_it_is_one() {
    let plain = pipeline(9, |_| {});
    let token = |name: &str| plain.token(&TokenName::Text(name.to_owned()));
    assert_eq!((token("a"), token("</s>"), plain.token(&TokenName::Id(7))), (Ok(3), Ok(1), Ok(7)));
    assert_eq!(token("zzz"), Ok(2), "no unknown token is named in this folder, so it is a token like others");
    let named = facts(WITH_BOS, r#"{"bos_token":"<s>","eos_token":"</s>","unk_token":"<unk>"}"#);
    let named = TextPipeline::new(&named, TextOptions::new(9, 9, date(2026, 1, 2).at(0, 0, 0, 0))).expect("loads");
    let token_of = |name: &str| named.token(&TokenName::Text(name.to_owned()));
    assert_eq!((token_of("zzz").is_err(), token_of("<unk>"), token_of("b")), (true, Ok(2), Ok(4)));
    let refused = token("a b").expect_err("two");
    assert!(refused.contains("is not one token: it becomes 2 (a, b)"), "{refused}");
}

proptest::proptest! {
    #[test]
    fn any_text_encodes_within_the_limit_or_fails(first in "\\PC*|[\\x00-\\x20 abcdef<s>/]*", second in ".*", limit in 1usize..12, side in 0usize..3, kind in 0..3) {
        let pipeline = pipeline(limit, |_| {});
        let truncation = [Truncation::Refuse, Truncation::Left, Truncation::Right][side];
        let sample = match kind {
            0 => Sample::Text(first),
            1 => Sample::Pair { first, second },
            _ => Sample::Conversation(Conversation::user(first).answered(second)),
        };
        if let Ok(encoding) = pipeline.encode(&sample, truncation) {
            proptest::prop_assert!((1..=limit).contains(&encoding.tokens()));
            proptest::prop_assert!(encoding.ids().iter().all(|&id| id < 9));
            // A cut sample keeps the order of the whole, and is a part of it.
            let whole = pipeline_ids(&sample);
            let mut rest = whole.iter();
            proptest::prop_assert!(encoding.ids().iter().all(|id| rest.any(|other| other == id)));
            proptest::prop_assert_eq!(encoding.truncated(), whole.len() > limit);
        }
    }

    #[test]
    fn two_bodies_share_the_room_fairly(first in 0usize..50, second in 0usize..50, room in 1usize..60) {
        let (a, b) = longest_first(first, second, room);
        proptest::prop_assert!(a <= first && b <= second);
        proptest::prop_assert_eq!(a + b, room.min(first + second));
        proptest::prop_assert!(a == first || b == second || a.abs_diff(b) <= 1);
    }
}

fn pipeline_ids(sample: &Sample) -> Vec<u32> {
    ids(&pipeline(1 << 20, |_| {}), sample, Truncation::Refuse).expect("encodes without a limit")
}
