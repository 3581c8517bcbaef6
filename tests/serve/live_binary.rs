//! The binary while its model is replaced: signals, fleets, and what a crash in the middle leaves.

use std::io::{BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use super::binary::{admin, listening, wait_for, warm};
use super::live::{Files, copy};

#[path = "../../src/checkpoint/fixture.rs"]
#[allow(dead_code)]
mod fixture;

struct Server {
    child: Child,
    log: BufReader<ChildStderr>,
    grpc: String,
    admin: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        // A test that failed leaves nothing running.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(config: &Path) -> Self {
        Self::start_by(warm(), config)
    }

    /// By a command that takes the arguments of the binary.
    fn start_by(mut command: Command, config: &Path) -> Self {
        let arguments = ["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain-delay", "0s", "--config"];
        let mut child = command.args(arguments).arg(config).spawn().expect("started");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let (grpc, admin) = listening(&mut log);
        Self { child, log, grpc, admin }
    }

    fn ready(mut self) -> Self {
        wait_for(&mut self.log, " ready", "");
        self
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.child.id().to_string()]).status().expect("kill");
        assert!(sent.success());
    }

    fn metrics(&self) -> String {
        admin(&self.admin, "/metrics")
    }

    /// What `/status.json` says of loads, the newest first.
    fn reloads(&self) -> Vec<serde_json::Value> {
        let answer = admin(&self.admin, "/status.json");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        let mut status: serde_json::Value = serde_json::from_str(body).expect("JSON");
        serde_json::from_value(status["reloads"].take()).expect("a list")
    }

    /// One sample's reward.
    fn score(&self) -> f64 {
        let mut score = warm().args(["score", "--connect", &self.grpc]).stdin(Stdio::piped()).spawn().expect("started");
        score.stdin.take().expect("piped").write_all(b"{\"text\": \"hello\"}\n").expect("written");
        let line: serde_json::Value = serde_json::from_slice(&score.wait_with_output().expect("ran").stdout).expect("one line of JSON");
        line["reward"].as_f64().unwrap_or_else(|| panic!("{line}"))
    }

    /// Whether `warm reload` ended well, and what it said.
    fn reload(&self) -> (bool, String) {
        let output = warm().args(["reload", "--addr", &self.grpc]).output().expect("ran");
        let words = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.success(), words)
    }

    /// The live fingerprint, by its metric.
    fn live(&self) -> String {
        let metrics = self.metrics();
        let line = metrics.lines().find(|line| line.starts_with("warm_registry_generation_info{")).expect("the series");
        let (_, rest) = line.split_once("fingerprint=\"").expect("a label");
        rest.split('"').next().expect("a value").to_owned()
    }

    fn waits_for(&self, series: &str) {
        // Each look is a request, so many of them are minutes; what never comes is a failure, not a hang.
        let seen = (0..50_000).any(|_| self.metrics().lines().any(|line| line == series));
        assert!(seen, "{series} never came:\n{}", self.metrics());
    }
}

#[test]
fn sighup_reloads_and_status_and_activate_speak_for_a_fleet() {
    let files = Files::new();
    files.want(&[0, 1], "activate: on_call\n");
    let (one, two) = (Server::start(&files.config()).ready(), Server::start(&files.config()).ready());
    let all = format!("{},{}", one.grpc, two.grpc);
    let run = |arguments: &[&str]| {
        let output = warm().args(arguments).args(["--all", &all]).output().expect("ran");
        let words = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.success(), words)
    };
    let before = one.live();
    let (agree, table) = run(&["status"]);
    assert!(agree && table.contains("2 servers, one model live") && table.contains(&before[..12]), "{table}");

    files.want(&[0, 1, 2], "activate: on_call\n");
    one.signal("-HUP");
    one.waits_for("warm_registry_generations{state=\"staged\"} 1");
    let (_, table) = run(&["status"]);
    let row = table.lines().find(|line| line.starts_with(&one.grpc)).expect("a row");
    let staged = row.split_whitespace().nth(3).expect("a fingerprint").to_owned();
    assert_ne!(staged, before[..12]);
    // The other one has not staged it, so none is swapped.
    let (done, words) = run(&["activate", "--fingerprint", &staged]);
    assert!(!done && words.contains(&two.grpc) && words.contains("1 of 2"), "{words}");
    assert_eq!((one.live(), two.live()), (before.clone(), before.clone()));

    let (done, words) = run(&["reload"]);
    assert!(done && words.contains("(staged)"), "{words}");
    let (done, words) = run(&["activate", "--fingerprint", &staged]);
    assert!(done, "{words}");
    assert!(one.live() == two.live() && one.live().starts_with(&staged));
    let (done, _) = run(&["activate", "--fingerprint", &before]);
    assert!(done && one.live() == before && two.live() == before, "going back is the same call");
}

#[test]
fn killed_in_the_middle_of_a_reload_a_server_comes_up_with_what_was_good() {
    let files = Files::new();
    let settings = "state: ./state\n";
    files.want(&[0, 1], settings);
    let mut server = Server::start(&files.config()).ready();
    let good = server.live();

    // Large enough that the load is seen while it runs.
    let large = files.member(9);
    let size = fixture::Size { hidden: 512, intermediate: 1024, layers: 8, vocab: 4000 };
    fixture::write(&large, &fixture::config(size), &fixture::llama(size, "F32", 9), 1).expect("written");
    files.want(&[9], settings);
    server.signal("-HUP");
    server.waits_for("warm_registry_reloading 1");
    // At once: another process that sends the signal may come too late.
    server.child.kill().expect("killed");
    server.child.wait().expect("ended");
    let mut rest = String::new();
    server.log.read_to_string(&mut rest).expect("log");
    assert!(!rest.contains("outcome=\"loaded\""), "it was killed while it loaded: {rest}");

    // The wanted recipe is good, so a restart serves it.
    let server = Server::start(&files.config()).ready();
    let wanted = server.live();
    assert_ne!(wanted, good);
    server.signal("-KILL");
    drop(server);

    // Half a copy is not, so the last good one is served, and the log says why.
    files.want(&[0, 1], settings);
    let server = Server::start(&files.config()).ready();
    assert_eq!(server.live(), good);
    server.signal("-KILL");
    drop(server);
    let shard = large.join("model.safetensors");
    let bytes = std::fs::read(&shard).expect("readable");
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).expect("written");
    files.want(&[9], settings);
    let mut server = Server::start(&files.config());
    let reason = wait_for(&mut server.log, "so the last good one is", "problem").expect("a reason");
    assert!(!reason.is_empty());
    let server = server.ready();
    assert_eq!(server.live(), good);
    server.waits_for("warm_registry_reloads_total{outcome=\"restored\"} 1");

    // What was good has changed on disk, too: it is not what it was, so nothing is served under its name.
    server.signal("-KILL");
    drop(server);
    copy(&files.member(2), &files.member(1));
    let mut server = Server::start(&files.config());
    assert_eq!(server.child.wait().expect("ended").code(), Some(1));
    let mut rest = String::new();
    server.log.read_to_string(&mut rest).expect("log");
    assert!(rest.contains("its files or the settings have changed"), "{rest}");
}

/// The binary under a shell's limit on the size of files, which any user may set. The signal that tells of it is ignored, so
/// that a write fails as it does on a full disk, half way through.
fn warm_with_small_files(bytes: u64) -> Command {
    let binary = warm();
    let mut command = Command::new("sh");
    // In blocks of 512 bytes, as POSIX has it.
    command.args(["-c", &format!("trap '' XFSZ; ulimit -f {} && exec \"$@\"", bytes / 512), "sh"]).arg(binary.get_program());
    for (name, value) in binary.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn a_cache_on_a_full_disk_costs_a_line_in_the_log_and_no_load() {
    let files = Files::new();
    let settings = "cache_dir: ./cache\n";
    files.want(&[0, 1], settings);
    // The merged weights have 170 kB, of which the disk takes 64.
    let mut server = Server::start_by(warm_with_small_files(64 << 10), &files.config());
    let problem = wait_for(&mut server.log, "merged weights cannot be kept", "problem").expect("a reason");
    assert!(problem.contains("cache"), "{problem}");
    let server = server.ready();
    let (first, before) = (server.live(), server.score());
    server.waits_for("warm_registry_cache_total{outcome=\"failed\"} 1");

    files.want(&[0, 1, 2], settings);
    let (done, words) = server.reload();
    assert!(done && words.contains("its merged weights are not kept") && words.contains("cannot be written"), "{words}");
    assert_ne!(server.live(), first);
    assert_ne!(server.score(), before);
    server.waits_for("warm_registry_cache_total{outcome=\"failed\"} 2");
    let left = std::fs::read_dir(files.dir.path().join("cache/weights")).expect("a folder").flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).filter(|name| !name.to_string_lossy().starts_with('.')).collect();
    assert!(left.is_empty(), "half of an entry is none: {left:?}");

    // Where there is room again, the same is merged once more and kept.
    let again = Server::start(&files.config()).ready();
    again.waits_for("warm_registry_cache_total{outcome=\"kept\"} 1");
    assert_eq!((again.live(), again.score()), (server.live(), server.score()));
}

#[test]
fn the_status_page_tells_loads_as_they_ended_the_newest_first() {
    let files = Files::new();
    files.want(&[0, 1], "");
    let server = Server::start(&files.config()).ready();
    let first = server.live();
    let events = |server: &Server| -> Vec<[String; 3]> {
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        server.reloads().iter().map(|event| ["outcome", "fingerprint", "problem"].map(|key| text(&event[key]))).collect()
    };
    let loaded = |fingerprint: &str| ["loaded".to_owned(), fingerprint.to_owned(), String::new()];
    assert_eq!(events(&server), [loaded(&first)]);
    files.want(&[0, 1, 2], "");
    assert!(server.reload().0);
    let second = server.live();
    std::fs::remove_dir_all(files.member(2)).expect("removed");
    assert!(!server.reload().0);
    let told = events(&server);
    assert_eq!(told[1..], [loaded(&second), loaded(&first)]);
    let [outcome, fingerprint, problem] = &told[0];
    assert!(outcome == "no_plan" && fingerprint.is_empty() && problem.contains("member-2"), "{told:?}");
    let times: Vec<u64> = server.reloads().iter().map(|event| event["at_unix_ms"].as_u64().expect("a time")).collect();
    assert!(times.is_sorted_by(|newer, older| newer >= older) && times[0] > 0, "{times:?}");
    files.want(&[0, 1], "");
    assert!(server.reload().0, "what was live before is held");
    assert_eq!(events(&server)[0], ["activated".to_owned(), first, String::new()]);
}
