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
        "method: slerp\ndtype: int8\nmethods: linear\ninit: [x]\nmembers:\n  - {path: a, weight: 2}\n  - {coefficient: .nan}\n  - 7\n  - {path: b, name: 'b c', coefficient: one}\n  - x/a\n",
    );
    let expected = [
        "methods: unknown key, expected one of method, init, members, dtype, head, pooling",
        "method: \"slerp\" is not known to this version, expected \"linear\"",
        "dtype: \"int8\" is unknown, expected float32, bfloat16 or float16",
        "init: expected text, found a list",
        "members[0].weight: unknown key, expected one of path, name, coefficient",
        "members[1].coefficient: expected a finite number, found .nan",
        "members[1].path: missing, expected a checkpoint folder",
        "members[2]: expected a path or {path, name, coefficient}, found 7",
        "members[3].coefficient: expected a finite number, found \"one\"",
        "members[3].name: member name \"b c\": expected 1 to 128 letters, digits, '.', '_' or '-'",
        "members[4].name: \"a\" is the name of members[0] already, give it another",
    ];
    assert_eq!(found, expected);
}

#[test]
fn every_other_mistake_has_its_sentence() {
    let cases = [
        ("", "expected keys method, init, members, dtype, head, pooling; found nothing"),
        ("[a]", "expected keys method, init, members, dtype, head, pooling; found a list"),
        ("method: linear", "members: missing, expected a list of checkpoints"),
        ("members: a", "members: expected a list, found \"a\""),
        ("members: []", "members: the list is empty, expected at least one checkpoint"),
        ("members: ['']", "members[0]: expected a path or {path, name, coefficient}, found empty text"),
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
        let recipe = parse(&format!("members: [{}]\ninit: i", members.join(", "))).unwrap();
        let again = Recipe::from_yaml(&recipe.to_resolved_string(), Path::new("/elsewhere")).unwrap();
        prop_assert_eq!(again, recipe);
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
