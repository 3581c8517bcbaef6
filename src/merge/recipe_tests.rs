use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<Recipe, RecipeError> {
    Recipe::from_yaml(text, Path::new("/base"))
}

fn problems(text: &str) -> Vec<String> {
    parse(text).unwrap_err().problems
}

fn summary(recipe: &Recipe) -> Vec<(String, String, f64)> {
    let member = |member: &Member| (member.name.to_string(), member.path.display().to_string(), member.coefficient);
    recipe.members().iter().map(member).collect()
}

#[test]
fn a_recipe_says_what_to_merge_and_leaves_little_to_say() {
    let recipe = parse(
        "method: linear\ninit: ./init\ndtype: bfloat16\nmembers:\n  - {path: ./a/rm-0, name: best, coefficient: 3}\n  - /abs/rm-1/\n  - {path: rm 2}\n",
    )
    .unwrap();
    assert_eq!(recipe.dtype(), Dtype::Bf16);
    assert_eq!(recipe.init(), Some(Path::new("/base/init")));
    let expected = [("best", "/base/./a/rm-0", 0.6), ("rm-1", "/abs/rm-1/", 0.2), ("rm-2", "/base/rm 2", 0.2)];
    assert_eq!(summary(&recipe), expected.map(|(name, path, coefficient)| (name.to_owned(), path.to_owned(), coefficient)));
    let shortest = parse("members: [a, b, c]").unwrap();
    assert_eq!((shortest.method(), shortest.dtype(), shortest.init()), (Method::Linear, Dtype::F32, None));
    assert!(summary(&shortest).iter().all(|(_, _, coefficient)| *coefficient == 1.0 / 3.0));
}

#[test]
fn all_mistakes_are_told_at_once_with_their_places() {
    let found = problems(
        "method: ties\ndtype: int8\nmethods: linear\ninit: [x]\nmembers:\n  - {path: a, weight: 2}\n  - {coefficient: .nan}\n  - 7\n  - {path: b, name: 'b c', coefficient: one}\n  - x/a\n",
    );
    let expected = [
        "methods: unknown key, expected one of kind, method, slerp, ema, normalize, liti, init, members, rules, dtype, head, pooling",
        "method: \"ties\" is unknown, expected one of linear, slerp, ema",
        "init: expected text, found a list",
        "dtype: \"int8\" is unknown, expected one of float32, bfloat16, float16",
        "members[0].weight: unknown key, expected one of path, base, name, coefficient",
        "members[1].coefficient: expected a finite number, found .nan",
        "members[1].path: missing, expected a checkpoint folder or another recipe",
        "members[2]: expected a path or {path, base, name, coefficient}, found 7",
        "members[3].coefficient: expected a finite number, found \"one\"",
        "members[3].name: member name \"b c\": expected 1 to 128 letters, digits, '.', '_' or '-'",
        "members[4].name: \"a\" is the name of members[0] already, give it another",
    ];
    assert_eq!(found, expected);
}

#[test]
fn every_other_mistake_has_its_sentence() {
    let cases = [
        ("", "expected keys kind, method, slerp, ema, normalize, liti, init, members, rules, dtype, head, pooling; found nothing"),
        ("[a]", "expected keys kind, method, slerp, ema, normalize, liti, init, members, rules, dtype, head, pooling; found a list"),
        ("method: linear", "members: missing, expected a list of checkpoints"),
        ("members: a", "members: expected a list, found \"a\""),
        ("members: []", "members: the list is empty, expected at least one checkpoint"),
        ("members: ['']", "members[0]: expected a path or {path, base, name, coefficient}, found empty text"),
        ("members: [{path: ..}]", "members[0].name: missing, and no name can be taken from the path \"/base/..\""),
        ("members: [x/a, y/a]", "members[1].name: \"a\" is the name of members[0] already, give it another"),
        (
            "members: [{path: a, coefficient: 0}]",
            "members: the coefficients sum to 0, expected a sum clearly above 0, because they are divided by it",
        ),
        ("members: [{path: a, coefficient: 1}, {path: b, coefficient: -1}]", "members: the coefficients sum to 0"),
        ("members: [{path: a, coefficient: .inf}]", "members[0].coefficient: expected a finite number, found .inf"),
        ("members: [{path: a, coefficient: 1e308}, {path: b, coefficient: 1e308}]", "members: the coefficients are too large to be summed"),
        ("3: 4\nmembers: [a]", "?: a key is 3"),
        ("members: [a", "is not valid YAML"),
        ("members: [a]\nmembers: [b]", "is not valid YAML: duplicate"),
    ];
    for (text, expected) in cases {
        let found = problems(text);
        assert_eq!(found.len(), 1, "{text:?}: {found:?}");
        assert!(found[0].contains(expected), "{text:?}: {:?} should say {expected:?}", found[0]);
    }
}

#[test]
fn every_method_is_said_in_few_words() {
    let method = |text: &str| parse(&format!("members: [a, b]\ninit: i\n{text}")).unwrap().method();
    let slerp = |granularity, t| Method::Slerp { granularity, t };
    assert_eq!(method("method: slerp"), slerp(Granularity::Layer, 0.5));
    assert_eq!(method("slerp: {granularity: tensor}"), slerp(Granularity::Tensor, 0.5));
    assert_eq!(method("method: slerp\nslerp: {granularity: global, t: 0.3}"), slerp(Granularity::Global, 0.3));
    assert_eq!(method("method: ema"), Method::Ema { mu: 0.01 });
    assert_eq!(method("ema: {mu: 0.5}"), Method::Ema { mu: 0.5 });
    assert_eq!(method("method: linear"), Method::Linear);
    let recipe = parse("kind: policy\nslerp: {}\nliti: {eta: 0.3}\ninit: i\nmembers: [a, b, c]").unwrap();
    assert_eq!((recipe.kind(), recipe.liti(), recipe.method()), (Kind::Policy, Some(0.3), slerp(Granularity::Layer, 0.5)));
}

#[test]
fn the_share_of_a_member_follows_from_the_method() {
    let shares = |text: &str| parse(text).unwrap().members().iter().map(|member| member.coefficient).collect::<Vec<_>>();
    assert_eq!(shares("members: [{path: a, coefficient: 3}, b]"), [0.75, 0.25]);
    assert_eq!(shares("members: [{path: a, coefficient: 3}, b]\nnormalize: false"), [3.0, 1.0]);
    assert_eq!(shares("members: [a, b]\ninit: i\nslerp: {t: 0.25}"), [0.75, 0.25]);
    assert_eq!(shares("members: [a, b, c, d]\ninit: i\nmethod: slerp"), [0.25; 4]);
    assert_eq!(shares("members: [a, b, c]\nema: {mu: 0.5}"), [0.25, 0.25, 0.5]);
}

#[test]
fn rules_name_members_and_mix_those_they_name() {
    let text = "members: [a, b, c]\ninit: i\nrules:\n  - {match: 'score.*', from: b}\n  - {match: '*.embed*', coefficients: {c: 3, a: 1}}\n  \
                - {match: '*norm*', init: true}\n  - {match: 'x', coefficients: {a: 1, c: 1}}\n";
    let recipe = parse(text).unwrap();
    let takes: Vec<&Take> = recipe.rules().iter().map(|rule| &rule.take).collect();
    let mix = |coefficients: [f64; 3]| Take::Mix(Coefficients(coefficients.to_vec()));
    assert_eq!(takes, [&Take::From(1), &mix([0.25, 0.0, 0.75]), &Take::Init, &mix([0.5, 0.0, 0.5])]);
    assert!(recipe.rules()[1].pattern.matches("model.embed_tokens.weight"));
    let as_given = parse(&format!("{text}normalize: false")).unwrap();
    assert_eq!(as_given.rules()[1].take, mix([1.0, 0.0, 3.0]));
}

#[test]
fn every_mistake_in_methods_and_rules_has_its_sentence() {
    let rule = |rule: &str| format!("members: [a, b]\nrules: [{rule}]");
    let cases = [
        (
            "members: [a, b]\nmethod: slerp".to_owned(),
            "init: missing; slerp turns task vectors, and these are the way from init to each member",
        ),
        ("members: [a, b]\nliti: {eta: 0.3}".to_owned(), "init: missing; liti goes from init towards the merge"),
        ("members: [a, b]\ninit: i\nliti: {}".to_owned(), "liti.eta: missing, expected a number"),
        ("members: [a, b]\ninit: i\nliti: {eta: much}".to_owned(), "liti.eta: expected a finite number, found \"much\""),
        ("members: [a, b]\ninit: i\nliti: 0.3".to_owned(), "liti: expected {eta}, found 0.3"),
        ("members: [a, b]\ninit: i\nslerp: {by: layer}".to_owned(), "slerp.by: unknown key, expected one of granularity, t"),
        (
            "members: [a, b]\ninit: i\nslerp: {granularity: row}".to_owned(),
            "slerp.granularity: \"row\" is unknown, expected one of layer, tensor, global",
        ),
        (
            "members: [a, b, c]\ninit: i\nslerp: {t: 0.5}".to_owned(),
            "slerp.t: is for two members, found 3; more are taken one after the other, the m-th with 1/m",
        ),
        ("members: [a, b]\ninit: i\nmethod: linear\nslerp: {t: 0.5}".to_owned(), "slerp: has no meaning where the method is linear"),
        ("members: [a, b]\ninit: i\nslerp: {}\nema: {}".to_owned(), "ema: has no meaning where the method is slerp"),
        ("members: [a, b]\nema: {mu: 0}".to_owned(), "ema.mu: expected a number above 0 and at most 1, found 0"),
        ("members: [a, b]\nema: {mu: 1.5}".to_owned(), "ema.mu: expected a number above 0 and at most 1, found 1.5"),
        (
            "members: [a, {path: b, coefficient: 2}]\nmethod: ema".to_owned(),
            "members[1].coefficient: has no meaning where the method is ema",
        ),
        ("members: [a, b]\nnormalize: 1".to_owned(), "normalize: expected true or false, found 1"),
        (
            "members: [{path: a, coefficient: 0}]\nnormalize: false".to_owned(),
            "members: the coefficients are all 0, expected at least one other",
        ),
        ("members: [a, b]\nkind: critic".to_owned(), "kind: \"critic\" is unknown, expected one of reward, policy"),
        ("members: [a, b]\nrules: {}".to_owned(), "rules: expected a list, found a mapping"),
        (rule("x"), "rules[0]: expected {match, and one of from, coefficients, init}, found \"x\""),
        (rule("{from: a}"), "rules[0].match: missing, expected a pattern over tensor names"),
        (
            rule("{match: 'a[0]', from: a}"),
            "rules[0].match: \"a[0]\": '[' has no meaning here, expected a tensor name in which `*` and `?` are wildcards",
        ),
        (rule("{match: x}"), "rules[0]: expected one of from, coefficients, init, found none"),
        (rule("{match: x, from: a, init: true}"), "rules[0]: expected one of from, coefficients, init, found from and init"),
        (rule("{match: x, from: c}"), "rules[0].from: \"c\" is no member, expected one of a, b"),
        (rule("{match: x, coefficients: a}"), "rules[0].coefficients: expected {member: number}, found \"a\""),
        (rule("{match: x, coefficients: {c: 1}}"), "rules[0].coefficients: \"c\" is no member, expected one of a, b"),
        (rule("{match: x, coefficients: {a: b}}"), "rules[0].coefficients.a: expected a finite number, found \"b\""),
        (rule("{match: x, coefficients: {1: 1}}"), "rules[0].coefficients: a key is 1, expected the name of a member"),
        (rule("{match: x, coefficients: {}}"), "rules[0].coefficients: names no member"),
        (rule("{match: x, coefficients: {a: 1, b: -1}}"), "rules[0].coefficients: the coefficients sum to 0"),
        (rule("{match: x, init: true}"), "rules[0].init: expected true, in a recipe that has an `init`"),
        (rule("{match: x, from: a, else: b}"), "rules[0].else: unknown key, expected one of match, from, coefficients, init"),
    ];
    for (text, expected) in cases {
        let found = problems(&text);
        assert_eq!(found.len(), 1, "{text:?}: {found:?}");
        assert!(found[0].starts_with(expected), "{text:?}: {:?} should say {expected:?}", found[0]);
    }
}

#[test]
fn another_recipe_has_a_name_without_its_ending() {
    assert_eq!(
        summary(&parse("members: [it/iteration-1.yaml, v1.5]").unwrap()).into_iter().map(|(name, _, _)| name).collect::<Vec<_>>(),
        ["iteration-1", "v1.5"]
    );
}

#[test]
fn a_file_is_named_in_its_mistakes_and_its_folder_is_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("recipe.yaml");
    std::fs::write(&file, "members: [./rm-0]").unwrap();
    assert_eq!(Recipe::from_file(&file).unwrap().members()[0].path, dir.path().join("./rm-0"));
    std::fs::write(&file, "member: []").unwrap();
    let error = Recipe::from_file(&file).unwrap_err().to_string();
    assert!(error.starts_with(&format!("recipe {}: member: unknown key", file.display())), "{error}");
    assert!(error.contains("; members: missing"), "{error}");
    assert!(Recipe::from_file(&dir.path().join("no.yaml")).unwrap_err().to_string().contains("cannot be read"));
    assert!(Recipe::from_file(dir.path()).unwrap_err().to_string().contains("is not a file"));
    std::fs::write(&file, vec![b'#'; 1 << 21]).unwrap();
    assert!(Recipe::from_file(&file).unwrap_err().to_string().contains("has 2097152 bytes, expected at most 1048576"));
}

#[test]
fn folders_given_alone_are_averaged_uniformly_under_names_that_tell_them_apart() {
    let paths = ["/x/run-0/final", "/x/run-1/final", "/x/other"].map(PathBuf::from);
    let names: Vec<_> = summary(&Recipe::uniform(&paths).unwrap()).into_iter().map(|(name, _, _)| name).collect();
    assert_eq!(names, ["run-0.final", "run-1.final", "other"]);
    let twice = Recipe::uniform(&[PathBuf::from("/x/a"), PathBuf::from("/x/a")]).unwrap_err().to_string();
    assert!(twice.contains("\"x.a\" is the name of members[0] already"), "{twice}");
    assert!(Recipe::uniform(&[]).unwrap_err().to_string().contains("the list is empty"));
    assert!(Recipe::uniform(&[PathBuf::from("/")]).unwrap_err().to_string().contains("no name can be taken"));
}

#[test]
fn another_output_dtype_can_be_asked_for_but_no_integer() {
    let recipe = parse("members: [a]").unwrap();
    assert_eq!(recipe.clone().with_dtype(Dtype::F16).unwrap().dtype(), Dtype::F16);
    assert_eq!(recipe.with_dtype(Dtype::I64), None);
}

proptest! {
    #[test]
    fn a_resolved_recipe_reads_as_itself(raw in prop::collection::vec(-1.0..10.0_f64, 1..9)) {
        prop_assume!(Coefficients::try_new(&raw).is_ok());
        let members: Vec<_> = raw.iter().enumerate().map(|(i, c)| format!("{{path: rm-{i}, coefficient: {c:?}}}")).collect();
        let names: Vec<_> = raw.iter().enumerate().map(|(i, c)| format!("rm-{i}: {c:?}")).collect();
        let rules = format!("rules: [{{match: 'score.*', from: rm-0}}, {{match: '*', coefficients: {{{}}}}}]", names.join(", "));
        let plain: Vec<_> = (0..raw.len()).map(|i| format!("rm-{i}")).collect();
        let eta = raw[0];
        for text in [
            format!("members: [{}]\ninit: i\n{rules}", members.join(", ")),
            format!("members: [{}]\ninit: i\n{rules}\nnormalize: false\nkind: policy", members.join(", ")),
            format!("members: {plain:?}\ninit: i\nmethod: slerp\nliti: {{eta: {eta:?}}}\nnormalize: false\n{rules}"),
            format!("members: {plain:?}\nema: {{mu: {:?}}}\n{rules}\ndtype: bfloat16", (eta.abs() / 10.0).max(1e-3)),
        ] {
            let recipe = parse(&text).unwrap();
            let again = Recipe::from_yaml(&recipe.to_resolved_string(), Path::new("/elsewhere")).unwrap();
            prop_assert_eq!(again, recipe);
        }
    }

    #[test]
    fn coefficients_sum_to_one_or_are_refused(raw in prop::collection::vec(prop_oneof![any::<f64>(), -2.0..2.0_f64], 1..9)) {
        if let Ok(coefficients) = Coefficients::try_new(&raw) {
            let values = coefficients.as_slice();
            let size: f64 = values.iter().map(|value| value.abs()).sum();
            prop_assert_eq!(values.len(), raw.len());
            prop_assert!((values.iter().sum::<f64>() - 1.0).abs() <= 1e-14 * size, "{:?}", values);
            prop_assert!(size <= 1.1e6);
        }
    }

    #[test]
    fn any_text_gives_an_answer(text in ".{0,80}") {
        let _ = parse(&text);
        let _ = parse(&format!("members: {text}"));
    }
}

#[test]
fn what_was_fetched_is_named_by_where_it_came_from() {
    let text = "members: [{path: 'hf:org/rm-lora', base: 'hf:org/sft@v2'}, ./rm]\ninit: hf:org/sft@v2";
    let mut recipe = Recipe::from_yaml(text, Path::new("/here")).unwrap();
    for (path, origin) in recipe.places_mut() {
        let Some(name) = path.to_str().unwrap().strip_prefix("hf:org/").map(str::to_owned) else { continue };
        *path = PathBuf::from("/copies").join(&name);
        *origin = Some(format!("hf:org/{name}@0123"));
    }
    let member = &recipe.members()[0];
    assert_eq!((member.path.to_str(), member.base.as_deref()), (Some("/copies/rm-lora"), Some(Path::new("/copies/sft@v2"))));
    let resolved = recipe.to_json();
    assert_eq!(resolved["members"][0]["path"], "hf:org/rm-lora@0123");
    assert_eq!(resolved["members"][0]["base"], "hf:org/sft@v2@0123");
    assert_eq!(resolved["members"][1]["path"], "/here/./rm");
    assert_eq!((resolved["init"].as_str(), recipe.init()), (Some("hf:org/sft@v2@0123"), Some(Path::new("/copies/sft@v2"))));
}
