//! The binary, from its arguments to its exit code.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use warm::client::Client;
use warm::wire::{self, sample::Input};

pub fn warm() -> Command {
    let mut command = crate::program::warm();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Reads the log until a line holds `words`.
fn line_with(log: &mut impl BufRead, words: &str) -> String {
    let mut line = String::new();
    while log.read_line(&mut line).expect("log") > 0 {
        if line.contains(words) {
            return line;
        }
        line.clear();
    }
    panic!("the log ended before `{words}`");
}

fn field(line: &str, name: &str) -> Option<String> {
    let value = line.split_once(&format!("{name}="))?.1;
    Some(value.split_whitespace().next()?.to_owned())
}

/// Reads the log until a line holds `words`; the value of its field `name`, if it has one.
pub fn wait_for(log: &mut impl BufRead, words: &str, name: &str) -> Option<String> {
    field(&line_with(log, words), name)
}

/// Reads the log until the server listens: where it does for scores, and where for probes.
pub fn listening(log: &mut impl BufRead) -> (String, String) {
    let line = line_with(log, "listening");
    let address = |name: &str| field(&line, name).expect("an address");
    (address("grpc"), address("admin"))
}

fn serve<P: AsRef<std::ffi::OsStr>>(folders: impl IntoIterator<Item = P>) -> Child {
    serve_with(&[], folders)
}

/// A server with more settings.
pub fn serve_with<P: AsRef<std::ffi::OsStr>>(settings: &[&str], folders: impl IntoIterator<Item = P>) -> Child {
    let all: Vec<&str> = ["--drain-delay", "0s", "--drain-deadline", "10m"].into_iter().chain(settings.iter().copied()).collect();
    serve_at("127.0.0.1:0", &all, folders)
}

/// A server at this address.
pub fn serve_at<P: AsRef<std::ffi::OsStr>>(address: &str, settings: &[&str], folders: impl IntoIterator<Item = P>) -> Child {
    let mut command = warm();
    command.args(["serve", "--listen", address, "--admin-listen", "127.0.0.1:0"]);
    command.args(settings).args(folders).spawn().expect("started")
}

pub fn terminate(server: &Child) {
    let killed = Command::new("kill").args(["-TERM", &server.id().to_string()]).status().expect("kill");
    assert!(killed.success());
}

/// The answer of the admin port.
pub fn admin(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("admin port");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    answer
}

#[test]
fn sigterm_drains_and_exits_with_zero_and_health_says_so_before() {
    let mut server = serve(super::members());
    let mut log = BufReader::new(server.stderr.take().expect("piped"));
    let address = wait_for(&mut log, "listening", "grpc").expect("address");
    wait_for(&mut log, "ready", "");
    let health = warm().args(["health", "--addr", &address]).output().expect("ran");
    assert!(health.status.success(), "{health:?}");

    let mut score = warm().args(["score", "--connect", &address]).stdin(Stdio::piped()).spawn().expect("started");
    score.stdin.take().expect("piped").write_all(b"{\"id\": 5, \"text\": \"hello\"}\n").expect("written");
    let score = score.wait_with_output().expect("ran");
    let line: serde_json::Value = serde_json::from_slice(&score.stdout).expect("one line of JSON");
    assert_eq!(line["id"], 5);
    assert!(line["reward"].is_number(), "{line}");

    terminate(&server);
    let mut rest = String::new();
    log.read_to_string(&mut rest).expect("log");
    assert_eq!(server.wait().expect("ended").code(), Some(0), "{rest}");
    assert!(rest.contains("stopped"), "{rest}");
}

#[test]
fn verify_says_by_its_exit_code_whether_a_model_scores_as_its_reference() {
    let golden = super::family().join("golden.json");
    let verify = |more: &[&std::ffi::OsStr]| {
        let output = warm().arg("verify").arg("--golden").arg(&golden).args(more).output().expect("ran");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    };
    let members = super::members();
    let member = |i: usize| members[i].as_os_str();
    let (code, said) = verify(&[member(0), member(1), member(2), "--members".as_ref()]);
    assert_eq!(code, Some(0), "{said}");
    for name in ["warm", "member-0", "member-1", "member-2", "largest deviation"] {
        assert!(said.contains(name), "{name}\n{said}");
    }
    // The scores of another member are not its own.
    let (code, said) = verify(&[member(0), "--key".as_ref(), "member-1".as_ref()]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("case 0: expected"), "{said}");
    // The same through a server.
    let mut server = serve(&members);
    let mut log = BufReader::new(server.stderr.take().expect("piped"));
    let address = wait_for(&mut log, "listening", "grpc").expect("address");
    wait_for(&mut log, "ready", "");
    let (code, said) = verify(&["--connect".as_ref(), address.as_ref()]);
    assert_eq!(code, Some(0), "{said}");
    terminate(&server);
    server.wait().expect("ended");
    // What is no golden is a mistake, not a difference.
    let no_golden = warm().args(["verify", "--golden", "Cargo.toml"]).arg(member(0)).output().expect("ran");
    assert_eq!(no_golden.status.code(), Some(1));
}

/// Long enough that a signal comes while it is being scored.
fn long_request() -> wire::ScoreRequest {
    let ids = |i: u32| (0..200).map(|k| 10 + (i * 31 + k * 7) % 4000).collect();
    let sample = |i| wire::Sample { input: Some(Input::Tokens(wire::TokenIds { ids: ids(i) })) };
    wire::ScoreRequest { samples: (0..400).map(sample).collect(), ..Default::default() }
}

#[test]
fn what_is_in_flight_at_sigterm_is_answered_in_full() {
    let mut server = serve([Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/family/rm-0")]);
    let mut log = BufReader::new(server.stderr.take().expect("piped"));
    let (grpc, probes) = listening(&mut log);
    wait_for(&mut log, "ready", "");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let asked = runtime.spawn(async move { Client::connect(&grpc).await.expect("connected").score(long_request()).await });
    // Packs are being run for it, and not yet all of them.
    while !admin(&probes, "/metrics").contains("warm_scorer_in_flight_requests 1") {
        assert!(!asked.is_finished(), "answered before the signal");
    }
    terminate(&server);
    let response = runtime.block_on(asked).expect("no panic").expect("answered");
    let mut rest = String::new();
    log.read_to_string(&mut rest).expect("log");
    assert_eq!(server.wait().expect("ended").code(), Some(0), "{rest}");
    assert_eq!(response.scores.iter().filter(|score| score.reward.is_some()).count(), 400);
}

#[test]
fn mistakes_end_with_a_sentence_and_a_code() {
    for (arguments, words) in [
        (&["serve"][..], "expected checkpoint folders"),
        (&["serve", "/nowhere"], "/nowhere"),
        (&["check-config", "--listen", "nowhere"], "expected an address"),
        (&["score", "--connect", "127.0.0.1:1"], "no connection"),
        (&["demo", "--family", "/nowhere"], "--family DIR"),
    ] {
        let output = warm().args(arguments).output().expect("ran");
        let words_found = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {words_found}");
        assert!(words_found.contains(words), "{arguments:?}: {words_found}");
    }
    let unknown = warm().arg("check-config").env("WARM_LISEN", "x").output().expect("ran");
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("did you mean `WARM_LISTEN`"), "{unknown:?}");
}

#[test]
fn a_bench_that_is_interrupted_tells_what_it_has() {
    let mut server = serve(super::members());
    let mut log = BufReader::new(server.stderr.take().expect("piped"));
    let (grpc, probes) = listening(&mut log);
    wait_for(&mut log, "ready", "");
    let shape = ["--prompt-tokens", "8", "--completion-tokens", "4", "--group", "2", "--warmup", "0s", "--duration", "1h", "--json"];
    let bench = warm().args(["bench", "--addr", &grpc]).args(shape).spawn().expect("started");
    // It is under way, so it listens for signals, too. A second answer says that it has counted the first.
    let answered = |probes: &str| {
        let metrics = admin(probes, "/metrics");
        let count = metrics.lines().find_map(|line| line.strip_prefix("warm_serve_requests_total{code=\"OK\",rpc=\"Score\"} "));
        count.and_then(|count| count.trim().parse::<f64>().ok()).unwrap_or(0.0)
    };
    while answered(&probes) < 3.0 {
        std::thread::yield_now();
    }
    let killed = Command::new("kill").args(["-INT", &bench.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    let output = bench.wait_with_output().expect("ran");
    assert!(output.status.success(), "{output:?}");
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(told["stopped"], true, "{told}");
    assert!(told["requests"]["scored"].as_u64().is_some_and(|scored| scored > 0), "{told}");
    server.kill().expect("killed");
    server.wait().expect("ended");
}

#[test]
fn bench_counts_what_a_server_answers_over_calls_and_streams() {
    let mut server = serve(super::members());
    let mut log = BufReader::new(server.stderr.take().expect("piped"));
    let address = wait_for(&mut log, "listening", "grpc").expect("address");
    wait_for(&mut log, "ready", "");
    let load = |more: &[&str]| {
        let shape = ["--prompt-tokens", "8", "--completion-tokens", "2..4", "--group", "3", "--warmup", "0s", "--requests", "5", "--json"];
        let output = warm().args(["bench", "--addr", &address]).args(shape).args(more).output().expect("ran");
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON")
    };
    let closed = load(&[]);
    assert_eq!((&closed["samples"]["scored"], &closed["requests"]["good"]), (&15.into(), &5.into()), "{closed}");
    // The same requests have the same rewards, whatever way they take.
    for more in [&["--stream"][..], &["--rate", "1000"], &["--concurrency", "4", "--connections", "2"]] {
        assert_eq!(load(more)["reward_checksum"], closed["reward_checksum"], "{more:?}");
    }
    let table = warm()
        .args(["bench", "--addr", &address, "--requests", "1", "--prompt-tokens", "4", "--completion-tokens", "1"])
        .output()
        .expect("ran");
    assert!(String::from_utf8_lossy(&table.stdout).contains("reward checksum"), "{table:?}");
    let long = warm().args(["bench", "--addr", &address, "--prompt-tokens", "999999"]).output().expect("ran");
    assert!(String::from_utf8_lossy(&long.stderr).contains("the model takes at most"), "{long:?}");
    server.kill().expect("killed");
    server.wait().expect("ended");
}
