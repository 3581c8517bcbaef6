//! The binary where a recipe names places elsewhere: a hub on this machine, and the fleet's Job with its own arguments.

#[allow(dead_code, reason = "some of it is for the tests inside of the library")]
#[path = "../../src/checkpoint/remote/testing.rs"]
mod testing;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use serde_json::Value;
use testing::{Asked, COMMIT, Repository, Server};

#[cfg(unix)]
use crate::deploy;

const FAMILY: &str = "tests/fixtures/conformance/transformers-5/qwen3";

fn family() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(FAMILY)
}

/// A hub with one repository, in which the family's folders have these names.
fn hub(name: &str, folders: &[(&str, &str)]) -> Server {
    let mut files = BTreeMap::new();
    for (folder, from) in folders {
        for entry in std::fs::read_dir(family().join(from)).expect("a folder") {
            let path = entry.expect("an entry").path();
            let file = path.file_name().expect("a name").to_string_lossy().into_owned();
            files.insert(format!("{folder}/{file}"), std::fs::read(&path).expect("a file"));
        }
    }
    let repository = Repository { name: name.to_owned(), files };
    Server::start(Arc::new(move |asked: &Asked| repository.answer(asked)))
}

/// A hub of three members and what they were trained from.
fn members() -> Server {
    hub("org/rm", &[("seed-0", "member-0"), ("seed-1", "member-1"), ("seed-2", "member-2"), ("init", "init")])
}

/// The binary with its downloads in `home` and no hub but this one.
fn warm(home: &Path, hub: &str) -> Command {
    let mut command = crate::program::warm();
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HF_")) {
        command.env_remove(name);
    }
    command.env("HF_HOME", home.join("hub")).env("HF_ENDPOINT", format!("http://{hub}")).stdin(Stdio::null());
    command
}

/// Nobody listens there.
const NOWHERE: &str = "127.0.0.1:9";

fn success(command: &mut Command) -> Output {
    let output = command.output().expect("ran");
    assert!(output.status.success(), "{command:?}\n{}\n{}", words(&output.stdout), words(&output.stderr));
    output
}

fn words(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn record(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("warm.json")).expect("a record")).expect("JSON")
}

fn write(path: &Path, text: &str) -> String {
    std::fs::write(path, text).expect("written");
    path.display().to_string()
}

#[test]
fn a_merge_fetches_its_members_and_records_their_commit() {
    let (hub, dir) = (members(), tempfile::tempdir().expect("a folder"));
    let text = "method: slerp\ninit: hf:org/rm@v1/init\nmembers: ['hf:org/rm@v1/seed-0', 'hf:org/rm@v1/seed-1']";
    let recipe = write(&dir.path().join("recipe.yaml"), text);
    let out = dir.path().join("out");
    success(warm(dir.path(), &hub.address).args(["merge", "--recipe", &recipe, "--out"]).arg(&out));
    let named = |folder: &str| Value::from(format!("hf:org/rm@{COMMIT}/{folder}"));
    let written = record(&out);
    assert_eq!((&written["inputs"][0]["origin"], &written["inputs"][1]["origin"]), (&named("seed-0"), &named("seed-1")));
    assert_eq!((&written["init"]["origin"], &written["recipe"]["init"]), (&named("init"), &named("init")));
    assert_eq!(written["recipe"]["members"][1]["path"], named("seed-1"));
    // The same bytes as the merge of the folders themselves.
    let [zero, one, init] = ["member-0", "member-1", "init"].map(|name| family().join(name).display().to_string());
    let here = write(&dir.path().join("here.yaml"), &format!("method: slerp\ninit: {init:?}\nmembers: [{zero:?}, {one:?}]"));
    let beside = dir.path().join("beside");
    success(warm(dir.path(), NOWHERE).args(["merge", "--recipe", &here, "--out"]).arg(&beside));
    assert_eq!(record(&beside)["weights_id"], written["weights_id"]);

    // Again without a network; and without a network what is not there is told.
    let again = dir.path().join("again");
    let offline = || {
        let mut command = warm(dir.path(), NOWHERE);
        command.env("HF_HUB_OFFLINE", "1");
        command
    };
    success(offline().args(["merge", "--recipe", &recipe, "--out"]).arg(&again));
    assert_eq!(record(&again), written);
    let missing = offline().args(["merge", "hf:org/rm@v2/seed-0", "--out"]).arg(dir.path().join("none")).output().expect("ran");
    assert!(!missing.status.success() && words(&missing.stderr).contains("HF_HUB_OFFLINE"), "{missing:?}");
}

#[test]
fn plan_and_report_fetch_too_and_name_the_commit() {
    let (hub, dir) = (members(), tempfile::tempdir().expect("a folder"));
    let places = ["hf:org/rm@v1/seed-0", "hf:org/rm@v1/seed-1"];
    let planned = success(warm(dir.path(), &hub.address).arg("plan").args(places).arg("--json"));
    let plan: Value = serde_json::from_slice(&planned.stdout).expect("JSON");
    assert_eq!(plan["members"][0]["origin"], format!("hf:org/rm@{COMMIT}/seed-0"));
    let told = success(warm(dir.path(), &hub.address).arg("plan").args(places));
    assert!(words(&told.stdout).contains(&format!("hf:org/rm@{COMMIT}/seed-1")), "{told:?}");
    success(warm(dir.path(), &hub.address).arg("report").args(places));
    // What may not be fetched is refused before it is, as a problem of the plan.
    let small =
        warm(&dir.path().join("other"), &hub.address).arg("plan").args(places).args(["--download-max-bytes", "1kB", "--json"]).output();
    let small = small.expect("ran");
    let refused: Value = serde_json::from_slice(&small.stdout).expect("JSON");
    assert_eq!(small.status.code(), Some(2));
    assert!(refused["problems"][0].as_str().is_some_and(|problem| problem.contains("download.max_bytes")), "{refused}");
}

#[test]
fn a_recipe_inside_a_recipe_is_fetched_too() {
    let (hub, dir) = (members(), tempfile::tempdir().expect("a folder"));
    write(&dir.path().join("inner.yaml"), "members: ['hf:org/rm@v1/seed-0', 'hf:org/rm@v1/seed-1']");
    let outer = write(&dir.path().join("outer.yaml"), "members: [./inner.yaml, 'hf:org/rm@v1/seed-2']");
    let out = dir.path().join("out");
    success(warm(dir.path(), &hub.address).args(["merge", "--recipe", &outer, "--out"]).arg(&out));
    let written = record(&out);
    assert_eq!(written["inputs"][1]["origin"], format!("hf:org/rm@{COMMIT}/seed-2"));
    assert_eq!(written["chain"][0]["inputs"][0]["origin"], format!("hf:org/rm@{COMMIT}/seed-0"));
    // A server opens it the same way, and a folder that was merged already scores the same.
    let line = write(&dir.path().join("line.jsonl"), "{\"text\": \"hello\"}\n");
    let rewards = [outer.as_str(), ""].map(|recipe| {
        let mut command = warm(dir.path(), &hub.address);
        command.args(["score", "--input", &line]);
        if recipe.is_empty() {
            command.arg(&out)
        } else {
            command.args(["--recipe", recipe])
        };
        let scored: Value = serde_json::from_slice(&success(&mut command).stdout).expect("a line of JSON");
        scored["reward"].clone()
    });
    assert!(rewards[0].is_number() && rewards[0] == rewards[1], "{rewards:?}");
}

/// Waits until a server is ready, and stops it.
#[cfg(unix)]
fn serves(command: &mut Command) {
    use std::io::{BufReader, Read};

    use crate::serve::binary::{terminate, wait_for};

    let mut server = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("started");
    let mut log = BufReader::new(server.stderr.take().expect("piped"));
    wait_for(&mut log, "ready", "");
    terminate(&server);
    let mut rest = String::new();
    log.read_to_string(&mut rest).expect("log");
    assert_eq!(server.wait().expect("ended").code(), Some(0), "{rest}");
}

/// Free ports, and no time for others to take over.
#[cfg(unix)]
const ALONE: [&str; 6] = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain-delay", "0s"];

#[cfg(unix)]
#[test]
fn a_server_fetches_what_it_serves() {
    let (hub, dir) = (members(), tempfile::tempdir().expect("a folder"));
    serves(warm(dir.path(), &hub.address).arg("serve").args(ALONE).arg("hf:org/rm@v1/seed-0"));
    serves(warm(dir.path(), NOWHERE).env("HF_HUB_OFFLINE", "1").arg("serve").args(ALONE).arg("hf:org/rm@v1/seed-0"));
}

/// The fleet of `deploy/`, with its volumes in a folder.
#[cfg(unix)]
struct Fleet {
    dir: tempfile::TempDir,
    hub: Server,
    job: serde_norway::Value,
}

#[cfg(unix)]
impl Fleet {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        for folder in ["config", "models", "state"] {
            std::fs::create_dir(dir.path().join(folder)).expect("a folder");
        }
        let hub = hub("example/reward-model", &[("seed-0", "member-0"), ("seed-1", "member-1"), ("seed-2", "member-2")]);
        let fleet = Self { dir, hub, job: deploy::document("kustomize/overlays/fleet/merge-job.yaml") };
        let map = deploy::document("kustomize/overlays/fleet/configmap.yaml");
        for (name, text) in deploy::pairs(&map, "data") {
            write(&fleet.dir.path().join("config").join(name), &fleet.here(&text));
        }
        fleet
    }

    /// A text of the manifests, with what is mounted in the folder.
    fn here(&self, text: &str) -> String {
        let dir = self.dir.path().display();
        [("/etc/warm/config", "config"), ("/models", "models"), ("/state", "state")]
            .iter()
            .fold(text.to_owned(), |text, (mount, folder)| text.replace(mount, &format!("{dir}/{folder}")))
    }

    /// A container as it is started.
    fn run(&self, container: &serde_norway::Value) -> Command {
        let mut command = warm(self.dir.path(), &self.hub.address);
        let arguments = deploy::list(container, "args").iter().map(|argument| argument.as_str().expect("text"));
        command.args(arguments.map(|argument| self.here(argument)));
        for variable in deploy::list(container, "env").iter().filter(|variable| deploy::at(variable, "value").is_string()) {
            command.env(deploy::text(variable, "name"), self.here(&deploy::text(variable, "value")));
        }
        command
    }
}

#[cfg(unix)]
#[test]
fn the_fleets_job_writes_what_its_pods_serve() {
    let fleet = Fleet::new();
    success(&mut fleet.run(deploy::container(&fleet.job)));
    let base = deploy::document("kustomize/base/deployment.yaml");
    let out = fleet.dir.path().join("models/merged/r1");
    assert_eq!(record(&out)["inputs"][2]["origin"], format!("hf:example/reward-model@{COMMIT}/seed-2"));
    assert!(fleet.dir.path().join("models/hub/hub").is_dir(), "downloads are on the volume");
    serves(fleet.run(deploy::container(&base)).env("HF_ENDPOINT", "http://127.0.0.1:9").args(ALONE));
}

#[cfg(unix)]
#[test]
fn the_fleets_job_may_run_again_and_never_takes_another_merge_for_its_own() {
    let fleet = Fleet::new();
    let job = || fleet.run(deploy::container(&fleet.job));
    success(&mut job());
    let out = fleet.dir.path().join("models/merged/r1");
    let written = std::fs::metadata(out.join("warm.json")).expect("a record").modified().expect("a time");
    // Also when what was downloaded is gone, and by names alone.
    std::fs::remove_dir_all(fleet.dir.path().join("models/hub")).expect("removed");
    let downloads = fleet.hub.downloads().len();
    let again = success(&mut job());
    assert!(words(&again.stdout).contains("the merge of this recipe stands there already"), "{again:?}");
    assert_eq!(fleet.hub.downloads().len(), downloads, "nothing is downloaded for it");
    assert_eq!(std::fs::metadata(out.join("warm.json")).expect("a record").modified().expect("a time"), written);
    // Another recipe under the same name is a mistake, and what stands there stays.
    let recipe = fleet.dir.path().join("config/recipe.yaml");
    let other = std::fs::read_to_string(&recipe).expect("a recipe").replace("bfloat16", "float32");
    write(&recipe, &other);
    let refused = job().output().expect("ran");
    assert!(!refused.status.success() && words(&refused.stderr).contains("holds the merge of another recipe"), "{refused:?}");
    assert_eq!(std::fs::metadata(out.join("warm.json")).expect("a record").modified().expect("a time"), written);
}

#[test]
fn a_merge_that_stands_there_is_another_one_where_a_recipe_within_has_changed() {
    let (hub, dir) = (members(), tempfile::tempdir().expect("a folder"));
    let inner = dir.path().join("inner.yaml");
    // Coefficients of which the last bit may be lost in writing.
    let text = "members: [{path: 'hf:org/rm@v1/seed-0', coefficient: 3}, {path: 'hf:org/rm@v1/seed-1', coefficient: 4}]";
    write(&inner, text);
    let outer = write(&dir.path().join("outer.yaml"), "members: [./inner.yaml, {path: 'hf:org/rm@v1/seed-2', coefficient: 0.7}]");
    let out = dir.path().join("out");
    let merge = || {
        let mut command = warm(dir.path(), &hub.address);
        command.args(["merge", "--recipe", &outer, "--if-absent", "--json", "--out"]).arg(&out);
        command
    };
    let told = || serde_json::from_slice::<Value>(&success(&mut merge()).stdout).expect("JSON");
    let (first, second) = (told(), told());
    assert_eq!((&first["written"], &second["written"]), (&Value::Bool(true), &Value::Bool(false)));
    assert_eq!(first["weights_id"], second["weights_id"]);
    write(&inner, &text.replace("coefficient: 4", "coefficient: 5"));
    assert!(!merge().output().expect("ran").status.success());
    // What is no merge of this program is not taken for one either.
    std::fs::remove_file(out.join("warm.json")).expect("removed");
    let refused = merge().output().expect("ran");
    assert!(words(&refused.stderr).contains("is no merge of this program"), "{refused:?}");
}

/// A pod that starts before the Job is done waits in its first container for the folder that the other one serves.
#[cfg(unix)]
#[test]
fn the_fleets_pods_wait_for_the_job() {
    use std::io::{BufRead, BufReader};

    let fleet = Fleet::new();
    let patch = deploy::document("kustomize/overlays/fleet/deployment.yaml");
    let wait = deploy::at(&patch, "spec.template.spec.initContainers.0");
    let mut waiting = fleet.run(wait).stderr(Stdio::piped()).spawn().expect("started");
    let mut log = BufReader::new(waiting.stderr.take().expect("piped")).lines();
    let out = fleet.dir.path().join("models/merged/r1");
    assert_eq!(log.next().expect("a line").expect("text"), format!("waiting for {}", out.display()));
    assert!(waiting.try_wait().expect("there").is_none(), "nothing is there yet");
    success(&mut fleet.run(deploy::container(&fleet.job)));
    assert!(waiting.wait().expect("ended").success());
    assert_eq!(log.next().expect("a line").expect("text"), "everything is there");
}

#[test]
fn whoever_waits_in_vain_is_told_for_what() {
    let dir = tempfile::tempdir().expect("a folder");
    let absent = dir.path().join("absent");
    let waited = warm(dir.path(), NOWHERE).args(["wait", "--timeout", "0s"]).arg(&absent).output().expect("ran");
    assert_eq!(waited.status.code(), Some(1));
    assert!(words(&waited.stderr).contains(&format!("{}: not there after 0 s", absent.display())), "{waited:?}");
    // What is fetched is not waited for.
    success(warm(dir.path(), NOWHERE).args(["wait", "--timeout", "0s", "hf:org/rm@v1/seed-0"]).arg(family().join("member-0")));
}
