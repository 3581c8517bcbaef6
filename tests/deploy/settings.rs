//! Every setting, variable, flag and verb that stands in `deploy/` is one that the program has.

use std::path::PathBuf;

use serde_norway::Value;
use warm::config::{Config, FILE_VARIABLE, Resolved, SETTINGS, Sources};
use warm::merge::Recipe;

use super::*;

/// Where pods find their settings.
const FOLDER: &str = "/etc/warm/config";

/// A file of a ConfigMap.
pub fn file_of(map: &Value, name: &str) -> String {
    let files = pairs(map, "data");
    files.into_iter().find(|(file, _)| file == name).unwrap_or_else(|| panic!("no {name} in {map:?}")).1
}

fn resolve(map: &Value, environment: Vec<(String, String)>) -> Result<Resolved, warm::config::ConfigErrors> {
    let file = Some((PathBuf::from(FOLDER).join("warm.yaml"), file_of(map, "warm.yaml")));
    Resolved::new(Sources { file, environment, ..Sources::default() })
}

pub fn of_config_map(map: &Value) -> Config {
    resolve(map, vec![]).unwrap_or_else(|errors| panic!("{errors}")).config
}

fn environment(container: &Value) -> Vec<(String, String)> {
    let variables = list(container, "env").iter().filter(|variable| at(variable, "value").is_string());
    variables.map(|variable| (text(variable, "name"), text(variable, "value"))).collect()
}

#[test]
fn the_settings_of_every_pod_resolve_to_a_model() {
    let base = (document("kustomize/base/deployment.yaml"), document("kustomize/base/configmap.yaml"));
    let mut all = vec![("base", base.0, base.1)];
    for overlay in OVERLAYS {
        if let Some(rendered) = rendered(overlay) {
            let one = |kind: &str| of_kind(&rendered, kind)[0].clone();
            all.push((overlay, one("Deployment"), one("ConfigMap")));
        }
    }
    for (overlay, deployment, map) in all {
        let environment = environment(container(&deployment));
        let named = environment.iter().find(|(name, _)| name == FILE_VARIABLE).map(|(_, path)| path.as_str());
        assert_eq!(named, Some("/etc/warm/config/warm.yaml"), "{overlay}");
        // Any build reads what any device is called; whether it is there is seen when the server starts.
        let device = environment.iter().find(|(name, _)| name == "WARM_DEVICE").map(|(_, device)| device.as_str());
        assert_eq!(device, ["gpu", "fleet"].contains(&overlay).then_some("cuda:0"), "{overlay}");
        let resolved = resolve(&map, environment).unwrap_or_else(|errors| panic!("{overlay}: {errors}"));
        assert!(resolved.config.model.is_some(), "{overlay}: no model is named");
    }
}

#[test]
fn every_recipe_is_one() {
    for map in ["kustomize/base/configmap.yaml", "kustomize/overlays/fleet/configmap.yaml"] {
        let map = document(map);
        for (name, yaml) in pairs(&map, "data").into_iter().filter(|(name, _)| name != "warm.yaml") {
            let recipe = Recipe::from_yaml(&yaml, &PathBuf::from(FOLDER)).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(!recipe.members().is_empty());
        }
    }
}

#[test]
fn every_variable_is_a_setting() {
    let mut named: Vec<(String, String)> = Vec::new();
    for (file, manifest) in manifests() {
        for variable in list(container(&manifest), "env") {
            named.push((file.clone(), text(variable, "name")));
        }
    }
    for (name, service) in at(&document("compose.yaml"), "services").as_mapping().expect("services") {
        named.extend(pairs(service, "environment").into_iter().map(|(key, _)| (format!("compose.yaml: {name:?}"), key)));
    }
    let dockerfile = read("Dockerfile");
    let words = dockerfile.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    named.extend(words.map(|word| ("Dockerfile".to_owned(), word.to_owned())));
    let ours: Vec<_> = named.into_iter().filter(|(_, name)| name.starts_with("WARM_")).collect();
    assert!(ours.len() >= 4, "{ours:?}");
    for (place, name) in ours {
        assert!(name == FILE_VARIABLE || SETTINGS.iter().any(|setting| setting.variable() == name), "{place}: {name}");
    }
}

/// Panics unless the binary has this verb with these flags.
pub fn assert_command(place: &str, arguments: &[String]) {
    let (verb, rest) = arguments.split_first().unwrap_or_else(|| panic!("{place}: no verb"));
    let output = crate::program::warm().args([verb, "--help"]).output().expect("started");
    assert!(output.status.success(), "{place}: there is no `warm {verb}`");
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    for flag in rest.iter().filter(|argument| argument.starts_with("--")) {
        let flag = flag.split('=').next().unwrap_or_default();
        let known = help.split(|c: char| c.is_whitespace() || c == ',' || c == '=').any(|word| word == flag);
        assert!(known, "{place}: `warm {verb}` has no {flag}");
    }
}

fn strings(values: &[Value]) -> Vec<String> {
    values.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

#[test]
fn every_command_is_one_that_the_binary_has() {
    for (file, manifest) in manifests() {
        let arguments = strings(list(container(&manifest), "args"));
        if !arguments.is_empty() {
            assert_command(&file, &arguments);
        }
    }
    let compose = document("compose.yaml");
    assert_command("compose.yaml", &strings(list(&compose, "services.warm.command")));
    let dockerfile = read("Dockerfile");
    let commands: Vec<&str> = dockerfile.lines().map(str::trim).filter(|line| line.starts_with("CMD [")).collect();
    assert_eq!(commands.len(), 4, "what runs and what checks its health, in both images");
    for line in commands {
        let arguments: Vec<String> = serde_json::from_str(line.trim_start_matches("CMD ")).expect("the exec form");
        let own = if arguments[0].ends_with("/warm") { &arguments[1..] } else { &arguments[..] };
        assert_command("Dockerfile", own);
    }
}

#[test]
fn every_command_of_the_runbook_is_one_that_the_binary_has() {
    let runbook = read("RUNBOOK.md");
    let lines = runbook.lines().map(|line| line.trim().trim_start_matches("$ "));
    // Lines of code, and spans of it in the text.
    let spans = runbook.split('`').skip(1).step_by(2);
    let mut checked = 0;
    for line in lines.chain(spans).filter(|line| line.starts_with("warm ") || line.starts_with("warm-fleet ")) {
        let words: Vec<String> =
            line.split_whitespace().skip(1).take_while(|word| !matches!(*word, "|" | ">" | "#" | "&&")).map(str::to_owned).collect();
        assert_command(&format!("RUNBOOK.md: {line}"), &words);
        checked += 1;
    }
    assert!(checked >= 10, "{checked} commands");
    for word in runbook.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|word| word.starts_with("WARM_")) {
        assert!(word == FILE_VARIABLE || SETTINGS.iter().any(|setting| setting.variable() == word), "RUNBOOK.md: {word}");
    }
}
