//! The binary, from its arguments to its exit code.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

fn warm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warm"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Reads the log until a line holds `words`; the value of its field `name`, if it has one.
fn wait_for(log: &mut impl BufRead, words: &str, name: &str) -> Option<String> {
    let mut line = String::new();
    while log.read_line(&mut line).expect("log") > 0 {
        if line.contains(words) {
            let value = line.split_once(&format!("{name}="))?.1;
            return Some(value.split_whitespace().next()?.to_owned());
        }
        line.clear();
    }
    panic!("the log ended before `{words}`");
}

fn serve() -> Child {
    let mut command = warm();
    command.args(["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain-delay", "0s"]);
    command.args(super::members()).spawn().expect("started")
}

#[test]
fn sigterm_drains_and_exits_with_zero_and_health_says_so_before() {
    let mut server = serve();
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

    let killed = Command::new("kill").args(["-TERM", &server.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    let mut rest = String::new();
    log.read_to_string(&mut rest).expect("log");
    assert_eq!(server.wait().expect("ended").code(), Some(0), "{rest}");
    assert!(rest.contains("stopped"), "{rest}");
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
