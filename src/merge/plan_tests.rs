use std::path::PathBuf;

use super::*;
use crate::checkpoint::TensorInfo;
use crate::checkpoint::fixture::{self, TINY, Tensors};

/// Members `a`, `b`, ... in folders of their own.
struct Family {
    dir: tempfile::TempDir,
    names: Vec<&'static str>,
}

impl Family {
    fn new(count: usize) -> Self {
        let names = ["a", "b", "c", "d"][..count].to_vec();
        let family = Self { dir: tempfile::tempdir().unwrap(), names };
        for name in &family.names {
            family.write(name, &fixture::config(TINY), &family.tensors("F32"));
        }
        family
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tensors(&self, dtype: &'static str) -> Tensors {
        fixture::llama(TINY, dtype, 1)
    }

    fn write(&self, name: &str, config: &Value, tensors: &Tensors) {
        let _ = std::fs::remove_dir_all(self.path(name));
        fixture::write(&self.path(name), config, tensors, 1).unwrap();
    }

    fn plan(&self, more: &str) -> Result<MergePlan, MergeError> {
        let text = format!("members: {:?}\n{more}", self.names);
        MergePlan::open(&Recipe::from_yaml(&text, self.dir.path()).unwrap())
    }

    fn problems(&self, more: &str) -> Vec<String> {
        self.plan(more).unwrap_err().problems
    }
}

#[test]
fn a_plan_says_what_will_be_read_and_made() {
    let family = Family::new(3);
    family.write("b", &fixture::config(TINY), &family.tensors("BF16"));
    let plan = family.plan("dtype: bfloat16\ninit: a").unwrap();
    // Counted by hand: embedding 24*8, norm and head 8 each, and two layers of 4*8*8 + 3*16*8 + 2*8.
    let parameters = 24 * 8 + 8 + 8 + 2 * (4 * 64 + 3 * 128 + 16);
    assert_eq!(plan.parameters(), parameters);
    assert_eq!(plan.bytes_to_read(), parameters * (4 + 2 + 4));
    assert_eq!(plan.merged_bytes(), parameters * 2);
    assert_eq!(plan.manifest().get("score.weight").unwrap().to_string(), "BF16 [1, 8]");
    let text = plan.to_string();
    for part in [
        "linear merge of 3 members to bfloat16",
        "  b     0.333333     3.0 kB  BF16  ",
        "21 tensors, 1520 parameters: 15.2 kB to read, 3.0 kB merged",
        "note: members are stored in F32 and BF16; they are averaged in float64",
        "note: init is checked but not read",
    ] {
        assert!(text.contains(part), "{text:?} should say {part:?}");
    }
}

#[test]
fn every_incompatibility_is_told_at_once() {
    let family = Family::new(4);
    std::fs::remove_file(family.path("a").join("model.safetensors")).unwrap();
    std::fs::remove_dir_all(family.path("c")).unwrap();
    let mut other = fixture::tokenizer();
    other["model"]["vocab"]["a"] = 23.into();
    other["model"]["vocab"]["t"] = 4.into();
    std::fs::write(family.path("d").join("tokenizer.json"), other.to_string()).unwrap();
    let problems = family.problems("init: nowhere");
    assert_eq!(problems.len(), 4, "{problems:?}");
    assert!(problems[0].starts_with("member \"a\": ") && problems[0].contains("has no weights"), "{problems:?}");
    assert!(problems[1].starts_with("member \"c\": ") && problems[1].contains("there is no such folder"), "{problems:?}");
    assert!(problems[2].starts_with("init: ") && problems[2].contains("there is no such folder"), "{problems:?}");
    assert!(problems[3].starts_with("member \"d\" differs from member \"b\": ") && problems[3].contains("tokenizer"), "{problems:?}");
    let text = MergeError { problems }.to_string();
    assert!(text.starts_with("cannot merge, for 4 reasons:\n  - member \"a\""), "{text}");
}

#[test]
fn one_incompatibility_is_one_sentence() {
    let family = Family::new(1);
    std::fs::remove_dir_all(family.path("a")).unwrap();
    let expected = format!("cannot merge: member \"a\": {}: there is no such folder", family.path("a").display());
    assert_eq!(family.plan("").unwrap_err().to_string(), expected);
}

#[test]
fn a_member_without_its_head_is_refused() {
    let family = Family::new(2);
    let mut tensors = family.tensors("F32");
    tensors.remove("score.weight");
    family.write("b", &fixture::config(TINY), &tensors);
    let problems = family.problems("");
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].starts_with("member \"b\": ") && problems[0].contains("score.weight"), "{problems:?}");
}

#[test]
fn a_tensor_of_another_shape_is_refused() {
    let family = Family::new(2);
    let mut tensors = family.tensors("F32");
    tensors.insert("score.weight".to_owned(), fixture::tensor("F32", &[2, 8], fixture::noise(1).take(16)));
    let mut config = fixture::config(TINY);
    config["id2label"] = serde_json::json!({"0": "A", "1": "B"});
    family.write("b", &config, &tensors);
    let problems = family.problems("");
    assert!(problems.iter().all(|problem| problem.starts_with("member \"b\"")), "{problems:?}");
    let expected = "member \"b\": tensor \"score.weight\" has shape [2, 8], expected [1, 8] as in member \"a\"";
    assert!(problems.iter().any(|problem| problem == expected), "{problems:?}");
}

#[test]
fn integers_are_not_averaged() {
    let family = Family::new(2);
    let mut tensors = family.tensors("F32");
    let integers = fixture::Tensor { dtype: "I32", shape: vec![1, 8], bytes: vec![0; 32] };
    tensors.insert("score.weight".to_owned(), integers);
    family.write("b", &fixture::config(TINY), &tensors);
    let problems = family.problems("");
    assert_eq!(problems, ["member \"b\": tensor \"score.weight\" is I32, expected floating-point numbers to average"]);
}

#[test]
fn an_initialisation_may_lack_the_head_but_not_be_another_model() {
    let family = Family::new(2);
    family.write("init", &fixture::config(TINY), &family.tensors("F32"));
    let checkpoint = |name: &str| Checkpoint::open(&family.path(name)).map(Input::from);
    let recipe = Recipe::from_yaml("members: [a, b]\ninit: init", family.dir.path()).unwrap();
    let with_init = |names: &[&str], shape: Option<Vec<usize>>| {
        let mut input = checkpoint("init").unwrap();
        let keep = input.weights.manifest().iter().filter(|(name, _)| !names.contains(name));
        let change = |(name, info): (&str, &TensorInfo)| {
            let mut info = info.clone();
            if let Some(shape) = shape.clone().filter(|_| name == "model.norm.weight") {
                info.shape = shape;
            }
            (name.to_owned(), info)
        };
        let manifest: Manifest = keep.map(change).collect();
        input.weights = Arc::new(Headers(manifest));
        MergePlan::new(&recipe, [checkpoint("a"), checkpoint("b")], Some(Ok(input)))
    };
    let plan = with_init(&["score.weight"], None).unwrap();
    assert!(plan.notes().contains(&"init lacks 1 tensors of the members: score.weight".to_owned()), "{:?}", plan.notes());
    let problems = with_init(&[], Some(vec![4, 2])).unwrap_err().problems;
    assert_eq!(problems, ["init: tensor \"model.norm.weight\" has shape [4, 2], expected [8] as in member \"a\""]);
}

/// A source without weights: planning reads none.
struct Headers(Manifest);

impl TensorSource for Headers {
    fn manifest(&self) -> &Manifest {
        &self.0
    }

    fn read(
        &self,
        name: &str,
        _: std::ops::Range<usize>,
        _: &mut crate::checkpoint::Elements,
    ) -> Result<(), crate::checkpoint::SourceError> {
        panic!("a plan must not read {name}")
    }
}

#[test]
fn a_plan_needs_headers_alone() {
    let family = Family::new(2);
    let recipe = Recipe::from_yaml("members: [a, b]", family.dir.path()).unwrap();
    let input = |name: &&str| {
        let mut input = Input::from(Checkpoint::open(&family.path(name))?);
        input.weights = Arc::new(Headers(input.weights.manifest().clone()));
        Ok(input)
    };
    assert_eq!(MergePlan::new(&recipe, family.names.iter().map(input), None).unwrap().members().len(), 2);
    let one = MergePlan::new(&recipe, family.names.iter().take(1).map(input), None).unwrap_err();
    assert_eq!(one.problems, ["member \"b\": no checkpoint was given for it"]);
}

#[test]
fn extrapolation_is_noted() {
    let family = Family::new(2);
    let recipe = Recipe::from_yaml("members: [{path: a, coefficient: 1.5}, {path: b, coefficient: -0.5}]", family.dir.path()).unwrap();
    let notes = MergePlan::open(&recipe).unwrap().notes().to_vec();
    assert_eq!(notes, ["a coefficient is negative: the result lies outside of the members (extrapolation)"]);
}

impl Family {
    /// A language model of the same family: no reward head, no pad token, and a template of its own.
    fn write_language_model(&self, name: &str) {
        let mut config = fixture::config(TINY);
        config["architectures"] = serde_json::json!(["LlamaForCausalLM"]);
        config["pad_token_id"] = Value::Null;
        config.as_object_mut().unwrap().remove("id2label");
        self.write(name, &config, &fixture::language_model(TINY, "F32", 7));
        std::fs::write(self.path(name).join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    }

    fn open(&self, recipe: &str) -> Result<MergePlan, MergeError> {
        MergePlan::open(&Recipe::from_yaml(recipe, self.dir.path()).unwrap())
    }
}

#[test]
fn a_rule_lets_a_language_model_lend_its_body() {
    let family = Family::new(1);
    family.write_language_model("lm");
    let members = "members: [a, lm]\n";
    let plan = family.open(&format!("{members}rules: [{{match: 'score.*', from: a}}]")).unwrap();
    assert_eq!(plan.members()[1].lacks(), ["score.weight"]);
    assert_eq!(plan.members()[0].lacks(), [""; 0]);
    assert!(!plan.members()[1].source().reads().contains(&"lm_head.weight".to_owned()));
    let expected = [
        "member \"lm\" differs from member \"a\": pad_token_id: expected 2, found null",
        "member \"lm\" differs from member \"a\": only the second has a chat template `default`",
        "left out, because the model does not read them: lm_head.weight",
    ];
    assert_eq!(plan.notes(), expected);
    let text = plan.to_string();
    assert!(text.contains("\n  score.*: from a, 1 tensors\n"), "{text}");
    assert!(plan.reward().unwrap().layout.used().contains(&"score.weight".to_owned()));
    let other = family.open(&format!("{members}rules: [{{match: 'score.*', coefficients: {{a: 1, lm: 1}}}}]")).unwrap_err();
    assert_eq!(other.problems.len(), 1, "{other}");
    assert!(other.problems[0].starts_with("member \"lm\": ") && other.problems[0].contains("score.weight"), "{other}");
    let without = family.open(members).unwrap_err();
    assert!(without.problems.iter().any(|problem| problem.starts_with("member \"lm\": reward head \"score.weight\"")), "{without}");
}

#[test]
fn a_language_model_cannot_stand_first() {
    let family = Family::new(1);
    family.write_language_model("lm");
    let problems = family.open("members: [lm, a]\nrules: [{match: 'score.*', from: a}]").unwrap_err().problems;
    let expected = "member \"lm\" has no reward head, and the first member's configuration and tokenizer become the merged model's; list a reward model first";
    assert!(problems.contains(&expected.to_owned()), "{problems:?}");
}

#[test]
fn rows_of_other_tokens_are_not_mixed() {
    let family = Family::new(1);
    family.write_language_model("lm");
    let mut tokenizer = fixture::tokenizer();
    tokenizer["model"]["vocab"]["a"] = 23.into();
    tokenizer["model"]["vocab"]["t"] = 4.into();
    std::fs::write(family.path("lm").join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let rules = "rules: [{match: 'score.*', from: a}";
    let problems = family.open(&format!("members: [a, lm]\n{rules}]")).unwrap_err().problems;
    let expected = "member \"lm\" differs from member \"a\": 2 tokens have other ids: token \"a\" has id 4 in the one and 23 in the other; \
                    rows of model.embed_tokens.weight would be mixed with those of other tokens";
    assert_eq!(problems, [expected]);
    let plan = family.open(&format!("members: [a, lm]\n{rules}, {{match: '*embed*', from: a}}]")).unwrap();
    assert!(plan.notes().iter().any(|note| note.contains("the tokenizers differ in vocabulary")), "{:?}", plan.notes());
}

#[test]
fn a_rule_may_take_a_tensor_that_has_another_shape_elsewhere() {
    let family = Family::new(1);
    let larger = fixture::Size { vocab: 25, ..TINY };
    let mut tensors = fixture::language_model(larger, "F32", 7);
    tensors.remove("lm_head.weight");
    let mut config = fixture::config(larger);
    config["architectures"] = serde_json::json!(["LlamaForCausalLM"]);
    family.write("lm", &config, &tensors);
    let rules = "rules: [{match: 'score.*', from: a}";
    let problems = family.open(&format!("members: [a, lm]\n{rules}]")).unwrap_err().problems;
    assert_eq!(problems, ["member \"lm\": tensor \"model.embed_tokens.weight\": expected shape [24, 8], found [25, 8]"]);
    let plan = family.open(&format!("members: [a, lm]\n{rules}, {{match: '*embed*', from: a}}]")).unwrap();
    assert_eq!(plan.manifest().get("model.embed_tokens.weight").unwrap().shape, [24, 8]);
}

#[test]
fn a_rule_that_matches_nothing_is_refused_and_one_that_never_decides_is_noted() {
    let family = Family::new(2);
    let problems = family.problems("rules: [{match: 'scor.*', from: a}]");
    assert_eq!(problems, ["rules[0]: \"scor.*\" matches no tensor of the members"]);
    let plan = family.plan("rules: [{match: '*', from: a}, {match: 'score.*', from: b}]").unwrap();
    assert_eq!(plan.notes(), ["rules[1] decides nothing: rules before it match all of its tensors"]);
    assert_eq!((plan.members()[0].bytes(), plan.members()[1].bytes()), (1520 * 4, 0));
}

#[test]
fn slerp_and_liti_want_a_head_from_init_or_a_rule() {
    let family = Family::new(2);
    family.write_language_model("init");
    let needs = |more: &str| family.problems(&format!("init: init\n{more}"));
    let expected = "init has no reward head (score.weight), as a language model has none, so heads have no task vectors; say by a rule \
                    whose head is taken ({match: \"score.*\", from: a}) or that it is averaged ({match: \"score.*\", coefficients: {a: 1, b: 1}})";
    assert_eq!(needs("method: slerp"), [expected]);
    assert_eq!(needs("liti: {eta: 0.5}"), [expected]);
    for rule in ["from: a", "coefficients: {a: 1, b: 1}"] {
        let plan = family.plan(&format!("init: init\nmethod: slerp\nrules: [{{match: 'score.*', {rule}}}]")).unwrap();
        assert_eq!(plan.init().unwrap().reads().len(), 20);
    }
    let unread = family.plan("init: init").unwrap();
    assert!(unread.init().unwrap().reads().is_empty());
    assert!(unread.notes().iter().any(|note| note.starts_with("init is checked but not read")), "{:?}", unread.notes());
}

#[test]
fn an_init_whose_tokens_have_other_ids_cannot_be_turned_from() {
    let family = Family::new(2);
    family.write("init", &fixture::config(TINY), &family.tensors("F32"));
    let mut tokenizer = fixture::tokenizer();
    tokenizer["model"]["vocab"]["a"] = 5.into();
    tokenizer["model"]["vocab"]["b"] = 4.into();
    std::fs::write(family.path("init").join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let problems = family.problems("init: init\nmethod: slerp");
    assert!(problems.len() == 1 && problems[0].starts_with("init differs from member \"a\": 2 tokens have other ids"), "{problems:?}");
    assert!(family.plan("init: init").is_ok());
}

#[test]
fn groups_follow_the_granularity() {
    let family = Family::new(2);
    family.write("init", &fixture::config(TINY), &family.tensors("F32"));
    let names = |more: &str| {
        let plan = family.plan(&format!("init: init\n{more}")).unwrap();
        plan.groups().into_iter().map(|(name, tensors)| (name.to_owned(), tensors.len())).collect::<Vec<_>>()
    };
    let layers =
        [("model.embed_tokens.weight", 1), ("model.layers.0.", 9), ("model.layers.1.", 9), ("model.norm.weight", 1), ("score.weight", 1)];
    let layers = layers.map(|(name, tensors)| (name.to_owned(), tensors));
    assert_eq!(names("method: slerp"), layers);
    assert_eq!(names("method: linear"), layers);
    assert_eq!(names("slerp: {granularity: global}"), [(String::new(), 21)]);
    assert_eq!(names("slerp: {granularity: tensor}").len(), 21);
    assert_eq!(names("method: slerp\nrules: [{match: 'score.*', from: a}]"), layers[..4]);
}

/// A policy of a family that this program does not know.
fn unknown_family(family: &Family, name: &str, change: impl FnOnce(&mut Value, &mut Tensors)) {
    let mut config = serde_json::json!({"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 4});
    let mut tensors = Tensors::new();
    for (tensor, shape) in [("backbone.layers.0.A_log", vec![4, 2]), ("lm_head.weight", vec![3, 2])] {
        let count = shape.iter().product();
        tensors.insert(tensor.to_owned(), fixture::tensor("BF16", &shape, fixture::noise(3).take(count)));
    }
    let integers = fixture::Tensor { dtype: "I64", shape: vec![2], bytes: [1_i64, 2].iter().flat_map(|x| x.to_le_bytes()).collect() };
    tensors.insert("backbone.steps".to_owned(), integers);
    let frequencies = fixture::tensor("F32", &[2], fixture::noise(4).take(2));
    tensors.insert("backbone.rotary_emb.inv_freq".to_owned(), frequencies);
    change(&mut config, &mut tensors);
    family.write(name, &config, &tensors);
}

#[test]
fn a_policy_of_any_family_is_planned_with_all_of_its_tensors_and_never_served() {
    let family = Family::new(0);
    unknown_family(&family, "p", |_, _| {});
    unknown_family(&family, "q", |config, tensors| {
        config["transformers_version"] = "5.0".into();
        tensors.remove("backbone.rotary_emb.inv_freq");
    });
    std::fs::remove_file(family.path("q").join("tokenizer.json")).unwrap();
    let plan = family.open("kind: policy\nmembers: [p, q]\ninit: p\nliti: {eta: 0.3}\ndtype: bfloat16").unwrap();
    let names: Vec<&str> = plan.manifest().names().collect();
    assert_eq!(names, ["backbone.layers.0.A_log", "backbone.steps", "lm_head.weight"]);
    assert_eq!(plan.manifest().get("backbone.steps").unwrap().to_string(), "I64 [2]");
    assert_eq!(
        plan.treatments().map(|(_, treatment)| treatment).collect::<Vec<_>>(),
        [Treatment::Method, Treatment::Equal, Treatment::Method]
    );
    let sentence = "the recipe merges a policy (kind: policy), which can be planned, reported on and written, but has no reward to serve";
    assert_eq!(plan.reward().unwrap_err().to_string(), sentence);
    let notes = plan.notes().join("\n");
    let left_out = "left out, because programs compute them from the configuration: backbone.rotary_emb.inv_freq";
    for part in ["model_type", "member \"q\": ", "tokenizer.json", left_out] {
        assert!(notes.contains(part), "{notes:?} should say {part:?}");
    }
    assert!(plan.to_string().starts_with("linear, liti (eta 0.3), merge of a policy of 2 members to bfloat16\n"), "{plan}");
    let as_reward = family.open("members: [p]").unwrap_err();
    assert!(as_reward.problems.iter().any(|problem| problem.contains("model_type")), "{as_reward}");
}

#[test]
fn policies_that_differ_are_refused() {
    let family = Family::new(0);
    unknown_family(&family, "p", |_, _| {});
    let problems = |change: fn(&mut Value, &mut Tensors), more: &str| {
        unknown_family(&family, "q", change);
        family.open(&format!("kind: policy\nmembers: [p, q]\n{more}")).unwrap_err().problems
    };
    let found = problems(|config, _| config["state_size"] = 8.into(), "");
    assert_eq!(found, ["member \"q\" differs from member \"p\": state_size: expected 4, found 8"]);
    let found = problems(|_, tensors| _ = tensors.remove("lm_head.weight"), "");
    assert_eq!(found, ["member \"q\": tensor \"lm_head.weight\" is missing, member \"p\" has it"]);
    let extra = |_: &mut Value, tensors: &mut Tensors| {
        _ = tensors.insert("extra".to_owned(), fixture::tensor("F32", &[1], fixture::noise(1).take(1)))
    };
    assert_eq!(problems(extra, ""), ["member \"p\": tensor \"extra\" is missing, member \"q\" has it"]);
    let narrow = |_: &mut Value, tensors: &mut Tensors| {
        tensors.insert("backbone.steps".to_owned(), fixture::Tensor { dtype: "I32", shape: vec![2], bytes: vec![0; 8] });
    };
    let expected =
        "member \"q\": tensor \"backbone.steps\" is I32, expected I64: it is not averaged, so it must be the same in all members";
    assert_eq!(problems(narrow, ""), [expected]);
    let found = problems(|_, _| {}, "rules: [{match: '*.steps', coefficients: {p: 1, q: 1}}]");
    assert!(
        found.contains(&"member \"q\": tensor \"backbone.steps\" is I64, expected floating-point numbers to average".to_owned()),
        "{found:?}"
    );
    unknown_family(&family, "q", narrow);
    let plan = family.open("kind: policy\nmembers: [p, q]\nrules: [{match: '*.steps', from: q}]").unwrap();
    assert_eq!(plan.manifest().get("backbone.steps").unwrap().to_string(), "I32 [2]");
    unknown_family(&family, "q", |_, _| {});
    let plan = family.open("kind: policy\nmembers: [p, q]\nrules: [{match: 'lm_head.*', from: q}]").unwrap();
    assert_eq!(plan.members()[0].source().reads().len(), 2);
}

#[test]
fn what_a_rule_takes_from_where_it_is_not_is_left_out_and_noted() {
    let family = Family::new(0);
    unknown_family(&family, "p", |_, _| {});
    unknown_family(&family, "q", |_, tensors| _ = tensors.remove("lm_head.weight"));
    let plan = family.open("kind: policy\nmembers: [p, q]\nrules: [{match: 'lm_head.*', from: q}]").unwrap();
    assert!(plan.manifest().get("lm_head.weight").is_none());
    let expected = "rules[0] takes tensor \"lm_head.weight\" from member \"q\", which does not have it, so it is left out";
    assert!(plan.notes().iter().any(|note| note == expected), "{:?}", plan.notes());
}

#[test]
fn what_is_unusual_in_coefficients_is_noted() {
    let family = Family::new(2);
    family.write("init", &fixture::config(TINY), &family.tensors("F32"));
    let notes = |more: &str| family.plan(&format!("init: init\n{more}")).unwrap().notes().to_vec();
    assert_eq!(notes("liti: {eta: 1.5}"), ["liti goes beyond the merge (extrapolation)"]);
    assert_eq!(notes("liti: {eta: -0.5}"), ["a coefficient is negative: the result lies outside of the members (extrapolation)"]);
    let plan = family.open("members: [a, {path: b, coefficient: 0}]").unwrap();
    assert_eq!(plan.notes(), ["member \"b\" has coefficient 0"]);
    assert_eq!(plan.members()[1].source().reads(), [""; 0]);
}

#[test]
fn what_the_model_needs_must_be_where_a_rule_takes_it_from() {
    let family = Family::new(2);
    let mut tensors = family.tensors("F32");
    tensors.remove("model.norm.weight");
    family.write("init", &fixture::config(TINY), &tensors);
    let problems = family.problems("init: init\nrules: [{match: '*norm*', init: true}]");
    let expected = [
        "rules[0] takes tensor \"model.norm.weight\" from init, which does not have it",
        "the merged model: tensor \"model.norm.weight\": expected shape [8], found no such tensor",
    ];
    assert_eq!(problems, expected);
}
