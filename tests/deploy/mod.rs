//! What stands in `deploy/` is held to the program: ports, probes, settings, flags, drain times and metric names are those
//! that the code has. Runs without any of the tools; where `kubectl` and `promtool` are at hand, their word is taken too;
//! with `WARM_REQUIRE_TOOLS=1` they have to be.

mod expressions;
mod fleet;
mod image;
mod manifests;
mod monitoring;
mod settings;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use serde_norway::Value;

pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub fn read(path: &str) -> String {
    let path = root().join("deploy").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All documents of a file.
pub fn documents(text: &str) -> Vec<Value> {
    let all = serde_norway::Deserializer::from_str(text);
    all.map(|document| Value::deserialize(document).expect("YAML")).filter(|document| !document.is_null()).collect()
}

pub fn document(path: &str) -> Value {
    documents(&read(path)).pop().unwrap_or_else(|| panic!("{path} is empty"))
}

/// The value at a path such as `spec.containers.0.name`; what is not there is null.
pub fn at<'a>(value: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(value, |value, step| match (value, step.parse::<usize>()) {
        (Value::Sequence(list), Ok(index)) => list.get(index).unwrap_or(&Value::Null),
        _ => value.get(step).unwrap_or(&Value::Null),
    })
}

pub fn text(value: &Value, path: &str) -> String {
    at(value, path).as_str().unwrap_or_else(|| panic!("no text at {path} in {value:?}")).to_owned()
}

pub fn number(value: &Value, path: &str) -> u64 {
    at(value, path).as_u64().unwrap_or_else(|| panic!("no number at {path} in {value:?}"))
}

pub fn list<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    at(value, path).as_sequence().map_or(&[], Vec::as_slice)
}

/// The key and value pairs of a mapping, as texts.
pub fn pairs(value: &Value, path: &str) -> Vec<(String, String)> {
    let word = |value: &Value| value.as_str().map(str::to_owned).unwrap_or_default();
    at(value, path).as_mapping().map(|map| map.iter().map(|(key, value)| (word(key), word(value))).collect()).unwrap_or_default()
}

/// The first container of a Deployment or Job.
pub fn container(workload: &Value) -> &Value {
    at(workload, "spec.template.spec.containers.0")
}

/// With this variable a tool that is missing fails its tests, which would pass without having looked otherwise.
const REQUIRE: &str = "WARM_REQUIRE_TOOLS";

/// Whether a tool is on this machine; says what is left out where it is not.
pub fn have(tool: &str, without: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file()));
    if !found {
        assert!(std::env::var_os(REQUIRE).is_none_or(|value| value != "1"), "{tool} is required and not here: {without}");
        println!("skipped, because there is no {tool} here: {without} (deploy/check.sh installs it)");
    }
    found
}

/// What a command prints, which must succeed.
pub fn output(command: &mut Command) -> String {
    let output = command.output().expect("started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}\n{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// The overlays that serve.
pub const OVERLAYS: [&str; 3] = ["cpu", "gpu", "fleet"];

/// What an overlay renders to; `None` without kubectl.
pub fn rendered(overlay: &str) -> Option<Vec<Value>> {
    have("kubectl", &format!("rendering of overlay {overlay}")).then(|| {
        let folder = root().join("deploy/kustomize/overlays").join(overlay);
        documents(&output(Command::new("kubectl").arg("kustomize").arg(folder)))
    })
}

/// Every manifest of base and overlays as it stands in its file, patches included.
pub fn manifests() -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for folder in ["kustomize/base", "kustomize/overlays/cpu", "kustomize/overlays/gpu", "kustomize/overlays/fleet", "monitoring"] {
        for path in yaml_files(&root().join("deploy").join(folder)) {
            let name = format!("{folder}/{}", path.file_name().unwrap_or_default().to_string_lossy());
            let all = documents(&read(&name));
            found.extend(all.into_iter().filter(|document| at(document, "kind").is_string()).map(|document| (name.clone(), document)));
        }
    }
    found
}

pub fn yaml_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    files
}

pub fn of_kind<'a>(all: impl IntoIterator<Item = &'a Value>, kind: &str) -> Vec<&'a Value> {
    all.into_iter().filter(|value| at(value, "kind").as_str() == Some(kind)).collect()
}
