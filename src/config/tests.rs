use proptest::prelude::*;

use super::*;

fn resolve(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Resolved, ConfigErrors> {
    let owned = |pairs: &[(&str, &str)]| pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Resolved::new(Sources {
        file: Some((PathBuf::from("conf/warm.yaml"), file.to_owned())),
        environment: owned(environment),
        flags: owned(flags),
        folders: vec![],
    })
}

fn mistakes(result: Result<Resolved, ConfigErrors>) -> Vec<String> {
    result.expect_err("mistakes").0.iter().map(ToString::to_string).collect()
}

#[test]
fn every_default_is_valid() {
    let resolved = Resolved::new(Sources::default()).expect("defaults");
    assert_eq!(resolved.config.listen.to_string(), "127.0.0.1:50051");
    assert_eq!(resolved.config.admin_listen.to_string(), "127.0.0.1:9464");
    assert_eq!(resolved.config.model, None);
}

#[test]
fn the_nearer_source_wins_and_says_so() {
    let file = "listen: 127.0.0.1:1\nadmin: {listen: \"127.0.0.1:2\"}\nensemble: resident\n";
    let resolved = resolve(file, &[("WARM_LISTEN", "127.0.0.1:3"), ("HOME", "/x")], &[("listen", "127.0.0.1:4")]).expect("valid");
    assert_eq!(resolved.config.listen.port(), 4);
    assert_eq!(resolved.config.admin_listen.port(), 2);
    assert_eq!(resolved.config.ensemble, EnsembleMode::Resident);
    let printed = resolved.describe();
    for line in ["listen = 127.0.0.1:4", "(--listen)", "(conf/warm.yaml)", "(default)"] {
        assert!(printed.contains(line), "{line}\n{printed}");
    }
    let variable = resolve(file, &[("WARM_ADMIN__LISTEN", "127.0.0.1:3")], &[]).expect("valid");
    assert_eq!(variable.config.admin_listen.port(), 3);
    assert!(variable.describe().contains("($WARM_ADMIN__LISTEN)"));
}

#[test]
fn unknown_names_are_mistakes_in_every_source() {
    let found = mistakes(resolve("lisen: x\nadmin: {port: 1}\nnovel: {deep: {er: 1}}\n", &[("WARM_LISTE", "x")], &[("nothing", "x")]));
    assert_eq!(found.len(), 5, "{found:#?}");
    assert!(
        found.iter().any(|mistake| mistake.contains("conf/warm.yaml: lisen") && mistake.contains("did you mean `listen`")),
        "{found:#?}"
    );
    assert!(found.iter().any(|mistake| mistake.contains("$WARM_LISTE") && mistake.contains("WARM_LISTEN")), "{found:#?}");
    assert!(found.iter().any(|mistake| mistake.contains("admin.port")), "{found:#?}");
}

#[test]
fn the_mistakes_of_the_recipe_stand_among_the_others() {
    let found = mistakes(resolve("listen: x\nmodel:\n  metod: linear\n  members: [a, {path: b, coefficent: 2}]\n", &[], &[]));
    assert_eq!(found.len(), 3, "{found:#?}");
    assert!(found.iter().any(|mistake| mistake.starts_with("conf/warm.yaml: model: ") && mistake.contains("metod")), "{found:#?}");
    assert!(found.iter().any(|mistake| mistake.contains("members[1]") && mistake.contains("coefficent")), "{found:#?}");
    let found = mistakes(resolve("model: ./recipe.yaml\n", &[], &[]));
    assert!(found.len() == 1 && found[0].starts_with("conf/warm.yaml: model: "), "{found:#?}");
}

#[test]
fn every_mistake_is_reported_at_once_with_its_origin() {
    let file = "listen: nowhere\nmax_pack_tokens: 0\ndrain: {delay: 5}\nensemble: [1]\n";
    let found = mistakes(resolve(file, &[("WARM_CALIBRATION__MEAN", "1")], &[("message.max_decode", "huge")]));
    assert_eq!(found.len(), 6, "{found:#?}");
    assert!(found.iter().any(|mistake| mistake.starts_with("listen (conf/warm.yaml): expected an address")), "{found:#?}");
    assert!(found.iter().any(|mistake| mistake.starts_with("message.max_decode (--message-max-decode)")), "{found:#?}");
}

#[test]
fn a_recipe_stands_in_the_file_or_is_named_but_not_both() {
    let inline = resolve("model:\n  method: linear\n  members: [{path: ./a}]\n", &[], &[]).expect("valid");
    match inline.config.model {
        Some(ModelChoice::Recipe { yaml, base }) => {
            assert!(yaml.contains("members"), "{yaml}");
            assert_eq!(base, Path::new("conf"));
        }
        other => panic!("{other:?}"),
    }
    let named = resolve("recipe: r.yaml\n", &[], &[]).expect("valid");
    assert_eq!(named.config.model, Some(ModelChoice::RecipeFile(PathBuf::from("conf/r.yaml"))));
    let flag = resolve("recipe: r.yaml\n", &[], &[("recipe", "other.yaml")]).expect("valid");
    assert_eq!(flag.config.model, Some(ModelChoice::RecipeFile(PathBuf::from("other.yaml"))));
    assert_eq!(mistakes(resolve("recipe: r.yaml\nmodel: {members: [a]}\n", &[], &[])).len(), 1);
}

#[test]
fn a_cache_stands_where_the_file_or_the_command_says() {
    let cache = |file, environment: &[_]| resolve(file, environment, &[]).expect("valid").config.cache;
    assert_eq!(cache("", &[]), None);
    let expected = |dir: &str, max_bytes| Some(CacheConfig { dir: PathBuf::from(dir), max_bytes });
    assert_eq!(cache("cache_dir: warm\ncache_max_bytes: 20GiB\n", &[]), expected("conf/warm", 20 << 30));
    assert_eq!(cache("cache_dir: warm\n", &[("WARM_CACHE_DIR", "/var/warm")]), expected("/var/warm", 100 << 30));
    assert_eq!(mistakes(resolve("cache_dir: warm\ncache_max_bytes: 20\u{a0}TB\n", &[], &[])).len(), 1);
}

#[test]
fn folders_on_the_command_line_win_over_the_file() {
    let folders = vec![PathBuf::from("a"), PathBuf::from("b")];
    let file = Some((PathBuf::from("warm.yaml"), "recipe: r.yaml\n".to_owned()));
    let resolved = Resolved::new(Sources { file, folders: folders.clone(), ..Default::default() }).expect("valid");
    assert_eq!(resolved.config.model, Some(ModelChoice::Folders(folders)));
}

#[test]
fn a_file_that_is_no_mapping_is_a_mistake_and_an_empty_one_is_not() {
    assert!(resolve("", &[], &[]).is_ok());
    assert_eq!(mistakes(resolve("- a\n", &[], &[])).len(), 1);
    assert_eq!(mistakes(resolve("a: [", &[], &[])).len(), 1);
}

#[test]
fn names_of_settings_flags_and_variables_are_unique() {
    let names: std::collections::BTreeSet<_> = SETTINGS.iter().map(Setting::flag).collect();
    assert_eq!(names.len(), SETTINGS.len());
    assert!(SETTINGS.iter().all(|setting| setting.variable() != FILE_VARIABLE));
}

#[test]
fn head_and_pooling_are_settings_in_every_source() {
    use crate::checkpoint::{At, Pooling, TokenName};
    let file = "pooling: {token: <r>}\nhead:\n  tokens: {plus: [\"+\"], minus: [\"-\"]}\n  at: each \"<step>\"\n";
    let resolved = resolve(file, &[], &[]).expect("valid");
    let step = TokenName::Text("<step>".to_owned());
    assert_eq!(resolved.config.head.as_ref().and_then(|head| head.at.clone()), Some(At::Each(step)));
    assert_eq!(resolved.config.pooling.as_ref().and_then(|choice| choice.pooling), Some(Pooling::Token));
    let flags = resolve(file, &[("WARM_POOLING", "cls")], &[("head", "score")]).expect("valid");
    assert_eq!(flags.config.head.as_ref().and_then(|head| head.name.clone()).as_deref(), Some("score"));
    assert_eq!(flags.config.pooling.and_then(|choice| choice.pooling), Some(Pooling::Cls));
    let found = mistakes(resolve("pooling: first\nhead: {at: never}\n", &[], &[]));
    assert!(found.len() == 2 && found[0].contains("each") && found[1].contains("last_non_pad"), "{found:#?}");
}

#[test]
fn a_calibration_comes_from_one_place() {
    let of = |file: &str| resolve(file, &[], &[]).map(|resolved| resolved.config.calibration);
    assert_eq!(of("calibration: {file: c.json}\n"), Ok(Some(CalibrationConfig::File(PathBuf::from("conf/c.json")))));
    assert_eq!(of("calibration: {from_config: true}\n"), Ok(Some(CalibrationConfig::FromConfig)));
    assert_eq!(of("calibration: {from_config: false}\n"), Ok(None));
    let given = CalibrationConfig::Given { mean: 1.0, std: 2.0, samples: 0, source: String::new() };
    assert_eq!(of("calibration: {mean: 1, std: 2}\n"), Ok(Some(given)));
    assert!(of("calibration: {mean: 1, std: 2, from_config: true}\n").is_err());
}

proptest! {
    #[test]
    fn no_file_makes_it_panic(text in "[a-z.:{}\\[\\]\\- \n0-9&*]{0,80}") {
        let _ = resolve(&text, &[], &[]);
    }
}

#[test]
fn devices_are_named_by_a_word_or_a_list() {
    let device = |file: &str| resolve(file, &[], &[]).map(|resolved| resolved.config.device);
    assert_eq!(device(""), Ok(DeviceChoice::Auto));
    assert_eq!(device("device: cpu"), Ok("cpu".parse().expect("a device")));
    assert_eq!(device("device: [cuda:0, cuda:1]"), Ok("cuda:0,cuda:1".parse().expect("devices")));
    let flag = resolve("", &[], &[("device", "[cuda:0, cuda:1]")]).expect("valid");
    assert_eq!(Ok(flag.config.device), device("device: [\"cuda:0\", \"cuda:1\"]"));
    let found = mistakes(resolve("device: [cuda:0, {a: b}]\ndtype: int8\nlisten: [a, b]\n", &[], &[("device", "gpu")]));
    assert_eq!(found.len(), 4, "{found:#?}");
    assert!(found.iter().any(|mistake| mistake.contains("expected auto, cpu, cuda:0")), "{found:#?}");
    assert!(found.iter().any(|mistake| mistake.contains("bfloat16")), "{found:#?}");
}
